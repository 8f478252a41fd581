"""Run folds in worker processes, one per device.

A worker is ``python -m app.experiments.crossval.workers`` and works on one fold; see :mod:`app.system.worker_pool`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from app.errors import ConfigError, DeviceError
from app.progress import Progress
from app.system.worker_pool import Send, TaskAttempt, TaskQueue, WorkerPool, be_worker, default_devices, device_names

if TYPE_CHECKING:
    from data.datasets.source import DataSource


def fold_devices(devices: str | None, jobs: int | None, *, config_device: str) -> tuple[str | None, ...]:
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
        >>> fold_devices("cuda:0,cuda:1", None, config_device="auto")
        ('cuda:0', 'cuda:1')
    """
    if devices is not None and jobs is not None:
        raise ConfigError("give either --devices or --jobs")
    if devices is None:
        return default_devices(1 if jobs is None else jobs, option="--jobs")
    names = device_names(devices)
    if not names:
        raise ConfigError(f"--devices takes cpu, cuda and cuda:N, separated by commas, got {devices!r}")
    if config_device != "auto":
        raise ConfigError(
            f"--devices {devices} cannot be combined with runtime.device: {config_device}. Leave one of them out."
        )
    return names


def work_in_processes(
    data: DataSource,
    out: Path,
    folds: Sequence[int],
    devices: Sequence[str | None],
    *,
    init_from: Path | None,
    on_progress: Callable[[int, Progress], None],
    on_done: Callable[[int], None],
) -> None:
    """Work on folds in processes, one per device; a device that finishes a fold takes the next one.

    Args:
        data: the data sets; their label conventions are those of the cross-validation.
        out: folder of the cross-validation.
        folds: the folds to do.
        devices: devices from :func:`fold_devices`.
        init_from: as in :func:`app.experiments.crossval.run.cross_validate`.
        on_progress: called with the fold and its progress, on the caller's thread.
        on_done: called with the fold that is done, on the caller's thread.

    Raises:
        DataError, ConfigError, RunError, DeviceError, OSError, InterruptedRunError: the error of the first process
            that failed.
        KeyboardInterrupt: this process was interrupted; the others have ended.
    """
    tasks = {f"fold {fold}": fold for fold in folds}

    def job(_: str, device: str | None) -> dict[str, Any]:
        needs_cuda = (device or "").startswith("cuda")
        place = {"data": list(data.resolved().arguments), "out": str(out.resolve())}
        start = None if init_from is None else str(init_from.resolve())
        return {**place, "init_from": start, "follow_links": data.follow_links, "needs_cuda": needs_cuda}

    def lost(attempt: TaskAttempt, how: str, log: Path) -> None:
        raise OSError(
            f"{attempt.task}: its process {how} without reporting an error; see {log}. Run the same command again to "
            "resume."
        )

    WorkerPool(
        module="app.experiments.crossval.workers",
        job=job,
        tasks=tasks,
        devices=devices,
        logs=out / "logs",
        on_progress=lambda task, progress: on_progress(tasks[task], Progress(**progress)),
        on_done=lambda attempt, _: on_done(tasks[attempt.task]),
        on_lost=lost,
    ).run()


def _work(job: dict[str, Any], tasks: TaskQueue, send: Send) -> None:
    from app.experiments.crossval.plan import read_folds
    from app.experiments.crossval.train_fold import work_on_fold
    from data.datasets.source import data_source

    if job["needs_cuda"]:
        import torch

        if not torch.cuda.is_available():
            raise DeviceError("no CUDA device is visible to its process. Use other --devices.")
    data = data_source(job["data"], follow_links=job["follow_links"])
    start = job["init_from"]
    folds = replace(read_folds(Path(job["out"]), data), init_from=None if start is None else Path(start))
    for task, fold in iter(tasks.get, None):

        def report(progress: Progress, task: str = task) -> None:
            send({"task": task, "progress": asdict(progress)})

        work_on_fold(data, folds, fold, on_progress=report)
        send({"task": task, "done": None})


if __name__ == "__main__":
    sys.exit(be_worker(_work))
