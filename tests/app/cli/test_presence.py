"""What the command line prints about presence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.cli.presence import presence_lines
from app.experiments.crossval.presence_decisions import FittedDecision
from app.inference.tumour_presence.model import Decision


def cross_validated(sensitivity: float) -> Any:
    """The result of a cross-validation for enhancing tumour."""
    fitted = FittedDecision(
        decision=Decision(tuned=True),
        brier_before=0.2,
        brier_after=0.2,
        sensitivity=0.8,
        specificity=0.9,
        gate_sensitivity=sensitivity,
        gate_specificity=0.7,
    )
    scores = SimpleNamespace(rows=lambda: [["measure", "ET"]], remarks=list)
    return SimpleNamespace(scores=scores, fitted={"ET": fitted}, page=Path("page"), ensemble=Path("CV/ensemble"))


@pytest.mark.parametrize(("sensitivity", "suggested"), [(0.95, True), (0.94, False)])
def test_a_gate_is_suggested_only_if_it_hardly_misses_enhancing_tumour(sensitivity: float, suggested: bool) -> None:
    *before, last = presence_lines(cross_validated(sensitivity))
    assert ("--presence CV/ensemble" in last) == suggested
    assert any("keeps 0.9" in line and ("do not use it" in line) != suggested for line in before)
