"""Measure how well a run predicts when contrasts are missing: Dice for each of the fifteen subsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from app import NOTICE
from app.errors import RunError
from app.evaluation.tables import write_csv
from app.inference.model import Predictor
from app.inference.scoring import CaseDice, case_dice
from app.progress import LOG, OnProgress, Progress, silent
from app.runs.folder import read_json
from app.system.device import Runtime
from data.contrasts import SUBSETS
from data.datasets.label_stats import convention_of
from data.datasets.layouts import Case
from data.datasets.naming import real_id
from data.errors import DataError
from data.labels import REGIONS, Contrast, LabelConvention, Region

#: Which cases of a data set to score: those the run did not train on, those it was validated on, or all.
Which = Literal["unseen", "validation", "all"]


@dataclass(frozen=True, kw_only=True)
class SubsetScores:
    """Scores of a run that is given one subset of the contrasts."""

    contrasts: tuple[Contrast, ...]
    """Contrasts given to the network, in project order."""
    cases: Mapping[str, CaseDice]
    """Dice by case id and region, for the cases that have these contrasts."""

    def dice(self) -> dict[Region, float]:
        """Return the mean Dice over cases, by region."""
        return {region: fmean(scores[region] for scores in self.cases.values()) for region in REGIONS}

    def mean_dice(self) -> float:
        """Mean Dice over cases and regions."""
        return fmean(self.dice().values())


@dataclass(frozen=True, kw_only=True)
class SubsetEvaluation:
    """Scores of every subset for which there was a case."""

    subsets: tuple[SubsetScores, ...]
    weights_sha256: str
    failures: Mapping[str, str]
    """Message by case id; failed cases are left out of every subset."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "subsets": [
                {
                    "contrasts": list(scores.contrasts),
                    "n": len(scores.cases),
                    "dice": scores.dice(),
                    "mean_dice": scores.mean_dice(),
                    "cases": dict(scores.cases),
                }
                for scores in self.subsets
            ],
            "weights_sha256": self.weights_sha256,
            "failures": dict(self.failures),
            "notice": NOTICE,
        }


def choose_cases(run: Path, cases: Sequence[Case], which: Which) -> tuple[Case, ...]:
    """Choose the labelled cases of a data set to score.

    Args:
        run: folder of the run; its split lists the ids of the cases it was trained and validated on.
        cases: all cases of the data set.
        which: the part to score.

    Raises:
        DataError: no case has a label map, or no case is left.
        RunError: the run has no split.
    """
    labelled = [case for case in cases if case.label is not None]
    if not labelled:
        none = "the only case has no" if len(cases) == 1 else f"none of {len(cases)} cases has a"
        raise DataError(f"{none} label map (a file that ends in seg) to score against")
    split = read_json(run / "split.json")
    trained, validated = {*split["train"], *map(real_id, split["train"])}, set(split["validation"])
    chosen = tuple(
        case
        for case in labelled
        if which == "all" or (case.id in validated if which == "validation" else case.id not in trained)
    )
    if not chosen:
        raise DataError(f"{run}: {_why_none(len(labelled), which)}. Give others, or --cases all.")
    if which == "unseen" and len(chosen) < len(labelled):
        LOG.info(
            "%d cases are left out because the run was trained on cases with their ids", len(labelled) - len(chosen)
        )
    return chosen


def _why_none(count: int, which: Which) -> str:
    """Why none of the labelled cases can be scored."""
    purpose = "validation" if which == "validation" else "training"
    if count == 1:
        never = "not " if which == "validation" else ""
        return f"the only case with a label map (compared by id) was {never}used for {purpose}"
    share = "none" if which == "validation" else "all"
    return f"{share} of the {count} cases with label maps (compared by id) were used for {purpose}"


def convention_for(model: Predictor, cases: Sequence[Case], *, labels: str | None = None) -> LabelConvention:
    """Return the label convention of a data set; the run's own convention if the data set does not determine it.

    Args:
        model: the run's network.
        cases: all cases of the data set.
        labels: name of the convention to use, from ``--labels``.

    Raises:
        DataError: there is no convention with this name.
    """
    try:
        return convention_of(cases, labels=labels)
    except DataError as error:
        if labels is not None:
            raise
        LOG.info("label numbers are read in the convention of the training data (%s): %s", model.convention.name, error)
        return model.convention


def score_subsets(
    model: Predictor,
    cases: Sequence[Case],
    runtime: Runtime,
    *,
    nan_to_zero: bool = False,
    convention: LabelConvention | None = None,
    on_progress: OnProgress = silent,
) -> SubsetEvaluation:
    """Predict cases with every subset of their contrasts, as if the other files were missing, and score them.

    Args:
        model: network of a run that was trained to accept missing contrasts.
        cases: cases with label maps; a case that lacks contrasts is scored only on subsets of the contrasts it has.
        runtime: the one that the model was loaded for.
        nan_to_zero: replace NaN and infinite voxels with 0.
        convention: meaning of the numbers in the label maps; default: that of the run's training data.
        on_progress: called with the case that is being scored.

    Raises:
        RunError: the run needs all contrasts.
        DataError: none of the cases could be scored.
    """
    if not model.takes_missing_contrasts:
        raise RunError(
            "this run was always trained with all four contrasts, so there are no subsets to score. Train one that "
            "accepts missing contrasts: znormseg train ... --set augment.contrast_dropout=0.5"
        )
    scores: dict[str, dict[tuple[Contrast, ...], CaseDice]] = {}
    failures: dict[str, str] = {}
    for number, case in enumerate(cases):
        subsets = [subset for subset in SUBSETS if set(subset) <= set(case.contrasts)]
        found: dict[tuple[Contrast, ...], CaseDice] = {}
        try:
            case.require(all_contrasts=False)
            for position, subset in enumerate(subsets):
                share = (number + position / len(subsets)) / len(cases)
                on_progress(Progress(job="scoring", share=share, detail=f"{case.id}: {'+'.join(subset)}"))
                given = replace(case, contrasts={c: case.contrasts[c] for c in subset}, problems=())
                found[subset] = case_dice(model, given, runtime, nan_to_zero=nan_to_zero, convention=convention)
            scores[case.id] = found
        except DataError as error:
            failures[case.id] = str(error)
    if not scores:
        raise DataError(f"none of the {len(cases)} cases could be scored. {next(iter(failures.values()))}")
    on_progress(Progress(job="scoring", share=1.0, detail=f"{len(scores)} of {len(cases)} cases"))
    by_subset = {s: {case: found[s] for case, found in scores.items() if s in found} for s in SUBSETS}
    return SubsetEvaluation(
        subsets=tuple(SubsetScores(contrasts=subset, cases=cases) for subset, cases in by_subset.items() if cases),
        weights_sha256=model.sha256,
        failures=failures,
    )


def subset_rows(evaluation: SubsetEvaluation) -> list[list[str]]:
    """Return the rows of the table for the terminal: a header, then ``["t1+t1c", "12", "0.801", ...]`` per subset."""
    return [
        ["contrasts", "n", *(f"{region} Dice" for region in REGIONS), "mean"],
        *([name, str(n), *(f"{value:.3f}" for value in dice)] for name, n, *dice in _rows(evaluation)),
    ]


def write_subset_table(evaluation: SubsetEvaluation, path: Path) -> None:
    """Write the table as CSV, with numbers in full precision; the file appears complete or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    header = ["subset", "n", *(f"{region}_dice" for region in REGIONS), "mean_dice"]
    write_csv(path, [header, *_rows(evaluation)])


def _rows(evaluation: SubsetEvaluation) -> list[tuple[Any, ...]]:
    return [
        ("+".join(scores.contrasts), len(scores.cases), *scores.dice().values(), scores.mean_dice())
        for scores in evaluation.subsets
    ]
