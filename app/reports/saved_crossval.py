"""Rebuild the page of a finished cross-validation from its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from app.errors import RunError
from app.experiments.crossval.plan import read_folds
from app.experiments.crossval.presence import measure_presence
from app.experiments.crossval.run import measure_folds
from app.experiments.runs import json_object
from app.progress import OnProgress, Progress, silent
from app.reports.crossval import write_crossval_page
from app.reports.presence import write_presence_page
from app.runs.folder import read_json


def rebuild_crossval_report(out: Path, page: Path, *, on_progress: OnProgress = silent) -> None:
    """Write the page of a finished cross-validation atomically, without training or predicting anything.

    Scores and post-processing are recomputed from the saved out-of-fold answers.

    Args:
        out: folder of the cross-validation.
        page: file to write; its folder is created if missing.
        on_progress: called as cases are scored.

    Raises:
        RunError: the cross-validation is unfinished, or one of its files is missing or damaged.
        OSError: ``page`` cannot be written.
    """
    folds = read_folds(out)
    numbers = range(len(folds.splits))
    if not (out / "crossval.json").exists() or not all(folds.result_file(fold).exists() for fold in numbers):
        raise RunError(f"{out}: the cross-validation is not finished. Run its command again to resume it.")
    recorded = json_object(read_json(out / "crossval.json"), out / "crossval.json")
    detail = f"{len(folds.cases)} cases"

    if folds.is_presence:
        write_presence_page(measure_presence(folds)[0], page)
        return

    def report(share: float) -> None:
        on_progress(Progress(job="scores", share=0.99 * share, detail=detail))

    write_crossval_page(replace(measure_folds(folds, on_share=report), content=recorded), page)
    on_progress(Progress(job="scores", share=1.0, detail=detail))
