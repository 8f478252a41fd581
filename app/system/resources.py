"""Memory, processors and disk space available to a process, read from the system without torch."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

#: Control groups version 1 express "no limit" as a number of at least this size.
_NO_LIMIT_BYTES: Final = 1 << 60


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """One limit on the memory of a process started now."""

    name: str
    """Source of the limit, e.g. ``MemAvailable``."""
    free_bytes: int
    """Memory left below the limit."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Memory of a process at one moment, in bytes, from /proc."""

    resident: int
    """Resident memory (VmRSS)."""
    peak: int
    """Highest resident memory so far (VmHWM)."""
    own: int
    """Resident memory that is not backed by files (RssAnon + RssShmem), which the system cannot reclaim."""
    files: int
    """Resident pages of mapped files: programs, libraries, prepared cases (RssFile)."""


def memory_of(process: int | str = "self", *, proc: Path = Path("/proc")) -> Memory | None:
    """Return the memory of a process; None if the process is gone or the system does not report it.

    ``getrusage`` is unsuitable: a child's peak includes the memory that its parent held when it started the child.
    """
    status = _table(proc / str(process) / "status")
    if "VmRSS" not in status:
        return None
    return Memory(
        resident=status["VmRSS"],
        peak=status.get("VmHWM", status["VmRSS"]),
        own=status.get("RssAnon", status["VmRSS"]) + status.get("RssShmem", 0),
        files=status.get("RssFile", 0),
    )


def memory_limits(*, root: Path = Path("/")) -> list[MemoryLimit]:
    """Return every known limit on memory, the tightest first.

    The sources are MemAvailable, the control group of this process and its ancestors (version 1 or 2; memory in use
    that cannot be reclaimed is subtracted), RLIMIT_AS and RLIMIT_DATA.

    Args:
        root: folder that contains /proc and /sys.
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
    """Return the number of processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads() -> int:
    """Return the number of compute threads: :func:`cores`, capped at OMP_NUM_THREADS.

    If the variable is a list (one number per nesting level), the first number counts; a value that is not a positive
    integer is ignored.
    """
    setting = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    return min(cores(), int(setting)) if setting.isdecimal() and int(setting) > 0 else cores()


def processor_quota(*, root: Path = Path("/")) -> float | None:
    """Return the control group's CPU quota in processors (cpu.max, cpu.cfs_quota_us); None if there is no limit."""
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
    """Return the free bytes at a path, which need not exist yet.

    Raises:
        OSError: no part of the path can be examined.
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
    """Return the folders of this process's control group and its ancestors, for versions 1 and 2.

    Inside a container, /proc/self/cgroup may show the path on the host; the top folder is then the group itself.
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
    """Parse a file in the format of /proc/meminfo: numbers by name, with kB converted to bytes."""
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
