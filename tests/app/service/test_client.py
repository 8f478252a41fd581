"""The client: it resumes what was interrupted, waits for a server that restarts, and repeats nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from app.errors import ConfigError, RunError
from app.service.accounts import Account
from app.service.answers import JobRequest
from app.service.client import RemoteService
from app.service.service import Service
from app.service.tables import Job, Upload


@pytest.fixture
def remote(live_port: int, service: Service) -> RemoteService:
    """A client of a service without workers, with a token of ann; it does not sleep."""
    return RemoteService(
        url=f"http://127.0.0.1:{live_port}", token=service.accounts.add_token("ann"), pause=lambda _: None
    )


@pytest.fixture
def files(phantoms: Path) -> list[tuple[str, Path, str | None]]:
    case = sorted(phantoms.iterdir())[0]
    return [(path.name, path, None) for path in sorted(case.glob("*.nii.gz")) if "seg" not in path.name]


def test_an_interrupted_submission_continues_and_starts_one_job(
    remote: RemoteService, service: Service, files: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, sent = tmp_path / "state.json", []
    real = RemoteService._send

    def send(self: RemoteService, upload: str, number: int, path: Path) -> None:
        sent.append(number)
        if sent == [0, 1, 2]:
            raise KeyboardInterrupt
        real(self, upload, number, path)

    monkeypatch.setattr(RemoteService, "_send", send)
    with pytest.raises(KeyboardInterrupt):
        remote.submit(files, {"options": {}}, state)
    jobs = remote.submit(files, {"options": {}}, state)
    assert sent == [0, 1, 2, 2, 3]
    assert len(jobs) == 1
    assert not state.exists()
    with service.database.reading() as session:
        assert (session.query(Upload).count(), session.query(Job).count()) == (1, 1)


def test_files_that_are_not_images_are_refused_with_the_servers_reason(remote: RemoteService, tmp_path: Path) -> None:
    from data.errors import DataError

    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(DataError, match="no image was found"):
        remote.submit([("readme.txt", tmp_path / "readme.txt", None)], {}, tmp_path / "state.json")
    assert not (tmp_path / "state.json").exists()


@pytest.fixture
def done(service: Service, accounts: dict[str, Account], ready_upload: Callable[..., str]) -> str:
    """A job that is done, with a label map of ten bytes."""
    import hashlib

    ann = accounts["ann"]
    job = service.jobs.submit(ann, JobRequest(upload=ready_upload(ann)), None)[0].id
    place = service.settings.place.job(job)
    (place / "output").mkdir(parents=True)
    (place / "output" / "case.nii.gz").write_bytes(b"0123456789")
    file = {"name": "label_map", "file": "output/case.nii.gz", "media_type": "application/gzip", "bytes": 10}
    file["sha256"] = hashlib.sha256(b"0123456789").hexdigest()
    with service.database.writing() as session:
        row = session.get(Job, job)
        assert row is not None
        row.state, row.ended, row.result = "done", 1.0, {"volumes_ml": {}, "flags": [], "files": [file]}
    return job


def test_a_download_resumes_and_is_not_repeated(remote: RemoteService, done: str, tmp_path: Path) -> None:
    from data.files import partial_prefix

    folder = tmp_path / "out"
    folder.mkdir()
    place, partial = folder / "a.nii.gz", folder / f"{partial_prefix(0)}{done}-label_map"
    partial.write_bytes(b"0123")
    assert remote.fetch(done, "label_map", place)
    assert place.read_bytes() == b"0123456789"
    assert not remote.fetch(done, "label_map", place)
    assert list(folder.iterdir()) == [place]


def test_a_damaged_partial_download_is_discarded(remote: RemoteService, done: str, tmp_path: Path) -> None:
    from data.files import partial_prefix

    (tmp_path / f"{partial_prefix(0)}{done}-label_map").write_bytes(b"oops")
    with pytest.raises(RunError, match="arrived damaged"):
        remote.fetch(done, "label_map", tmp_path / "a.nii.gz")
    assert remote.fetch(done, "label_map", tmp_path / "a.nii.gz")


def test_all_jobs_are_listed_and_finished_ones_are_not_waited_for(remote: RemoteService, done: str) -> None:
    assert [job["id"] for job in remote.jobs()] == [done]
    seen: list[str] = []
    remote.watch([done], lambda job: seen.append(job["state"]))
    assert seen == ["done"]


def test_an_unavailable_server_is_retried(live_port: int, service: Service) -> None:
    waited: list[float] = []
    away = RemoteService(url="http://127.0.0.1:9", token="zns_x", pause=waited.append)
    with pytest.raises(OSError, match="cannot be reached"):
        away.job("0" * 32)
    assert waited == [1, 2, 4, 8, 16, 32, 64]


def answers_of(monkeypatch: pytest.MonkeyPatch, status: Callable[[int], int], **headers: str) -> list[float]:
    """Let a server answer the n-th request with a status; returns the pauses of its client, to be filled."""
    waited: list[float] = []

    def once(*_: object) -> requests.Response:
        answer = requests.Response()
        answer.status_code, answer._content = status(len(waited)), b'{"detail": "busy"}'
        answer.headers.update(headers)
        return answer

    monkeypatch.setattr(RemoteService, "_once", once)
    return waited


def test_a_busy_server_is_retried_after_the_delay_it_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = answers_of(monkeypatch, lambda asked: 429 if asked < 12 else 200, **{"retry-after": "2"})
    assert RemoteService(url="http://a", token="x", pause=waited.append).job("0") == {"detail": "busy"}
    assert waited == [2.0] * 12


def test_retries_stop_after_half_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = answers_of(monkeypatch, lambda _: 503)
    with pytest.raises(RunError, match="busy"):
        RemoteService(url="http://a", token="x", pause=waited.append).job("0")
    assert waited[:8] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert 1800 <= sum(waited) < 1900


def test_a_wrong_token_and_a_wrong_address_are_reported(live_port: int) -> None:
    with pytest.raises(RunError, match="The token is not valid"):
        RemoteService(url=f"http://127.0.0.1:{live_port}", token="x").job("0" * 32)
    for url in (
        "127.0.0.1:8000",
        "ftp://a",
        "http://user:secret@a",
        "http://[::1",
        "http://:80",
        "http://a:x",
        "http://*",
    ):
        with pytest.raises(ConfigError, match="not the address of a service"):
            RemoteService(url=url, token="x")


def test_the_commands_need_a_token(znormseg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZNORMSEG_TOKEN", raising=False)
    ended = znormseg("remote", "status", "http://127.0.0.1:9")
    assert (ended.code, ended.err) == (4, "znormseg: no token: set ZNORMSEG_TOKEN, or give --token-file FILE\n")


def test_the_commands_list_and_fetch(
    znormseg: Callable[..., Any], remote: RemoteService, done: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZNORMSEG_TOKEN", remote.token)
    listed = znormseg("remote", "status", remote.url)
    assert listed.code == 0, listed.err
    assert f"{done}   done" in listed.out
    fetched = znormseg("remote", "fetch", remote.url, done, tmp_path / "out")
    assert fetched.code == 0, fetched.err
    assert (tmp_path / "out" / f"{done}.nii.gz").read_bytes() == b"0123456789"


@pytest.mark.parametrize("text", [b"", b"two words", b"two\nlines", b"\xff\xfe"])
def test_a_token_file_without_a_token_is_refused(znormseg: Callable[..., Any], tmp_path: Path, text: bytes) -> None:
    (tmp_path / "token").write_bytes(text)
    ended = znormseg("remote", "status", "http://127.0.0.1:9", "--token-file", tmp_path / "token")
    assert ended.code == 4, ended.err
    assert "token" in ended.err


def test_the_first_failure_of_a_request_is_reported() -> None:
    waits: list[str] = []
    away = RemoteService(url="http://127.0.0.1:9", token="x", pause=lambda _: None, on_wait=waits.append)
    with pytest.raises(OSError, match="cannot be reached"):
        away.job("0" * 32)
    assert waits == ["http://127.0.0.1:9: cannot be reached: ConnectionError. Trying again."]


def test_the_api_works_with_a_trusted_certificate(
    tls_port: int, service: Service, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate / "cert.pem"))
    remote = RemoteService(url=f"https://127.0.0.1:{tls_port}", token=service.accounts.add_token("ann"))
    assert list(remote.jobs()) == []


def test_tls_errors_are_reported_immediately(tls_port: int, live_port: int) -> None:
    def pause(_: float) -> None:
        raise AssertionError("repeated")

    for port, words in ((tls_port, "certificate is not trusted"), (live_port, "does not speak TLS")):
        with pytest.raises(OSError, match=words):
            RemoteService(url=f"https://127.0.0.1:{port}", token="x", pause=pause).job("0" * 32)


def test_without_a_home_folder_a_submission_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.cli.remote import _state_file

    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert _state_file("http://a", []) is None


def test_the_working_folder_is_submitted_under_its_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from app.cli.remote import _of_folder

    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "a_t1.nii.gz").write_bytes(b"x")
    monkeypatch.chdir(tmp_path / "case")
    assert [name for name, _, _ in _of_folder(Path())] == ["case/a_t1.nii.gz"]
