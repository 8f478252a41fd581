"""A disk that is full: a real one, a small tmpfs. Skipped where mounting is not allowed."""

from __future__ import annotations

import subprocess
import time
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 24 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "none", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk to the last byte; returns the file that does."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return ballast


def status_of(call: Callable[[], Any]) -> int:
    try:
        call()
    except urllib.error.HTTPError as error:
        return error.code
    return 200


def wait_until(true: Callable[[], bool], seconds: float = 900) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_uploads_jobs_and_commits_wait_for_disk_space_without_losing_data(
    start_server: Callable[..., Any], phantoms: Path, small_disk: Path, predicted: Callable[[Path], bytes]
) -> None:
    case = sorted(phantoms.iterdir())[0]
    server = start_server(folder=small_disk / "service")
    server.wait_for("/ready")
    upload = server.upload(case)

    ballast = fill(small_disk)
    assert status_of(lambda: server.upload(case)) == 507
    assert status_of(lambda: server.ask("POST", "/jobs", {"upload": upload})) == 507
    ballast.unlink()
    (job,) = server.ask("POST", "/jobs", {"upload": upload, "options": {"save_probabilities": True}})["jobs"]
    ballast = fill(small_disk)
    time.sleep(8)
    assert server.ask("GET", f"/jobs/{job['id']}")["state"] in ("queued", "running")
    assert server.process.poll() is None
    ballast.unlink()
    (ended,) = server.wait_until_ended([job["id"]])
    assert ended["state"] == "done", server.log()
    assert server.ask("GET", f"/jobs/{job['id']}/results/label_map") == predicted(case)
    wait_until(lambda: status_of(lambda: server.upload(case)) == 200)
