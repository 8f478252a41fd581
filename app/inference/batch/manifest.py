"""``OUT/manifest.json``: every case of a cohort, what came of it, and where."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from app.inference.batch.fingerprint import MADE_FROM, sha256_of
from app.notice import NOTICE
from app.runs.folder import write_json
from app.system.device import versions

MANIFEST_FILE: Final = "manifest.json"
VERSION: Final = 1

Status = Literal["done", "skipped", "failed", "left"]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """Who works on cases."""

    name: str
    """``main``, ``cuda:1``, ``worker-2``, or a process of Ray."""
    device: str
    """``cpu`` or ``cuda:N``, as the machine counts."""
    host: str
    """Name of the machine."""


def this_worker(device: str, name: str = "main") -> Worker:
    """A worker on this machine."""
    return Worker(name=name, device=device, host=platform.node())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one case."""

    case: str
    content: dict[str, Any] | None = None
    """As in ``<case>.json``; None where it failed."""
    message: str | None = None
    """Why it failed."""
    skipped: bool = False
    """Whether it was finished before."""
    worker: Worker | None = None
    """Who did it, where it was done now."""
    attempts: int | None = 1
    """How often it was begun: more than once where workers were lost. None: not known."""

    @property
    def status(self) -> Status:
        """In a word."""
        if self.content is None:
            return "failed"
        return "skipped" if self.skipped else "done"


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """What is the same for all cases of one command."""

    run: Path | None
    """Folder of the run or the ensemble, where it is known."""
    settings: Mapping[str, Any]
    """As of :func:`app.inference.batch.fingerprint.settings_of`."""
    engine: str
    """``local`` or ``ray``."""


def write_manifest(
    output: Path, cohort: Cohort, cases: Iterable[str], outcomes: Mapping[str, Outcome], *, seconds: float, ended: bool
) -> None:
    """Write the manifest; whole or not at all.

    Args:
        output: folder of the results.
        cohort: what is the same for all cases.
        cases: every case id that was asked for, in order.
        outcomes: by case id; a case without is left.
        seconds: spent by the command on the cohort.
        ended: whether it came to its end.

    Raises:
        OSError: it cannot be written.
    """
    listed = [_entry(case, outcomes.get(case)) for case in cases]
    counts = {
        status: sum(one["status"] == status for one in listed) for status in ("done", "skipped", "failed", "left")
    }
    content = {
        "version": VERSION,
        "run": None if cohort.run is None else str(cohort.run),
        "weights_sha256": cohort.settings["weights_sha256"],
        "settings_sha256": sha256_of(cohort.settings),
        "settings": dict(cohort.settings),
        "engine": cohort.engine,
        "ended": ended,
        "seconds": round(seconds, 3),
        "counts": counts,
        "cases": listed,
        "versions": versions(),
        "notice": NOTICE,
    }
    write_json(output / MANIFEST_FILE, content)


def _entry(case: str, outcome: Outcome | None) -> dict[str, Any]:
    """What the manifest says of one case."""
    if outcome is None:
        return {"case": case, "status": "left"}
    if outcome.content is None:
        found: dict[str, Any] = {"message": outcome.message}
    else:
        noted = outcome.content[MADE_FROM]
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
