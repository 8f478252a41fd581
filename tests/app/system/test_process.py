"""How the process uses processors and memory."""

import os
import subprocess
import sys

import pytest

from app.system import process
from app.system.process import share_processors
from app.system.worker_pool import worker_environment

GLIBC = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")


def run(code: str, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env={**kept, **environment}, text=True, capture_output=True, check=True)
    return done.stdout + done.stderr


@GLIBC
def test_torch_threads_sleep_while_waiting() -> None:
    code = "from app.system.process import share_processors as s; s(); import torch; torch.ones(9).sum()"
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in run(code, OMP_DISPLAY_ENV="TRUE")


def test_a_wait_policy_set_by_the_user_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    share_processors()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


@pytest.mark.parametrize(("quota", "threads"), [(1.5, "2"), (0.5, "1"), (4.0, None), (None, None)])
def test_the_number_of_threads_does_not_exceed_the_control_group_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, threads: str | None
) -> None:
    monkeypatch.setattr(process, "processor_quota", lambda: quota)
    monkeypatch.setattr(process, "cores", lambda: 4)
    monkeypatch.setattr(process, "_SET", {})
    monkeypatch.setenv("OMP_NUM_THREADS", "9")  # so that it is put back after the test
    monkeypatch.delenv("OMP_NUM_THREADS")
    share_processors()
    assert os.environ.get("OMP_NUM_THREADS") == threads


@pytest.mark.parametrize(("asked", "threads"), [(None, "2"), ("4", "4"), ("7", "7")])
def test_workers_share_the_control_group_quota_unless_the_user_has_set_threads(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, threads: str
) -> None:
    monkeypatch.setattr(process, "_SET", {})
    monkeypatch.setattr(process, "processor_quota", lambda: 4.0)
    monkeypatch.setattr(process, "cores", lambda: 16)
    monkeypatch.setenv("OMP_NUM_THREADS", asked or "")
    if asked is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    share_processors()
    assert worker_environment(None, 2, given=dict(os.environ))["OMP_NUM_THREADS"] == threads


PAGES = """
import resource
from app.system.process import keep_freed_memory
import torch
if {keep}:
    assert keep_freed_memory()
for _ in range(20):
    torch.empty(1 << 24).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.empty(1 << 24).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


BLOCKS = """
from app.system.resources import memory_of
from app.system.process import give_back_large_blocks
if {at_once}:
    assert give_back_large_blocks()
first = b"x" * 4_000_000
del first  # the C library takes blocks of this size from the heap from now on
before = memory_of().own
blocks = [block for _ in range(20) for block in (b"x" * 3_000_000, b"x" * 60_000)]
del blocks[::2]
print(memory_of().own - before)
"""


@GLIBC
def test_large_blocks_are_returned_to_the_system_when_freed() -> None:
    kept, at_once = (int(run(BLOCKS.replace("{at_once}", str(one)))) for one in (False, True))
    assert at_once < 5e6
    assert kept > 30e6


@GLIBC
def test_freed_memory_is_reused_without_new_pages() -> None:
    fresh, kept = (int(run(PAGES.replace("{keep}", str(keep)))) for keep in (False, True))
    assert kept < fresh / 5


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone")
def test_freed_memory_is_returned_to_the_system() -> None:
    code = """
import psutil
from app.system.process import give_back_freed_memory
small = [bytes(60_000) for _ in range(2000)]
held = small[::100]  # stays between the others, so that the heap's end does not move
del small
before = psutil.Process().memory_info().rss
assert give_back_freed_memory()
assert psutil.Process().memory_info().rss < before - 80e6, before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
