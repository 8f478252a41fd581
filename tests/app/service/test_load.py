"""Speed of reads while jobs compute, and memory during a large upload."""

from __future__ import annotations

import sqlite3
import statistics
import time
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
API = "/api/v1"


def resident_mb(process: int) -> float:
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def copies(folder: Path, job: str, count: int) -> None:
    """Copy the row of a job that is done, so that the database has many."""
    with sqlite3.connect(folder / "service.db") as database:
        database.row_factory = sqlite3.Row
        row = dict(database.execute("SELECT * FROM jobs WHERE id = ?", (job,)).fetchone())
        for number in range(count):
            row |= {"id": uuid.uuid4().hex, "place": 10**6 + number, "change": 10**6 + number}
            marks = ", ".join(f":{name}" for name in row)
            database.execute(f"INSERT INTO jobs ({', '.join(row)}) VALUES ({marks})", row)
        database.execute("UPDATE counters SET value = 2000000")


def test_reads_are_quick_with_a_thousand_jobs_while_two_compute(
    start_server: Callable[..., Any], phantoms: Path
) -> None:
    server = start_server("--workers", "2")
    upload = server.upload(sorted(phantoms.iterdir())[0])
    (first,) = server.ask("POST", "/jobs", {"upload": upload})["jobs"]
    server.wait_until_ended([first["id"]])
    copies(server.folder, first["id"], 1000)
    for _ in range(20):
        server.ask("POST", "/jobs", {"upload": upload, "options": {"tta": True}})
    seconds = []
    for _ in range(100):
        for path in ("/jobs", f"/jobs/{first['id']}"):
            began = time.monotonic()
            server.ask("GET", path)
            seconds.append(time.monotonic() - began)
    assert statistics.quantiles(seconds, n=20)[-1] < 0.05, statistics.quantiles(seconds, n=20)


def test_an_upload_of_a_gigabyte_does_not_grow_the_memory(start_server: Callable[..., Any], tmp_path: Path) -> None:
    server = start_server()
    size = 10**9
    sparse = tmp_path / "a_t1.nii"
    with sparse.open("wb") as file:
        file.truncate(size)
    upload = server.ask("POST", "/uploads", {"files": [{"name": sparse.name, "bytes": size}]})["id"]
    before = resident_mb(server.process.pid)
    with sparse.open("rb") as body:
        request = urllib.request.Request(
            f"{server.url}{API}/uploads/{upload}/files/0",
            data=body,
            method="PUT",
            headers={"Authorization": f"Bearer {server.token}", "Content-Length": str(size)},
        )
        urllib.request.urlopen(request, timeout=300).close()
    assert server.ask("GET", f"/uploads/{upload}")["files"][0]["received"]
    status = Path(f"/proc/{server.process.pid}/status").read_text(encoding="ascii")
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
    assert peak - before < 40, (before, peak)
