"""What the machine lets a process have: memory, processors, disk. Read from the system, without torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Memory limits at and above this are how version 1 of control groups writes "none".
_NO_LIMIT_BYTES: Final = 1 << 60


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """One bound on the memory of a process started now."""

    name: str
    """What bounds it, e.g. ``MemAvailable``."""
    free_bytes: int
    """What is left below the bound."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a process holds at one moment, in bytes, from /proc."""

    resident: int
    """All that is in RAM (VmRSS)."""
    peak: int
    """The most that was (VmHWM)."""
    own: int
    """Without pages of files (RssAnon and RssShmem): what the system cannot take back."""
    files: int
    """Pages of mapped files: programs, libraries, prepared cases (RssFile)."""


def memory_of(process: int | str = "self", *, proc: Path = Path("/proc")) -> Memory | None:
    """Memory of a process; None where the system does not tell, or the process is gone.

    Not ``getrusage``: its peak of a child counts what the parent held when it started the child.
    """
    told = _table(proc / str(process) / "status")
    if "VmRSS" not in told:
        return None
    return Memory(
        resident=told["VmRSS"],
        peak=told.get("VmHWM", told["VmRSS"]),
        own=told.get("RssAnon", told["VmRSS"]) + told.get("RssShmem", 0),
        files=told.get("RssFile", 0),
    )


def memory_limits(*, root: Path = Path("/")) -> list[MemoryLimit]:
    """Every bound on memory that is known here, the tightest first.

    MemAvailable of the system; the control group of this process (version 2 or 1) and those above it, less what is in
    use there and cannot be taken back; RLIMIT_AS and RLIMIT_DATA.

    Args:
        root: where /proc and /sys are.
    """
    found = []
    free = _table(root / "proc/meminfo").get("MemAvailable")
    if free is not None:
        found.append(MemoryLimit(name="MemAvailable", free_bytes=free))
    found += _group_memory(root)
    if root == Path("/"):
        found += _resource_limits()
    return sorted(found, key=lambda limit: limit.free_bytes)


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Threads to compute with: one a processor of :func:`cores`, and no more than OMP_NUM_THREADS says.

    Of a list, for nested levels, the first number counts; what is no whole number above 0 bounds nothing.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(cores(), int(asked)) if asked.isdecimal() and int(asked) > 0 else cores()


def processor_quota(*, root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the control group gives (cpu.max, cpu.cfs_quota_us); None without a bound."""
    found = []
    for folder in _group_folders(root, "cpu"):
        words = (_text(folder / "cpu.max") or "").split()
        if len(words) == 2 and words[0].isdecimal():
            found.append(int(words[0]) / int(words[1]))
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota is not None and period is not None and int(quota) > 0:
            found.append(int(quota) / int(period))
    return min(found, default=None)


def free_disk(place: Path) -> int:
    """Free bytes at a place, which need not be there yet.

    Raises:
        OSError: nothing of its path can be looked at.
    """
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def _group_memory(root: Path) -> list[MemoryLimit]:
    found = []
    for folder in _group_folders(root, "memory"):
        for name, usage, idle in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, used = _text(folder / name), _text(folder / usage)
            if limit is None or used is None or not limit.isdecimal() or int(limit) >= _NO_LIMIT_BYTES:
                continue
            given_back = _table(folder / "memory.stat").get(idle, 0)
            found.append(
                MemoryLimit(name=f"control group ({name})", free_bytes=max(0, int(limit) - int(used) + given_back))
            )
    return found


def _group_folders(root: Path, controller: str) -> list[Path]:
    """Folders of this process's control group and those above it, of both versions.

    Inside of a container the path of /proc/self/cgroup may be the host's; then the folder at the top is the group.
    """
    folders = []
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, names, path = line.split(":", 2)
        if names == "":
            tops = [root / "sys/fs/cgroup", root / "sys/fs/cgroup/unified"]
        elif controller in names.split(","):
            tops = [root / "sys/fs/cgroup" / controller, root / "sys/fs/cgroup" / names]
        else:
            continue
        for top in dict.fromkeys(tops):
            place = top / path.lstrip("/")
            folders += [folder for folder in (place, *place.parents) if folder == top or top in folder.parents]
    return list(dict.fromkeys(folders))


def _resource_limits() -> list[MemoryLimit]:
    import resource

    found = []
    for name in ("RLIMIT_AS", "RLIMIT_DATA"):
        soft, _ = resource.getrlimit(getattr(resource, name))
        if soft != resource.RLIM_INFINITY:
            found.append(MemoryLimit(name=name, free_bytes=soft))
    return found


def _table(path: Path) -> dict[str, int]:
    """Numbers by name, of files as /proc/meminfo; what is in kB in bytes."""
    numbers = {}
    for line in (_text(path) or "").splitlines():
        words = line.replace(":", " ").split()
        if len(words) >= 2 and words[1].isdecimal():
            numbers[words[0]] = int(words[1]) * (1024 if words[2:] == ["kB"] else 1)
    return numbers


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
