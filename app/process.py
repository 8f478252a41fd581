"""How this process waits and keeps memory. Imports nothing slow: the first has to come before torch."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

#: mallopt's parameters, of glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_INT: Final = 2**31 - 1


def sleep_while_waiting() -> None:
    """Let OpenMP threads sleep, not spin, while they wait for each other; what the user has set stays.

    A spinning thread holds a processor that whoever it waits for may need: beside another job, a step that takes half
    a second alone then takes several. It counts only before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


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
