"""Fit the decisions of a presence network on out-of-fold logits: Platt scaling, and a threshold for each output.

Platt scaling (Platt 1999) is a logistic regression on one logit. It is kept only if it lowers the Brier score of folds
that it was not fitted on. A slope that is not above 0 means that larger logits do not go with presence: the network has
learned nothing to decide by, so neither scaling nor threshold is fitted. The threshold maximises sensitivity plus
specificity (Youden 1950); of equally good ones, the one in the middle of the widest gap between probabilities is taken.
A gate needs another threshold, since a segmentation that it removes wrongly is lost: one below every present example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression

from app.inference.tumour_presence.model import UNTUNED, Decision

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int_]


@dataclass(frozen=True, kw_only=True)
class FittedDecision:
    """The decision for one output, and how it does on folds that it was not fitted on."""

    decision: Decision
    brier_before: float
    """Of uncalibrated out-of-fold probabilities."""
    brier_after: float
    """Of probabilities calibrated without the case's fold."""
    sensitivity: float | None
    """Share of present examples found with a threshold tuned without their fold; None without such examples."""
    specificity: float | None
    gate_sensitivity: float | None = None
    """Share of present examples that a gate keeps whose threshold was chosen without their fold."""
    gate_specificity: float | None = None
    """Share of absent examples that such a gate removes."""
    slope: float | None = None
    """Of Platt scaling fitted on all folds, also where it was not kept; None if it was not fitted."""

    @property
    def untuned_because(self) -> str:
        """Why nothing was tuned, as the rest of a sentence about the output; empty if something was."""
        if self.decision.tuned:
            return ""
        if self.slope is None:
            return "all cases are of one kind, so nothing was tuned"
        return (
            f"larger out-of-fold logits do not go with presence (slope {self.slope:.3g}), so nothing was tuned. The "
            "networks are no better than chance; do not use them"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**vars(self), "decision": dict(vars(self.decision))}


def fit_decision(logits: FloatArray, truth: FloatArray, folds: IntArray) -> FittedDecision:
    """Fit one output on all folds, and estimate its errors on folds left out.

    Args:
        logits: out-of-fold logits, shape (examples,).
        truth: 0 or 1, shape (examples,).
        folds: fold of each example.

    Returns:
        an untuned decision if all examples are of one kind, or larger logits do not go with presence.
    """
    plain = Decision().probability(logits)
    before = float(np.mean((plain - truth) ** 2))
    if len(set(truth.tolist())) < 2:
        return FittedDecision(
            decision=Decision(), brier_before=before, brier_after=before, sensitivity=None, specificity=None
        )
    slope, intercept = platt_scaling(logits, truth)
    if slope <= 0:
        return FittedDecision(
            decision=Decision(),
            brier_before=before,
            brier_after=before,
            sensitivity=float((plain[truth == 1] >= UNTUNED).mean()),
            specificity=float((plain[truth == 0] < UNTUNED).mean()),
            slope=slope,
        )
    left_out = np.array(plain)
    for fold in np.unique(folds):
        if len(set(truth[folds != fold].tolist())) > 1:
            scaling = _calibration(logits[folds != fold], truth[folds != fold])
            left_out[folds == fold] = scaling.probability(logits[folds == fold])
    after = float(np.mean((left_out - truth) ** 2))
    scale = after < before
    decided, kept = (
        _decide_by_fold(logits, truth, folds, rule, scale=scale) for rule in (best_threshold, gate_threshold)
    )
    scaling = Decision(slope=slope, intercept=intercept) if scale else Decision()
    probability = scaling.probability(logits)
    decision = Decision(
        slope=scaling.slope,
        intercept=scaling.intercept,
        threshold=best_threshold(probability, truth),
        gate_threshold=gate_threshold(probability, truth),
        tuned=True,
    )
    return FittedDecision(
        decision=decision,
        brier_before=before,
        brier_after=after if scale else before,
        sensitivity=float(decided[truth == 1].mean()),
        specificity=float((~decided[truth == 0]).mean()),
        gate_sensitivity=float(kept[truth == 1].mean()),
        gate_specificity=float((~kept[truth == 0]).mean()),
        slope=slope,
    )


def platt_scaling(logits: FloatArray, truth: FloatArray) -> tuple[float, float]:
    """Fit slope and intercept by logistic regression with scikit-learn's default penalty; both classes are needed."""
    model = LogisticRegression().fit(logits[:, None], truth)
    return float(model.coef_[0, 0]), float(model.intercept_[0])


def _calibration(logits: FloatArray, truth: FloatArray) -> Decision:
    """Return Platt scaling without a threshold; none if its slope is not above 0."""
    slope, intercept = platt_scaling(logits, truth)
    return Decision(slope=slope, intercept=intercept) if slope > 0 else Decision()


def best_threshold(probability: FloatArray, truth: FloatArray) -> float:
    """Return the threshold with the largest sum of sensitivity and specificity; both classes are needed.

    Example:
        >>> best_threshold(np.array([0.1, 0.2, 0.6, 0.9]), np.array([0.0, 0.0, 1.0, 1.0]))
        0.4
    """
    values = np.unique(probability)
    if len(values) < 2:
        return UNTUNED
    middles, gaps = (values[1:] + values[:-1]) / 2, np.diff(values)
    above = probability[None, :] >= middles[:, None]
    sums = above[:, truth == 1].mean(axis=1) + (~above[:, truth == 0]).mean(axis=1)
    best = np.flatnonzero(sums >= sums.max() - 1e-12)
    return float(middles[best[gaps[best].argmax()]])


def gate_threshold(probability: FloatArray, truth: FloatArray) -> float:
    """Return a threshold below every present example: halfway to the next smaller probability, or to 0.

    Args:
        probability: shape (examples,).
        truth: 0 or 1, shape (examples,); at least one is 1.

    Example:
        >>> gate_threshold(np.array([0.1, 0.2, 0.4, 0.5, 0.9]), np.array([0.0, 0.0, 1.0, 0.0, 1.0])).__round__(3)
        0.3
    """
    lowest = probability[truth == 1].min()
    return float((lowest + probability[probability < lowest].max(initial=0.0)) / 2)


def _decide_by_fold(
    logits: FloatArray,
    truth: FloatArray,
    folds: IntArray,
    rule: Callable[[FloatArray, FloatArray], float],
    *,
    scale: bool,
) -> npt.NDArray[np.bool_]:
    """Decide on the examples of each fold with a scaling and a threshold that are fitted on the other folds."""
    decided = np.zeros(len(truth), dtype=bool)
    for fold in np.unique(folds):
        others = folds != fold
        if len(set(truth[others].tolist())) < 2:
            decided[~others] = Decision().probability(logits[~others]) >= UNTUNED
            continue
        scaling = _calibration(logits[others], truth[others]) if scale else Decision()
        threshold = rule(scaling.probability(logits[others]), truth[others])
        decided[~others] = scaling.probability(logits[~others]) >= threshold
    return decided
