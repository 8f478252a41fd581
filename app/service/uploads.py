"""Uploads: announced with names and sizes, received file by file, then looked at and recognised."""

from __future__ import annotations

import os
import secrets
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final, cast

from anyio import to_thread
from sqlalchemy import func, select

from app.service.accounts import Account
from app.service.answers import (
    FolderRequest,
    RecognisedCase,
    SentFile,
    UploadAnswer,
    UploadRequest,
    UploadState,
    moment,
)
from app.service.archive import OVER_THE_LIMIT
from app.service.database import Database, is_full
from app.service.intake import look_at
from app.service.refusals import RefusedError, no_room, not_found
from app.service.settings import ServiceSettings
from app.service.tables import Event, Job, Upload
from data.errors import DataError
from data.filesystem import sync_folder

#: Uploads that are checked in parallel.
_LOOKS: Final = 2
_BLOCK_BYTES: Final = 1 << 20
#: Bytes of a file between two checks of the space on the disk.
_ROOM_BYTES: Final = 64 << 20
#: States of an upload that has been checked.
_CHECKED: Final = ("ready", "refused")
#: Most files of a folder on the server.
_MOST_IN_FOLDER: Final = 20_000


@dataclass(kw_only=True)
class Uploads:
    """The uploads of all users."""

    settings: ServiceSettings
    database: Database
    _looking: set[str] = field(default_factory=set, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def announce(self, account: Account, request: UploadRequest) -> UploadAnswer:
        """Create an upload whose files are still to be received.

        Raises:
            RefusedError: it is too large, the user has too many uploads, or the disk is full.
        """
        largest, total = max(one.bytes for one in request.files), sum(one.bytes for one in request.files)
        for size, most, what in (
            (largest, self.settings.most_file_bytes, "file"),
            (total, self.settings.most_upload_bytes, "upload"),
        ):
            if size > most:
                raise RefusedError(
                    413, f"A{'n' * (what == 'upload')} {what} has {size / 1e9:.3g} GB; {most / 1e9:g} GB are allowed."
                )
        self._require_room(total)
        return self._created(account, [one.model_dump(mode="json") for one in request.files])

    def from_folder(self, account: Account, request: FolderRequest) -> UploadAnswer:
        """Copy a folder below the inbox to a new upload, and check it, unless too many uploads are being checked.

        Raises:
            RefusedError: no inbox is allowed, the folder is not below it, it is empty or too large; or as raised by
                :meth:`complete`.
        """
        paths = self._in_inbox(request.folder)
        files: list[dict[str, Any]] = [
            {"name": name, "bytes": path.stat().st_size, "contrast": None} for name, path in paths.items()
        ]
        total = sum(path.stat().st_size for path in paths.values())
        if total > self.settings.most_upload_bytes:
            raise RefusedError(
                413, f"The folder has {total / 1e9:.3g} GB; {self.settings.most_upload_bytes / 1e9:g} GB are allowed."
            )
        self._require_room(total)
        made = self._created(account, files)
        place = self.settings.place.received(made.id)
        try:
            for number, path in enumerate(paths.values()):
                self._require_room(path.stat().st_size)
                shutil.copyfile(path, place / f"{number:05}", follow_symlinks=False)
            return self.complete(account, made.id)
        except RefusedError as error:
            if error.status == 429:  # nothing has to be copied again: the client completes the upload later
                return self.read(account, made.id)
            self.delete(account, made.id)
            raise
        except OSError as error:
            self.delete(account, made.id)
            raise no_room() if is_full(error) else RefusedError(409, "A file of the folder cannot be read.") from error

    async def receive(self, account: Account, upload: str, number: int, body: AsyncIterator[bytes]) -> None:
        """Write a file of an upload to the disk as it arrives; it counts as received once it is complete.

        Raises:
            RefusedError: there is no such file, it has another size than announced, or the disk is full.
        """
        expected = await to_thread.run_sync(self._expected_bytes, account, upload, number)
        await to_thread.run_sync(self._require_room, expected)
        partial = self.settings.place.received(upload) / f".partial-{secrets.token_hex(8)}"
        try:
            await _write(partial, body, expected, require_room=lambda: self._require_room(0))
            await to_thread.run_sync(self._finish, account, upload, number, partial)
        except OSError as error:
            if is_full(error):
                raise no_room() from error
            if isinstance(error, FileNotFoundError):
                raise not_found("upload") from error
            raise
        finally:
            partial.unlink(missing_ok=True)

    def complete(self, account: Account, upload: str) -> UploadAnswer:
        """Check an upload whose files have all arrived, and recognise its cases; repeating it changes nothing.

        Raises:
            RefusedError: there is no such upload, a file is missing, or too many uploads are being checked.
        """
        row = self._row(account, upload)
        if row.state in _CHECKED:
            return self._answer(row)
        place = self.settings.place
        missing = [
            number for number in range(len(row.files)) if not (place.received(upload) / f"{number:05}").is_file()
        ]
        if missing and self._row(account, upload).state == "receiving":
            raise RefusedError(
                409, f"{len(missing)} of {len(row.files)} files have not arrived: number {missing[0]} is the first."
            )
        # Requests do not wait for their turn, since a few that did would keep all others from being answered.
        with self._lock:
            if upload in self._looking or len(self._looking) >= _LOOKS:
                raise RefusedError(429, "The server is busy checking other uploads. Try again.", retry_seconds=2)
            self._looking.add(upload)
        try:
            row = self._row(account, upload)
            if row.state in _CHECKED:  # by a request that has ended since; jobs may use its cases already
                return self._answer(row)
            self._set(upload, "checking")
            return self._looked_at(account, upload, row)
        finally:
            with self._lock:
                self._looking.discard(upload)

    def read(self, account: Account, upload: str) -> UploadAnswer:
        """Return an upload.

        Raises:
            RefusedError: there is no such upload, or it belongs to another user.
        """
        return self._answer(self._row(account, upload))

    def delete(self, account: Account, upload: str) -> None:
        """Mark an upload that no job uses as deleted.

        Raises:
            RefusedError: there is no such upload, it is being checked, or a job uses it.
        """
        self._row(account, upload)
        with self.database.writing() as session:
            row = session.get(Upload, upload, with_for_update=True)
            if session.scalar(select(Job.id).where(Job.upload_id == upload, Job.deleted.is_(False)).limit(1)):
                raise RefusedError(409, "A job uses this upload; it is deleted with the job.")
            if row is not None:
                if upload in self._looking:
                    raise RefusedError(409, "The upload is being checked. Delete it afterwards.")
                row.deleted = True
                session.add(Event(at=time.time(), user=account.name, action="upload deleted", what=upload))

    def interrupted(self) -> None:
        """After a start: uploads that a stopped service was checking can be completed again."""
        with self.database.writing() as session:
            for row in session.scalars(select(Upload).where(Upload.state == "checking")):
                row.state = "receiving"

    def _created(self, account: Account, files: list[dict[str, Any]]) -> UploadAnswer:
        row = Upload(
            id=uuid.uuid4().hex,
            user_id=account.id,
            created=time.time(),
            state="receiving",
            files=files,
            cases=[],
            message="",
            deleted=False,
        )
        used = select(Job.upload_id).where(Job.upload_id == Upload.id).exists()
        with self.database.writing() as session:
            waiting = select(func.count()).select_from(Upload)
            waiting = waiting.where(Upload.user_id == account.id, Upload.deleted.is_(False), ~used)
            waiting = waiting.where(Upload.state != "refused")
            if (session.scalar(waiting) or 0) >= self.settings.most_uploads_per_user:
                raise RefusedError(
                    429, "You have too many uploads without a job. Delete one, or start its jobs.", retry_seconds=60
                )
            session.add(row)
            session.add(Event(at=row.created, user=account.name, action="upload", what=row.id))
        # The row comes first, so that a folder without one is always a remainder.
        self.settings.place.received(row.id).mkdir(parents=True, mode=0o700)
        return self._answer(row)

    def _looked_at(self, account: Account, upload: str, row: Upload) -> UploadAnswer:
        folder = self.settings.place.upload(upload)
        most = self.settings.most_upload_bytes
        room = shutil.disk_usage(self.settings.place.root).free - self.settings.reserve_bytes
        try:
            cases = look_at(folder, row.files, min(most, max(room, 0)))
        except DataError as error:
            if room < most and str(error).startswith(OVER_THE_LIMIT):
                self._set(upload, "receiving")
                raise no_room() from error
            self._set(upload, "refused", message=str(error))
            shutil.rmtree(folder, ignore_errors=True)
            return self.read(account, upload)
        except OSError as error:
            self._set(upload, "receiving")
            raise no_room() if is_full(error) else error from error
        self._set(upload, "ready", cases=cases)
        if not any(case["dicom"] for case in cases):  # a study is needed again for a DICOM segmentation
            for part in ("received", "unpacked"):
                shutil.rmtree(folder / part, ignore_errors=True)
        return self.read(account, upload)

    def _set(self, upload: str, state: str, *, message: str = "", cases: list[dict[str, Any]] | None = None) -> None:
        with self.database.writing() as session:
            row = session.get(Upload, upload, with_for_update=True)
            if row is None or row.deleted:
                raise not_found("upload")
            row.state, row.message, row.cases = state, message, cases or []

    def _row(self, account: Account, upload: str) -> Upload:
        with self.database.reading() as session:
            row = session.get(Upload, upload)
            if row is None or row.deleted or (row.user_id != account.id and not account.is_admin):
                raise not_found("upload")
            return row

    def _expected_bytes(self, account: Account, upload: str, number: int) -> int:
        row = self._row(account, upload)
        if row.state != "receiving":
            raise RefusedError(409, "The upload is complete; its files cannot be changed.")
        if number >= len(row.files):
            raise not_found("file")
        return int(row.files[number]["bytes"])

    def _finish(self, account: Account, upload: str, number: int, partial: Path) -> None:
        """Give a complete file its name, unless its upload has been completed while it arrived."""
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        place = partial.with_name(f"{number:05}")
        with self._lock:
            if upload in self._looking:
                raise RefusedError(409, "The upload is being checked; its files cannot be changed.")
            self._expected_bytes(account, upload, number)
            partial.replace(place)
        sync_folder(place.parent)

    def _require_room(self, needed: int) -> None:
        if shutil.disk_usage(self.settings.place.root).free < needed + self.settings.reserve_bytes:
            raise no_room()

    def _in_inbox(self, folder: str) -> dict[str, Path]:
        """Return the files of a folder below the inbox by their names in it; links are not followed."""
        if self.settings.inbox is None:
            raise RefusedError(403, "This service reads no folders of the server. Its administrator may allow one.")
        inbox = self.settings.inbox.resolve()
        place = Path(os.path.realpath(inbox / folder.lstrip("/")))
        if not place.is_relative_to(inbox) or not place.is_dir():
            raise not_found("folder")
        found: dict[str, Path] = {}
        for parent, folders, names in os.walk(place, followlinks=False):
            folders.sort()
            for name in sorted(names):
                path = Path(parent) / name
                shown = str(path.relative_to(place))
                if path.is_file() and not path.is_symlink() and shown.isprintable():
                    found[shown] = path
                if len(found) > _MOST_IN_FOLDER:
                    raise RefusedError(413, f"The folder has more than {_MOST_IN_FOLDER} files.")
        if not found:
            raise RefusedError(422, "The folder has no files.")
        return found

    def _answer(self, row: Upload) -> UploadAnswer:
        place = self.settings.place.received(row.id)
        arrived = row.state in ("checking", "ready")
        return UploadAnswer(
            id=row.id,
            state=cast("UploadState", row.state),
            created=moment(row.created),
            files=[
                SentFile(
                    number=number,
                    name=one["name"],
                    bytes=one["bytes"],
                    received=arrived or (place / f"{number:05}").is_file(),
                )
                for number, one in enumerate(row.files)
            ],
            cases=[recognised(number, case) for number, case in enumerate(row.cases)],
            message=row.message,
        )


def recognised(number: int, case: dict[str, Any]) -> RecognisedCase:
    """Return what the intake found out about a case, without paths."""
    shown = {key: case[key] for key in ("name", "missing", "problems", "warnings", "notes", "dicom")}
    return RecognisedCase.model_validate({"number": number, "contrasts": case["files"], **shown})


async def _write(partial: Path, body: AsyncIterator[bytes], expected: int, *, require_room: Callable[[], None]) -> None:
    """Write a body of exactly the expected size; only one block of it is in memory."""
    received, block, room_asked_at = 0, bytearray(), 0
    with await to_thread.run_sync(lambda: partial.open("xb")) as file:
        async for chunk in body:
            received += len(chunk)
            if received > expected:
                raise RefusedError(413, f"The file is larger than the {expected} bytes that were announced.")
            block += chunk
            if len(block) >= _BLOCK_BYTES:
                await to_thread.run_sync(file.write, bytes(block))
                block.clear()
                if received - room_asked_at >= _ROOM_BYTES:
                    room_asked_at = received
                    await to_thread.run_sync(require_room)
        await to_thread.run_sync(file.write, bytes(block))
    if received < expected:
        raise RefusedError(400, f"{received} bytes arrived, but {expected} were announced. Send the file again.")
