"""What processes that this program starts as its workers have in common, and what they tell whoever started them.

A worker's standard input begins with a line of JSON and stays open: when it closes, the process that started it is
gone, and the worker stops as if by SIGTERM. Its standard output has one JSON object a line.
"""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Final

import app
from app.errors import EXIT_MACHINE, ConfigError, DeviceError, InterruptedRunError, RunError, exit_code, message
from app.progress import LOG
from app.system.process import threads_of_each
from data.errors import DataError

DEVICE: Final = re.compile(r"^(cpu|cuda|cuda:(?P<index>\d+))$")
#: Told by name; others are faults.
_ERRORS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind for kind in (DataError, ConfigError, RunError, DeviceError, InterruptedRunError, OSError)
}
#: What a process prints so that its line is not taken for something that a library printed.
_MARK: Final = "znormseg-worker"

Tell = Callable[[dict[str, Any]], None]


def environment_of(device: str | None, processes: int, *, given: dict[str, str]) -> dict[str, str]:
    """The environment of a worker: it sees its own GPU alone, so that runs do not depend on which one it is.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N``, or None for that of the job.
        processes: that work at once; they share the processors, unless the user has set OMP_NUM_THREADS.
        given: the environment of this process.

    Raises:
        ConfigError: ``CUDA_VISIBLE_DEVICES`` hides the device.
    """
    root = str(Path(app.__file__).resolve().parent.parent)
    found = {**given, "PYTHONPATH": os.pathsep.join(part for part in (root, given.get("PYTHONPATH")) if part)}
    found["OMP_NUM_THREADS"] = threads_of_each(processes, given=given)
    match = DEVICE.match(device or "")
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    elif match is not None and match["index"] is not None:
        visible = [part for part in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        index = int(match["index"])
        if visible and index >= len(visible):
            raise ConfigError(f"device {device}: CUDA_VISIBLE_DEVICES leaves {len(visible)}, counted from 0")
        found["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return found


def start_worker(module: str, environment: Mapping[str, str], stderr: IO[str]) -> subprocess.Popen[str]:
    """Start a worker; its standard input and output are pipes of text.

    Args:
        module: whose ``__main__`` it is, such as ``app.inference.batch.process_pool``.
        environment: of :func:`environment_of`.
        stderr: file for what it writes there.
    """
    # A session of its own: Ctrl-C reaches the process that starts it alone, which then stops it.
    return subprocess.Popen(  # noqa: S603 - this program itself
        [sys.executable, "-P", "-m", module],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
    )


def how_it_ended(status: int) -> str:
    """What became of a process, in words.

    Example:
        >>> how_it_ended(-9)
        'was ended by SIGKILL'
    """
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"


def be_worker(work: Callable[[Iterator[str], Tell], None]) -> int:
    """What a worker's process does: its work, telling warnings and the error that stops it.

    Args:
        work: given the lines of standard input and a function that tells an event.

    Returns:
        the exit status: 0, or 1 after an error.
    """
    stop_on_sigterm()
    tell = teller()
    LOG.setLevel(logging.WARNING)
    LOG.propagate = False
    LOG.addHandler(Passing(tell))
    try:
        work(lines_in(), tell)
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):  # nobody may be listening any more
            tell({"error": name_of(error), "message": message(error)})
        return 1
    return 0


def name_of(error: BaseException) -> str:
    """How an error is told: by the kind that has its exit code."""
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError.__name__
    if exit_code(error) == EXIT_MACHINE and not isinstance(error, DeviceError):
        return OSError.__name__
    return next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), type(error).__name__)


def error_of(event: Mapping[str, Any], who: str) -> Exception:
    """The error that a worker told by ``error`` (a name of :func:`name_of`) and ``message``."""
    return _ERRORS.get(event["error"], RuntimeError)(f"{who}: {event['message']}")


def teller() -> Tell:
    """A function that prints an event for whoever started this process; from any thread.

    Events are dropped once nobody reads them: the end of standard input stops the worker, with everything saved.
    """
    out, writing = sys.stdout, threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        with writing, suppress(BrokenPipeError):
            out.write(f"{_MARK} {json.dumps(event)}\n")
            out.flush()

    return tell


def event_of(line: str) -> dict[str, Any] | None:
    """The event in a line of a worker's output; None where something else printed it."""
    mark, _, text = line.partition(" ")
    try:
        event = json.loads(text) if mark == _MARK else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


class Passing(logging.Handler):
    """Log lines, for the process that started this one."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Tell a line."""
        self._tell({"log": record.getMessage(), "level": record.levelno})


def stop_on_sigterm() -> None:
    """SIGTERM unwinds as Ctrl-C does; Ctrl-C itself is for the process that started this one."""

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001 - the shape of a handler
        raise KeyboardInterrupt("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def lines_in() -> Iterator[str]:
    """Lines of standard input; read without a buffer, whose lock a thread would still hold at the end."""
    found = b""
    while part := os.read(0, 1):
        found += part
        if part == b"\n":
            yield found.decode()
            found = b""


def stop_when_alone() -> None:
    """Wait for the end of standard input, which is the end of the process that started this one; then stop."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
