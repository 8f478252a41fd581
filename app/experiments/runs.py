"""Helpers for jobs of several runs: the job's folder, resuming a run, and a quiet log.

The folder of such a job contains its runs and one file that describes it; the same command resumes unfinished work.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from app.config.load import RunConfig
from app.errors import ConfigError, InterruptedRunError, RunError
from app.progress import LOG, OnProgress, Progress, silent
from app.runs.folder import LOCK
from app.training.run import TrainResult, resume, start
from data.datasets.source import DataSource
from data.patches.cache import CaseFolder

#: Share of a job that must be done before the time left is estimated.
_LEAST_MADE: Final = 0.005


def require_place(out: Path, record: str, what: str, *, before: Collection[str] = ()) -> None:
    """Require that a folder can be used for a job, or already contains one.

    Args:
        out: the folder.
        record: name of the file that describes the job.
        what: the kind of job, in one word, for messages.
        before: names of entries that the job writes before that file; a killed job may have left them, or partial
            files, behind.

    Raises:
        RunError: ``out`` is a file, or contains something else.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; give a folder for the {what}")
    if (
        out.is_dir()
        and not (out / record).exists()
        and any(entry.name not in (LOCK, *before) and not entry.name.startswith(".partial-") for entry in out.iterdir())
    ):
        raise RunError(f"{out} is not empty and contains no {what}; give another folder")


def json_object(content: Any, path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, which must be an object.

    Raises:
        RunError: the content is something else.
    """
    if not isinstance(content, dict):
        raise RunError(f"{path}: damaged, it contains no JSON object. Delete it to repeat its run.")
    return content


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the differences between two objects of plain data, each as ``key: old -> new``."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found


def require_unchanged(out: Path, what: str, changed: Sequence[str]) -> None:
    """Refuse to resume a job in a folder where a different one was started.

    Args:
        out: the folder.
        what: the kind of job, in one word.
        changed: differences from the job that was started there; if there are none, nothing happens.

    Raises:
        ConfigError: there are differences.
    """
    if changed:
        raise ConfigError(
            f"{out} contains another {what}; give another folder, or the settings it was started with. "
            f"Different: {'; '.join(changed)}"
        )


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a checkpoint to resume from."""
    return any((run / "checkpoints").glob("last-*.json"))


def start_or_resume(
    data: DataSource,
    run: Path,
    config: RunConfig,
    *,
    split_file: Path,
    init_from: Path | None = None,
    store: CaseFolder | None = None,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Start a run, or resume it if it has a checkpoint; a run killed before its first checkpoint is restarted.

    Args:
        data: the data set.
        run: folder of the run.
        config: the complete configuration.
        split_file: JSON file with the lists ``train`` and ``validation``, whose patients the caller has checked.
        init_from: folder of the network that a new run starts from.
        store: where prepared cases are kept; default: the user's cache.
        on_progress: called with the progress of the run.

    Raises:
        DataError, ConfigError, RunError, DeviceError, InterruptedRunError: as raised by :func:`app.training.run.start`
            and :func:`app.training.run.resume`.
    """
    if has_checkpoint(run):
        return resume(data, run, config, split_is_checked=True, store=store, on_progress=on_progress)
    shutil.rmtree(run, ignore_errors=True)
    return start(
        data,
        run,
        config,
        split_file=split_file,
        split_is_checked=True,
        init_from=init_from,
        store=store,
        on_progress=on_progress,
    )


def count_backends(records: Iterable[Mapping[str, str] | None]) -> list[dict[str, str | int | None]]:
    """Count the records by backend, precision and device, most frequent first.

    Args:
        records: from :meth:`app.system.device.Runtime.record`; None for results of versions that always used torch and
            recorded nothing.

    Returns:
        dicts of ``backend``, ``precision``, ``device`` (None if not recorded) and ``count``.
    """
    keys = ("backend", "precision", "device")
    found = Counter(tuple((record or {}).get(key) for key in keys) for record in records)
    return [{**dict(zip(keys, values, strict=True)), "count": count} for values, count in found.most_common()]


def backends_sentence(counts: Sequence[Mapping[str, str | int | None]]) -> str:
    """Describe the counts of :func:`count_backends` in words.

    Example:
        >>> backends_sentence([{"backend": "openvino", "precision": "float32", "device": "cpu", "count": 6}])
        'openvino, float32, cpu'
    """
    names = [
        "torch, by an earlier version"
        if one["backend"] is None
        else f"{one['backend']}, {one['precision']}, {one['device']}"
        for one in counts
    ]
    if len(names) == 1:
        return names[0]
    return "; ".join(f"{name}: {one['count']}" for one, name in zip(counts, names, strict=True))


@contextmanager
def resumable(out: Path, position: Callable[[], str]) -> Iterator[None]:
    """Work on a job: limit the log of single runs to warnings, and report the job's position on interruption.

    Args:
        out: folder of the job.
        position: describes what the job is working on, such as ``run 3 of 8``.

    Raises:
        InterruptedRunError: the job was interrupted.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or Path(record.pathname).is_relative_to(Path(__file__).parent)

    LOG.addFilter(wanted)
    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        raise InterruptedRunError(
            f"{str(error).partition(';')[0] or 'interrupted'} in {position()}; everything is saved in {out}. "
            "Run the same command again to resume."
        ) from error
    finally:
        LOG.removeFilter(wanted)


@dataclass(kw_only=True)
class JobProgress:
    """Reports the progress of a job with several parts; estimates the time left from the parts this process did."""

    job: str
    parts: int
    on_progress: OnProgress
    kept: float = 0.0
    """Number of parts that were complete before this process started."""
    scale: float = 1.0
    """Share of the job's time that the parts take together."""
    began: float = field(default_factory=time.monotonic)

    def report(self, done: float, detail: str) -> None:
        """Report the number of parts done, including the fractions of those in progress."""
        share = min(done / self.parts, 0.999)
        made = share - self.kept / self.parts
        eta = (time.monotonic() - self.began) / made * (1 - share) if made > _LEAST_MADE else None
        self.on_progress(Progress(job=self.job, share=self.scale * share, detail=detail, eta_seconds=eta))

    def end(self, detail: str) -> None:
        """Report that the job is complete."""
        self.on_progress(Progress(job=self.job, share=1.0, detail=detail, eta_seconds=0.0))
