"""Cross-validation of the presence task: out-of-fold logits, fitted decisions, scores, and the ensemble."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from app import NOTICE
from app.errors import RunError
from app.evaluation.presence import SPECIFICITY, with_intervals
from app.evaluation.presence_scores import PresenceScores
from app.evaluation.tables import write_csv
from app.experiments.crossval.ensemble_folder import write_networks
from app.experiments.crossval.plan import Folds
from app.experiments.crossval.presence_decisions import FittedDecision, fit_decision
from app.experiments.runs import json_object
from app.inference.ensemble import ENSEMBLE_FOLDER
from app.inference.tumour_presence.model import VERSION, load_presence
from app.progress import OnProgress, Progress
from app.runs.folder import read_json, write_json
from app.system.device import choose_runtime, machine, versions
from app.training.presence_labels import RECORD
from data.preprocess import prepare

FloatArray = npt.NDArray[np.float64]
_KEYS: Final = {"case", "logits", "labels", "weights_sha256", "computed_by"}


@dataclass(frozen=True, kw_only=True)
class PresenceCrossValidation:
    """Results of a cross-validation of presence."""

    out: Path
    scores: PresenceScores
    """Of out-of-fold answers with the fitted decisions; the intervals do not cover that these were fitted on them."""
    fitted: Mapping[str, FittedDecision]
    """By output."""
    content: Mapping[str, Any]
    """Content of ``crossval.json``."""

    @property
    def ensemble(self) -> Path:
        """Folder of the ensemble."""
        return self.out / ENSEMBLE_FOLDER

    @property
    def page(self) -> Path:
        """Path of the page."""
        return self.out / "crossval.html"


def answer_left_out(folds: Folds, fold: int, *, on_progress: OnProgress, done_before: float) -> None:
    """Compute and write the logits of a fold's validation cases; finished ones are kept.

    Args:
        folds: the cross-validation.
        fold: number of the fold, which is trained.
        on_progress: called with the progress of the fold.
        done_before: share of the fold that training took.

    Raises:
        DataError: a case cannot be used.
        RunError: the fold's weights are missing or damaged.
    """
    config, run = folds.config, folds.run(fold)
    runtime = choose_runtime(config.runtime)
    model = load_presence(run, runtime)
    labels = read_json(run / "run.json")[RECORD]["labels"]
    validation = folds.splits[fold].validation
    for number, case_id in enumerate(validation):
        path = folds.prediction_file(case_id)
        if is_answer_of(path, model.sha256):
            continue
        share = done_before + (1 - done_before) * number / len(validation)
        on_progress(Progress(job="fold", share=share, detail=f"predicting {case_id}"))
        case = folds.cases[case_id]
        prepared = prepare(case, spacing_mm=model.spacing_mm, nan_to_zero=config.data.nan_to_zero)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "case": case_id,
            "logits": model.logits(prepared.image, prepared.present, runtime).tolist(),
            "labels": labels[case_id],
            "weights_sha256": model.sha256,
            "computed_by": runtime.record(),
        }
        write_json(path, content)


def is_answer_of(path: Path, weights_sha256: str) -> bool:
    """Whether a file holds the out-of-fold logits of the network with these weights."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return set(content) == _KEYS and content["weights_sha256"] == weights_sha256
    except (OSError, ValueError, TypeError):
        return False


def measure_presence(folds: Folds) -> tuple[PresenceScores, dict[str, FittedDecision]]:
    """Fit the decisions on the out-of-fold logits, and score these.

    Raises:
        RunError: a file is missing or damaged.
    """
    names, logits, truths, of_fold = _answers(folds)  # of cases, as that is what a decision is made about
    outputs = folds.config.outputs
    fitted = {name: fit_decision(logits[:, n], truths[:, n], of_fold) for n, name in enumerate(outputs)}
    probabilities = np.stack(
        [fitted[name].decision.probability(logits[:, n]) for n, name in enumerate(outputs)], axis=1
    )
    patients = [folds.cases[name].patient for name in names]
    thresholds = tuple(fitted[name].decision.threshold for name in outputs)
    scores = PresenceScores(
        outputs=outputs,
        specificity=SPECIFICITY,
        thresholds=thresholds,
        truth={name: tuple(map(int, row)) for name, row in zip(names, truths, strict=True)},
        probability={name: tuple(map(float, row)) for name, row in zip(names, probabilities, strict=True)},
        measures={
            name: with_intervals(truths[:, n], probabilities[:, n], patients, threshold=thresholds[n])
            for n, name in enumerate(outputs)
        },
        missing_predictions=(),
        missing_references=(),
        fitted_here=any(one.decision.tuned for one in fitted.values()),
    )
    return scores, fitted


def _answers(folds: Folds) -> tuple[list[str], FloatArray, FloatArray, npt.NDArray[np.int_]]:
    """Return the id, logits, labels and fold of every case; of slabs, the largest logit of each output counts."""
    names: list[str] = []
    logits: list[list[float]] = []
    truths: list[list[float]] = []
    of_fold: list[int] = []
    for case_id, fold in folds.fold_of().items():
        path = folds.prediction_file(case_id)
        content = json_object(read_json(path), path)
        try:
            rows, own = np.array(content["logits"], dtype=np.float64), content["labels"]
            if rows.ndim != 2 or not len(rows) or not rows.shape[1] == len(own) == len(folds.config.outputs):
                raise ValueError(f"logits of shape {rows.shape} and {len(own)} labels")
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(f"{path}: damaged ({error}). Delete it to predict its case again.") from error
        names.append(case_id)
        logits.append(rows.max(axis=0).tolist())
        truths.append(own)
        of_fold.append(fold)
    return names, np.array(logits), np.array(truths, dtype=np.float64), np.array(of_fold)


def finish_presence(folds: Folds, results: Sequence[Mapping[str, Any]]) -> PresenceCrossValidation:
    """Write the ensemble, ``crossval.csv`` and ``crossval.json``.

    Args:
        folds: folds that are all trained and predicted.
        results: result of training, by fold.
    """
    scores, fitted = measure_presence(folds)
    decisions = {name: dict(vars(one.decision)) for name, one in fitted.items()}
    auroc = {name: scores.measures[name]["auroc"].value for name in scores.outputs}
    write_networks(
        folds,
        of_each=[{} for _ in folds.splits],
        of_all={"version": VERSION, "decisions": decisions, "out_of_fold_auroc": auroc},
    )
    out = folds.out
    content = {
        "ensemble": str(out / ENSEMBLE_FOLDER),
        "folds": [
            {**result, "fold": fold, "cases": len(split.validation), "trained_on": len(split.train)}
            for fold, (result, split) in enumerate(zip(results, folds.splits, strict=True))
        ],
        "scores": scores.to_json(),
        "decisions": {name: one.to_json() for name, one in fitted.items()},
        "versions": versions(),
        "machine": machine(),
        "notice": NOTICE,
    }
    fold_of = folds.fold_of()
    rows: list[list[object]] = [["fold", "case", *scores.outputs, *(f"{name}_truth" for name in scores.outputs)]]
    for name, truth in scores.truth.items():
        rows.append([fold_of[name], name, *scores.probability[name], *truth])
    write_csv(out / "crossval.csv", rows)
    write_json(out / "crossval.json", content)
    return PresenceCrossValidation(out=out, scores=scores, fitted=fitted, content=content)
