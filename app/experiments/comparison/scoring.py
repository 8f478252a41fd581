"""Dice of a finished run on cases, on each case's own grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from app.config.load import RunConfig
from app.inference.backends.choose import choose_backend
from app.inference.model import load_model
from app.inference.scoring import CaseDice, case_dice
from app.system.device import Runtime
from data.datasets.layouts import Case


def score_run(
    run: Path, cases: Sequence[Case], config: RunConfig, *, on_case: Callable[[str], None]
) -> tuple[Runtime, str, dict[str, CaseDice]]:
    """Predict cases with the weights that ``predict`` would take, and score them against their label maps.

    Args:
        run: folder of a finished run.
        cases: with label maps.
        config: of the run; device and precision are chosen by its runtime section, as ``predict`` would choose them.
        on_case: called with the id of each case that is done.

    Returns:
        what computed; SHA-256 of the weights; Dice by case id and region, on the grid of the case's files.

    Raises:
        DataError: a case cannot be used.
        RunError: the run has no weights, or they were changed.
    """
    runtime = choose_backend("auto", config.runtime)
    model = load_model(run, runtime)
    scores: dict[str, CaseDice] = {}
    for case in cases:
        scores[case.id] = case_dice(model, case.require(), runtime, nan_to_zero=config.data.nan_to_zero)
        on_case(case.id)
    return runtime, model.sha256, scores
