"""Measures of presence on many bootstrap samples at once.

The same definitions as :func:`app.evaluation.presence.presence_measures`, which calls scikit-learn and would take
seconds for a thousand samples. A sample is the number of times that it contains each example; the examples are sorted
once for all samples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def measures_of_samples(
    truth: FloatArray, probability: FloatArray, counts: FloatArray, *, threshold: float, specificity: float, bins: int
) -> dict[str, FloatArray]:
    """Return each measure of each sample, shape (samples,); NaN where it is not defined.

    Args:
        truth: 0 or 1, shape (examples,).
        probability: shape (examples,).
        counts: how often a sample contains an example, shape (samples, examples).
        threshold: an output counts as present from this probability on.
        specificity: for ``sensitivity_at_specificity``.
        bins: number of bins of equal width of the calibration error.
    """
    with np.errstate(invalid="ignore", divide="ignore"):  # 0/0 is NaN: not defined
        return {
            **_at_every_threshold(truth, probability, counts, specificity),
            **_at_one_threshold(truth, probability >= threshold, counts),
            **_of_probabilities(truth, probability, counts, bins),
        }


def _at_every_threshold(
    truth: FloatArray, probability: FloatArray, counts: FloatArray, specificity: float
) -> dict[str, FloatArray]:
    """Return the measures that use the whole ROC or precision-recall curve."""
    order = np.argsort(-probability, kind="stable")
    last_of_equals = np.flatnonzero(np.append(np.diff(probability[order]) != 0, True))

    def found(weights: FloatArray) -> FloatArray:
        """Return how many examples are at or above each distinct probability, after a column of zeros."""
        columns = weights[:, order].cumsum(axis=1)[:, last_of_equals]
        return np.concatenate([np.zeros((len(weights), 1)), columns], axis=1)

    right, wrong = found(counts * truth), found(counts * (1 - truth))
    sensitivity, false_positive = right / right[:, -1:], wrong / wrong[:, -1:]
    both_kinds = (right[:, -1] > 0) & (wrong[:, -1] > 0)
    enough = 1 - false_positive >= specificity - 1e-12
    precision = np.nan_to_num(right[:, 1:] / (right[:, 1:] + wrong[:, 1:]))  # 0/0 adds nothing to the recall
    at_specificity = np.where(enough, sensitivity, 0.0).max(axis=1)
    return {
        "auroc": np.trapezoid(sensitivity, false_positive, axis=1),
        "auprc": (np.diff(sensitivity) * precision).sum(axis=1),
        "sensitivity_at_specificity": np.where(both_kinds, at_specificity, np.nan),
    }


def _at_one_threshold(truth: FloatArray, decided: npt.NDArray[np.bool_], counts: FloatArray) -> dict[str, FloatArray]:
    """Return the measures of decisions."""
    right = counts @ (decided & (truth == 1))
    return {
        "accuracy": counts @ (decided == (truth == 1)) / counts.sum(axis=1),
        "f1": 2 * right / (counts @ decided + counts @ truth),
    }


def _of_probabilities(
    truth: FloatArray, probability: FloatArray, counts: FloatArray, bins: int
) -> dict[str, FloatArray]:
    """Return the measures of probabilities as such."""
    examples = counts.sum(axis=1)
    bin_of = np.minimum((probability * bins).astype(int), bins - 1)
    errors = [np.abs(counts @ ((bin_of == number) * (probability - truth))) for number in range(bins)]
    return {
        "brier": counts @ (probability - truth) ** 2 / examples,
        "ece": np.sum(errors, axis=0) / examples,
    }
