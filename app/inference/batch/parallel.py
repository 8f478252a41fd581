"""Predict cases in worker processes on this machine, one per device; cases of a lost worker are retried.

Each worker runs ``python -m app.inference.batch.parallel``; see :mod:`app.system.worker_pool`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from app.errors import ConfigError, DeviceError
from app.inference.batch.cohort import CaseObserver
from app.inference.batch.job import CASE, PredictJob, job_from_plain
from app.inference.batch.manifest import Outcome, this_worker
from app.inference.batch.output_folder import at_work
from app.system.worker_pool import Send, TaskAttempt, TaskQueue, WorkerPool, be_worker, device_names, last_output
from data.datasets.layouts import Case

#: Maximum attempts before a case that keeps killing its worker is reported as failed.
MAX_ATTEMPTS: Final = 3


def devices_of(text: str, gpus: int) -> tuple[str, ...]:
    """Parse the devices given by ``--devices``.

    Args:
        text: ``auto`` for every GPU, a number of them, or names such as ``cuda:0,cuda:1``.
        gpus: number of GPUs on this machine.

    Raises:
        ConfigError: ``text`` is none of these.
        DeviceError: there are fewer GPUs.

    Example:
        >>> devices_of("2", 4)
        ('cuda:0', 'cuda:1')
    """
    if text == "auto" and gpus == 0:
        raise DeviceError("--devices auto: no GPU is visible. Use --workers N for N processes on the CPU.")
    if text == "auto" or text.isdecimal():
        names = tuple(f"cuda:{number}" for number in range(gpus if text == "auto" else int(text)))
    else:
        names = device_names(text)
    if not names:
        raise ConfigError(f"--devices takes auto, a number of GPUs, or names such as cuda:0,cuda:1, got {text!r}")
    if any(int(name.partition(":")[2] or 0) >= gpus for name in names if name != "cpu"):
        raise DeviceError(f"--devices {text}: there are {gpus} GPUs, counted from 0. Use --workers N for the CPU.")
    return names


@dataclass(frozen=True, kw_only=True)
class InProcesses:
    """Executes cases in several processes."""

    job: PredictJob
    devices: Sequence[str | None]
    """One entry per process: its device, or None for the device of the job."""

    @property
    def name(self) -> str:
        """Name for the manifest."""
        return "local"

    def work(self, cases: Sequence[Case], observer: CaseObserver) -> None:
        """Execute cases.

        Raises:
            DataError, ConfigError, RunError, DeviceError, OSError, KeyboardInterrupt: as raised by
                :meth:`app.system.worker_pool.WorkerPool.run`.
        """

        def job(worker: str, device: str | None) -> dict[str, Any]:
            kind = "cpu" if device == "cpu" else "cuda" if device else self.job.device
            return {"job": replace(self.job, device=kind).to_plain(), "name": worker, "device": device}

        def done(attempt: TaskAttempt, result: dict[str, Any]) -> None:
            worker = this_worker(attempt.device, attempt.worker)
            observer.ended(Outcome(case=attempt.task, **result, worker=worker, attempts=attempt.number))

        def lost(attempt: TaskAttempt, how: str, log: Path) -> None:
            text = f"case {attempt.task}: its process {how} in {attempt.number} attempts. {last_output(log)}".rstrip()
            done(attempt, {"message": text})

        with tempfile.TemporaryDirectory(prefix="znormseg-") as logs:
            WorkerPool(
                module="app.inference.batch.parallel",
                job=job,
                tasks={case.id: CASE.dump_python(case, mode="json") for case in cases},
                devices=self.devices,
                logs=Path(logs),
                on_progress=observer.started,
                on_done=done,
                on_lost=lost,
                max_attempts=MAX_ATTEMPTS,
                reuse=True,
            ).run()


class _Reporter:
    """Reports the events of cases to the parent process."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def started(self, case: str, what: str = "") -> None:
        """See :class:`app.inference.batch.cohort.CaseObserver`."""
        self._send({"task": case, "progress": what})

    def ended(self, outcome: Outcome) -> None:
        """See :class:`app.inference.batch.cohort.CaseObserver`."""
        self._send({"task": outcome.case, "done": {"content": outcome.content, "message": outcome.message}})


def _work(given: dict[str, Any], tasks: TaskQueue, send: Send) -> None:
    job = job_from_plain(given["job"])
    model, runtime = job.load()
    engine = job.engine(model, runtime, worker=given["name"], device=given["device"])
    send({"ready": runtime.device_name, "ahead": engine.steps.readers})
    cases = (CASE.validate_python(content) for _, content in iter(tasks.get, None))
    with at_work(job.output):
        engine.work(cases, _Reporter(send), stop_cases=lambda: tasks.put(None))


if __name__ == "__main__":
    sys.exit(be_worker(_work))
