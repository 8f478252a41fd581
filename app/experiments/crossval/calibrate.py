"""Fit temperatures and volume intervals on out-of-fold predictions, and estimate their gain without bias.

A temperature minimises the negative log likelihood over the voxels around the tumours of all cases (Guo et al. 2017,
arXiv 1706.04599). Its reported scores are held out: each fold's cases are scored under the temperature fitted on the
other folds, and their volumes are compared with intervals from the other folds. A temperature is kept only if it
improves both held-out scores, calibration error and likelihood; otherwise it is 1. The likelihood is not enough: a few
confidently wrong voxels can call for a temperature that spoils a well-calibrated network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from app.evaluation.reliability import DEFINITION, NO_VOXELS
from app.experiments.crossval.logits import Counts, fit_temperature, negative_log_likelihood, under_temperature
from app.experiments.crossval.summary import Summary
from app.inference.calibration import LEVEL, OFFSET_ML, VERSION, conformal_quantile, log_ratio
from data.labels import REGIONS, Region


@dataclass(frozen=True, kw_only=True)
class CalibrationScores:
    """Scores of one region's probabilities, over the voxels around the tumours of all cases."""

    ece: float = 0.0
    case_ece: float = 0.0
    """Mean over cases of each case's ECE."""
    brier: float = 0.0
    nll: float = 0.0
    """Mean negative log likelihood over voxels."""


@dataclass(frozen=True, kw_only=True)
class RegionCalibration:
    """Effect of a temperature on one region, measured on cases that it was not fitted on."""

    fitted: float
    """The temperature fitted on all cases."""
    left_out: tuple[float, ...]
    """By fold: the temperature fitted without the fold's cases."""
    before: CalibrationScores
    """With the networks' probabilities as they are."""
    after: CalibrationScores
    """With each case under the temperature fitted without its fold."""
    log_ratio: Mapping[str, float | None]
    """Quantile of volume errors over all cases, ``plain`` and ``postprocessed``; None if there are too few cases."""
    coverage: float | None
    """Share of cases whose true volume is in the interval from the other folds; None if those have too few cases."""

    @property
    def temperature(self) -> float:
        """Temperature of the ensemble: the fitted one, or 1 if that does not help cases it was not fitted on."""
        return self.fitted if self.after.ece < self.before.ece and self.after.nll < self.before.nll else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "temperature": self.temperature,
            "temperature_fitted": self.fitted,
            "temperature_without_fold": list(self.left_out),
            **{
                f"{name}_{when}": getattr(scores, name)
                for name in ("ece", "case_ece", "brier", "nll")
                for when, scores in (("before", self.before), ("after", self.after))
            },
            "interval_coverage": self.coverage,
        }


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """Temperatures and volume intervals of a cross-validation."""

    regions: Mapping[Region, RegionCalibration]
    cases: int
    """Number of cases that the volume intervals are based on."""
    cases_with_tumour: int
    """Number of cases that the temperatures are fitted on."""

    def ensemble_json(self) -> dict[str, Any]:
        """Return plain data in the form that :func:`app.inference.calibration.calibration_from_json` reads."""

        def ratios(masks: str) -> dict[str, float | None] | None:
            found: dict[str, float | None] = {region: one.log_ratio[masks] for region, one in self.regions.items()}
            return None if None in found.values() else found

        return {
            "version": VERSION,
            "temperature": {region: one.temperature for region, one in self.regions.items()},
            "volume_interval": {
                "level": LEVEL,
                "offset_ml": OFFSET_ML,
                "cases": self.cases,
                "log_ratio": {masks: ratios(masks) for masks in ("plain", "postprocessed")},
            },
        }

    def to_json(self) -> dict[str, Any]:
        """Return plain data: the values of the ensemble, and their effect by region."""
        return {
            **self.ensemble_json(),
            "regions": {region: one.to_json() for region, one in self.regions.items()},
            "cases_with_tumour": self.cases_with_tumour,
            "definition": DEFINITION,
        }


def calibrate(counts: Mapping[str, Counts], raw: Summary, tuned: Summary) -> Calibrated:
    """Fit temperatures and volume intervals on all cases, and again without each fold.

    Args:
        counts: counts from :func:`app.experiments.crossval.logits.count_logits`, by case id; all 0 for a case without
            predicted or true tumour.
        raw: scores without post-processing.
        tuned: scores with post-processing.
    """
    fold_of = raw.fold_of
    return Calibrated(
        regions={region: _region(number, region, counts, raw, tuned) for number, region in enumerate(REGIONS)},
        cases=len(fold_of),
        cases_with_tumour=sum(bool(one.any()) for one in counts.values()),
    )


def _region(
    number: int, region: Region, counts: Mapping[str, Counts], raw: Summary, tuned: Summary
) -> RegionCalibration:
    fold_of = raw.fold_of
    held = {case_id: one[number] for case_id, one in counts.items() if one[number].any()}
    folds = range(max(fold_of.values()) + 1)
    left_out = [_fit([one for case_id, one in held.items() if fold_of[case_id] != fold]) for fold in folds]
    return RegionCalibration(
        fitted=_fit(list(held.values())),
        left_out=tuple(left_out),
        before=_scores(held, dict.fromkeys(held, 1.0)),
        after=_scores(held, {case_id: left_out[fold_of[case_id]] for case_id in held}),
        log_ratio={
            masks: conformal_quantile(list(volume_errors(summary, region).values()), LEVEL)
            for masks, summary in (("plain", raw), ("postprocessed", tuned))
        },
        coverage=_coverage(tuned, region),
    )


def volume_errors(summary: Summary, region: Region) -> dict[str, float]:
    """Return the :func:`app.inference.calibration.log_ratio` of a region's volume, by case id."""
    return {
        case_id: log_ratio(scores[region].reference_volume_ml, scores[region].volume_ml)
        for case_id, scores in summary.cases.items()
    }


def _coverage(summary: Summary, region: Region) -> float | None:
    """Return the share of cases whose true volume is in the interval from the other folds."""
    errors, covered = volume_errors(summary, region), []
    for case_id, error in errors.items():
        fold = summary.fold_of[case_id]
        bound = conformal_quantile([one for other, one in errors.items() if summary.fold_of[other] != fold], LEVEL)
        if bound is None:
            return None
        covered.append(error <= bound)
    return fmean(covered)


def _fit(counts: Sequence[Counts]) -> float:
    return fit_temperature(np.sum(counts, axis=0)) if counts else 1.0


def _scores(counts: Mapping[str, Counts], temperatures: Mapping[str, float]) -> CalibrationScores:
    """Score cases under their temperatures."""
    if not counts:
        return CalibrationScores()
    cases = [under_temperature(one, temperatures[case_id]) for case_id, one in counts.items()]
    voxels = [one[:, 1:-1].sum() for one in counts.values()]
    losses = [negative_log_likelihood(one, temperatures[case_id]) for case_id, one in counts.items()]
    together = sum(cases, NO_VOXELS)
    nll = float(np.dot(voxels, losses) / max(1, sum(voxels)))
    return CalibrationScores(
        ece=together.ece, case_ece=fmean(case.ece for case in cases), brier=together.brier, nll=nll
    )
