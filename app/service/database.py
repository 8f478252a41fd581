"""The service's database: SQLite in its data folder, or PostgreSQL. The newest version is created at the start."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, create_engine, event, text
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, NoSuchModuleError
from sqlalchemy.orm import Session

from app.errors import ConfigError, RunError
from app.system.disk_full import is_disk_full

#: Seconds that a statement waits for another writer of SQLite.
_BUSY_SECONDS: Final = 30
#: Any number; processes of the service that use one PostgreSQL database exclude each other by it.
_ADVISORY_LOCK: Final = 0x7A6E6F726D
#: Texts with which SQLite and PostgreSQL report a full disk.
_FULL: Final = ("database or disk is full", "no space left on device", "could not extend file")


class Database:
    """Opens transactions; every one that writes has ended on the disk when its block ends."""

    def __init__(self, url: str) -> None:
        """Prepare to connect.

        Args:
            url: SQLAlchemy's URL of a SQLite file or a PostgreSQL database.

        Raises:
            ConfigError: the URL has another form, or the driver that it names is not installed.
        """
        self.is_sqlite = url.startswith("sqlite")
        if self.is_sqlite:
            _create_private(Path(url.removeprefix("sqlite:///")))
            arguments: dict[str, Any] = {"connect_args": {"timeout": _BUSY_SECONDS, "check_same_thread": False}}
        else:
            arguments = {"pool_pre_ping": True}
        try:
            self.engine = create_engine(url, **arguments)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError, ValueError):
            # The URL is not repeated, since it may contain a password; neither is the error, which quotes it.
            raise ConfigError(
                "--database: give postgresql+psycopg://USER:PASSWORD@HOST/NAME, and install its driver: "
                "pip install 'znormseg[postgres]'"
            ) from None
        if self.is_sqlite:
            event.listen(self.engine, "connect", _set_up_sqlite)
            event.listen(self.engine, "begin", _begin)
        self._guard: Connection | None = None

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Yield a session whose changes are dropped."""
        with Session(self.engine, expire_on_commit=False) as session:
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Yield a session whose changes are committed when the block ends; writers of SQLite wait for each other.

        Raises:
            OSError: the disk is full; nothing was changed.
        """
        bound = self.engine.execution_options(writes=True)
        try:
            with Session(bound, expire_on_commit=False) as session, session.begin():
                yield session
        except DBAPIError as error:
            if is_full(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the database") from error
            raise

    def migrate(self) -> None:
        """Create the tables, or bring those of an earlier version up to date.

        Raises:
            RunError: a newer program created the database, or it cannot be opened.
        """
        scripts = _scripts()
        try:
            with self.engine.execution_options(writes=True).begin() as connection:
                context = MigrationContext.configure(connection, opts={"fn": _upgrade(scripts)})
                with Operations.context(context):
                    context.run_migrations()
        except CommandError as error:
            raise RunError(self._newer()) from error
        except DatabaseError as error:
            raise RunError(self._unusable(error)) from error

    def revision(self) -> str | None:
        """Return the version of the database; None if it is empty.

        Raises:
            RunError: a newer program created it, or it cannot be opened.
        """
        try:
            with self.engine.connect() as connection:
                found = MigrationContext.configure(connection).get_current_revision()
        except DatabaseError as error:
            raise RunError(self._unusable(error)) from error
        if found is not None and found not in {one.revision for one in _scripts().walk_revisions()}:
            raise RunError(self._newer())
        return found

    def _unusable(self, error: DatabaseError) -> str:
        return f"{self._shown()}: cannot be used as the database: {error.orig}"

    def _newer(self) -> str:
        return (
            f"{self._shown()}: a newer version of znormseg created this database. Start that version, or restore a "
            "backup from before the update."
        )

    def guard(self) -> None:
        """Keep other services away from a PostgreSQL database until it is closed; repeating it changes nothing.

        Raises:
            RunError: another service uses it, or it cannot be opened.
        """
        if self.is_sqlite or self._guard is not None:
            return
        try:
            connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            free = connection.scalar(text("SELECT pg_try_advisory_lock(:number)"), {"number": _ADVISORY_LOCK})
        except DatabaseError as error:
            raise RunError(self._unusable(error)) from error
        if not free:
            connection.close()
            raise RunError(f"{self._shown()}: another service uses this database. Stop it, or name another one.")
        self._guard = connection

    def forget(self) -> None:
        """Remove deleted content from SQLite's write-ahead log; freed pages are overwritten as they are freed."""
        if self.is_sqlite:
            connection = self.engine.raw_connection()  # outside of a transaction
            try:
                connection.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)")
            finally:
                connection.close()

    def close(self) -> None:
        """Close all connections."""
        if self._guard is not None:
            self._guard.close()
        self.engine.dispose()

    def _shown(self) -> str:
        """Return the database's address without a password."""
        return self.engine.url.render_as_string(hide_password=True)


def is_full(error: BaseException) -> bool:
    """Whether an error of the database or of the system means that a disk is full."""
    return is_disk_full(error) or (
        isinstance(error, DBAPIError) and any(words in str(error).lower() for words in _FULL)
    )


def _create_private(path: Path) -> None:
    """Create an empty database that only this user can read; SQLite gives its log the same permissions."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def _set_up_sqlite(connection: Any, record: object) -> None:  # noqa: ARG001 - signature of the event
    connection.isolation_level = None  # transactions begin where _begin says
    for setting in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "secure_delete=ON",
        "trusted_schema=OFF",
    ):
        connection.execute(f"PRAGMA {setting}")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _scripts() -> ScriptDirectory:
    folder = str(Path(__file__).with_name("migrations"))
    return ScriptDirectory(folder, version_locations=[folder])


def _upgrade(scripts: ScriptDirectory) -> Any:
    def steps(revision: Any, context: Any) -> Any:  # noqa: ARG001 - signature that alembic calls
        return scripts._upgrade_revs("head", revision)

    return steps
