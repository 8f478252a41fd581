"""Scores of presence: discrimination, decisions at a threshold, calibration; with bootstrap intervals over patients.

The measures are scikit-learn's. ECE uses its calibration curve's definition with bins of equal width, as
:mod:`app.evaluation.reliability` does for voxels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from sklearn import metrics

from app.evaluation.presence_bootstrap import measures_of_samples

FloatArray = npt.NDArray[np.float64]

#: Bins of equal width of the calibration error.
BINS_OF_CASES: Final = 10
#: Specificity at which the sensitivity is stated, unless another is requested.
SPECIFICITY: Final = 0.9
#: Definition of the score of one case in comparisons.
BRIER_DEFINITION: Final = "1 - squared difference of the probability and the truth (0 or 1); 1 is best"
#: Bootstrap samples of patients.
PATIENT_RESAMPLES: Final = 1000
_LEVEL: Final = 0.95
#: Share of the samples in which a measure must be defined for its interval.
_LEAST_DEFINED: Final = 0.9

#: Name and definition of each measure of :func:`presence_measures`.
PRESENCE_MEASURES: Final = {
    "auroc": ("AUROC", "area under the ROC curve; undefined if all cases are of one kind"),
    "auprc": ("AUPRC", "average precision; undefined without a present case"),
    "sensitivity_at_specificity": (
        "sensitivity at specificity {:g}",
        "largest sensitivity of all thresholds with at least the stated specificity",
    ),
    "accuracy": ("accuracy", "share of right decisions at the threshold"),
    "f1": ("F1", "of decisions at the threshold"),
    "brier": ("Brier", "mean squared difference of probability and truth"),
    "ece": ("ECE", f"expected calibration error, {BINS_OF_CASES} bins of equal width"),
}


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A measure with its bootstrap interval over patients."""

    value: float | None
    """None where the measure is not defined."""
    low: float | None
    """Lower end of the 95 % interval; None if too few samples define the measure."""
    high: float | None


def area_under_roc(truth: FloatArray, probability: FloatArray) -> float | None:
    """Return the area under the ROC curve, or None if all examples are of one kind.

    Example:
        >>> area_under_roc(np.array([0.0, 1.0, 1.0]), np.array([0.1, 0.2, 0.9]))
        1.0
    """
    return float(metrics.roc_auc_score(truth, probability)) if len(set(truth.tolist())) > 1 else None


def sensitivity_at(truth: FloatArray, probability: FloatArray, specificity: float) -> float | None:
    """Return the largest sensitivity with at least this specificity, or None if all examples are of one kind.

    Example:
        >>> sensitivity_at(np.array([0.0, 0.0, 1.0, 1.0]), np.array([0.1, 0.6, 0.5, 0.9]), 0.9)
        0.5
    """
    if len(set(truth.tolist())) < 2:
        return None
    false_positive, sensitivity, _ = metrics.roc_curve(truth, probability, drop_intermediate=False)
    return float(sensitivity[1 - false_positive >= specificity - 1e-12].max())


def calibration_bins(truth: FloatArray, probability: FloatArray) -> list[tuple[float, float, int]]:
    """Return mean probability, share of present examples and number of examples of each bin that has any.

    Example:
        >>> calibration_bins(np.array([0.0, 1.0]), np.array([0.05, 1.0]))
        [(0.05, 0.0, 1), (1.0, 1.0, 1)]
    """
    place = np.minimum((probability * BINS_OF_CASES).astype(int), BINS_OF_CASES - 1)
    return [
        (float(probability[own].mean()), float(truth[own].mean()), int(own.sum()))
        for number in range(BINS_OF_CASES)
        if (own := place == number).any()
    ]


def calibration_error(truth: FloatArray, probability: FloatArray) -> float:
    """Return the expected calibration error: the mean distance of a bin's probability and share, by example."""
    bins = calibration_bins(truth, probability)
    return sum(count * abs(mean - share) for mean, share, count in bins) / len(truth)


def presence_measures(
    truth: FloatArray, probability: FloatArray, *, threshold: float, specificity: float = SPECIFICITY
) -> dict[str, float | None]:
    """Return the measures of :data:`PRESENCE_MEASURES` of one output; None where a measure is not defined.

    Args:
        truth: 0 or 1, shape (examples,), at least one.
        probability: shape (examples,).
        threshold: an output counts as present from this probability on.
        specificity: for ``sensitivity_at_specificity``.
    """
    decided = probability >= threshold
    return {
        "auroc": area_under_roc(truth, probability),
        "auprc": float(metrics.average_precision_score(truth, probability)) if truth.any() else None,
        "sensitivity_at_specificity": sensitivity_at(truth, probability, specificity),
        "accuracy": float(metrics.accuracy_score(truth, decided)),
        "f1": float(metrics.f1_score(truth, decided, zero_division=0.0)) if truth.any() or decided.any() else None,
        "brier": float(metrics.brier_score_loss(truth, probability, labels=[0, 1])),
        "ece": calibration_error(truth, probability),
    }


def with_intervals(
    truth: FloatArray,
    probability: FloatArray,
    patients: Sequence[str],
    *,
    threshold: float,
    specificity: float = SPECIFICITY,
    resamples: int = PATIENT_RESAMPLES,
) -> dict[str, Interval]:
    """Return the measures of one output with percentile intervals; whole patients are drawn with replacement.

    Args:
        truth: 0 or 1, shape (examples,).
        probability: shape (examples,).
        patients: the patient of each example.
        threshold: see :func:`presence_measures`.
        specificity: see :func:`presence_measures`.
        resamples: number of samples; the same input gives the same interval.
    """
    rows_of: dict[str, list[int]] = {}
    for row, patient in enumerate(patients):
        rows_of.setdefault(patient, []).append(row)
    groups, rng = list(rows_of.values()), np.random.default_rng(0)
    counts = np.zeros((resamples, len(truth)))
    for sample in counts:
        drawn = np.bincount(rng.integers(len(groups), size=len(groups)), minlength=len(groups))
        for times, rows in zip(drawn, groups, strict=True):
            sample[rows] = times
    samples = measures_of_samples(
        truth, probability, counts, threshold=threshold, specificity=specificity, bins=BINS_OF_CASES
    )
    tail = 50 * (1 - _LEVEL)
    found = {}
    values = presence_measures(truth, probability, threshold=threshold, specificity=specificity)
    for name, value in values.items():
        defined = samples[name][~np.isnan(samples[name])]
        low, high = (
            np.percentile(defined, [tail, 100 - tail]).tolist()
            if value is not None and len(defined) >= _LEAST_DEFINED * resamples and len(groups) > 1
            else (None, None)
        )
        found[name] = Interval(value=value, low=low, high=high)
    return found
