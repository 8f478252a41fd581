"""The service on a real PostgreSQL server, which the test starts; skipped where none is installed."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from app.errors import RunError
from app.service.accounts import Account
from app.service.answers import JobRequest
from app.service.database import Database
from app.service.service import Service, create_service
from app.service.settings import ServiceSettings
from app.service.tables import Job, Table, User

pytestmark = pytest.mark.slow
PASSWORD = "correct horse battery"


def _programs() -> Path | None:
    """Folder of PostgreSQL's own programs, in Debian's place or on the path."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) if Path("/usr/lib/postgresql").is_dir() else []
    on_path = shutil.which("initdb")
    return found[-1].parent if found else Path(on_path).parent if on_path else None


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """Address of an empty database on a server of this test."""
    programs = _programs()
    if programs is None:
        pytest.skip("no PostgreSQL")
    folder = Path(tempfile.mkdtemp(prefix="znormseg-postgres-"))  # others may not enter the folders of pytest
    # PostgreSQL refuses to run as root.
    prefix = ["setpriv", "--reuid", "postgres", "--regid", "postgres", "--clear-groups"] if os.getuid() == 0 else []
    if prefix:
        shutil.chown(folder, "postgres", "postgres")
    command = [*prefix, str(programs / "initdb"), "-D", str(folder), "-U", "znormseg", "--auth", "trust", "-E", "UTF8"]
    subprocess.run(command, check=True, capture_output=True, cwd="/")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", ""]
    with subprocess.Popen(
        [*prefix, str(programs / "postgres"), "-D", str(folder), *options], cwd="/", stderr=subprocess.DEVNULL
    ) as server:
        try:
            _wait_for(port)
            yield f"postgresql+psycopg://znormseg@127.0.0.1:{port}/postgres"
        finally:
            server.terminate()
            server.wait()
            shutil.rmtree(folder)


def _wait_for(port: int) -> None:
    for _ in range(300):
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.1)
        else:
            time.sleep(1)  # until it has recovered
            return
    raise AssertionError("PostgreSQL does not answer")


@pytest.fixture
def service(url: str, tmp_path: Path, fast_hashes: object) -> Iterator[Service]:
    """A service on a database that is emptied in the end."""
    settings = ServiceSettings(folder=tmp_path, models={"tiny": tmp_path}, database=url, reserve_bytes=0)
    made = create_service(settings)
    made.accounts.hasher = fast_hashes  # type: ignore[assignment]
    made.accounts.add("ann", PASSWORD, "user")
    yield made
    with made.database.engine.begin() as connection:
        Table.metadata.drop_all(connection)
        connection.exec_driver_sql("DROP TABLE alembic_version")
    made.database.close()


@pytest.fixture
def ann(service: Service) -> Account:
    with service.database.reading() as session:
        return Account(id=session.query(User).one().id, name="ann", role="user")


def test_the_migrations_create_the_tables_of_the_models(service: Service) -> None:
    service.database.migrate()
    with service.database.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []


def test_jobs_are_created_once_ordered_cancelled_and_deleted(
    service: Service, ann: Account, ready_upload: Callable[..., str]
) -> None:
    request = JobRequest(upload=ready_upload(ann, cases=2))
    jobs = service.jobs.submit(ann, request, "key")
    assert [job.id for job in service.jobs.submit(ann, request, "key")] == [job.id for job in jobs]
    assert [job.place for job in jobs] == [1, 2]
    assert service.jobs.cancel(ann, jobs[0].id).state == "cancelled"
    for job in jobs:
        service.jobs.mark_deleted(ann, job.id)
    service.removal.finish()
    with service.database.reading() as session:
        assert session.query(Job).count() == 0


def test_a_session_and_a_token_work(service: Service) -> None:
    cookie = service.accounts.sign_in("ann", PASSWORD)
    assert cookie is not None
    assert service.accounts.by_cookie(cookie) is not None
    assert service.accounts.by_token(service.accounts.add_token("ann")) is not None


def test_a_second_service_on_the_same_database_is_refused(service: Service, url: str) -> None:
    service.database.guard()
    second = Database(url)
    with pytest.raises(RunError, match="another service uses this database"):
        second.guard()
    second.close()
