"""Deletion: of what users delete, of what is too old, and of what a killed service left behind."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final

from sqlalchemy import delete, or_, select

from app.progress import LOG
from app.service.database import Database
from app.service.jobs import OPEN, note_change
from app.service.settings import ServiceSettings
from app.service.tables import BrowserSession, Event, Job, Submission, Upload

_DAY: Final = 86_400.0
#: Uploads without a job are deleted after this many seconds.
UNUSED_UPLOAD_SECONDS: Final = _DAY
#: Idempotency keys are remembered for this many seconds.
_KEY_SECONDS: Final = _DAY
#: Entries of the log of who did what are kept for this many seconds.
EVENT_SECONDS: Final = 365 * _DAY


@dataclass(kw_only=True)
class Removal:
    """Deletes jobs and uploads with all their files."""

    settings: ServiceSettings
    database: Database
    now: Callable[[], float] = time.time
    _lock: Lock = field(default_factory=Lock, repr=False)
    """Held while folders are removed, since two threads that remove the same one would fail."""

    def finish(self) -> None:
        """Remove everything that is marked as deleted: first files, then rows, so that a crash loses no trace of it.

        Raises:
            OSError: a folder cannot be removed; what is marked stays so.
        """
        with self._lock:
            self._finish()

    def _finish(self) -> None:
        with self.database.reading() as session:
            done = Job.deleted.is_(True), Job.state.not_in(OPEN)
            if not session.scalar(select(Job.id).where(*done).limit(1)) and not session.scalar(
                select(Upload.id).where(Upload.deleted.is_(True)).limit(1)
            ):
                return
        with self.database.writing() as session:
            jobs = session.scalars(select(Job.id).where(*done)).all()
            of_jobs = select(Job.upload_id).where(Job.id.in_(jobs))
            unused = ~select(Job.id).where(Job.upload_id == Upload.id, Job.id.not_in(jobs)).exists()
            going = or_(Upload.deleted.is_(True), Upload.id.in_(of_jobs))
            found = session.scalars(select(Upload).where(going, unused).with_for_update()).all()
            for upload in found:  # from now on, no job can use it
                upload.deleted = True
            uploads = [upload.id for upload in found]
        if not jobs and not uploads:
            return
        self._remove_folders([*map(self.settings.place.job, jobs), *map(self.settings.place.upload, uploads)])
        with self.database.writing() as session:
            session.execute(delete(Job).where(Job.id.in_(jobs)))
            session.execute(delete(Upload).where(Upload.id.in_(uploads)))
        self.database.forget()

    def by_age(self) -> None:
        """Mark what is too old as deleted, and forget old sessions, keys and log entries."""
        now = self.now()
        with self.database.writing() as session:
            old = Job.ended < now - self.settings.keep_days * _DAY
            ended = select(Job).where(old, Job.state.not_in(OPEN), Job.deleted.is_(False))
            for job in session.scalars(ended.with_for_update()).all():
                job.deleted = True
                note_change(session, job)
                session.add(Event(at=now, user="service", action="job too old", what=job.id))
            used = select(Job.id).where(Job.upload_id == Upload.id).exists()
            unused = select(Upload).where(Upload.created < now - UNUSED_UPLOAD_SECONDS, ~used)
            for upload in session.scalars(unused.where(Upload.deleted.is_(False), Upload.state != "checking")):
                upload.deleted = True
                session.add(Event(at=now, user="service", action="upload too old", what=upload.id))
            session.execute(delete(BrowserSession).where(BrowserSession.expires < now))
            session.execute(delete(Submission).where(Submission.created < now - _KEY_SECONDS))
            session.execute(delete(Event).where(Event.at < now - EVENT_SECONDS))
        self.finish()
        self.remainders()
        self.database.forget()  # readers may have kept the log from being emptied before

    def remainders(self) -> None:
        """Remove folders that no row knows, left behind by a killed service or a user who was removed."""
        with self._lock:
            self._remove_remainders()

    def _remove_remainders(self) -> None:
        place = self.settings.place
        # Folders are listed first: the row of an upload or job is there before its folder.
        found = [*place.uploads.iterdir(), *place.jobs.iterdir()]
        with self.database.reading() as session:
            uploads, jobs = set(session.scalars(select(Upload.id))), set(session.scalars(select(Job.id)))
        known = {place.upload(upload) for upload in uploads} | {place.job(job) for job in jobs}
        self._remove_folders(folder for folder in found if folder not in known)

    def partial_files(self) -> None:
        """At the start: remove files that a killed service was receiving."""
        for partial in self.settings.place.uploads.glob("*/received/.partial-*"):
            partial.unlink(missing_ok=True)

    def _remove_folders(self, folders: Iterable[Path]) -> None:
        """Remove all folders that can be removed, then raise the first error."""
        first: OSError | None = None
        for folder in folders:
            try:
                shutil.rmtree(folder)
            except OSError as error:
                if isinstance(error, FileNotFoundError) and not folder.exists():
                    continue
                LOG.error("%s cannot be removed: %s; tried again later", folder, error.strerror)
                first = first or error
        if first is not None:
            raise first
