"""The cross-validation of presence decides about cases, also where the network answers for slabs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.errors import RunError
from app.experiments.crossval import presence

#: Logits by slab, and the label of the case.
ANSWERS: Mapping[str, tuple[list[list[float]], int]] = {
    "a": ([[-5.0], [2.0], [-5.0]], 1),
    "b": ([[1.0], [-6.0]], 1),
    "c": ([[-2.0], [-5.0]], 0),
    "d": ([[-1.0]], 0),
}


@pytest.fixture
def folds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is left of folds after training, with these answers; scores have no intervals."""
    monkeypatch.setattr(presence, "with_intervals", lambda *_, **__: {})
    for name, (logits, label) in ANSWERS.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"logits": logits, "labels": [label]}))
    return SimpleNamespace(
        config=SimpleNamespace(outputs=("ET",)),
        cases={name: SimpleNamespace(patient=name) for name in ANSWERS},
        prediction_file=lambda name: tmp_path / f"{name}.json",
        fold_of=lambda: {name: number % 2 for number, name in enumerate(ANSWERS)},
    )


def test_a_case_is_scored_by_its_largest_logit(folds: Any) -> None:
    scores, _ = presence.measure_presence(folds)
    decided = {name: int(found >= scores.thresholds[0]) for name, (found,) in scores.probability.items()}
    assert decided == {name: label for name, (_, label) in ANSWERS.items()}
    assert scores.truth == {name: (label,) for name, (_, label) in ANSWERS.items()}


def test_scores_with_thresholds_from_the_same_cases_are_marked(folds: Any) -> None:
    scores, _ = presence.measure_presence(folds)
    assert any("fitted on these same cases" in remark for remark in scores.remarks()[:-1])


def test_predictions_without_labels_are_reported_as_damaged(folds: Any) -> None:
    folds.prediction_file("a").write_text(json.dumps({"logits": [[1.0]], "labels": []}))
    with pytest.raises(RunError, match=r"a\.json: damaged \(logits of shape \(1, 1\) and 0 labels\)"):
        presence.measure_presence(folds)
