"""``znormseg report``: recognise the content of a folder and write its pages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from app.errors import ConfigError, RunError
from app.evaluation.folders import PREDICTIONS_FILE
from app.evaluation.presence import SPECIFICITY
from app.evaluation.presence_scores import score_presence
from app.inference.ensemble import CROSSVAL_FILE, ENSEMBLE_FILE
from app.progress import OnProgress, silent
from app.reports import saved_comparison as comparison
from app.reports import saved_crossval as crossval
from app.reports.cohort import write_cohort
from app.reports.predictions import is_predictions
from app.reports.presence import write_presence_page
from app.reports.run import write_run
from data.datasets.source import DataSource

Kind = Literal["run", "predictions", "comparison", "cross-validation"]

_PAGE: Final = "index.html"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The pages that were written."""

    kind: Kind
    page: Path
    """The page to open first."""
    cases: Mapping[str, Path] = field(default_factory=dict)
    """For predictions: page by case id."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """For predictions: reason why a case has no page, by case id."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "kind": self.kind,
            "page": str(self.page),
            "cases": {case: str(page) for case, page in self.cases.items()},
            "failures": dict(self.failures),
        }


def recognise(folder: Path) -> Kind:
    """Recognise the content of a folder by its files.

    Raises:
        RunError: the folder does not exist, or contains nothing that has a page.
    """
    if not folder.is_dir():
        raise RunError(f"{folder}: {'is a file' if folder.exists() else 'does not exist'}; give a folder")
    if (folder / ENSEMBLE_FILE).exists():
        raise RunError(f"{folder}: an ensemble; give the folder of its cross-validation, {folder.resolve().parent}")
    if (folder / CROSSVAL_FILE).exists():
        return "cross-validation"
    if (folder / "plan.json").exists():
        return "comparison"
    if (folder / "run.json").exists() and (folder / "config.yaml").exists():
        return "run"
    if is_predictions(folder) or (folder / PREDICTIONS_FILE).exists():
        return "predictions"
    raise RunError(
        f"{folder}: contains nothing to report on. Expected a run (config.yaml and run.json), predictions "
        "(<case>.nii.gz with <case>.json), a comparison (plan.json) or a cross-validation (folds.json)."
    )


def report(
    folder: Path,
    out: Path,
    *,
    images: DataSource | None = None,
    references: DataSource | None = None,
    on_progress: OnProgress = silent,
) -> Report:
    """Write the pages of a folder: ``index.html`` and, for predictions, a page per case in ``cases``.

    Args:
        folder: folder of a run, predictions, a comparison or a cross-validation.
        out: folder of the pages, created if missing; existing pages are replaced.
        images: for predictions: data set with their scans.
        references: for predictions: data set or folder with expert label maps.
        on_progress: called as pages are finished.

    Raises:
        RunError: ``folder`` is not recognised, unfinished or damaged; ``out`` is a file or ``folder`` itself.
        ConfigError: ``images`` or ``references`` are given but ``folder`` does not contain predictions.
        DataError: predictions, scans or references cannot be used.
        OSError: ``out`` cannot be written to.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; the pages written so far are complete.
    """
    kind = recognise(folder)
    for option, value in (("--images", images), ("--references", references)):
        if value is not None and kind != "predictions":
            raise ConfigError(f"{option} can only be used with predictions; {folder} is a {kind}")
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; give a folder for the pages")
    if out.resolve() == folder.resolve():
        raise RunError(f"{out} is the folder that the pages describe; give another folder for the pages")
    if kind == "predictions" and (folder / PREDICTIONS_FILE).exists():
        if references is None:
            raise ConfigError(f"{folder}: predictions of a presence run; its page needs --references")
        write_presence_page(score_presence(folder, references, specificity=SPECIFICITY), out / _PAGE)
        return Report(kind=kind, page=out / _PAGE)
    if kind == "predictions":
        pages = write_cohort(
            folder,
            out,
            images=images,
            references=references,
            on_progress=on_progress,
        )
        return Report(kind=kind, page=pages.index, cases=pages.cases, failures=pages.failures)
    page = out / _PAGE
    if kind == "run":
        write_run(folder, page)
    elif kind == "comparison":
        comparison.rebuild_comparison_report(folder, page)
    else:
        crossval.rebuild_crossval_report(folder, page, on_progress=on_progress)
    return Report(kind=kind, page=page)
