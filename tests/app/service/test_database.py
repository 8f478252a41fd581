"""The database: its versions, its transactions, and what deletion leaves in its files."""

from __future__ import annotations

import errno
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from app.errors import RunError
from app.service.database import Database, is_full
from app.service.tables import Event, Table


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    made = Database(f"sqlite:///{tmp_path / 'service.db'}")
    made.migrate()
    yield made
    made.close()


def event(action: str) -> Event:
    return Event(at=0.0, user="ann", action=action, what="")


def test_the_migrations_create_exactly_the_tables_of_the_models(database: Database) -> None:
    with database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_migrating_again_changes_nothing(database: Database) -> None:
    before = database.revision()
    database.migrate()
    assert database.revision() == before == "0001"


def test_a_database_of_a_newer_version_is_refused(database: Database) -> None:
    with database.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    for look in (database.migrate, database.revision):
        with pytest.raises(RunError, match="a newer version of znormseg created this database"):
            look()


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"no database" * 100)
    broken = Database(f"sqlite:///{tmp_path / 'x.db'}")
    with pytest.raises(RunError, match="cannot be used as the database"):
        broken.migrate()
    broken.close()


def test_only_the_owner_can_read_the_database(database: Database, tmp_path: Path) -> None:
    with database.writing() as session:
        session.add(event("a"))
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("service.db*")}
    assert modes == {0o600}


def test_a_failed_transaction_changes_nothing(database: Database) -> None:
    def fail() -> None:
        with database.writing() as session:
            session.add(event("a"))
            session.flush()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with database.reading() as session:
        assert session.query(Event).count() == 0


def test_deleted_data_is_in_none_of_the_database_files(database: Database, tmp_path: Path) -> None:
    with database.writing() as session:
        session.add(event("SECRET-NAME"))
    assert any(b"SECRET-NAME" in path.read_bytes() for path in tmp_path.iterdir())
    with database.writing() as session:
        session.query(Event).delete()
    database.forget()
    assert not any(b"SECRET-NAME" in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "x"), True),
        (OSError(errno.EACCES, "x"), False),
        (OperationalError("INSERT", {}, Exception("database or disk is full")), True),
        (OperationalError("INSERT", {}, Exception("database is locked")), False),
    ],
)
def test_a_full_disk_is_recognised(error: Exception, full: bool) -> None:
    assert is_full(error) == full


def test_a_transaction_on_a_full_disk_reports_it(database: Database) -> None:
    with pytest.raises(OSError, match="No space left") as caught, database.writing():
        raise OperationalError("INSERT", {}, Exception("database or disk is full"))
    assert caught.value.errno == errno.ENOSPC
