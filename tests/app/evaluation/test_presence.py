"""Scores of presence: those of scikit-learn, undefined where they have no meaning, with intervals over patients."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics

from app.evaluation.presence import (
    area_under_roc,
    calibration_error,
    presence_measures,
    sensitivity_at,
    with_intervals,
)

TRUTH = np.array([0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
PROBABILITY = np.array([0.1, 0.6, 0.5, 0.9, 0.8, 0.2])


def test_the_metrics_equal_those_of_scikit_learn() -> None:
    found = presence_measures(TRUTH, PROBABILITY, threshold=0.5)
    assert found["auroc"] == metrics.roc_auc_score(TRUTH, PROBABILITY)
    assert found["brier"] == pytest.approx(np.mean((TRUTH - PROBABILITY) ** 2))
    assert found["f1"] == metrics.f1_score(TRUTH, PROBABILITY >= 0.5)


@pytest.mark.parametrize("kind", [0.0, 1.0])
def test_a_single_class_has_a_brier_score_but_no_roc_curve(kind: float) -> None:
    found = presence_measures(np.full(3, kind), np.array([0.2, 0.4, 0.9]), threshold=0.5)
    assert found["auroc"] is None
    assert found["sensitivity_at_specificity"] is None
    assert found["brier"] is not None


def test_sensitivity_at_full_specificity_counts_cases_above_every_absent_one() -> None:
    assert sensitivity_at(TRUTH, PROBABILITY, 1.0) == pytest.approx(2 / 3)


def test_probabilities_that_are_correct_on_average_have_no_calibration_error() -> None:
    assert calibration_error(np.array([0.0, 1.0]), np.array([0.5, 0.5])) == 0


def test_inverted_predictions_mirror_the_area_under_the_curve() -> None:
    area = area_under_roc(TRUTH, PROBABILITY)
    assert area is not None
    assert area_under_roc(TRUTH, 1 - PROBABILITY) == pytest.approx(1 - area)


def test_intervals_contain_the_value_and_are_reproducible() -> None:
    patients = list("abcdef")
    one, other = (with_intervals(TRUTH, PROBABILITY, patients, threshold=0.5, resamples=50) for _ in range(2))
    assert one == other
    brier = one["brier"]
    assert brier.low is not None
    assert brier.high is not None
    assert brier.value is not None
    assert brier.low <= brier.value <= brier.high


def test_a_single_patient_has_no_interval() -> None:
    found = with_intervals(TRUTH, PROBABILITY, ["a"] * 6, threshold=0.5, resamples=10)
    assert found["brier"].low is None
