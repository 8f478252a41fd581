"""Scores of a cross-validation: by case, by fold and overall."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Final

from app.evaluation.metrics import RegionScores, region_scores
from app.evaluation.tables import write_csv
from app.experiments.crossval.out_of_fold import read_prediction
from app.experiments.crossval.plan import Folds
from app.experiments.crossval.tune import cropped
from app.inference.postprocess import Postprocess
from data.labels import REGIONS, Region, from_regions

#: Scores kept for each region. Specificity is not: it counts voxels of the whole grid, which are not kept.
METRICS: Final = ("dice", "hd95_mm", "sensitivity", "volume_ml", "reference_volume_ml")

CaseScores = Mapping[Region, RegionScores]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean over cases, and the spread of cases and folds."""

    mean: float
    sd_cases: float | None
    """Standard deviation of the cases; None for a single case."""
    sd_folds: float | None
    """Standard deviation of the folds' means; None for a single fold."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Out-of-fold scores under some post-processing rules."""

    rules: Postprocess
    fold_of: Mapping[str, int]
    """Fold by case id."""
    cases: Mapping[str, CaseScores]

    def dice_of(self, case_id: str) -> float:
        """Return the mean Dice of a case over its regions."""
        return fmean(self.cases[case_id][region].dice for region in REGIONS)

    def fold_means(self, fold: int) -> dict[str, float]:
        """Return a fold's mean Dice by region and over regions (``mean``), and mean HD95 by region (``WT_hd95_mm``)."""
        return self._means(case_id for case_id, its_fold in self.fold_of.items() if its_fold == fold)

    def spread(self) -> dict[str, Spread]:
        """Return means and spreads over all cases, with the keys of :meth:`fold_means`."""
        by_fold = [self.fold_means(fold) for fold in sorted(set(self.fold_of.values()))]
        by_case = [self._means([case_id]) for case_id in self.cases]
        return {
            key: Spread(
                mean=fmean(case[key] for case in by_case),
                sd_cases=_sd([case[key] for case in by_case]),
                sd_folds=_sd([means[key] for means in by_fold]),
            )
            for key in by_case[0]
        }

    def worst(self, count: int) -> list[str]:
        """Return the ids of the cases with the lowest mean Dice, lowest first."""
        return sorted(self.cases, key=lambda case_id: (self.dice_of(case_id), case_id))[:count]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "postprocess": self.rules.to_json(),
            "all": {key: asdict(spread) for key, spread in self.spread().items()},
            "folds": [self.fold_means(fold) for fold in sorted(set(self.fold_of.values()))],
        }

    def _means(self, case_ids: Iterable[str]) -> dict[str, float]:
        listed = [self.cases[case_id] for case_id in case_ids]
        means: dict[str, float] = {}
        for region in REGIONS:
            means[region] = fmean(scores[region].dice for scores in listed)
            means[f"{region}_hd95_mm"] = fmean(scores[region].hd95_mm for scores in listed)
        return {**means, "mean": fmean(means[region] for region in REGIONS)}


def summarise(folds: Folds, rules: Postprocess) -> Summary:
    """Score the out-of-fold predictions of all cases under some post-processing rules.

    Raises:
        RunError: a file is missing or damaged.
    """
    fold_of = folds.fold_of()
    return Summary(
        rules=rules, fold_of=fold_of, cases={case: _scores(folds.prediction_file(case), rules) for case in fold_of}
    )


def write_crossval_table(path: Path, summaries: Mapping[str, Summary]) -> None:
    """Write the scores of every case as CSV, in full precision and atomically.

    Args:
        path: file to write.
        summaries: summaries by the name to write in the column ``masks``.
    """
    rows = [
        [name, summary.fold_of[case_id], case_id, *(getattr(scores[r], metric) for r in REGIONS for metric in METRICS)]
        for name, summary in summaries.items()
        for case_id, scores in summary.cases.items()
    ]
    write_csv(path, [["masks", "fold", "case", *(f"{region}_{name}" for region in REGIONS for name in METRICS)], *rows])


def _scores(file: Path, rules: Postprocess) -> CaseScores:
    prediction = cropped(read_prediction(file))
    codes = from_regions(rules.clean(prediction.cut(rules), prediction.spacing_mm))
    return region_scores(codes, prediction.reference, prediction.spacing_mm)


def _sd(values: list[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
