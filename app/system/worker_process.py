"""Worker subprocesses: start-up, and the JSON-lines protocol they speak with their parent.

The parent sends one line of JSON on a worker's standard input and keeps the pipe open. When it closes, the parent is
gone, and the worker stops as if by SIGTERM. The worker writes events to standard output, one JSON object per line.
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
#: Errors that keep their type across the pipe; any other error is a bug and becomes a RuntimeError.
_ERRORS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind for kind in (DataError, ConfigError, RunError, DeviceError, InterruptedRunError, OSError)
}
#: Prefix of every event, which distinguishes it from output printed by a library.
_MARK: Final = "znormseg-worker"

Tell = Callable[[dict[str, Any]], None]


def environment_of(device: str | None, processes: int, *, given: dict[str, str]) -> dict[str, str]:
    """Return the environment of a worker; under ``cuda:N`` only that GPU is visible, so results do not depend on N.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N``, or None for the device of the job.
        processes: number of concurrent workers; they share the processors unless the user has set OMP_NUM_THREADS.
        given: environment of this process.

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
    """Start a worker, with text pipes for its standard input and output.

    Args:
        module: module to run as ``__main__``, such as ``app.inference.batch.process_pool``.
        environment: as from :func:`environment_of`.
        stderr: file for its standard error.
    """
    # In a new session, so that Ctrl-C reaches only the parent, which then stops the worker.
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
    """Describe the exit status of a process in words.

    Example:
        >>> how_it_ended(-9)
        'was ended by SIGKILL'
    """
    return f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with {status}"


def be_worker(work: Callable[[Iterator[str], Tell], None]) -> int:
    """Run a worker, forwarding its warnings and the error that stops it to the parent.

    Args:
        work: called with the lines of standard input and a function that sends an event.

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
        with suppress(OSError):  # the parent may be gone
            tell({"error": name_of(error), "message": message(error)})
        return 1
    return 0


def name_of(error: BaseException) -> str:
    """Return the type name under which an error is sent, so that the parent ends with the same exit code."""
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError.__name__
    if exit_code(error) == EXIT_MACHINE and not isinstance(error, DeviceError):
        return OSError.__name__
    return next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), type(error).__name__)


def error_of(event: Mapping[str, Any], who: str) -> Exception:
    """Rebuild a worker's error from its event: ``error``, a name from :func:`name_of`, and ``message``."""
    return _ERRORS.get(event["error"], RuntimeError)(f"{who}: {event['message']}")


def teller() -> Tell:
    """Return a thread-safe function that sends an event to the parent.

    Events are dropped once nobody reads them; the worker then notices that its standard input has ended, saves its
    work and stops.
    """
    out, writing = sys.stdout, threading.Lock()

    def tell(event: dict[str, Any]) -> None:
        with writing, suppress(BrokenPipeError):
            out.write(f"{_MARK} {json.dumps(event)}\n")
            out.flush()

    return tell


def event_of(line: str) -> dict[str, Any] | None:
    """Parse the event in a line of a worker's output; None if the line is not an event."""
    mark, _, text = line.partition(" ")
    try:
        event = json.loads(text) if mark == _MARK else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


class Passing(logging.Handler):
    """A logging handler that forwards records to the parent."""

    def __init__(self, tell: Tell) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record as an event."""
        self._tell({"log": record.getMessage(), "level": record.levelno})


def stop_on_sigterm() -> None:
    """Raise KeyboardInterrupt on SIGTERM, and ignore Ctrl-C, which the parent handles."""

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001 - signature of a signal handler
        raise KeyboardInterrupt("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def lines_in() -> Iterator[str]:
    """Yield the lines of standard input, unbuffered: a thread blocked on a buffer would hold its lock at exit."""
    found = b""
    while part := os.read(0, 1):
        found += part
        if part == b"\n":
            yield found.decode()
            found = b""


def stop_when_alone() -> None:
    """Wait until standard input closes, which means that the parent is gone; then stop this process by SIGTERM."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
