"""Stop or save a run between two steps when the user or the system asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from app.system.process import stopping_signals

#: Signal that requests a checkpoint; None on Windows, which lacks it.
_SAVE = getattr(signal, "SIGUSR1", None)


@dataclass
class StopRequest:
    """Requests made by signals."""

    signal_name: str | None = None
    """Name of the signal that requested to save and stop."""
    save: bool = False
    """Whether SIGUSR1 requested a checkpoint; saving one resets it."""


@contextmanager
def stop_on_signals(*, patient: bool = False) -> Iterator[StopRequest]:
    """Record SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 instead of ending at once; restore the handlers on exit.

    A second SIGINT or SIGTERM of the same kind ends the process as usual. A second SIGHUP does not: the kernel and the
    shell of a closed terminal both send one. An ignored SIGHUP (nohup) stays ignored. Outside the main thread no signal
    is caught.

    Args:
        patient: treat a repeated signal like the first: a batch system sends one to every process, and torchrun
            forwards its own as well.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = stopping_signals() if _SAVE is None else (*stopping_signals(), _SAVE)
    before = {number: signal.getsignal(number) for number in caught}

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - signature of a signal handler
        if number == _SAVE:
            request.save = True
            return
        request.signal_name = signal.Signals(number).name
        if not patient and request.signal_name != "SIGHUP":
            signal.signal(number, before[signal.Signals(number)])

    try:
        for number in caught:
            signal.signal(number, note)
        yield request
    finally:
        for number in caught:
            signal.signal(number, before[number])


@contextmanager
def not_ended_by_sigusr1() -> Iterator[None]:
    """Ignore SIGUSR1, which ends a process by default, while there is nothing to save yet."""
    if _SAVE is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(_SAVE, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(_SAVE, before)
