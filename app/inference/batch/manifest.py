"""``OUT/manifest.json``: every case of a cohort, its outcome and its worker."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

from app import NOTICE
from app.inference.batch.fingerprint import FINGERPRINT, sha256_of
from app.runs.folder import write_json
from app.system.device import versions

MANIFEST_FILE: Final = "manifest.json"
VERSION: Final = 1

Status = Literal["done", "skipped", "failed", "left"]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A process that works on cases."""

    name: str
    """``main``, ``cuda:1``, ``worker-2``, or a process of Ray."""
    device: str
    """``cpu`` or ``cuda:N``, as the machine numbers its GPUs."""
    host: str
    """Name of the machine."""


def this_worker(device: str, name: str = "main") -> Worker:
    """Describe a worker on this machine."""
    return Worker(name=name, device=device, host=platform.node())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Outcome of one case."""

    case: str
    content: Mapping[str, Any] | None = None
    """Content of ``<case>.json``; None if the case failed."""
    message: str | None = None
    """Why it failed."""
    skipped: bool = False
    """Whether an earlier command finished it."""
    worker: Worker | None = None
    """Worker that executed it, if it was executed now."""
    attempts: int | None = 1
    """Number of attempts: more than one if workers were lost; None if unknown."""

    @property
    def status(self) -> Status:
        """Status in one word."""
        if self.content is None:
            return "failed"
        return "skipped" if self.skipped else "done"


def write_manifest(
    path: Path,
    outcomes: Mapping[str, Outcome | None],
    *,
    run: Path | None,
    settings: Mapping[str, Any],
    engine: str,
    seconds: float,
    ended: bool,
) -> None:
    """Write the manifest; the file appears complete or not at all.

    Args:
        path: the file.
        outcomes: by case id, every case that was requested, in order; one without an outcome is listed as ``left``.
        run: folder of the run or the ensemble, if known.
        settings: as returned by :func:`app.inference.batch.fingerprint.settings_of`.
        engine: ``local`` or ``ray``.
        seconds: time that the command spent on the cohort.
        ended: whether the command reached its end.

    Raises:
        OSError: the file cannot be written.
    """
    listed = [_entry(case, outcome) for case, outcome in outcomes.items()]
    counted = Counter(one["status"] for one in listed)
    content = {
        "version": VERSION,
        "run": None if run is None else str(run),
        "weights_sha256": settings["weights_sha256"],
        "settings_sha256": sha256_of(settings),
        "settings": dict(settings),
        "engine": engine,
        "ended": ended,
        "seconds": round(seconds, 3),
        "counts": {status: counted[status] for status in get_args(Status)},
        "cases": listed,
        "versions": versions(),
        "notice": NOTICE,
    }
    write_json(path, content)


def _entry(case: str, outcome: Outcome | None) -> dict[str, Any]:
    """Return the entry of one case in the manifest."""
    if outcome is None:
        return {"case": case, "status": "left"}
    if outcome.content is None:
        found: dict[str, Any] = {"message": outcome.message}
    else:
        noted = outcome.content[FINGERPRINT]
        found = {
            "files_sha256": noted["files_sha256"],
            "inputs_sha256": noted["inputs_sha256"],
            "seconds": outcome.content["seconds"],
        }
    worker = outcome.worker
    if worker is not None:
        found |= {"worker": worker.name, "device": worker.device, "host": worker.host}
    if not outcome.skipped and outcome.attempts is not None:
        found["attempts"] = outcome.attempts
    return {"case": case, "status": outcome.status, **found}
