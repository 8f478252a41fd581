"""Jobs and their deletion, without workers."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from app.service.accounts import Account
from app.service.answers import JobRequest
from app.service.refusals import RefusedError
from app.service.service import Service
from app.service.tables import Job, Upload

API = "/api/v1"
Accounts = dict[str, Account]
Ready = Callable[..., str]
Token = Callable[[str], dict[str, str]]


def submitted(service: Service, account: Account, upload: str, key: str | None = None, **request: Any) -> list[str]:
    """Ids of new jobs."""
    return [job.id for job in service.jobs.submit(account, JobRequest(upload=upload, **request), key)]


def end(service: Service, job: str, state: str, *, ago: float = 0.0) -> None:
    """End a job as the dispatcher would."""
    place = service.settings.place.job(job) / "output"
    place.mkdir(parents=True)
    (place / "case.nii.gz").write_bytes(b"0123456789")
    file = {"name": "label_map", "file": "output/case.nii.gz", "media_type": "application/gzip"}
    with service.database.writing() as session:
        row = session.get(Job, job)
        assert row is not None
        row.state, row.ended = state, time.time() - ago
        row.result = {"volumes_ml": {"WT": 1.0}, "flags": [], "files": [{**file, "bytes": 10, "sha256": "ab" * 32}]}


def test_each_case_of_an_upload_becomes_a_job_queued_in_order(
    service: Service, accounts: Accounts, ready_upload: Ready
) -> None:
    jobs = submitted(service, accounts["ann"], ready_upload(accounts["ann"], cases=3))
    assert [service.jobs.read(accounts["ann"], job).place for job in jobs] == [1, 2, 3]


def test_higher_priorities_run_first(service: Service, accounts: Accounts, ready_upload: Ready) -> None:
    eve = accounts["eve"]
    upload = ready_upload(eve)
    jobs = {priority: submitted(service, eve, upload, priority=priority)[0] for priority in ("low", "normal", "high")}
    places = {priority: service.jobs.read(eve, job).place for priority, job in jobs.items()}
    assert places == {"high": 1, "normal": 2, "low": 3}


def test_an_idempotency_key_returns_the_same_jobs_and_is_refused_for_another_request(
    service: Service, accounts: Accounts, ready_upload: Ready
) -> None:
    ann, upload = accounts["ann"], ready_upload(accounts["ann"])
    assert submitted(service, ann, upload, "key") == submitted(service, ann, upload, "key")
    assert len(service.jobs.listed(ann).jobs) == 1
    with pytest.raises(RefusedError, match="used for another request"):
        submitted(service, ann, upload, "key", priority="low")


def test_an_idempotency_key_belongs_to_its_user(service: Service, accounts: Accounts, ready_upload: Ready) -> None:
    jobs = [submitted(service, accounts[name], ready_upload(accounts[name]), "key")[0] for name in ("ann", "ben")]
    assert jobs[0] != jobs[1]


@pytest.mark.parametrize("limit", ["most_queued", "most_queued_per_user"])
def test_a_full_queue_gives_429_with_retry_after(
    service: Service, accounts: Accounts, ready_upload: Ready, limit: str
) -> None:
    object.__setattr__(service.settings, limit, 2)
    upload = ready_upload(accounts["ann"], cases=2)
    submitted(service, accounts["ann"], upload)
    with pytest.raises(RefusedError, match="queue is full: 2 of 2") as refused:
        submitted(service, accounts["ann"], upload, cases=[0])
    assert (refused.value.status, refused.value.retry_seconds) == (429, 60)


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"model": "other"}, "There is no model other"),
        ({"cases": [7]}, "there is no 7"),
        ({"upload": "0" * 32}, "no such upload"),
    ],
)
def test_a_request_that_matches_nothing_is_refused(
    service: Service, accounts: Accounts, ready_upload: Ready, request_: dict[str, Any], says: str
) -> None:
    with pytest.raises(RefusedError, match=says):
        submitted(service, accounts["ann"], **{"upload": ready_upload(accounts["ann"]), **request_})


def test_a_case_with_problems_gets_no_job(service: Service, accounts: Accounts, ready_upload: Ready) -> None:
    upload = ready_upload(accounts["ann"], problems=("two files for t1.",))
    with pytest.raises(RefusedError, match="two files for t1"):
        submitted(service, accounts["ann"], upload)


def test_the_list_is_paginated_newest_first(
    service: Service, accounts: Accounts, ready_upload: Ready, client: TestClient, token: Token
) -> None:
    jobs = submitted(service, accounts["ann"], ready_upload(accounts["ann"], cases=5))
    header, seen = token("ann"), []
    after: dict[str, str] = {}
    while True:
        part = client.get(f"{API}/jobs", headers=header, params={"limit": "2", **after}).json()
        seen += [job["id"] for job in part["jobs"]]
        if part["next"] is None:
            break
        after = {"after": part["next"]}
    assert seen == jobs[::-1]


def test_a_cancelled_job_can_be_repeated_and_a_finished_one_cannot(
    service: Service, accounts: Accounts, ready_upload: Ready
) -> None:
    ann = accounts["ann"]
    first, second = submitted(service, ann, ready_upload(ann, cases=2))
    assert service.jobs.cancel(ann, first).state == "cancelled"
    assert service.jobs.retry(ann, first).place == 2
    end(service, second, "done")
    with pytest.raises(RefusedError, match="only a failed or cancelled job"):
        service.jobs.retry(ann, second)
    with pytest.raises(RefusedError, match="only a queued or running job"):
        service.jobs.cancel(ann, second)


def test_an_unchanged_job_gives_304(
    service: Service, accounts: Accounts, ready_upload: Ready, client: TestClient, token: Token
) -> None:
    (job,) = submitted(service, accounts["ann"], ready_upload(accounts["ann"]))
    header = token("ann")
    tag = client.get(f"{API}/jobs/{job}", headers=header).headers["etag"]
    assert client.get(f"{API}/jobs/{job}", headers={**header, "If-None-Match": tag}).status_code == 304
    service.jobs.cancel(accounts["ann"], job)
    assert client.get(f"{API}/jobs/{job}", headers={**header, "If-None-Match": tag}).status_code == 200


def test_a_download_supports_ranges_and_has_an_etag_and_the_name_of_the_case(
    service: Service, accounts: Accounts, ready_upload: Ready, client: TestClient, token: Token
) -> None:
    (job,) = submitted(service, accounts["ann"], ready_upload(accounts["ann"], name="Doe Ján\n"))
    end(service, job, "done")
    header, path = token("ann"), f"{API}/jobs/{job}/results/label_map"
    whole = client.get(path, headers=header)
    assert "filename*=UTF-8''Doe%20J%C3%A1n%0A.nii.gz" in whole.headers["content-disposition"]
    part = client.get(path, headers={**header, "Range": "bytes=4-"})
    assert (part.status_code, part.content) == (206, b"456789")
    same = {**header, "If-None-Match": whole.headers["etag"]}
    assert client.get(path, headers=same).status_code == 304
    assert client.get(path, headers={**header, "Range": "bytes=99-"}).status_code == 416


def test_events_report_each_change_after_the_given_one(
    service: Service, accounts: Accounts, ready_upload: Ready, client: TestClient, token: Token
) -> None:
    ann = accounts["ann"]
    before = service.jobs.last_change()
    (job,) = submitted(service, ann, ready_upload(ann))
    service.jobs.cancel(ann, job)
    headers = {**token("ann"), "Last-Event-ID": str(before)}
    text = client.get(f"{API}/events?seconds=0", headers=headers).text
    assert f"id: {service.jobs.last_change()}\nevent: jobs\n" in text
    assert '"state": "cancelled"' in text
    others = client.get(f"{API}/events?seconds=0", headers={**token("ben"), "Last-Event-ID": "0"}).text
    assert "event: jobs" not in others


# ---- deletion


def files_of(service: Service) -> list[Path]:
    place = service.settings.place
    return [path for folder in (place.uploads, place.jobs) for path in folder.rglob("*") if path.is_file()]


def test_deleting_a_job_leaves_nothing_of_it(service: Service, accounts: Accounts, ready_upload: Ready) -> None:
    ann = accounts["ann"]
    (job,) = submitted(service, ann, ready_upload(ann, name="Doe_Jane_1964"), "key")
    end(service, job, "done")
    assert service.jobs.mark_deleted(ann, job)
    service.removal.finish()
    assert files_of(service) == []
    everything = [path.read_bytes() for path in service.settings.place.root.rglob("*") if path.is_file()]
    assert not any(b"Doe_Jane" in content for content in everything)
    with service.database.reading() as session:
        assert session.query(Job).count() == session.query(Upload).count() == 0


def test_images_are_deleted_with_the_last_job_of_their_upload(
    service: Service, accounts: Accounts, ready_upload: Ready
) -> None:
    ann = accounts["ann"]
    first, second = submitted(service, ann, ready_upload(ann, cases=2))
    for job, left in ((first, 1), (second, 0)):
        service.jobs.mark_deleted(ann, job)
        service.removal.finish()
        assert len(files_of(service)) == left


def test_a_running_job_is_deleted_after_its_worker_has_stopped(
    service: Service, accounts: Accounts, ready_upload: Ready
) -> None:
    ann = accounts["ann"]
    (job,) = submitted(service, ann, ready_upload(ann))
    with service.database.writing() as session:
        row = session.get(Job, job)
        assert row is not None
        row.state = "running"
    assert not service.jobs.mark_deleted(ann, job)
    service.removal.finish()
    assert len(files_of(service)) == 1
    service.dispatcher._recover()
    service.removal.finish()
    assert files_of(service) == []


def test_finished_jobs_and_unused_uploads_are_deleted_by_age(
    service: Service, accounts: Accounts, ready_upload: Ready
) -> None:
    ann, day = accounts["ann"], 86400.0
    old, new = submitted(service, ann, ready_upload(ann, cases=2))
    end(service, old, "done", ago=7.1 * day)
    end(service, new, "failed", ago=6.9 * day)
    ready_upload(ann)
    service.removal.by_age()
    assert [job.id for job in service.jobs.listed(ann).jobs] == [new]
    assert len(files_of(service)) == 3
    service.removal.now = lambda: time.time() + 2 * day
    service.removal.by_age()
    assert files_of(service) == []


def test_orphaned_files_of_a_killed_service_are_removed_at_startup(
    service: Service, accounts: Accounts, ready_upload: Ready
) -> None:
    kept = ready_upload(accounts["ann"])
    place = service.settings.place
    for folder in (place.upload("1" * 32), place.job("2" * 32)):
        (folder / "received").mkdir(parents=True)  # an upload and a job that no row knows
    partial = place.received(kept)
    partial.mkdir()
    (partial / ".partial-0").touch()
    service.removal.partial_files()
    service.removal.remainders()
    assert [path.name for path in place.uploads.iterdir()] == [kept]
    assert list(place.jobs.iterdir()) == []
    assert list(partial.iterdir()) == []


def test_an_interrupted_deletion_is_finished_later(
    service: Service, accounts: Accounts, ready_upload: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = accounts["ann"]
    (job,) = submitted(service, ann, ready_upload(ann))
    service.jobs.mark_deleted(ann, job)
    with monkeypatch.context() as broken:
        broken.setattr("shutil.rmtree", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
        with pytest.raises(PermissionError):
            service.removal.finish()
    assert len(files_of(service)) == 1
    service.removal.finish()
    assert files_of(service) == []


def test_a_folder_that_cannot_be_removed_does_not_block_others_and_is_removed_later(
    *,
    service: Service,
    accounts: Accounts,
    ready_upload: Ready,
    client: TestClient,
    token: Token,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    uploads, remove = [ready_upload(accounts["ann"]) for _ in range(2)], shutil.rmtree
    service.uploads.delete(accounts["ann"], uploads[0])

    def some(folder: Path) -> None:
        if folder.name == uploads[0]:
            raise PermissionError(13, "no")
        remove(folder)

    monkeypatch.setattr(shutil, "rmtree", some)
    assert client.delete(f"{API}/uploads/{uploads[1]}", headers=token("ann")).status_code == 202
    assert [path.name for path in service.settings.place.uploads.iterdir()] == [uploads[0]]
    monkeypatch.setattr(shutil, "rmtree", remove)
    service.removal.finish()
    assert list(service.settings.place.uploads.iterdir()) == []


def test_the_log_records_who_did_what_without_case_names(
    service: Service, accounts: Accounts, ready_upload: Ready
) -> None:
    from app.service.tables import Event

    ann = accounts["ann"]
    (job,) = submitted(service, ann, ready_upload(ann, name="Doe_Jane"))
    service.jobs.cancel(ann, job)
    with service.database.reading() as session:
        events = [(one.user, one.action, one.what) for one in session.query(Event)]
    assert ("ann", "job cancelled", job) in events
    assert "Doe" not in str(events)


def test_every_operation_that_writes_documents_a_full_disk(routes: FastAPI) -> None:
    operations = [one for path in routes.openapi()["paths"].values() for one in path.items()]
    assert [one["description"] for method, one in operations if method != "get" and "507" not in one["responses"]] == []
