"""What jobs that make several runs have in common: their folder, going on with a run, a quiet log.

Such a job keeps one file that says what it is, and its runs; the same command goes on with what is not done.
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
from data.patches.cache import CaseFolder


def require_place(out: Path, told_by: str, what: str, *, before: Collection[str] = ()) -> None:
    """Make sure that a folder can hold a job, or holds one.

    Args:
        out: the folder.
        told_by: name of the file that says what the job is.
        what: the job, in a word.
        before: names of what the job writes before that file; a kill may have left it, or half of a file.

    Raises:
        RunError: it is a file, or holds something else.
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
    """The content of a JSON file that holds an object.

    Raises:
        RunError: it holds something else.
    """
    if not isinstance(content, dict):
        raise RunError(f"{path}: damaged, it holds no JSON object. Delete it, and its run is made again.")
    return content


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Where two objects of plain data differ, each as ``key: old -> new``."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found += differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(f"{prefix}{key}: {before} -> {after}")
    return found


def has_begun(run: Path) -> bool:
    """Whether a run has a checkpoint to go on from."""
    return any((run / "checkpoints").glob("last-*.json"))


def start_or_resume(
    data: Path,
    run: Path,
    config: RunConfig,
    *,
    split_file: Path,
    labels: str | None = None,
    follow_links: bool = False,
    store: CaseFolder | None = None,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Start a run, or go on with one that has begun; one that was killed before its first checkpoint starts anew.

    Args:
        data: folder of cases.
        run: folder of the run.
        config: the complete configuration.
        split_file: JSON with the lists ``train`` and ``validation``, whose patients the caller has seen to.
        labels: name of the label convention, where the data set does not tell.
        follow_links: accept symbolic links that lead out of ``data``.
        store: where prepared cases are kept; default the user's cache.
        on_progress: told where the run is.

    Raises:
        DataError, ConfigError, RunError, DeviceError, InterruptedRunError: as :func:`app.training.run.start` and
            :func:`app.training.run.resume`.
    """
    if has_begun(run):
        return resume(
            data, run, config, split_is_judged=True, follow_links=follow_links, store=store, on_progress=on_progress
        )
    shutil.rmtree(run, ignore_errors=True)
    return start(
        data,
        run,
        config,
        split_file=split_file,
        split_is_judged=True,
        labels=labels,
        follow_links=follow_links,
        store=store,
        on_progress=on_progress,
    )


def count_backends(records: Iterable[Mapping[str, str] | None]) -> list[dict[str, str | int | None]]:
    """How often networks were applied with each backend, precision and device, the most frequent first.

    Args:
        records: as of :meth:`app.system.device.Runtime.record`; None where a version that always took torch wrote none.

    Returns:
        objects of ``backend``, ``precision``, ``device`` (None where not recorded) and ``count``.
    """
    keys = ("backend", "precision", "device")
    found = Counter(tuple((record or {}).get(key) for key in keys) for record in records)
    return [{**dict(zip(keys, values, strict=True)), "count": count} for values, count in found.most_common()]


def backends_sentence(counts: Sequence[Mapping[str, str | int | None]]) -> str:
    """The counts of :func:`count_backends` in words.

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
    """Keep what every single run would say out of the log; the job says a line a run.

    Args:
        but_of: path of the module whose every line stays.
    """

    def wanted(record: logging.LogRecord) -> bool:
        return record.levelno > logging.INFO or record.pathname == but_of

    LOG.addFilter(wanted)
    try:
        yield
    finally:
        LOG.removeFilter(wanted)
