"""Score a network or a finished run on cases: Dice on each case's original grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from app.config.load import RunConfig
from app.evaluation.metrics import dice
from app.inference.backends.choose import choose_backend
from app.inference.model import Predictor, load_model
from app.inference.probabilities import predict_codes
from app.system.device import Runtime
from data.datasets.layouts import Case
from data.labels import REGIONS, LabelConvention, Region, decode, to_regions
from data.nifti import read_label_map, reorient, to_native_order
from data.preprocess import prepare

CaseDice = dict[Region, float]


def case_dice(
    model: Predictor,
    case: Case,
    runtime: Runtime,
    *,
    nan_to_zero: bool = False,
    convention: LabelConvention | None = None,
) -> CaseDice:
    """Predict a case from the contrasts it has and score it against its label map.

    Args:
        model: the network; missing contrasts are set to 0 without a warning even if it was not trained for that.
        case: case with a label map and at least one contrast.
        runtime: the one that the model was loaded for.
        nan_to_zero: replace NaN and infinite voxels with 0.
        convention: convention of the label map; default: that of the network's training data.

    Raises:
        DataError: the case cannot be used.
    """
    convention = convention or model.convention
    # Given the convention, `prepare` also checks the label map's grid. The codes that it returns are not used, as they
    # are at the network's spacing.
    prepared = prepare(
        case,
        spacing_mm=model.spacing_mm,
        convention=convention,
        nan_to_zero=nan_to_zero,
        all_contrasts=False,
    )
    predicted = to_regions(predict_codes(model, prepared, runtime))
    assert case.label is not None
    codes = decode(reorient(read_label_map(case.label)).voxels, convention)
    expected = to_regions(to_native_order(codes, prepared.native_affine))
    return {region: dice(one, other) for region, one, other in zip(REGIONS, predicted, expected, strict=True)}


def score_run(
    run: Path, cases: Sequence[Case], config: RunConfig, *, on_case: Callable[[str], None]
) -> tuple[Runtime, str, dict[str, CaseDice]]:
    """Predict cases with the weights that ``predict`` would use, and score them against their label maps.

    Args:
        run: folder of a finished run.
        cases: cases with label maps.
        config: config of the run; its runtime section determines device and precision, as in ``predict``.
        on_case: called with the id of each finished case.

    Returns:
        the runtime that was used; the SHA-256 of the weights; and Dice by case id and region, on the grid of the case's
        files.

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
