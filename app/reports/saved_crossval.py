"""Rebuild the page of a finished cross-validation from its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from app.config.load import from_plain
from app.errors import RunError
from app.experiments.crossval.folds import Folds
from app.experiments.crossval.run import measure_folds
from app.experiments.runs import json_object
from app.inference.ensemble import CROSSVAL_FILE
from app.progress import OnProgress, Progress, silent
from app.reports.crossval import write_crossval_page
from app.runs.folder import read_json
from data.datasets.layouts import Case
from data.datasets.splits import Split
from data.labels import CONVENTIONS


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
    folds = folds_on_record(out)
    numbers = range(len(folds.splits))
    if not (out / "crossval.json").exists() or not all(folds.result_file(fold).exists() for fold in numbers):
        raise RunError(f"{out}: the cross-validation is unfinished. Give the same command again to resume it.")
    recorded = json_object(read_json(out / "crossval.json"), out / "crossval.json")
    detail = f"{len(folds.fold_of())} cases"

    def report(share: float) -> None:
        on_progress(Progress(job="scores", share=0.99 * share, detail=detail))

    write_crossval_page(replace(measure_folds(folds, on_share=report), content=recorded), page)
    on_progress(Progress(job="scores", share=1.0, detail=detail))


def folds_on_record(out: Path) -> Folds:
    """Read the folds of a cross-validation; its cases have ids but no files.

    Args:
        out: folder of the cross-validation.

    Raises:
        RunError: ``folds.json`` is missing or damaged.
    """
    path = out / CROSSVAL_FILE
    content = json_object(read_json(path), path)
    try:
        parts = [tuple(map(str, ids)) for ids in content["folds"]]
        ids = sorted(case_id for part in parts for case_id in part)
        return Folds(
            out=out,
            cases={case_id: Case(id=case_id, folder=out) for case_id in ids},
            config=from_plain(content["config"], str(path)),
            convention=CONVENTIONS[content["labels"]],
            splits=tuple(
                Split(train=tuple(case_id for case_id in ids if case_id not in part), validation=part) for part in parts
            ),
            label_maps_sha256=str(content["label_maps_sha256"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path}: damaged ({error}).") from error
