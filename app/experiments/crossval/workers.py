"""Folds in processes of their own, one on each device, and what they tell the process that started them.

A worker is ``python -m app.experiments.crossval.workers``. Its standard input has one line of JSON, the job, and
stays open: when
it closes, the process that started it is gone, and the worker stops as if by SIGTERM, everything saved. Its standard
output has one JSON object a line: progress, warnings, and how it ended.
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
    """One fold for one worker."""

    data: str
    out: str
    fold: int
    follow_links: bool
    needs_cuda: bool = False
    """Whether a GPU must be there."""


def fold_slots(devices: str | None, jobs: int | None, *, config_device: str) -> tuple[str | None, ...]:
    """Where folds are worked on, an entry a process: a device, or None for that of the config.

    Args:
        devices: names with commas between, such as ``cuda:0,cuda:1``.
        jobs: processes on the device of the config.
        config_device: ``runtime.device``.

    Returns:
        one None where everything is done in this process.

    Raises:
        ConfigError: both are given, one is no device or no number of processes, or the config names a device too.

    Example:
        >>> slots_of("cuda:0,cuda:1", None, config_device="auto")
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
    """Do jobs in processes, as many at once as there are devices; a device takes the next job when it has done one.

    When one fails, or this process is interrupted, the others are stopped the way SIGTERM stops them, everything saved.

    Args:
        jobs: what is to be done.
        devices: as of :func:`fold_slots`.
        logs: folder for what the processes write to stderr.
        on_progress: told the fold and where it is, on the caller's thread.
        on_done: told the fold that is done, on the caller's thread.

    Raises:
        DataError, ConfigError, RunError, DeviceError, OSError: of the first process that failed.
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
    """A device: a thread that starts one process after the other and passes on what they tell."""

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
        """Begin with the first job."""
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
        """Ask the process to end; none is started any more."""
        with self.starting:
            if self.process is not None and self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)

    def join(self) -> None:
        """Wait until the process has ended."""
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
        """Pass on every line; whether the process said how it ended."""
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
    """Do the job on standard input; 0 when it is done."""
    return be_worker(_work)


def _work(lines: Iterator[str], tell: Tell) -> None:
    job = FoldJob(**json.loads(next(lines)))
    threading.Thread(target=stop_when_alone, daemon=True).start()
    _do_job(job, tell)
    tell({"done": True})


def _do_job(job: FoldJob, tell: Tell) -> None:
    from app.experiments.crossval.fold import work_on_fold
    from app.experiments.crossval.folds import begun

    if job.needs_cuda:
        import torch

        if not torch.cuda.is_available():
            raise DeviceError("no CUDA device is visible to its process. Give other --devices.")
    folds = begun(Path(job.data), Path(job.out), follow_links=job.follow_links)

    def told(progress: Progress) -> None:
        tell({"progress": {"share": progress.share, "detail": progress.detail}})

    work_on_fold(Path(job.data), folds, job.fold, follow_links=job.follow_links, on_progress=told)


if __name__ == "__main__":
    sys.exit(_main())
