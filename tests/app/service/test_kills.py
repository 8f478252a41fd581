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
from pathlib import Path
from typing import Any

import pytest

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


@pytest.mark.slow
def test_two_hundred_jobs_of_eight_clients_survive_ten_kills(
    start_server: Start, phantoms: Path, predicted: Predicted
) -> None:
    server = start_server("--workers", "2")
    chosen = cases(phantoms)[:4]
    uploads = [server.upload(case) for case in chosen]
    made: dict[str, int] = {}
    errors: list[str] = []

    def client(number: int) -> None:
        for turn in range(25):
            which = (number + turn) % len(uploads)
            key = {"Idempotency-Key": f"{number}-{turn}"}
            while True:
                try:
                    (job,) = server.ask("POST", "/jobs", {"upload": uploads[which]}, **key)["jobs"]
                except OSError as error:
                    if getattr(error, "code", 503) not in (429, 503):
                        errors.append(f"{error}")
                        return
                    time.sleep(0.5)
                else:
                    made[job["id"]] = which
                    break

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in clients:
        thread.start()
    chance = random.Random(0)
    memory = []
    for turn in range(10):
        time.sleep(chance.uniform(4, 12))
        if turn % 2:
            server.kill()
            assert disagreements(server.folder) == []
            server.start()
        elif workers := server.workers():
            os.kill(chance.choice(workers), signal.SIGKILL)
        memory.append(_resident_mb(server.process.pid))
    for thread in clients:
        thread.join()
    assert errors == []
    assert len(made) == 200
    ended = server.wait_until_ended(list(made), seconds=3600)
    assert Counter(job["state"] for job in ended) == {"done": 200}, server.log()
    memory.append(_resident_mb(server.process.pid))
    assert max(memory) < 400, memory
    expected = [predicted(case) for case in chosen]
    for job, which in made.items():
        assert server.ask("GET", f"/jobs/{job}/results/label_map") == expected[which]
    assert disagreements(server.folder) == []


def _resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


@pytest.mark.slow
def test_on_sigterm_running_jobs_are_queued_again_and_the_exit_is_clean(start_server: Start, phantoms: Path) -> None:
    server = start_server("--grace-seconds", "0")
    upload = server.upload(cases(phantoms)[0])
    server.ask("POST", "/jobs", {"upload": upload, "options": {"tta": True}})
    assert server.stop() == 0
    with sqlite3.connect(server.folder / "service.db") as database:
        states = [state for (state,) in database.execute("SELECT state FROM jobs")]
    assert states in (["queued"], ["done"])


def test_a_second_service_on_the_folder_is_refused(
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
