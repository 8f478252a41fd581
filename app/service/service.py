"""The parts of a running service."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Final

from anyio import CapacityLimiter
from sqlalchemy.exc import SQLAlchemyError

from app.errors import ConfigError
from app.progress import LOG
from app.service.accounts import Accounts
from app.service.database import Database
from app.service.dispatcher import Dispatcher
from app.service.intake import stop_looks
from app.service.jobs import Jobs
from app.service.limits import Failures
from app.service.removal import Removal
from app.service.settings import ServiceSettings
from app.service.uploads import Uploads

#: Seconds between two looks for what is too old or marked as deleted.
_REMOVAL_SECONDS: Final = 30.0
#: Seconds between two looks for uploads that are looked at while the service stops.
_STOP_LOOKS_SECONDS: Final = 0.2


@dataclass(kw_only=True)
class Service:
    """Everything that requests need."""

    settings: ServiceSettings
    database: Database
    accounts: Accounts
    uploads: Uploads
    jobs: Jobs
    dispatcher: Dispatcher
    removal: Removal
    name_failures: Failures = field(default_factory=lambda: Failures(most=5, seconds=300))
    """By name: sign-ins that failed."""
    address_failures: Failures = field(default_factory=lambda: Failures(most=20, seconds=300))
    """By address: sign-ins that failed."""
    token_failures: Failures = field(default_factory=lambda: Failures(most=30, seconds=60))
    """By address: tokens that were not valid."""
    streams: dict[int, int] = field(default_factory=dict)
    """Open event streams by user."""
    stopping: threading.Event = field(default_factory=threading.Event)
    hashing: CapacityLimiter | None = None
    """Limits how many passwords are verified at a time; created in the event loop, by the first sign-in."""
    _answered: threading.Event = field(default_factory=threading.Event, repr=False)
    """Set once no request is answered any more."""
    _threads: list[threading.Thread] = field(default_factory=list, repr=False)

    def start(self) -> None:
        """Tidy up after a service that was killed, and begin to compute.

        Raises:
            OSError: the data folder cannot be written to.
        """
        self.uploads.interrupted()
        self.removal.partial_files()
        self.removal.remainders()
        self.dispatcher.start()
        for work in (self._remove, self._stop_jobs, self._stop_looks):
            thread = threading.Thread(target=work, name=work.__name__, daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """Let running jobs finish within the grace period, stop the workers and close the database."""
        self.stopping.set()
        self._answered.set()
        for thread in self._threads:
            thread.join()
        self.database.close()

    def _stop_jobs(self) -> None:
        self.stopping.wait()
        self.dispatcher.stop(self.settings.grace_seconds)

    def _stop_looks(self) -> None:
        """End the processes that look at uploads, since requests that wait for them keep the service from stopping."""
        self.stopping.wait()
        while not self._answered.wait(_STOP_LOOKS_SECONDS):
            stop_looks()
        stop_looks()

    def _remove(self) -> None:
        while True:
            try:
                self.removal.by_age()
            except (OSError, SQLAlchemyError) as error:
                LOG.warning("old jobs could not be deleted, tried again later: %s", type(error).__name__)
            if self.stopping.wait(_REMOVAL_SECONDS):
                return


def create_service(settings: ServiceSettings) -> Service:
    """Open the database of a service, bring it up to date, and return its parts; nothing runs yet.

    Raises:
        ConfigError: as raised by :func:`require_inbox`, or the database's URL has another form.
        RunError: another service uses the database, it is newer than this program, or it cannot be opened.
        OSError: the data folder cannot be written to.
    """
    require_inbox(settings)
    settings.place.create()
    database = Database(settings.database_url)
    try:
        database.guard()  # first, since another service may still use the tables as they are
        database.migrate()
    except BaseException:
        database.close()
        raise
    dispatcher = Dispatcher(settings=settings, database=database)
    return Service(
        settings=settings,
        database=database,
        accounts=Accounts(database=database, secret=settings.place.secret()),
        uploads=Uploads(settings=settings, database=database),
        jobs=Jobs(settings=settings, database=database, wake=dispatcher.wake),
        dispatcher=dispatcher,
        removal=Removal(settings=settings, database=database),
    )


def require_inbox(settings: ServiceSettings) -> None:
    """Check the folder below which jobs may name folders of images; every user may read it.

    Raises:
        ConfigError: it is not a folder that can be read, or it shares folders with the data folder.
    """
    if settings.inbox is None:
        return
    inbox, root = settings.inbox.resolve(), settings.place.root
    if not inbox.is_dir() or not os.access(inbox, os.R_OK | os.X_OK):
        raise ConfigError(f"--inbox {settings.inbox}: not a folder that can be read; give one that exists")
    if inbox.is_relative_to(root) or root.is_relative_to(inbox):
        raise ConfigError(
            f"--inbox {settings.inbox}: every user may read the inbox, so it must not contain the data folder or be in "
            "it; give another folder"
        )
