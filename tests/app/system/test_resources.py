"""Limits of the machine, read from made-up copies of /proc and /sys, and from the real ones."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from app.system.resources import cores, free_disk, memory_limits, memory_of, processor_quota, threads

GB = 10**9


def write(root: Path, **files: str) -> None:
    """Files below a folder; double underscores stand for slashes, ``dot`` for a dot."""
    for name, text in files.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A made-up machine with 8 GB free."""
    write(tmp_path, proc__meminfo=f"MemTotal: 16000000 kB\nMemAvailable: {8 * GB // 1024} kB\n")
    return tmp_path


def limits_of(root: Path) -> dict[str, int]:
    return {limit.name: limit.free_bytes for limit in memory_limits(root=root)}


def test_without_control_groups_the_available_memory_is_the_limit(root: Path) -> None:
    assert limits_of(root) == {"MemAvailable": 8 * GB // 1024 * 1024}


def test_a_version_2_control_group_limits_memory_and_its_page_cache_counts_as_free(root: Path) -> None:
    write(root, proc__self__cgroup="0::/job\n")
    group = {"memory_dot_max": 4 * GB, "memory_dot_current": 3 * GB, "memory_dot_stat": f"inactive_file {GB}"}
    write(root, **{f"sys__fs__cgroup__job__{name}": str(value) for name, value in group.items()})
    assert limits_of(root)["control group (memory.max)"] == 2 * GB


def test_a_version_1_control_group_limits_memory(root: Path) -> None:
    write(root, proc__self__cgroup="4:memory:/job\n")
    group = {"memory_dot_limit_in_bytes": 2 * GB, "memory_dot_usage_in_bytes": GB}
    write(root, **{f"sys__fs__cgroup__memory__job__{name}": str(value) for name, value in group.items()})
    assert memory_limits(root=root)[0].free_bytes == GB


def test_a_parent_control_group_also_limits_memory(root: Path) -> None:
    write(root, proc__self__cgroup="0::/slice/job\n")
    write(root, sys__fs__cgroup__slice__job__memory_dot_max="max", sys__fs__cgroup__slice__job__memory_dot_current="5")
    write(root, sys__fs__cgroup__slice__memory_dot_max=str(GB), sys__fs__cgroup__slice__memory_dot_current="0")
    assert limits_of(root)["control group (memory.max)"] == GB


@pytest.mark.parametrize("none", ["max", str(0x7FFFFFFFFFFFF000)])
def test_a_control_group_without_a_limit_does_not_limit_memory(root: Path, none: str) -> None:
    write(root, proc__self__cgroup="0::/\n4:memory:/\n")
    write(root, sys__fs__cgroup__memory_dot_max=none, sys__fs__cgroup__memory_dot_current="1")
    write(root, sys__fs__cgroup__memory__memory_dot_limit_in_bytes=none)
    write(root, sys__fs__cgroup__memory__memory_dot_usage_in_bytes="1")
    assert set(limits_of(root)) == {"MemAvailable"}


def test_a_container_with_the_hosts_group_path_is_limited_by_the_root_group(root: Path) -> None:
    write(root, proc__self__cgroup="0::/docker/0123\n")
    write(root, sys__fs__cgroup__memory_dot_max=str(GB), sys__fs__cgroup__memory_dot_current="0")
    assert limits_of(root)["control group (memory.max)"] == GB


def test_cpu_quotas_are_read_from_both_versions(root: Path) -> None:
    assert processor_quota(root=root) is None
    write(root, proc__self__cgroup="0::/\n2:cpu,cpuacct:/\n", sys__fs__cgroup__cpu_dot_max="max 100000")
    assert processor_quota(root=root) is None
    write(root, sys__fs__cgroup__cpu_dot_max="150000 100000")
    assert processor_quota(root=root) == 1.5
    write(root, sys__fs__cgroup__cpu__cpu_dot_cfs_quota_us="50000")
    write(root, sys__fs__cgroup__cpu__cpu_dot_cfs_period_us="100000")
    assert processor_quota(root=root) == 0.5


def test_the_measured_memory_grows_by_what_is_allocated() -> None:
    before = memory_of()
    if before is None:
        pytest.skip("no /proc here")
    with mmap.mmap(-1, 30_000_000) as held:  # from the system, not from what the C library has kept
        held.write(bytes(30_000_000))
        after = memory_of()
    assert after is not None
    assert after.own - before.own >= 27_000_000
    assert after.peak >= after.resident


def test_a_process_that_has_ended_has_no_memory(tmp_path: Path) -> None:
    assert memory_of(7, proc=tmp_path) is None


def test_the_disk_of_a_path_that_does_not_exist_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    assert free_disk(tmp_path / "a" / "b") == pytest.approx(free_disk(tmp_path), rel=0.01)
    assert cores() >= 1


@pytest.mark.parametrize(
    ("asked", "expected"), [("3", 3), ("9", 4), ("2,1", 2), ("0", 4), ("-1", 4), ("many", 4), ("", 4)]
)
def test_threads_are_limited_by_cores_and_openmp_settings(
    asked: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.system.resources.cores", lambda: 4)
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert threads() == expected
