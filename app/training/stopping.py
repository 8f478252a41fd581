"""Stop a run between two steps when the user or the system asks for it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class StopRequest:
    """Whether someone asked to stop, and how."""

    signal_name: str | None = None


@contextmanager
def stop_on_signals(*, patient: bool = False) -> Iterator[StopRequest]:
    """Note SIGINT (Ctrl-C) and SIGTERM instead of ending at once; the old handlers come back afterwards.

    A second signal of the same kind ends the process as usual. Outside the main thread nothing is caught.

    Args:
        patient: take second signals as the first: a batch system sends one to every process, and torchrun hands its own
            on to them.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    caught = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in caught}

    def note(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - the shape of a handler
        request.signal_name = signal.Signals(number).name
        if not patient:
            signal.signal(number, before[signal.Signals(number)])

    try:
        for number in caught:
            signal.signal(number, note)
        yield request
    finally:
        for number in caught:
            signal.signal(number, before[number])
