"""Real services and workers that are killed: every job ends once, with the label map of ``predict``."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from data.phantoms import write_phantoms

Start = Callable[..., Any]
Predicted = Callable[[Path], bytes]


def cases(phantoms: Path) -> list[Path]:
    return sorted(phantoms.iterdir())


def disagreements(folder: Path) -> list[str]:
    """Where database and folder contradict each other."""
    with sqlite3.connect(f"file:{folder / 'service.db'}?mode=ro", uri=True) as database:
        jobs = dict(database.execute("SELECT id, state FROM jobs"))
        uploads = {upload for (upload,) in database.execute("SELECT id FROM uploads")}
    found = [f"job folder {path.name} without a row" for path in (folder / "jobs").iterdir() if path.name not in jobs]
    found += [
        f"upload {path.name} without a row" for path in (folder / "uploads").iterdir() if path.name not in uploads
    ]
    for job, state in jobs.items():
        complete = (folder / "jobs" / job / "output" / "case.nii.gz").is_file()
        found += [f"job {job} is done without a label map"] if state == "done" and not complete else []
    return found


def test_a_killed_worker_and_a_killed_service_lose_nothing(
    start_server: Start, phantoms: Path, predicted: Predicted
) -> None:
    case = cases(phantoms)[0]
    server = start_server()
    upload = server.upload(case)
    jobs = [job["id"] for job in server.ask("POST", "/jobs", {"upload": upload, "cases": [0]})["jobs"]]
    server.wait_for("/ready")
    for worker in server.workers():
        os.kill(worker, signal.SIGKILL)
    jobs += [job["id"] for job in server.ask("POST", "/jobs", {"upload": upload})["jobs"]]
    server.kill()
    server.start()
    ended = server.wait_until_ended(jobs)
    assert [job["state"] for job in ended] == ["done", "done"], server.log()
    expected = predicted(case)
    assert [server.ask("GET", f"/jobs/{job}/results/label_map") for job in jobs] == [expected] * 2
    assert disagreements(server.folder) == []
    assert server.stop() == 0


@pytest.fixture
def small_cases(tmp_path: Path) -> list[Path]:
    """Four phantoms at 4 mm: a job costs about what the service itself does with it."""
    folder = tmp_path / "small"
    write_phantoms(folder, 4, seed=1, spacing_mm=4.0)
    return cases(folder)


def events(folder: Path, action: str) -> Counter[str]:
    """How often something is recorded of each job."""
    with sqlite3.connect(f"file:{folder / 'service.db'}?mode=ro", uri=True) as database:
        return Counter(what for (what,) in database.execute("SELECT what FROM events WHERE action = ?", (action,)))


@dataclass(kw_only=True)
class Client:
    """Submits jobs one at a time, each after the previous one has ended, even if the server restarts."""

    server: Any
    number: int
    uploads: list[str]
    made: dict[str, int] = field(default_factory=dict)
    """Which of the uploads each job has."""
    error: str = ""

    def run(self, jobs: int) -> None:
        for turn in range(jobs):
            which = (self.number + turn) % len(self.uploads)
            key = {"Idempotency-Key": f"{self.number}-{turn}"}
            made = self.patiently("POST", "/jobs", {"upload": self.uploads[which]}, **key)
            if made is None:
                return
            (job,) = (one["id"] for one in made["jobs"])
            self.made[job] = which
            while (found := self.patiently("GET", f"/jobs/{job}")) is not None and found["ended"] is None:
                time.sleep(0.5)

    def patiently(self, *request: Any, **headers: str) -> Any:
        """Send a request until it is answered; None, and the error, if it is refused."""
        while True:
            try:
                return self.server.ask(*request, **headers)
            except (OSError, HTTPException) as error:
                if getattr(error, "code", 503) not in (429, 503):
                    self.error = f"{request}: {error}"
                    return None
                time.sleep(0.5)


@pytest.mark.slow
def test_two_hundred_jobs_of_eight_clients_survive_ten_kills(
    start_server: Start, small_cases: list[Path], predicted: Predicted
) -> None:
    server = start_server("--workers", "2")
    uploads = [server.upload(case) for case in small_cases]
    clients = [Client(server=server, number=number, uploads=uploads) for number in range(8)]
    threads = [threading.Thread(target=client.run, args=(25,)) for client in clients]
    for thread in threads:
        thread.start()
    chance = random.Random(0)
    for turn in range(10):  # by what is done, not by the clock, so that jobs run at each kill on any machine
        wait_until_done(server, chance.randint(10 * turn + 1, 10 * turn + 10))
        time.sleep(chance.uniform(0, 1))
        assert any(thread.is_alive() for thread in threads), [client.error for client in clients]
        if turn % 2:
            server.kill()
            assert disagreements(server.folder) == []
            server.start()
        else:
            os.kill(wait_for_workers(server, chance), signal.SIGKILL)
            assert disagreements(server.folder) == []
    wait_until_both_work(server)
    wait_until_done(server, 130)  # all that a worker keeps has been loaded
    memory = resident_mb(server)
    for thread in threads:
        thread.join()
    made = {job: which for client in clients for job, which in client.made.items()}
    assert [client.error for client in clients if client.error] == []
    assert len(made) == 200
    ended = server.wait_until_ended(list(made), seconds=60)
    assert Counter(job["state"] for job in ended) == {"done": 200}, server.log()
    assert events(server.folder, "job done") == dict.fromkeys(made, 1)
    expected = [predicted(case) for case in small_cases]
    for job, which in made.items():
        assert server.ask("GET", f"/jobs/{job}/results/label_map") == expected[which]
    assert disagreements(server.folder) == []
    assert all(after < before + 30 for before, after in zip(memory, resident_mb(server), strict=True)), memory


def wait_until_done(server: Any, count: int, seconds: float = 3600) -> None:
    until = time.monotonic() + seconds
    while len(events(server.folder, "job done")) < count:
        assert time.monotonic() < until, server.log()
        time.sleep(0.2)


def wait_until_both_work(server: Any) -> None:
    counted = "SELECT count(*) FROM jobs WHERE state = 'running'"
    while True:
        with sqlite3.connect(f"file:{server.folder / 'service.db'}?mode=ro", uri=True) as database:
            if database.execute(counted).fetchone() == (2,):
                return
        time.sleep(0.1)


def wait_for_workers(server: Any, chance: random.Random) -> int:
    """Process id of one of the workers, both of which have started."""
    while len(found := server.workers()) < 2:
        time.sleep(0.1)
    chosen: int = chance.choice(found)
    return chosen


def resident_mb(server: Any) -> list[float]:
    """Memory of the server and of its workers."""
    texts = [Path(f"/proc/{process}/status").read_text("ascii") for process in (server.process.pid, *server.workers())]
    lines = (next(line for line in text.splitlines() if line.startswith("VmRSS")) for text in texts)
    return [int(line.split()[1]) / 1024 for line in lines]


@pytest.mark.slow
def test_on_sigterm_running_jobs_are_queued_again_and_the_exit_is_clean(start_server: Start, phantoms: Path) -> None:
    server = start_server("--grace-seconds", "0")
    upload = server.upload(cases(phantoms)[0])
    server.ask("POST", "/jobs", {"upload": upload, "options": {"tta": True}})
    assert server.stop() == 0
    with sqlite3.connect(server.folder / "service.db") as database:
        states = [state for (state,) in database.execute("SELECT state FROM jobs")]
    assert states in (["queued"], ["done"])


def test_a_second_service_on_the_same_folder_is_refused(
    start_server: Start, shell: Callable[..., Any], quick_run: Path
) -> None:
    server = start_server()
    ended = shell(["python", "-m", "app", "serve", "--data", server.folder, "--model", quick_run, "--port", "0"])
    assert ended.code == 5
    assert "another service uses this folder" in ended.err


@pytest.mark.slow
def test_a_cancelled_running_job_stops_and_the_next_one_runs(start_server: Start, phantoms: Path) -> None:
    server = start_server()
    upload = server.upload(cases(phantoms)[0])
    server.wait_for("/ready")
    first, second = (server.ask("POST", "/jobs", {"upload": upload})["jobs"][0]["id"] for _ in range(2))
    while server.ask("GET", f"/jobs/{first}")["state"] == "queued":
        time.sleep(0.02)
    server.ask("POST", f"/jobs/{first}/cancel")
    states = [job["state"] for job in server.wait_until_ended([first, second])]
    assert states[0] in ("cancelled", "done")
    assert states[1] == "done"
