"""Fixtures of the service's tests: one in this process without workers, and one in a process that can be killed."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from argon2 import PasswordHasher
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from app.service.accounts import Account
from app.service.http_server import HttpSettings, http_config
from app.service.serve import require_usable
from app.service.service import Service, create_service
from app.service.settings import ServiceSettings
from app.service.site import create_routes, guarded
from app.service.tables import Upload, User

PASSWORD = "correct horse battery"
#: Argon2 with the least cost, since tests hash many passwords.
FAST_HASHES = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1)


@pytest.fixture
def fast_hashes() -> PasswordHasher:
    """Argon2 with the least cost."""
    return FAST_HASHES


@pytest.fixture
def settings(tmp_path: Path) -> ServiceSettings:
    """A service in an empty folder, with a model that only workers would load."""
    return ServiceSettings(folder=tmp_path / "service", models={"tiny": tmp_path / "run"}, reserve_bytes=0)


@pytest.fixture(scope="session")
def database_with_users(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with the users ann and ben, and the admin eve, made once; tests get a copy."""
    folder = tmp_path_factory.mktemp("database")
    made = create_service(ServiceSettings(folder=folder, models={}))
    made.accounts.hasher = FAST_HASHES
    for name in ("ann", "ben", "eve"):
        made.accounts.add(name, PASSWORD, "admin" if name == "eve" else "user")
    made.database.forget()
    made.database.close()
    return folder / "service.db"


@pytest.fixture
def service(settings: ServiceSettings, database_with_users: Path) -> Iterator[Service]:
    """A service with the users ann and ben, and the admin eve; it computes nothing."""
    settings.place.create()
    shutil.copy(database_with_users, settings.place.database)
    made = create_service(settings)
    made.accounts.hasher = FAST_HASHES
    yield made
    made.database.close()


@pytest.fixture
def accounts(service: Service) -> dict[str, Account]:
    """The three users."""
    with service.database.reading() as session:
        users = session.query(User).all()
    return {
        one.name: Account(id=one.id, name=one.name, role="admin" if one.role == "admin" else "user") for one in users
    }


@pytest.fixture(scope="session")
def routes() -> FastAPI:
    """The routes of the API and the pages, made once, since that takes longer than most tests."""
    return create_routes()


@pytest.fixture
def site(routes: FastAPI, service: Service) -> ASGIApp:
    """The application of the service."""
    return guarded(routes, service)


@pytest.fixture
def client(site: ASGIApp) -> TestClient:
    """A client of the service without a token; redirects are not followed."""
    return TestClient(site, base_url="http://localhost", follow_redirects=False)


@contextmanager
def running(site: ASGIApp, http: HttpSettings) -> Iterator[int]:
    """Answer requests in a thread; yields the port."""
    server = uvicorn.Server(http_config(site, http))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.fixture
def live_port(site: ASGIApp) -> Iterator[int]:
    """Port of a real HTTP server of the service, which computes nothing."""
    with running(site, HttpSettings(port=0)) as port:
        yield port


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with cert.pem, which nobody has signed, and key.pem."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem -days 2 -subj /CN=localhost"
    command += " -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def tls_port(site: ASGIApp, certificate: Path) -> Iterator[int]:
    """Port of a real HTTPS server of the service, which computes nothing."""
    http = HttpSettings(port=0, certificate=certificate / "cert.pem", key=certificate / "key.pem")
    require_usable(http)
    with running(site, http) as port:
        yield port


@pytest.fixture
def token(service: Service) -> Callable[[str], dict[str, str]]:
    """The header with a new token of a user."""

    def of(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {service.accounts.add_token(name)}"}

    return of


@pytest.fixture
def ready_upload(service: Service) -> Callable[..., str]:
    """Make an upload as it is after its files were looked at: ``ready_upload(account, cases=1)`` returns its id."""

    def make(account: Account, *, cases: int = 1, name: str = "Doe_Jane", problems: tuple[str, ...] = ()) -> str:
        upload = uuid.uuid4().hex
        recognised = [
            {
                "name": name,
                "case": {"id": "case", "folder": f"{number:05}", "contrasts": {}, "naming": None},
                "files": {"t1": f"{name}_t1.nii.gz"},
                "missing": [],
                "problems": list(problems),
                "warnings": [],
                "notes": [],
                "dicom": False,
            }
            for number in range(cases)
        ]
        with service.database.writing() as session:
            session.add(
                Upload(
                    id=upload,
                    user_id=account.id,
                    created=time.time(),
                    state="ready",
                    files=[{"name": f"{name}_t1.nii.gz", "bytes": 4, "contrast": None}],
                    cases=recognised,
                    message="",
                    deleted=False,
                )
            )
        place = service.settings.place.cases(upload) / "00000"
        place.mkdir(parents=True)
        (place / "case_t1.nii.gz").write_bytes(b"scan")
        return upload

    return make


@dataclass(kw_only=True)
class ServerProcess:
    """``znormseg serve`` in a separate process."""

    folder: Path
    model: Path
    options: tuple[str, ...] = ()
    port: int = 0
    token: str = ""
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        """Address of the service."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = [sys.executable, "-P", "-m", "app", "serve", "--data", self.folder, "--model", self.model]
        command += ["--port", self.port, "--reserve-gb", "0", *self.options]
        log = (self.folder.parent / "server.txt").open("a", encoding="utf-8")
        with log:
            self.process = subprocess.Popen(list(map(str, command)), stderr=log, start_new_session=True, text=True)
        self.wait_for("/health")

    def wait_for(self, path: str, seconds: float = 600) -> None:
        """Wait until a path is answered with 200."""
        until = time.monotonic() + seconds
        while True:
            try:
                self.ask("GET", path)
            except OSError:
                assert self.process is None or self.process.poll() is None, self.log()
                assert time.monotonic() < until, self.log()
                time.sleep(0.1)
            else:
                return

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Any:
        """Send a request with the token; returns the parsed answer, or its bytes."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
        sent = {"Authorization": f"Bearer {self.token}", "Content-Type": kind, **headers}
        request = urllib.request.Request(f"{self.url}/api/v1{path}", data=data, method=method, headers=sent)
        with urllib.request.urlopen(request, timeout=600) as answer:
            content = answer.read()
        is_json = answer.headers.get_content_type() == "application/json" and "/results/" not in path
        return json.loads(content) if is_json else content

    def upload(self, case: Path) -> str:
        """Send a case folder; returns the id of the upload."""
        paths = [path for path in sorted(case.glob("*.nii.gz")) if "seg" not in path.name]
        files = [{"name": path.name, "bytes": path.stat().st_size} for path in paths]
        upload: str = self.ask("POST", "/uploads", {"files": files})["id"]
        for number, path in enumerate(paths):
            self.ask("PUT", f"/uploads/{upload}/files/{number}", path.read_bytes())
        assert self.ask("POST", f"/uploads/{upload}/complete")["state"] == "ready"
        return upload

    def wait_until_ended(self, jobs: list[str], seconds: float = 1200) -> list[dict[str, Any]]:
        """Wait until jobs have ended; returns them."""
        until = time.monotonic() + seconds
        while True:
            found = [self.ask("GET", f"/jobs/{job}") for job in jobs]
            if all(one["ended"] is not None for one in found):
                return found
            assert time.monotonic() < until, (found, self.log())
            time.sleep(0.2)

    def kill(self) -> None:
        """End it by SIGKILL."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it by SIGTERM; returns its exit status."""
        if self.process is None:
            return 0
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(120)

    def workers(self) -> list[int]:
        """Process ids of the workers."""
        assert self.process is not None
        children = subprocess.run(
            ["pgrep", "-P", str(self.process.pid), "-f", "app.service.worker"],
            capture_output=True,
            text=True,
            check=False,
        )
        return list(map(int, children.stdout.split()))

    def log(self) -> str:
        """What it and its workers wrote."""
        texts = [self.folder.parent / "server.txt", *self.folder.glob("logs/*.txt")]
        return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in texts if path.exists())


@pytest.fixture(scope="session")
def quick_run(phantoms: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the tiny settings, two steps long."""
    from app.config.load import load_config
    from app.training.run import start
    from data.datasets.source import DataSource

    run = tmp_path_factory.mktemp("quick") / "run"
    start(DataSource(phantoms), run, load_config("laptop", [*tiny_settings, "training.steps=2"]))
    return run


@pytest.fixture
def start_server(quick_run: Path, tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Start a server with the user ann and a token; ``start_server("--workers", "2")``. It is stopped in the end."""
    started: list[ServerProcess] = []

    def start(*options: str, folder: Path | None = None) -> ServerProcess:
        place = folder or tmp_path / "service"
        made = create_service(ServiceSettings(folder=place, models={"run": quick_run}))
        made.accounts.add("ann", PASSWORD, "admin")
        token = made.accounts.add_token("ann")
        made.database.close()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        server = ServerProcess(folder=place, model=quick_run, options=options, port=port, token=token)
        started.append(server)
        server.start()
        return server

    yield start
    for server in started:
        if server.process is not None and server.process.poll() is None:
            server.kill()


@pytest.fixture
def predicted(quick_run: Path, tmp_path: Path) -> Callable[[Path], bytes]:
    """Bytes of the label map that ``predict`` writes for a case folder."""
    from app.inference.batch.cohort import predict_each
    from app.inference.batch.job import PredictJob
    from data.datasets.layouts import find_cases

    def of(case: Path) -> bytes:
        output = tmp_path / "predicted"
        job = PredictJob(run=quick_run, output=output, device="cpu")
        model, runtime = job.load()
        predict_each(find_cases(case), output, job.engine(model, runtime), settings=job.settings(model))
        return (output / f"{case.name}.nii.gz").read_bytes()

    return of


@pytest.fixture
def changed_settings(settings: ServiceSettings) -> Callable[..., ServiceSettings]:
    """The settings with some of them changed."""
    return lambda **changes: replace(settings, **changes)
