"""Dice of a network on one case, on the case's own grid."""

from __future__ import annotations

from app.evaluation.metrics import dice
from app.inference.model import Predictor
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
    """Predict a case from the contrasts it has, and score it against its label map.

    Args:
        model: the network; what it was not trained to do without is 0 for it, without a word.
        case: with a label map and at least one contrast.
        runtime: as the model was loaded for.
        nan_to_zero: take voxels that are NaN or infinite as 0.
        convention: of the label map, default that of the data which the network was trained on.

    Raises:
        DataError: the case cannot be used.
    """
    convention = convention or model.convention
    # With the convention the label map's grid is checked too; its codes are at the network's spacing, not used.
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
