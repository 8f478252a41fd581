"""Predict cases in worker processes on this machine, one per device; cases of a lost worker go to another one.

A worker is ``python -m app.inference.batch.process_pool`` and speaks the protocol of :mod:`app.system.worker_process`.
After the job, each line of its standard input is a case; it holds one more than it computes, to read it ahead. It
reports that it is ready, the outcome of each case, warnings, and the error that stopped it.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from app.errors import ConfigError, DeviceError, InterruptedRunError
from app.inference.batch.cohort import CaseObserver
from app.inference.batch.job import PredictJob, case_from_plain, case_to_plain, job_from_plain
from app.inference.batch.manifest import Outcome, this_worker
from app.inference.batch.output_folder import at_work
from app.progress import LOG
from app.system.worker_process import (
    DEVICE,
    Tell,
    be_worker,
    environment_of,
    error_of,
    event_of,
    how_it_ended,
    start_worker,
)
from data.datasets.layouts import Case

#: Maximum attempts before a case that keeps killing its worker is reported as failed.
MOST_ATTEMPTS: Final = 3
_MOST_WORKERS: Final = 64


def devices_of(text: str, there: int) -> tuple[str, ...]:
    """Parse the devices given by ``--devices``.

    Args:
        text: ``auto`` for every GPU, a number of them, or names such as ``cuda:0,cuda:1``.
        there: number of GPUs on this machine.

    Raises:
        ConfigError: ``text`` is none of these.
        DeviceError: there are fewer GPUs.

    Example:
        >>> devices_of("2", 4)
        ('cuda:0', 'cuda:1')
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if text == "auto" or text.isdecimal():
        wanted = there if text == "auto" else int(text)
        if text == "auto" and there == 0:
            raise DeviceError("--devices auto: no GPU is visible. Use --workers N for N processes on the CPU.")
        names = tuple(f"cuda:{number}" for number in range(wanted))
    matches = [DEVICE.match(name) for name in names]
    if not names or not all(matches):
        raise ConfigError(f"--devices takes auto, a number of GPUs, or cpu and cuda:N with commas, got {text!r}")
    most = max((int(match["index"] or 0) + 1 for match in matches if match and match[0] != "cpu"), default=0)
    if most > there:
        raise DeviceError(f"--devices {text}: there are {there} GPUs, counted from 0. Use --workers N on the CPU.")
    return names


def slots_of(workers: int) -> tuple[None, ...]:
    """One entry per worker process on the device of the job.

    Raises:
        ConfigError: ``workers`` is not from 1 to 64.
    """
    if not 1 <= workers <= _MOST_WORKERS:
        raise ConfigError(f"--workers takes 1 to {_MOST_WORKERS} processes, got {workers}")
    return (None,) * workers


@dataclass(kw_only=True)
class _Todo:
    """A case and its number of attempts."""

    case: Case
    attempts: int = 0


@dataclass(frozen=True, kw_only=True)
class InProcesses:
    """Executes cases in several processes."""

    job: PredictJob
    devices: Sequence[str | None]
    """One entry per process: its device, or None for the device of the job."""

    @property
    def name(self) -> str:
        """For the manifest."""
        return "local"

    def work(self, cases: Sequence[Case], told: CaseObserver) -> None:
        """Execute cases; a worker gets the next one when it has finished one.

        Raises:
            DataError, ConfigError, RunError, DeviceError, OSError: the error that stopped a worker that was ready, or
                all workers before they were.
            KeyboardInterrupt: this process was interrupted; the workers have ended.
        """
        if not cases:
            return
        with tempfile.TemporaryDirectory(prefix="znormseg-") as logs:
            crew = _WorkerPool(self, cases, told, Path(logs))
            try:
                crew.work()
            finally:
                crew.stop()


class _WorkerPool:
    """The workers, and the cases that each holds; apart from reading workers' output, all is done on one thread."""

    def __init__(self, engine: InProcesses, cases: Sequence[Case], told: CaseObserver, logs: Path) -> None:
        self._told = told
        self._left = len(cases)
        self._waiting = deque(_Todo(case=case) for case in cases)
        self._events: queue.SimpleQueue[tuple[_Slot, int, dict[str, Any]]] = queue.SimpleQueue()
        devices = engine.devices[: len(cases)]
        self._slots = [
            _Slot(
                name=f"worker-{number}",
                device=device,
                job=engine.job,
                environment=environment_of(device, len(devices), given=dict(os.environ)),
                events=self._events,
                log=logs / f"worker-{number}.txt",
            )
            for number, device in enumerate(devices, 1)
        ]

    def work(self) -> None:
        """Run until every case is done or has failed."""
        for slot in self._slots:
            slot.start()
        while self._left:
            slot, start, event = self._events.get()
            if start == slot.starts:
                self._take(slot, event)

    def stop(self) -> None:
        """End every worker; one that is still working stops as on SIGTERM."""
        for slot in self._slots:
            slot.stop(at_once=self._left > 0)
        for slot in self._slots:
            slot.join()

    def _take(self, slot: _Slot, event: dict[str, Any]) -> None:
        if "log" in event:
            LOG.log(event["level"], "%s", event["log"])
        elif "begun" in event:
            self._told.begun(event["begun"], event["what"])
        elif "error" in event:
            slot.error = event
        elif "case" in event:
            todo = slot.held.pop(event["case"])
            self._end(slot, todo, content=event.get("content"), message=event.get("message"))
        elif "gone" in event:
            self._gone(slot, event["gone"])
        else:
            slot.ready = True
        for one in self._slots:
            self._hand_out(one)

    def _end(self, slot: _Slot, todo: _Todo, *, content: dict[str, Any] | None, message: str | None) -> None:
        self._left -= 1
        worker = this_worker(slot.device or (slot.seen_device or "unknown"), slot.name)
        self._told.ended(
            Outcome(case=todo.case.id, content=content, message=message, worker=worker, attempts=todo.attempts)
        )

    def _hand_out(self, slot: _Slot) -> None:
        """Give a worker up to two cases; a case that was with a lost worker is given out by itself."""
        while slot.ready and self._waiting:
            again = self._waiting[0].attempts > 0 or any(todo.attempts > 1 for todo in slot.held.values())
            if len(slot.held) >= (1 if again else 2):
                return
            todo = self._waiting.popleft()
            todo.attempts += 1
            slot.held[todo.case.id] = todo
            slot.tell(case_to_plain(todo.case))

    def _gone(self, slot: _Slot, status: int) -> None:
        """Handle a worker that ended while cases are left."""
        was_ready, slot.ready = slot.ready, False
        stopped = slot.error is not None and slot.error["error"] == InterruptedRunError.__name__
        if slot.error is not None and was_ready and not stopped:
            raise error_of(slot.error, slot.name)
        how = how_it_ended(status)
        lost, slot.held = list(slot.held.values()), {}
        then = "what it had is done again" if any(todo.attempts < MOST_ATTEMPTS for todo in lost) else "another begins"
        for todo in reversed(lost):
            if todo.attempts < MOST_ATTEMPTS:
                self._waiting.appendleft(todo)
            else:
                text = f"case {todo.case.id}: its process {how}, {todo.attempts} times. {slot.last_words()}".rstrip()
                self._end(slot, todo, content=None, message=text)
        if self._left == 0:
            return
        if was_ready:
            LOG.warning("%s %s; %s", slot.name, how, then)
            slot.start()
            return
        slot.retired = slot.error or {"error": "OSError", "message": f"its process {how}. {slot.last_words()}"}
        if all(one.retired is not None for one in self._slots):
            raise error_of(slot.retired, slot.name)
        LOG.warning("%s: %s The others go on.", slot.name, slot.retired["message"])


@dataclass(kw_only=True, eq=False)
class _Slot:
    """A device: runs one process, and a new one whenever a process is lost."""

    name: str
    device: str | None
    job: PredictJob
    environment: dict[str, str]
    events: queue.SimpleQueue[tuple[_Slot, int, dict[str, Any]]]
    log: Path
    held: dict[str, _Todo] = field(default_factory=dict)
    """Cases that its process holds, by case id."""
    ready: bool = False
    error: dict[str, Any] | None = None
    """Error that its process reported before it ended."""
    retired: dict[str, Any] | None = None
    """Why no further process is started."""
    seen_device: str | None = None
    starts: int = 0
    process: subprocess.Popen[str] | None = None
    thread: threading.Thread | None = None

    def start(self) -> None:
        """Start a process, and a thread that forwards what it reports."""
        self._close_input()  # of the previous process
        self.starts += 1
        self.error = None
        device = "cpu" if self.device == "cpu" else "cuda" if self.device else self.job.device
        with self.log.open("w", encoding="utf-8") as stderr:
            self.process = start_worker("app.inference.batch.process_pool", self.environment, stderr)
        self.thread = threading.Thread(target=self._pass_on, args=(self.process, self.starts), daemon=True)
        self.thread.start()
        self.tell({"job": replace(self.job, device=device).to_plain(), "name": self.name, "device": self.device})

    def tell(self, content: dict[str, Any]) -> None:
        """Send a line to the process; if the process is gone, its thread reports that."""
        assert self.process is not None
        assert self.process.stdin is not None
        with suppress(OSError, ValueError):
            self.process.stdin.write(json.dumps(content) + "\n")
            self.process.stdin.flush()

    def stop(self, *, at_once: bool) -> None:
        """Make the process end: after the cases it holds, or at once, as on SIGTERM."""
        if self.process is None or self.process.stdin is None:
            return
        if not at_once:
            self.tell({"end": True})
        self._close_input()

    def _close_input(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            with suppress(OSError):  # input that it has not read yet is lost
                self.process.stdin.close()

    def join(self) -> None:
        """Wait until the process has ended."""
        if self.process is not None:
            self.process.wait()
        if self.thread is not None:
            self.thread.join()

    def last_words(self) -> str:
        """Last line that the process wrote to stderr."""
        lines = [line.strip() for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines()]
        last = next((line for line in reversed(lines) if line), "")
        return f"It wrote: {last}" if last else ""

    def _pass_on(self, process: subprocess.Popen[str], start: int) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                event = event_of(line)
                if event is not None:
                    self.seen_device = event.get("ready", self.seen_device)
                    self.events.put((self, start, event))
        self.events.put((self, start, {"gone": process.wait()}))


class _Telling:
    """Reports the events of cases to the parent process."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell

    def begun(self, case: str, what: str = "") -> None:
        """See :class:`app.inference.batch.cohort.CaseObserver`."""
        self._tell({"begun": case, "what": what})

    def ended(self, outcome: Outcome) -> None:
        """See :class:`app.inference.batch.cohort.CaseObserver`."""
        self._tell({"case": outcome.case, "content": outcome.content, "message": outcome.message})


def _main() -> int:
    """Run the job and the cases from standard input; returns 0 after the message that there are no more cases."""
    return be_worker(_work)


def _work(lines: Iterator[str], tell: Tell) -> None:
    told = json.loads(next(lines, ""))
    cases: queue.SimpleQueue[Case | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines, cases), daemon=True).start()
    job = job_from_plain(told["job"])
    model, runtime = job.load()
    engine = job.engine(model, runtime, worker=told["name"], device=told["device"])
    tell({"ready": runtime.device_name})
    with at_work(job.output):
        engine.work(iter(cases.get, None), _Telling(tell), stop_cases=lambda: cases.put(None))


def _listen(lines: Iterator[str], cases: queue.SimpleQueue[Case | None]) -> None:
    """Read cases from standard input; if it closes without an end message, the parent process is gone."""
    for line in lines:
        content = json.loads(line)
        if "end" in content:
            cases.put(None)
            return
        cases.put(case_from_plain(content))
    cases.put(None)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(_main())
