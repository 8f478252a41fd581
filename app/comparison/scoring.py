"""Dice of a finished run on cases, on each case's own grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from app.config import RunConfig
from app.evaluation.metrics import dice
from app.inference.model import load_model
from app.inference.predict import predict_codes
from app.runtime import choose_runtime
from data.labels import REGIONS, Region, decode, to_regions
from data.layouts import Case
from data.nifti import read_label_map, reorient, to_native_order
from data.preprocess import prepare

CaseDice = dict[Region, float]


def score_run(
    run: Path, cases: Sequence[Case], config: RunConfig, *, on_case: Callable[[str], None]
) -> tuple[str, dict[str, CaseDice]]:
    """Predict cases with the weights that ``predict`` would take, and score them against their label maps.

    Args:
        run: folder of a finished run.
        cases: with label maps.
        config: of the run; its runtime is used.
        on_case: called with the id of each case that is done.

    Returns:
        SHA-256 of the weights; Dice by case id and region, on the grid of the case's files.

    Raises:
        DataError: a case cannot be used.
        RunError: the run has no weights, or they were changed.
    """
    runtime = choose_runtime(config.runtime)
    model = load_model(run, runtime)
    scores: dict[str, CaseDice] = {}
    for case in cases:
        # With the convention the label map's grid is checked too; its codes are at the network's spacing, not used.
        prepared = prepare(
            case, spacing_mm=model.spacing_mm, convention=model.convention, nan_to_zero=config.data.nan_to_zero
        )
        predicted = to_regions(predict_codes(model, prepared, runtime))
        assert case.label is not None
        codes = decode(reorient(read_label_map(case.label)).voxels, model.convention)
        expected = to_regions(to_native_order(codes, prepared.native_affine))
        scores[case.id] = {
            region: dice(one, other) for region, one, other in zip(REGIONS, predicted, expected, strict=True)
        }
        on_case(case.id)
    return model.sha256, scores
