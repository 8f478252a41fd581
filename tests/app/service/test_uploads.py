"""Uploads: received file by file, resumed, looked at, and refused when there is no room."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from starlette.testclient import TestClient

from app.errors import ConfigError
from app.service.accounts import Account
from app.service.archive import checked_archive
from app.service.service import Service, create_service
from app.service.settings import ServiceSettings
from app.service.tables import Upload
from app.service.uploads import Uploads

API = "/api/v1"
Token = Callable[[str], dict[str, str]]


class Usage(NamedTuple):
    """As returned by shutil.disk_usage."""

    total: int
    used: int
    free: int


@pytest.fixture
def ann(token: Token) -> dict[str, str]:
    return token("ann")


def announced(client: TestClient, ann: dict[str, str], files: list[dict[str, Any]]) -> str:
    answer = client.post(f"{API}/uploads", headers=ann, json={"files": files})
    assert answer.status_code == 201, answer.text
    return str(answer.json()["id"])


def sent(client: TestClient, ann: dict[str, str], paths: list[Path], names: list[str] | None = None) -> Any:
    """Send files and complete the upload; returns the answer."""
    shown = names or [path.name for path in paths]
    files = [{"name": name, "bytes": path.stat().st_size} for name, path in zip(shown, paths, strict=True)]
    upload = announced(client, ann, files)
    for number, path in enumerate(paths):
        answer = client.put(f"{API}/uploads/{upload}/files/{number}", headers=ann, content=path.read_bytes())
        assert answer.status_code == 204, answer.text
    return client.post(f"{API}/uploads/{upload}/complete", headers=ann).json()


def images(case: Path) -> list[Path]:
    return [path for path in sorted(case.glob("*.nii.gz")) if "seg" not in path.name]


def test_an_interrupted_upload_reports_what_is_missing_and_resumes(client: TestClient, ann: dict[str, str]) -> None:
    upload = announced(client, ann, [{"name": f"a_{one}.nii", "bytes": 3} for one in ("t1", "t2")])
    path = f"{API}/uploads/{upload}"
    assert client.put(f"{path}/files/1", headers=ann, content=b"abc").status_code == 204
    assert client.put(f"{path}/files/0", headers=ann, content=b"ab").status_code == 400
    assert [file["received"] for file in client.get(path, headers=ann).json()["files"]] == [False, True]
    answer = client.post(f"{path}/complete", headers=ann)
    assert (answer.status_code, answer.json()["detail"][:23]) == (409, "1 of 2 files have not a")


def test_a_truncated_file_leaves_nothing(client: TestClient, ann: dict[str, str], service: Service) -> None:
    upload = announced(client, ann, [{"name": "a_t1.nii", "bytes": 10}])
    client.put(f"{API}/uploads/{upload}/files/0", headers=ann, content=b"half")
    assert list(service.settings.place.received(upload).iterdir()) == []


def test_without_disk_space_an_upload_is_refused_before_it_is_sent(
    client: TestClient, ann: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 95, 5))
    answer = client.post(f"{API}/uploads", headers=ann, json={"files": [{"name": "a_t1.nii", "bytes": 6}]})
    assert answer.status_code == 507
    assert int(answer.headers["retry-after"]) > 0


def test_a_disk_that_fills_up_during_an_upload_is_reported_and_the_upload_can_resume(
    client: TestClient, ann: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = announced(client, ann, [{"name": "a_t1.nii", "bytes": 3}])
    path = f"{API}/uploads/{upload}/files/0"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as short:
        short.setattr("os.fsync", full)
        assert client.put(path, headers=ann, content=b"abc").status_code == 507
    assert client.put(path, headers=ann, content=b"abc").status_code == 204


def test_too_many_unused_uploads_are_refused(client: TestClient, ann: dict[str, str], service: Service) -> None:
    object.__setattr__(service.settings, "most_uploads_per_user", 1)
    announced(client, ann, [{"name": "a_t1.nii", "bytes": 3}])
    answer = client.post(f"{API}/uploads", headers=ann, json={"files": [{"name": "a_t1.nii", "bytes": 3}]})
    assert answer.status_code == 429


def test_four_images_are_recognised_and_completing_again_changes_nothing(
    client: TestClient, ann: dict[str, str], phantoms: Path
) -> None:
    case = sorted(phantoms.iterdir())[0]
    answer = sent(client, ann, images(case))
    assert answer["state"] == "ready", answer
    (found,) = answer["cases"]
    assert (found["name"], sorted(found["contrasts"])) == (case.name, ["flair", "t1", "t1c", "t2"])
    assert (found["missing"], found["problems"]) == ([], [])
    assert client.post(f"{API}/uploads/{answer['id']}/complete", headers=ann).json() == answer


def test_the_cases_of_an_archive_are_recognised_and_the_archive_is_removed(
    client: TestClient, ann: dict[str, str], phantoms: Path, tmp_path: Path, service: Service
) -> None:
    archive = tmp_path / "cases.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for case in sorted(phantoms.iterdir())[:2]:
            for path in images(case):
                made.write(path, f"set/{case.name}/{path.name}")
    answer = sent(client, ann, [archive])
    assert [len(case["contrasts"]) for case in answer["cases"]] == [4, 4]
    folder = service.settings.place.upload(answer["id"])
    assert [path.name for path in folder.iterdir()] == ["cases"]


def test_a_refused_archive_leaves_nothing_on_the_disk(
    client: TestClient, ann: dict[str, str], tmp_path: Path, service: Service
) -> None:
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("../evil_t1.nii", b"x")
    answer = sent(client, ann, [archive])
    assert answer["state"] == "refused"
    assert "leads out" in answer["message"]
    assert not service.settings.place.upload(answer["id"]).exists()


def test_a_missing_contrast_is_asked_for(client: TestClient, ann: dict[str, str], phantoms: Path) -> None:
    paths = images(sorted(phantoms.iterdir())[0])
    answer = sent(client, ann, paths, ["x1.nii.gz", *[path.name for path in paths[1:]]])
    (found,) = answer["cases"]
    assert len(found["missing"]) == 1
    assert found["notes"][0].startswith("x1.nii.gz: not one of the four contrasts")


@pytest.mark.slow
def test_a_dicom_study_becomes_a_case_without_the_patients_name(
    client: TestClient, ann: dict[str, str], dicom_study: Path, tmp_path: Path
) -> None:
    archive = tmp_path / "study.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for path in dicom_study.rglob("*"):
            if path.is_file():
                made.write(path, path.relative_to(dicom_study))
    answer = sent(client, ann, [archive])
    assert answer["state"] == "ready", answer
    assert answer["cases"][0]["dicom"]
    assert "Mustermann" not in str(answer)


def test_a_folder_of_the_inbox_becomes_an_upload_without_following_links(
    client: TestClient, ann: dict[str, str], phantoms: Path, tmp_path: Path, service: Service
) -> None:
    case = sorted(phantoms.iterdir())[0]
    shutil.copytree(case, tmp_path / "inbox" / "one")
    (tmp_path / "inbox" / "one" / "passwd_t1.nii").symlink_to("/etc/passwd")
    object.__setattr__(service.settings, "inbox", tmp_path / "inbox")
    answer = client.post(f"{API}/uploads/from-folder", headers=ann, json={"folder": "one"})
    assert answer.status_code == 201, answer.text
    assert len(answer.json()["cases"][0]["contrasts"]) == 4
    assert "passwd" not in answer.text


def test_an_upload_checked_in_the_meantime_is_not_checked_again(
    service: Service, accounts: dict[str, Account], ready_upload: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, read, seen = ready_upload(accounts["ann"]), Uploads._row, []

    def row(self: Uploads, account: Account, upload: str) -> Upload:
        found = read(self, account, upload)
        seen.append(found.state)
        if len(seen) == 1:  # as it was before the request that ends meanwhile
            found.state = "receiving"
        return found

    monkeypatch.setattr(Uploads, "_row", row)
    assert service.uploads.complete(accounts["ann"], upload).state == "ready"
    assert (service.settings.place.cases(upload) / "00000" / "case_t1.nii.gz").is_file()


def test_a_file_that_completes_during_the_check_replaces_nothing(
    client: TestClient, ann: dict[str, str], service: Service
) -> None:
    upload = announced(client, ann, [{"name": "a_t1.nii", "bytes": 3}])
    path = f"{API}/uploads/{upload}/files/0"
    assert client.put(path, headers=ann, content=b"abc").status_code == 204
    service.uploads._looking.add(upload)
    assert client.put(path, headers=ann, content=b"xyz").status_code == 409
    received = service.settings.place.received(upload)
    assert {one.name: one.read_bytes() for one in received.iterdir()} == {"00000": b"abc"}


def test_an_upload_that_is_being_checked_is_not_deleted(
    client: TestClient, ann: dict[str, str], service: Service
) -> None:
    upload = announced(client, ann, [{"name": "a_t1.nii", "bytes": 3}])
    service.uploads._looking.add(upload)
    assert client.delete(f"{API}/uploads/{upload}", headers=ann).status_code == 409
    service.uploads._looking.clear()
    assert client.delete(f"{API}/uploads/{upload}", headers=ann).status_code == 204


def test_the_disk_reserve_is_kept_during_an_upload(
    client: TestClient, ann: dict[str, str], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = announced(client, ann, [{"name": "a_t1.nii", "bytes": 3}])
    object.__setattr__(service.settings, "reserve_bytes", 10)
    free = iter([13])
    monkeypatch.setattr("app.service.uploads._BLOCK_BYTES", 1)
    monkeypatch.setattr("app.service.uploads._ROOM_BYTES", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100, 0, next(free, 9)))
    assert client.put(f"{API}/uploads/{upload}/files/0", headers=ann, content=b"abc").status_code == 507
    assert list(service.settings.place.received(upload).iterdir()) == []


def test_an_archive_without_space_to_unpack_is_kept_until_space_is_available(
    client: TestClient, ann: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a_t1.nii", bytes(range(256)) * 40)
    content = (tmp_path / "x.zip").read_bytes()
    upload = announced(client, ann, [{"name": "x.zip", "bytes": len(content)}])
    client.put(f"{API}/uploads/{upload}/files/0", headers=ann, content=content)

    def look(folder: Path, files: object, most_bytes: int) -> list[Any]:
        with checked_archive(folder / "received" / "00000", most_bytes):
            return []

    monkeypatch.setattr("app.service.uploads.look_at", look)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**6, 0, 5000))
    assert client.post(f"{API}/uploads/{upload}/complete", headers=ann).status_code == 507
    assert client.get(f"{API}/uploads/{upload}", headers=ann).json()["state"] == "receiving"


@pytest.fixture
def inbox(tmp_path: Path, service: Service) -> Path:
    """A folder below which the service reads ``one``, with a file."""
    folder = tmp_path / "inbox"
    (folder / "one").mkdir(parents=True)
    (folder / "one" / "a_t1.nii").write_bytes(b"abc")
    object.__setattr__(service.settings, "inbox", folder)
    return folder


@pytest.mark.usefixtures("inbox")
def test_a_copied_folder_is_completed_later_if_the_service_is_busy(
    client: TestClient, ann: dict[str, str], service: Service
) -> None:
    service.uploads._looking |= {"1", "2"}
    answer = client.post(f"{API}/uploads/from-folder", headers=ann, json={"folder": "one"})
    assert (answer.status_code, answer.json()["state"]) == (201, "receiving")
    assert [file["received"] for file in answer.json()["files"]] == [True]


@pytest.mark.usefixtures("inbox")
def test_a_folder_that_cannot_be_copied_leaves_no_upload(
    client: TestClient, ann: dict[str, str], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "copyfile", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
    answer = client.post(f"{API}/uploads/from-folder", headers=ann, json={"folder": "one"})
    assert answer.status_code == 409
    service.removal.finish()
    assert list(service.settings.place.uploads.iterdir()) == []


@pytest.mark.parametrize("inbox", ["missing", ".", "service", "service/uploads"])
def test_an_inbox_that_shares_folders_with_the_data_folder_is_refused(
    settings: ServiceSettings, tmp_path: Path, inbox: str
) -> None:
    settings.place.create()
    with pytest.raises(ConfigError, match="--inbox"):
        create_service(replace(settings, inbox=tmp_path / inbox))
