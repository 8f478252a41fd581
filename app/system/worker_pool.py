"""Worker subprocesses: a pool that hands out tasks and replaces lost workers, and the worker's side of the protocol.

The parent writes lines of JSON to a worker's standard input: the job, the tasks, and a message that no more will come.
If the pipe closes before that message, the parent is gone, and the worker stops as if by SIGTERM. The worker writes
events to standard output, one JSON object per line: a ready message, the progress and the result of each task, log
records, and the error that stops it.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from app.errors import EXIT_MACHINE, ConfigError, DeviceError, InterruptedRunError, RunError, exit_code, message
from app.progress import LOG
from app.system.process import how_it_ended, own_environment, repeat_ignored_interrupts, threads_of_each
from data.errors import DataError

_DEVICE: Final = re.compile(r"cpu|cuda|cuda:(?P<index>\d+)")
_MAX_WORKERS: Final = 64
#: Time for training to finish a step and save before it receives a second signal.
_SAVING_SECONDS: Final = 60.0
#: Errors that keep their type across the pipe; any other error is a bug and becomes a RuntimeError.
_ERRORS: Final[dict[str, type[Exception]]] = {
    kind.__name__: kind for kind in (DataError, ConfigError, RunError, DeviceError, InterruptedRunError, OSError)
}
#: Prefix of every event, which distinguishes it from output printed by a library.
_MARK: Final = "znormseg-worker"

Send = Callable[[dict[str, Any]], None]
#: Tasks as (id, content); None after the last one.
TaskQueue = queue.SimpleQueue[tuple[str, Any] | None]


def device_names(text: str) -> tuple[str, ...]:
    """Split comma-separated device names; return an empty tuple unless each is ``cpu``, ``cuda`` or ``cuda:N``."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    return names if all(_DEVICE.fullmatch(name) for name in names) else ()


def default_devices(workers: int, *, option: str) -> tuple[None, ...]:
    """Return one None per worker, for the device of the job.

    Raises:
        ConfigError: ``workers``, the value of ``option``, is not from 1 to 64.
    """
    if not 1 <= workers <= _MAX_WORKERS:
        raise ConfigError(f"{option} takes 1 to {_MAX_WORKERS} processes, got {workers}")
    return (None,) * workers


def worker_environment(device: str | None, workers: int, *, given: dict[str, str]) -> dict[str, str]:
    """Return the environment of a worker; under ``cuda:N`` only that GPU is visible, so results do not depend on N.

    Args:
        device: ``cpu``, ``cuda``, ``cuda:N``, or None for the device of the job.
        workers: number of concurrent workers; they share the processors unless the user has set OMP_NUM_THREADS.
        given: environment of this process.

    Raises:
        ConfigError: ``CUDA_VISIBLE_DEVICES`` hides the device.
    """
    environment = own_environment(given) | {"OMP_NUM_THREADS": threads_of_each(workers, given=given)}
    match = _DEVICE.fullmatch(device or "")
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    elif match is not None and match["index"] is not None:
        visible = [part for part in given.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        index = int(match["index"])
        if visible and index >= len(visible):
            raise ConfigError(
                f"device {device}: CUDA_VISIBLE_DEVICES leaves {len(visible)} devices visible, counted from 0. "
                "Use one of them."
            )
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return environment


@dataclass(frozen=True, kw_only=True)
class TaskAttempt:
    """An attempt at a task."""

    task: str
    number: int
    """From 1."""
    worker: str
    """Name of the worker."""
    device: str
    """``cpu`` or ``cuda:N``; ``unknown`` if the worker was lost before it reported its device."""


@dataclass(kw_only=True)
class WorkerPool:
    """Tasks and the workers that do them; callbacks are called on the thread of :meth:`run`."""

    module: str
    """Module that a worker runs as ``__main__``; it calls :func:`be_worker`."""
    job: Callable[[str, str | None], dict[str, Any]]
    """Returns what a worker with a given name and device needs for all of its tasks, as plain data."""
    tasks: Mapping[str, Any]
    """Content of each task as plain data, by id, in the order in which they are handed out."""
    devices: Sequence[str | None]
    """One entry per worker: its device, or None for the device of the job."""
    logs: Path
    """Folder for the stderr of the workers."""
    on_progress: Callable[[str, Any], None]
    """Called with a task's id and the progress that its worker reports."""
    on_done: Callable[[TaskAttempt, Any], None]
    """Called with the result of a task."""
    on_lost: Callable[[TaskAttempt, str, Path], None]
    """Called after the last attempt at a task whose worker died, with how it ended and the worker's stderr."""
    max_attempts: int = 1
    reuse: bool = False
    """Whether a worker does one task after another, and receives the next one early in order to prefetch its input.
    Otherwise each task has its own process, which is named after it."""

    def run(self) -> None:
        """Do all tasks; a worker gets the next one when it has finished one.

        If a worker reports an error or this process is interrupted, the other workers stop as on SIGTERM.

        Raises:
            DataError, ConfigError, RunError, DeviceError, OSError, InterruptedRunError: a worker reported this error
                after it was ready, or no worker could start and the last one failed with this error.
            KeyboardInterrupt: this process was interrupted; the workers have ended.
        """
        self._left = len(self.tasks)
        self._waiting = deque(self.tasks)
        self._attempts = Counter[str]()
        events: queue.SimpleQueue[tuple[WorkerSlot, dict[str, Any]]] = queue.SimpleQueue()
        devices = self.devices[: len(self.tasks)]
        self._slots = [
            WorkerSlot(
                name=f"worker-{number}",
                device=device,
                environment=worker_environment(device, len(devices), given=dict(os.environ)),
                events=events,
            )
            for number, device in enumerate(devices, 1)
        ]
        try:
            for slot in self._slots:
                self._start(slot)
            while self._left:
                self._handle(*events.get())
        finally:
            for slot in self._slots:
                slot.close(finish=self._left == 0)
            for slot in self._slots:
                slot.join()

    def _start(self, slot: WorkerSlot) -> None:
        """Start a worker, unless it would have nothing to do."""
        if not self._waiting and not self.reuse:
            return
        slot.ready = not self.reuse
        if not self.reuse:
            slot.name = self._waiting[0]
        slot.start(self.module, self.logs / f"{slot.name.replace(' ', '-')}.txt")
        slot.send({"job": self.job(slot.name, slot.device)})
        self._hand_out(slot)

    def _hand_out(self, slot: WorkerSlot) -> None:
        """Give a worker as many tasks as it may hold: a task that a lost worker held must be its only one."""
        while slot.ready and self._waiting:
            by_itself = self._attempts[self._waiting[0]] > 0 or any(self._attempts[task] > 1 for task in slot.held)
            ahead = max(1, min(slot.ahead, len(self._waiting) // len(self._slots)))
            if len(slot.held) >= (1 + ahead if self.reuse and not by_itself else 1):
                return
            task = self._waiting.popleft()
            self._attempts[task] += 1
            slot.held.append(task)
            slot.send({"task": task, "content": self.tasks[task]})

    def _handle(self, slot: WorkerSlot, event: dict[str, Any]) -> None:
        match event:
            case {"log": text, "level": level}:
                LOG.log(level, "%s", text if self.reuse else f"{slot.name}: {text}")
            case {"progress": progress, "task": task}:
                self.on_progress(task, progress)
            case {"ready": device}:
                slot.ready, slot.reported_device, slot.ahead = True, device, event.get("ahead", 1)
            case {"done": result, "task": task}:
                slot.held.remove(task)
                self._left -= 1
                if not self.reuse:
                    slot.ready = False
                    slot.close(finish=True)
                self.on_done(self._attempt(slot, task), result)
            case {"error": _}:
                slot.error = event
            case {"gone": status} if slot.closed:
                self._start(slot)
            case {"gone": status}:
                self._replace(slot, how_it_ended(status))
        for one in self._slots:
            self._hand_out(one)

    def _attempt(self, slot: WorkerSlot, task: str) -> TaskAttempt:
        device = slot.device or slot.reported_device or "unknown"
        return TaskAttempt(task=task, number=self._attempts[task], worker=slot.name, device=device)

    def _replace(self, slot: WorkerSlot, how: str) -> None:
        """Handle a worker that ended while tasks were left."""
        was_ready, slot.ready = slot.ready, False
        retried = self.max_attempts > 1 and slot.error and slot.error["error"] == InterruptedRunError.__name__
        if slot.error is not None and was_ready and not retried:
            raise error_of(slot.error, slot.name)
        lost, slot.held = slot.held, []
        again = [task for task in lost if self._attempts[task] < self.max_attempts]
        self._waiting.extendleft(reversed(again))
        for task in lost:
            if task not in again:
                self._left -= 1
                self.on_lost(self._attempt(slot, task), how, slot.log)
        if self._left == 0:
            return
        if was_ready:
            retrying = f" and retrying {', '.join(again)}" if again else ""
            LOG.warning("%s %s; starting a new worker%s.", slot.name, how, retrying)
            self._start(slot)
            return
        text = f"its process {how}. {last_output(slot.log)}".rstrip()
        slot.retired = slot.error or {"error": "OSError", "message": text}
        if all(one.retired is not None for one in self._slots):
            raise error_of(slot.retired, slot.name)
        LOG.warning("%s: %s The other workers continue.", slot.name, slot.retired["message"])


@dataclass(kw_only=True, eq=False)
class WorkerSlot:
    """A slot for a worker on a device: runs one process at a time, and starts another when that one has ended.

    :class:`WorkerPool` has one for each worker of a fixed set of tasks. The service, whose tasks have no end, uses
    slots directly.
    """

    name: str
    device: str | None
    """Device of its processes; None for the device of the job."""
    environment: dict[str, str]
    """Environment of its processes, from :func:`worker_environment`."""
    events: queue.SimpleQueue[tuple[WorkerSlot, dict[str, Any]]]
    """Receives the events of its processes, and ``{"gone": status}`` when one has ended."""
    held: list[str] = field(default_factory=list)
    """Ids of the tasks that its process holds."""
    ready: bool = False
    ahead: int = 1
    """Maximum number of tasks that its process receives early, as it reported; fewer near the end, so that every worker
    has some left."""
    error: dict[str, Any] | None = None
    """Error that its process reported before it ended."""
    retired: dict[str, Any] | None = None
    """Why no further process is started."""
    reported_device: str | None = None
    closed: bool = False
    """Whether its process was asked to end."""
    log: Path = field(init=False)
    process: subprocess.Popen[str] | None = None
    thread: threading.Thread | None = None

    def start(self, module: str, log: Path) -> None:
        """Start a process, and a thread that forwards its events."""
        self.close(finish=False)  # the pipe to the previous process
        self.closed, self.error, self.log = False, None, log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as stderr:
            # In a new session, so that Ctrl-C reaches only the parent, which then stops the worker.
            self.process = subprocess.Popen(  # noqa: S603 - this program itself
                [sys.executable, "-P", "-m", module],
                env=self.environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )
        self.thread = threading.Thread(target=self._forward, args=(self.process,), daemon=True)
        self.thread.start()

    def send(self, content: dict[str, Any]) -> None:
        """Send a line to the process; if the process is gone, its thread reports that."""
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()

    def close(self, *, finish: bool) -> None:
        """Make the process end: after the tasks it holds, or at once, as on SIGTERM."""
        if self.process is None or self.process.stdin is None:
            return
        if finish:
            self.send({"end": True})
        self.closed = True
        with suppress(OSError):  # input that the process has not read yet is lost
            self.process.stdin.close()

    def join(self) -> None:
        """Wait until the process has ended."""
        if self.process is not None:
            self.process.wait()
        if self.thread is not None:
            self.thread.join()

    def _forward(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                if (event := _event_of(line)) is not None:
                    self.events.put((self, event))
        self.events.put((self, {"gone": process.wait()}))


def last_output(log: Path) -> str:
    """Return a sentence with the last line that a worker wrote to stderr; empty if it wrote nothing."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    last = next((line for line in reversed(lines) if line), "")
    return f"Its last output: {last}" if last else ""


def _event_of(line: str) -> dict[str, Any] | None:
    """Parse the event in a line of a worker's output; None if the line is not an event."""
    mark, _, text = line.partition(" ")
    try:
        event = json.loads(text) if mark == _MARK else None
    except ValueError:
        return None
    return event if isinstance(event, dict) else None


def be_worker(work: Callable[[Any, TaskQueue, Send], None]) -> int:
    """Run a worker, forwarding its warnings and the error that stops it to the parent.

    Args:
        work: called with the job, the queue of tasks and a thread-safe function that sends an event to the parent.

    Returns:
        the exit status: 0, or 1 after an error.
    """
    stopping = threading.Event()

    def interrupt(number: int, frame: object) -> None:  # noqa: ARG001 - signature of a signal handler
        stopping.set()
        raise KeyboardInterrupt("stopped by SIGTERM")

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    out, writing = sys.stdout, threading.Lock()

    def send(event: dict[str, Any]) -> None:
        # If nobody reads events, the parent is gone, and the worker is about to notice that its input has closed.
        with writing, suppress(BrokenPipeError):
            out.write(f"{_MARK} {json.dumps(event)}\n")
            out.flush()

    LOG.setLevel(logging.WARNING)
    LOG.propagate = False
    LOG.addHandler(_Forwarding(send))
    tasks: TaskQueue = queue.SimpleQueue()
    try:
        lines = _input_lines()
        job = json.loads(next(lines))["job"]
        threading.Thread(target=_receive, args=(lines, tasks, stopping), daemon=True).start()
        with repeat_ignored_interrupts(lambda: signal.SIGTERM):
            work(job, tasks, send)
    except BaseException as error:
        traceback.print_exc()
        with suppress(OSError):  # the parent may be gone
            send({"error": error_name(error), "message": message(error)})
        return 1
    return 0


def _input_lines() -> Iterator[str]:
    """Yield the lines of standard input, unbuffered: a thread blocked in a buffered read keeps its lock at exit."""
    line = b""
    while part := os.read(0, 1):
        line += part
        if part == b"\n":
            yield line.decode()
            line = b""


def _receive(lines: Iterator[str], tasks: TaskQueue, stopping: threading.Event) -> None:
    """Queue the tasks from standard input; if it closes without an end message, the parent is gone."""
    for line in lines:
        content = json.loads(line)
        if "end" in content:
            tasks.put(None)
            return
        tasks.put((content["task"], content["content"]))
    tasks.put(None)
    # Repeated, because a signal that arrives just before the main thread blocks in a system call is handled only when
    # that call returns. A handler that has removed itself is given time: training stops after the current step, and a
    # second signal would end it before it has saved.
    handler = signal.getsignal(signal.SIGTERM)
    while not stopping.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.wait(1)
        if signal.getsignal(signal.SIGTERM) is not handler:
            stopping.wait(_SAVING_SECONDS)


class _Forwarding(logging.Handler):
    """A logging handler that sends records to the parent."""

    def __init__(self, send: Send) -> None:
        super().__init__()
        self._send = send

    def emit(self, record: logging.LogRecord) -> None:
        self._send({"log": record.getMessage(), "level": record.levelno})


def error_name(error: BaseException) -> str:
    """Return the type name under which an error is sent, so that the parent ends with the same exit code."""
    if isinstance(error, KeyboardInterrupt):
        return InterruptedRunError.__name__
    if exit_code(error) == EXIT_MACHINE and not isinstance(error, DeviceError):
        return OSError.__name__
    return next((name for name, kind in _ERRORS.items() if isinstance(error, kind)), type(error).__name__)


def error_of(event: Mapping[str, Any], who: str) -> Exception:
    """Rebuild a worker's error from its event: ``error``, a name from :func:`error_name`, and ``message``."""
    return _ERRORS.get(event["error"], RuntimeError)(f"{who}: {event['message']}")
