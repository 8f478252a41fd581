"""Stop a run, or save it, between two steps when the user or the system asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from app.system.process import stopping_signals

#: Asks for a checkpoint; Windows has no such signal.
_SAVE = getattr(signal, "SIGUSR1", None)


@dataclass
class StopRequest:
    """What a signal asked for."""

    signal_name: str | None = None
    """The one that asked to save and stop."""
    save: bool = False
    """Whether SIGUSR1 asked to save and go on; who has done it sets it back."""


@contextmanager
def stop_on_signals(*, patient: bool = False) -> Iterator[StopRequest]:
    """Note SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 instead of ending at once; old handlers come back afterwards.

    A second SIGINT or SIGTERM of the same kind ends the process as usual; of SIGHUP, the kernel and the shell of a
    closed terminal both send one. A SIGHUP that is ignored (nohup) stays so. Outside the main thread nothing is caught.

    Args:
        patient: take second signals as the first: a batch system sends one to every process, and torchrun hands its own
            on to them.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    stopping = stopping_signals()
    caught = stopping if _SAVE is None else (*stopping, _SAVE)
    before = {number: signal.getsignal(number) for number in caught}

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the shape of a handler
        request.signal_name = signal.Signals(number).name
        if not patient and request.signal_name != "SIGHUP":
            signal.signal(number, before[signal.Signals(number)])

    def note_save(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        request.save = True

    try:
        for number in stopping:
            signal.signal(number, note)
        if _SAVE is not None:
            signal.signal(_SAVE, note_save)
        yield request
    finally:
        for number in caught:
            signal.signal(number, before[number])


@contextmanager
def not_ended_by_sigusr1() -> Iterator[None]:
    """Let SIGUSR1 do nothing, while there is nothing to save yet; by default it ends a process."""
    if _SAVE is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(_SAVE, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(_SAVE, before)
