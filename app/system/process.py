"""Processor and memory settings of this process; must not import torch, as threads are set before it loads."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from app.system.resources import cores, processor_quota

#: Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_INT: Final = 2**31 - 1
#: Delay before a signal whose exception Python ignored is sent again.
_REPEAT_SECONDS: Final = 0.05
#: OpenMP's environment variable for the number of threads.
_THREADS: Final = "OMP_NUM_THREADS"


#: Environment variables set by this process rather than by the user.
_SET: Final[dict[str, str]] = {}


def granted_processors() -> int:
    """Return the number of processors this process may use, capped at its control group's quota (rounded)."""
    quota = processor_quota()
    return cores() if quota is None else min(cores(), max(1, round(quota)))


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the signals that ask a job to save and stop.

    They include SIGHUP, sent when a terminal or connection closes, unless it is ignored, as under nohup.
    """
    hangup = getattr(signal, "SIGHUP", None)
    always = (signal.SIGINT, signal.SIGTERM)
    return always if hangup is None or signal.getsignal(hangup) is signal.SIG_IGN else (*always, hangup)


@contextmanager
def repeat_ignored_interrupts(prepare: Callable[[], int]) -> Iterator[None]:
    """Send a signal again if Python ignored the KeyboardInterrupt that its handler raised.

    Python ignores exceptions raised in finalizers and weak reference callbacks.

    Args:
        prepare: makes the handler ready for the signal, and returns the signal's number.
    """

    def repeat(ignored: sys.UnraisableHookArgs) -> None:
        if not isinstance(ignored.exc_value, KeyboardInterrupt):
            hook(ignored)
            return
        # From another thread, because an exception raised in this hook would be ignored too.
        again = threading.Timer(_REPEAT_SECONDS, os.kill, (os.getpid(), prepare()))
        again.daemon = True
        again.start()

    hook, sys.unraisablehook = sys.unraisablehook, repeat
    try:
        yield
    finally:
        sys.unraisablehook = hook


def share_processors() -> None:
    """Set OpenMP's wait policy and number of threads unless the user has; must run before torch is imported.

    Waiting threads sleep instead of spinning: a spinning thread occupies a processor that the thread it waits for may
    need, so that next to another job a step takes two to three times as long. If a control group grants fewer
    processors than are visible (``docker run --cpus``), the number of threads is set to that grant, because more
    threads would stall each other.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    granted = granted_processors()
    if granted < cores() and _THREADS not in os.environ:
        os.environ[_THREADS] = _SET[_THREADS] = str(granted)


def own_environment(given: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return an environment, by default this process's, in which a subprocess imports the same program."""
    root = str(Path(__file__).resolve().parents[2])
    return {**given, "PYTHONPATH": os.pathsep.join(filter(None, (root, given.get("PYTHONPATH"))))}


def threads_of_each(processes: int, *, given: Mapping[str, str]) -> str:
    """Return ``OMP_NUM_THREADS`` for concurrent processes: the user's value, else an equal share of the processors.

    Args:
        processes: number of concurrent processes.
        given: environment of this process.
    """
    setting = given.get(_THREADS)
    if setting is not None and setting != _SET.get(_THREADS):
        return setting
    return str(max(1, granted_processors() // processes))


def how_it_ended(status: int) -> str:
    """Describe the exit status of a process in words.

    Example:
        >>> how_it_ended(-9)
        'was killed by SIGKILL'
    """
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"exited with status {status}"


def give_back_freed_memory() -> bool:
    """Return freed memory to the system, so that it does not add to the next peak.

    Reading a case frees hundreds of megabytes in small pieces scattered over the heap, which the process would
    otherwise keep. Takes milliseconds. Does nothing unless the C library is glibc.

    Returns:
        Whether any memory was returned.
    """
    return _call_glibc("malloc_trim", 0)


def give_back_gpu_memory() -> None:
    """Return the blocks that torch keeps for its next tensors to the GPU; does nothing if torch has not used one.

    cuDNN, cuBLAS and other processes cannot allocate memory that torch keeps.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def give_back_large_blocks() -> bool:
    """Return each freed block of 128 KiB or more to the system at once, for jobs with a memory limit.

    glibc starts with this threshold, but raises it as larger blocks are freed. Blocks of other threads then stay
    with the process, which grows by tens of megabytes per case. Does nothing unless the C library is glibc.

    Returns:
        Whether the setting was accepted.
    """
    return _call_glibc("mallopt", _M_MMAP_THRESHOLD, 128 << 10)


def keep_freed_memory() -> bool:
    """Keep freed memory for the next tensor of its size, instead of returning it to the system each time.

    Every training step frees and allocates the same gigabytes; the system would hand them out page by page, each
    zeroed first. Peak memory does not rise. Does nothing unless the C library is glibc.

    Returns:
        Whether the setting was accepted.
    """
    # A block above the mmap threshold is mapped separately and zeroed by the system each time; free memory at the end
    # of the heap is kept up to the trim threshold.
    large = _call_glibc("mallopt", _M_MMAP_THRESHOLD, 1 << 30)
    return large and _call_glibc("mallopt", _M_TRIM_THRESHOLD, _LARGEST_INT)


def _call_glibc(function: str, *arguments: int) -> bool:
    """Call a function of glibc; return False if it returns 0 or if the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        return bool(getattr(ctypes.CDLL("libc.so.6"), function)(*arguments))
    except (OSError, AttributeError):
        return False
