"""Decisions fitted on out-of-fold logits: calibration only where it helps, thresholds in the widest gap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from app.experiments.crossval.presence_decisions import best_threshold, fit_decision, gate_threshold, platt_scaling
from app.inference.tumour_presence.model import Decision

TRUTH = np.tile([0.0, 1.0], 20)
FOLDS = np.arange(40) // 2 % 5


def test_separable_predictions_get_a_threshold_in_between_and_no_held_out_errors() -> None:
    fitted = fit_decision(np.where(TRUTH == 1, 2.0, -2.0) + np.linspace(-0.5, 0.5, 40), TRUTH, FOLDS)
    assert (fitted.sensitivity, fitted.specificity) == (1.0, 1.0)
    assert fitted.decision.tuned


def test_overconfident_predictions_are_scaled_down() -> None:
    logits = np.where(TRUTH == 1, 20.0, -20.0)
    logits[:8] *= -1  # a fifth is wrong
    fitted = fit_decision(logits, TRUTH, FOLDS)
    assert 0 < fitted.decision.slope < 1
    assert fitted.brier_after < fitted.brier_before


def test_a_scaling_that_does_not_help_is_not_kept() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(0.2, 0.8, 40)
    truth = (rng.random(40) < probability).astype(float)
    fitted = fit_decision(np.log(probability / (1 - probability)), truth, FOLDS)
    assert fitted.brier_after <= fitted.brier_before
    assert fitted.decision.slope == 1 or fitted.brier_after < fitted.brier_before


def test_a_single_class_leaves_the_decision_untuned() -> None:
    fitted = fit_decision(np.zeros(4), np.ones(4), np.array([0, 0, 1, 1]))
    assert (fitted.decision.tuned, fitted.decision.threshold, fitted.specificity) == (False, 0.5, None)


def test_ties_between_thresholds_go_to_the_widest_gap() -> None:
    probability, truth = np.array([0.1, 0.2, 0.3, 0.7, 0.8]), np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    assert best_threshold(probability, truth) == pytest.approx(0.5)


def test_a_gate_keeps_all_present_examples_and_removes_those_below_them() -> None:
    logits = np.where(TRUTH == 1, 1.0, -1.0) + np.linspace(-2.0, 2.0, 40)
    fitted = fit_decision(logits, TRUTH, FOLDS)
    kept = fitted.decision.probability(logits) >= fitted.decision.gate_threshold
    assert kept[TRUTH == 1].all()
    assert np.array_equal(kept, logits >= logits[TRUTH == 1].min())
    assert fitted.decision.gate_threshold < fitted.decision.threshold


def test_the_threshold_of_a_gate_is_tested_on_folds_that_did_not_choose_it() -> None:
    logits = np.where(TRUTH == 1, 2.0, -2.0)
    logits[1] = -3.0  # present in fold 0, and lower than all others
    fitted = fit_decision(logits, TRUTH, FOLDS)
    assert fitted.gate_sensitivity == pytest.approx(19 / 20)
    assert fitted.decision.probability(logits[[1]])[0] >= fitted.decision.gate_threshold


@pytest.mark.parametrize(("probability", "expected"), [([0.2, 0.6, 0.8], 0.4), ([0.7, 0.6, 0.8], 0.3)])
def test_the_threshold_of_a_gate_is_halfway_to_the_highest_removed_example(
    probability: list[float], expected: float
) -> None:
    assert gate_threshold(np.array(probability), np.array([0.0, 1.0, 1.0])) == pytest.approx(expected)


def test_platt_scaling_keeps_the_order_of_predictions() -> None:
    slope, _ = platt_scaling(np.array([-2.0, -1.0, 1.0, 2.0]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert slope > 0


def test_predictions_worse_than_chance_are_neither_scaled_nor_used_for_decisions() -> None:
    fitted = fit_decision(np.where(TRUTH == 1, -2.0, 2.0), TRUTH, FOLDS)
    assert fitted.slope is not None
    assert fitted.slope < 0
    assert fitted.decision == Decision()
    assert (fitted.sensitivity, fitted.specificity) == (0.0, 0.0)
    assert "no better than chance" in fitted.untuned_because


def test_a_fold_whose_complement_has_a_negative_slope_is_not_scaled_with_it() -> None:
    logits, truth = np.array([-9.0, 9.0, 1.0, -1.0]), np.array([0.0, 1.0, 0.0, 1.0])
    fitted = fit_decision(logits, truth, np.array([0, 0, 1, 1]))
    assert fitted.brier_after <= fitted.brier_before
    assert fitted.decision.slope > 0


def test_a_decision_with_a_negative_slope_is_refused() -> None:
    with pytest.raises(ValueError, match=r"slope -0\.5 of the calibration, which must be above 0"):
        Decision(slope=-0.5)


@pytest.mark.parametrize(
    "values",
    [
        {"gate_threshold": float("nan")},
        {"threshold": 7.0},
        {"gate_threshold": "low"},
        {"intercept": float("inf")},
        {"slope": float("inf")},
    ],
)
def test_a_decision_with_an_impossible_value_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Decision(**values)
