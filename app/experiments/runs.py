"""Shared by jobs that make several runs: their folder, resuming a run, and a quiet log.

The folder of such a job has one file that describes the job, and the runs; the same command resumes unfinished work.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from app.config.load import RunConfig
from app.errors import RunError
from app.progress import LOG, OnProgress, silent
from app.runs.folder import LOCK
from app.training.run import TrainResult, resume, start
from data.datasets.source import DataSource
from data.patches.cache import CaseFolder


def require_place(out: Path, told_by: str, what: str, *, before: Collection[str] = ()) -> None:
    """Require that a folder can hold a job, or already holds one.

    Args:
        out: the folder.
        told_by: name of the file that describes the job.
        what: the kind of job, in one word, for messages.
        before: names of entries that the job writes before that file; a killed job may have left them, or partial
            files, behind.

    Raises:
        RunError: ``out`` is a file, or holds something else.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; give a folder for the {what}")
    if (
        out.is_dir()
        and not (out / told_by).exists()
        and any(entry.name not in (LOCK, *before) and not entry.name.startswith(".partial-") for entry in out.iterdir())
    ):
        raise RunError(f"{out} is not empty and holds no {what}; give another folder")


def json_object(content: Any, path: Path) -> dict[str, Any]:
    """Return the content of a JSON file, which must be an object.

    Raises:
        RunError: the content is something else.
    """
    if not isinstance(content, dict):
        raise RunError(f"{path}: damaged, it holds no JSON object. Delete it, and its run is made again.")
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


def has_begun(run: Path) -> bool:
    """Whether a run has a checkpoint to resume from."""
    return any((run / "checkpoints").glob("last-*.json"))


def start_or_resume(
    data: DataSource,
    run: Path,
    config: RunConfig,
    *,
    split_file: Path,
    store: CaseFolder | None = None,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Start a run, or resume it if it has a checkpoint; a run killed before its first checkpoint is restarted.

    Args:
        data: the data set.
        run: folder of the run.
        config: the complete configuration.
        split_file: JSON file with the lists ``train`` and ``validation``, whose patients the caller has checked.
        store: where prepared cases are kept; default: the user's cache.
        on_progress: called with the progress of the run.

    Raises:
        DataError, ConfigError, RunError, DeviceError, InterruptedRunError: as :func:`app.training.run.start` and
            :func:`app.training.run.resume`.
    """
    if has_begun(run):
        return resume(data, run, config, split_is_judged=True, store=store, on_progress=on_progress)
    shutil.rmtree(run, ignore_errors=True)
    return start(
        data,
        run,
        config,
        split_file=split_file,
        split_is_judged=True,
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
def only_warnings(but_of: str) -> Iterator[None]:
    """Suppress the info messages of single runs in the log; the job itself logs one line per run.

    Args:
        but_of: path of the module whose messages are all kept.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or record.pathname == but_of

    LOG.addFilter(wanted)
    try:
        yield
    finally:
        LOG.removeFilter(wanted)
