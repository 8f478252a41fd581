"""Run folds in worker processes, one per device; workers report to their parent in JSON lines.

A worker is ``python -m app.experiments.crossval.workers``. It reads its job from the first line of standard input, as
JSON. Standard input then stays open: when it closes, the parent is gone, and the worker saves everything and stops as
if by SIGTERM. Standard output has one JSON object per line: progress, warnings and the outcome.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app.errors import ConfigError, DeviceError, message
from app.progress import LOG, Progress
from app.system.worker_process import (
    DEVICE,
    Tell,
    be_worker,
    environment_of,
    error_of,
    event_of,
    how_it_ended,
    name_of,
    start_worker,
    stop_when_alone,
)


@dataclass(frozen=True, kw_only=True)
class FoldJob:
    """The job of one worker: one fold."""

    data: str
    out: str
    fold: int
    follow_links: bool
    needs_cuda: bool = False
    """Whether the worker must see a GPU."""


def fold_slots(devices: str | None, jobs: int | None, *, config_device: str) -> tuple[str | None, ...]:
    """Return one entry per process for working on folds: a device, or None for the config's device.

    Args:
        devices: comma-separated names, such as ``cuda:0,cuda:1``.
        jobs: number of processes on the config's device.
        config_device: ``runtime.device``.

    Returns:
        the devices; a single None if all work is done in the current process.

    Raises:
        ConfigError: both are given, one of them is invalid, or ``devices`` is given and the config names a device too.

    Example:
        >>> fold_slots("cuda:0,cuda:1", None, config_device="auto")
        ('cuda:0', 'cuda:1')
    """
    if devices is not None and jobs is not None:
        raise ConfigError("give either --devices or --jobs")
    if devices is None:
        if jobs is not None and not 1 <= jobs <= 64:
            raise ConfigError(f"--jobs takes 1 to 64 processes, got {jobs}")
        return (None,) * (jobs or 1)
    names = tuple(name.strip() for name in devices.split(",") if name.strip())
    if not names or not all(DEVICE.match(name) for name in names):
        raise ConfigError(f"--devices takes cpu, cuda and cuda:N with commas between, got {devices!r}")
    if config_device != "auto":
        raise ConfigError(
            f"--devices says where folds are worked on, and so does runtime.device: {config_device}. Leave one out."
        )
    return names


def work_in_processes(
    jobs: Sequence[FoldJob],
    devices: Sequence[str | None],
    *,
    logs: Path,
    on_progress: Callable[[int, Progress], None],
    on_done: Callable[[int], None],
) -> None:
    """Run jobs in worker processes, one per device; a device that finishes a job takes the next one.

    If one fails, or this process is interrupted, the others are stopped by SIGTERM and save everything.

    Args:
        jobs: the folds to do.
        devices: devices from :func:`fold_slots`.
        logs: folder for the stderr of the processes.
        on_progress: called with the fold and its progress, on the caller's thread.
        on_done: called with the fold that is done, on the caller's thread.

    Raises:
        DataError, ConfigError, RunError, DeviceError, OSError: the error of the first process that failed.
        KeyboardInterrupt: this process was interrupted; the others have ended.
    """
    waiting: queue.SimpleQueue[FoldJob] = queue.SimpleQueue()
    for job in jobs:
        waiting.put(job)
    told: queue.SimpleQueue[tuple[FoldJob, dict[str, Any]]] = queue.SimpleQueue()
    stopping = threading.Event()
    logs.mkdir(parents=True, exist_ok=True)
    environments = [environment_of(device, len(devices), given=dict(os.environ)) for device in devices]
    slots = [
        _Slot(device=device, environment=found, waiting=waiting, told=told, stopping=stopping, logs=logs)
        for device, found in zip(devices, environments, strict=True)
    ]
    left, failure = len(jobs), None
    try:
        for slot in slots:
            slot.start()
        while left and failure is None:
            job, event = told.get()
            if "progress" in event:
                on_progress(job.fold, Progress(job="fold", **event["progress"]))
            elif "log" in event:
                LOG.log(event["level"], "fold %d: %s", job.fold, event["log"])
            elif "error" in event:
                failure = error_of(event, f"fold {job.fold}")
            else:
                left -= 1
                on_done(job.fold)
    finally:
        stopping.set()
        for slot in slots:
            slot.stop()
        for slot in slots:
            slot.join()
    if failure is not None:
        raise failure


@dataclass(kw_only=True)
class _Slot:
    """A device and its thread, which runs one worker process after the other and forwards their messages."""

    device: str | None
    environment: dict[str, str]
    waiting: queue.SimpleQueue[FoldJob]
    told: queue.SimpleQueue[tuple[FoldJob, dict[str, Any]]]
    stopping: threading.Event
    logs: Path
    process: subprocess.Popen[str] | None = None
    starting: threading.Lock = field(default_factory=threading.Lock)
    thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        while True:
            try:
                job = self.waiting.get_nowait()
            except queue.Empty:
                return
            try:
                self._do(job)
            except Exception as error:
                self.told.put((job, {"error": name_of(error), "message": message(error)}))
            if self.stopping.is_set():
                return

    def stop(self) -> None:
        """Send SIGTERM to the running process; callers set ``stopping`` first, so that no other one is started."""
        with self.starting:
            if self.process is not None and self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)

    def join(self) -> None:
        """Wait until the last process has ended."""
        if self.thread is not None:
            self.thread.join()

    def _do(self, job: FoldJob) -> None:
        log = self.logs / f"fold-{job.fold}.txt"
        with log.open("w", encoding="utf-8") as stderr:
            with self.starting:
                if self.stopping.is_set():
                    return
                self.process = start_worker("app.experiments.crossval.workers", self.environment, stderr)
            process = self.process
            ended = self._told_by(process, job)
            status = process.wait()
        if not ended:
            how = how_it_ended(status)
            text = f"its process {how} and did not say why; {log} has what it wrote. The same command goes on."
            self.told.put((job, {"error": "OSError", "message": text}))

    def _told_by(self, process: subprocess.Popen[str], job: FoldJob) -> bool:
        """Forward every line of the process, and return whether it reported its outcome."""
        assert process.stdin is not None
        assert process.stdout is not None
        content = {**vars(job), "needs_cuda": (self.device or "").startswith("cuda")}
        ended = False
        with process.stdin, process.stdout:
            try:
                process.stdin.write(json.dumps(content) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                return False
            for line in process.stdout:
                event = event_of(line)
                if event is not None:
                    ended = ended or bool({"error", "done"} & event.keys())
                    self.told.put((job, event))
        return ended


def _main() -> int:
    """Do the job given on standard input, and return 0 once it is done."""
    return be_worker(_work)


def _work(lines: Iterator[str], tell: Tell) -> None:
    job = FoldJob(**json.loads(next(lines)))
    threading.Thread(target=stop_when_alone, daemon=True).start()
    _do_job(job, tell)
    tell({"done": True})


def _do_job(job: FoldJob, tell: Tell) -> None:
    from app.experiments.crossval.fold import work_on_fold
    from app.experiments.crossval.folds import begun
    from data.datasets.source import DataSource

    if job.needs_cuda:
        import torch

        if not torch.cuda.is_available():
            raise DeviceError("no CUDA device is visible to its process. Give other --devices.")
    data = DataSource(Path(job.data), follow_links=job.follow_links)
    folds = begun(data, Path(job.out))

    def told(progress: Progress) -> None:
        tell({"progress": {"share": progress.share, "detail": progress.detail}})

    work_on_fold(data, folds, job.fold, on_progress=told)


if __name__ == "__main__":
    sys.exit(_main())
