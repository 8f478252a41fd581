"""Settings of the service, and the layout of its data folder."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from data.files import replacing
from data.filesystem import sync_folder

_SECRET_BYTES: Final = 32


@dataclass(frozen=True, kw_only=True)
class ServiceSettings:
    """What an administrator decides about a service."""

    folder: Path
    """Data folder: the database, uploads and results."""
    models: Mapping[str, Path]
    """Folder of each model that jobs may name; the first is the default."""
    database: str = ""
    """URL of a PostgreSQL database (``postgresql+psycopg://...``); empty for SQLite in ``folder``."""
    device: str = "auto"
    """Device of the workers; see :class:`app.system.device.RuntimeConfig`."""
    devices: tuple[str | None, ...] = (None,)
    """One entry per worker process: its device, or None for ``device``."""
    inbox: Path | None = None
    """Folder below which jobs may name folders of images; None allows none."""
    keep_days: float = 7.0
    """Days after which an ended job is deleted with its images and results."""
    most_queued: int = 500
    """Jobs that may wait or run at a time."""
    most_queued_per_user: int = 200
    """The same, for one user."""
    most_uploads_per_user: int = 20
    """Uploads of one user that may wait to be used by a job."""
    most_file_bytes: int = 2 * 10**9
    """Largest file of an upload."""
    most_upload_bytes: int = 8 * 10**9
    """Largest upload, also after an archive is unpacked."""
    reserve_bytes: int = 10**9
    """Free space that uploads leave on the disk."""
    grace_seconds: float = 5.0
    """How long running jobs may finish after SIGTERM; then they are stopped, and run again after the next start."""
    names: tuple[str, ...] = field(default=())
    """Host names under which the service is reached, in addition to those of this machine's loopback interface."""

    @property
    def place(self) -> ServiceFolder:
        """Paths in the data folder."""
        return ServiceFolder(self.folder.resolve())

    @property
    def database_url(self) -> str:
        """URL of the database, for SQLAlchemy."""
        return self.database or f"sqlite:///{self.place.database}"


@dataclass(frozen=True)
class ServiceFolder:
    """Paths in the data folder; no part of a path comes from a user."""

    root: Path
    """The data folder, resolved."""

    @property
    def database(self) -> Path:
        """The SQLite database."""
        return self.root / "service.db"

    @property
    def uploads(self) -> Path:
        """One folder for each upload."""
        return self.root / "uploads"

    @property
    def jobs(self) -> Path:
        """One folder for each job that has run."""
        return self.root / "jobs"

    @property
    def logs(self) -> Path:
        """What the worker processes write to stderr."""
        return self.root / "logs"

    def upload(self, upload: str) -> Path:
        """Folder of an upload."""
        return self.uploads / upload

    def received(self, upload: str) -> Path:
        """Folder of the files of an upload as they were received, each named by its number."""
        return self.upload(upload) / "received"

    def cases(self, upload: str) -> Path:
        """Folder of the cases that were recognised in an upload."""
        return self.upload(upload) / "cases"

    def job(self, job: str) -> Path:
        """Folder of a job's results."""
        return self.jobs / job

    def create(self) -> None:
        """Create the folder and those in it, readable by this user only.

        Raises:
            OSError: a folder cannot be created.
        """
        for folder in (self.root, self.uploads, self.jobs, self.logs):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def secret(self) -> bytes:
        """Return the key that signs cookies; create it if it is missing.

        Raises:
            OSError: it cannot be read or written.
        """
        path = self.root / "secret.key"
        if not path.exists():
            with replacing(path) as partial:
                descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                with os.fdopen(descriptor, "wb") as file:
                    file.write(secrets.token_bytes(_SECRET_BYTES))
                    file.flush()
                    os.fsync(file.fileno())
            sync_folder(self.root)
        return path.read_bytes()
