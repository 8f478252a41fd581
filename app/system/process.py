"""How this process uses processors and memory. Imports nothing slow: the first has to come before torch."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from app.system.resources import cores, processor_quota

#: mallopt's parameters, of glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_INT: Final = 2**31 - 1
#: OpenMP's variable for the number of threads.
_THREADS: Final = "OMP_NUM_THREADS"


@dataclass
class _Set:
    """What this process has set in its own environment."""

    threads: str | None = None


_SET: Final = _Set()


def granted_processors() -> int:
    """Processors this process may run on, and no more than its control group grants, rounded."""
    quota = processor_quota()
    return cores() if quota is None else min(cores(), max(1, round(quota)))


def stopping_signals() -> tuple[signal.Signals, ...]:
    """The signals that ask a job to save and stop.

    SIGHUP, which comes when a terminal or a connection closes, is one of them unless it is ignored, as under nohup.
    """
    hangup = getattr(signal, "SIGHUP", None)
    asked = (signal.SIGINT, signal.SIGTERM)
    return asked if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else (*asked, hangup)


def share_processors() -> None:
    """Settle how OpenMP's threads wait and how many there are; what the user has set stays.

    Threads sleep while they wait for each other: one that spins holds a processor that whoever it waits for may need,
    and beside another job a step takes two to three times as long. Where a control group grants less than the
    processors that are visible (``docker run --cpus``), there are as many threads as it grants: more would stop each
    other. It counts only before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    granted = granted_processors()
    if granted < cores() and _THREADS not in os.environ:
        os.environ[_THREADS] = _SET.threads = str(granted)


def threads_of_each(processes: int, *, given: Mapping[str, str]) -> str:
    """``OMP_NUM_THREADS`` of processes that work at once: what the user has set, else their share of the processors.

    Args:
        processes: how many.
        given: the environment of this process.
    """
    asked = given.get(_THREADS)
    if asked is not None and asked != _SET.threads:
        return asked
    return str(max(1, granted_processors() // processes))


def give_back_freed_memory() -> bool:
    """Let the C library give back what is freed, so that it does not count beside what comes next.

    Reading a case frees hundreds of megabytes in small pieces between others, which stay with the process otherwise.
    Takes milliseconds. With another C library than glibc nothing happens.

    Returns:
        Whether anything was given back.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").malloc_trim(0))
    except (OSError, AttributeError):
        return False


def give_back_large_blocks() -> bool:
    """Let the C library give back each freed block of 128 KiB or more at once, for what is planned by memory.

    It begins so, but raises that size with what is freed; blocks of other threads then stay with the process, tens of
    megabytes more from case to case. With another C library than glibc nothing happens.

    Returns:
        Whether it took.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, 128 << 10))
    except (OSError, AttributeError):
        return False


def keep_freed_memory() -> bool:
    """Let the C library keep what is freed for the next tensor of that size, instead of giving it back each time.

    Every step of a training frees and takes the same gigabytes; from the system they come page by page, each cleared
    first. Costs no memory at the peak. With another C library than glibc nothing happens.

    Returns:
        Whether it took.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    # Above the mmap threshold a block is a mapping of its own, cleared by the system each time; below the trim
    # threshold the end of the heap is kept.
    return bool(mallopt(_M_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
