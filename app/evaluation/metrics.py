"""Scores of a predicted mask against a reference mask, as the BraTS 2023 challenge defines them for whole volumes.

Sources: the scoring script of BraTS 2023 (rachitsaluja/BraTS-2023-Metrics, metrics.py, its "legacy" whole-volume
scores) for every rule on empty masks; Nikolov et al., "Deep learning to achieve clinically applicable segmentation of
head and neck anatomy for radiotherapy", arXiv 1809.04430, and their package ``surface-distance`` for the Hausdorff
distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from app.evaluation.surfaces import Mask, Spacing, corner_codes, surface_areas_mm2, surface_distances
from data.labels import ENHANCING, REGIONS, Region, region_codes
from data.preprocess import smallest_box

#: HD95 in mm when exactly one of two masks is empty: the diagonal of 240 x 240 x 155 mm, rounded up (BraTS 2023).
ONE_EMPTY_HD95_MM: Final = 374.0
#: Definition of this "HD95" in one sentence; every result file contains it.
HD95_DEFINITION: Final = "surface-distance robust Hausdorff, 95 %; one mask empty 374 mm (BraTS 2023)"
#: Default distance in mm within which two surfaces agree; BraTS 2024 reports this one and 0.5 mm.
NSD_MM: Final = 1.0
#: One sentence that defines Dice.
DICE_DEFINITION: Final = "whole volume; both masks empty 1, one mask empty 0 (BraTS 2023)"


def nsd_definition(tolerance_mm: float) -> str:
    """Return the definition of this normalised surface Dice in one sentence."""
    return f"surface-distance surface Dice at {tolerance_mm:g} mm, by area; both masks empty 1, one mask empty 0"


@dataclass(frozen=True, kw_only=True)
class RegionScores:
    """Scores of one region of one case."""

    dice: float
    """0 to 1, see :func:`dice`."""
    hd95_mm: float
    """Millimetres, see :func:`hausdorff95_mm`."""
    sensitivity: float
    """0 to 1, see :func:`sensitivity`."""
    specificity: float
    """0 to 1, see :func:`specificity`."""
    volume_ml: float
    """Predicted volume in millilitres."""
    reference_volume_ml: float
    """Reference volume in millilitres."""
    volume_error_ml: float
    """Predicted minus reference volume in millilitres: positive if the prediction is too large."""
    nsd: float
    """0 to 1, see :func:`surface_dice`."""


def dice(prediction: Mask, reference: Mask) -> float:
    """Compute the Dice overlap, ``2 |P and R| / (|P| + |R|)``.

    Args:
        prediction: bool, shape (X, Y, Z).
        reference: bool, same shape.

    Returns:
        0 to 1; 1 when both masks are empty, 0 when exactly one is (BraTS 2023).

    Raises:
        ValueError: shapes differ, or a mask is not boolean.

    Example:
        >>> dice(np.array([[[True, True, False]]]), np.array([[[True, False, False]]]))
        0.6666666666666666
    """
    _require_masks(prediction, reference)
    marked = _count(prediction) + _count(reference)
    return 2 * _count(prediction & reference) / marked if marked else 1.0


def sensitivity(prediction: Mask, reference: Mask) -> float:
    """Compute the share of the reference that was found, ``TP / (TP + FN)``.

    Args:
        prediction: bool, shape (X, Y, Z).
        reference: bool, same shape.

    Returns:
        0 to 1; if the reference is empty, 1 for an empty prediction, else 0 (BraTS 2023).

    Raises:
        ValueError: shapes differ, or a mask is not boolean.

    Example:
        >>> sensitivity(np.array([[[True, False, False]]]), np.array([[[True, True, False]]]))
        0.5
    """
    _require_masks(prediction, reference)
    positives = _count(reference)
    if positives == 0:
        return 0.0 if prediction.any() else 1.0
    return _count(prediction & reference) / positives


def specificity(prediction: Mask, reference: Mask) -> float:
    """Compute the share of voxels outside the reference that are outside the prediction too, ``TN / (TN + FP)``.

    Args:
        prediction: bool, shape (X, Y, Z).
        reference: bool, same shape.

    Returns:
        0 to 1; 0 when the reference fills the whole grid, as in the BraTS 2023 script (which adds the smallest float to
        the denominator).

    Raises:
        ValueError: shapes differ, or a mask is not boolean.

    Example:
        >>> specificity(np.array([[[True, False, False]]]), np.array([[[False, False, True]]]))
        0.5
    """
    _require_masks(prediction, reference)
    negatives = reference.size - _count(reference)
    true_negatives = reference.size - _count(prediction | reference)
    return true_negatives / negatives if negatives else 0.0


def volume_ml(mask: Mask, spacing_mm: Spacing) -> float:
    """Compute the volume of a mask: number of voxels times voxel volume; 1 ml is 1000 cubic millimetres.

    Args:
        mask: bool, any shape.
        spacing_mm: voxel edge lengths in mm.

    Returns:
        millilitres.

    Raises:
        ValueError: the spacing is not three positive finite numbers.

    Example:
        >>> volume_ml(np.ones((10, 10, 10), dtype=bool), (1.0, 1.0, 2.0))
        2.0
    """
    _require_spacing(spacing_mm)
    return _count(mask) * (spacing_mm[0] * spacing_mm[1] * spacing_mm[2]) / 1000


def hausdorff95_mm(prediction: Mask, reference: Mask, spacing_mm: Spacing) -> float:
    """Compute the area-weighted robust Hausdorff distance at 95 %, the "HD95" of ``surface-distance`` and BraTS.

    The surface of a mask is defined on the corners of the voxel grid: a corner belongs to it if the eight voxels around
    it are neither all inside nor all outside, and represents the area in mm^2 of the marching-cubes patch of those
    eight. In each direction, let ``d_i`` be the Euclidean distances of the corners to the nearest surface corner of the
    other mask, ascending, and ``a_i`` their areas. The robust distance is the first ``d_k`` with
    ``a_1 + ... + a_k >= 0.95 sum(a)``. The result is the larger of the two directions.

    Other programs give every border voxel the same weight, or pool the two directions; their "HD95" differs.

    Args:
        prediction: bool, shape (X, Y, Z).
        reference: bool, same shape.
        spacing_mm: voxel edge lengths in mm along X, Y, Z.

    Returns:
        millimetres; 0 when both masks are empty, 374 when exactly one is (BraTS 2023).

    Raises:
        ValueError: shapes differ, a mask is not boolean, or the spacing is not three positive finite numbers.

    Example:
        >>> first, second = np.zeros((2, 9, 9, 9), dtype=bool)
        >>> first[2:5, 2:5, 2:5] = second[4:7, 2:5, 2:5] = True
        >>> hausdorff95_mm(first, second, (1.5, 1.0, 1.0))
        3.0
    """
    return _surface_scores(prediction, reference, spacing_mm, NSD_MM)[0]


def surface_dice(prediction: Mask, reference: Mask, spacing_mm: Spacing, tolerance_mm: float = NSD_MM) -> float:
    """Compute the surface Dice: the share of both surfaces' area within a tolerance of the other surface.

    Surfaces and areas are those of :func:`hausdorff95_mm`. nnU-Net and the script of BraTS 2024 count border voxels
    instead of areas; ``evaluate --rules brats2024`` computes that variant.

    Args:
        prediction: bool, shape (X, Y, Z).
        reference: bool, same shape.
        spacing_mm: voxel edge lengths in mm along X, Y, Z.
        tolerance_mm: distance in mm up to which surfaces agree, default 1.

    Returns:
        0 to 1; 1 when both masks are empty, 0 when exactly one is.

    Raises:
        ValueError: shapes differ, a mask is not boolean, the spacing is not three positive finite numbers, or the
            tolerance is negative or not finite.

    Example:
        >>> first, second = np.zeros((2, 9, 9, 9), dtype=bool)
        >>> first[2:5, 2:5, 2:5] = second[4:7, 2:5, 2:5] = True
        >>> surface_dice(first, second, (1.5, 1.0, 1.0), 3.0)
        1.0
    """
    return _surface_scores(prediction, reference, spacing_mm, tolerance_mm)[1]


def _surface_scores(prediction: Mask, reference: Mask, spacing_mm: Spacing, tolerance_mm: float) -> tuple[float, float]:
    """Compute HD95 in mm and surface Dice together."""
    _require_masks(prediction, reference)
    _require_spacing(spacing_mm)
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"the tolerance must be a distance of 0 mm or more, not {tolerance_mm}")
    if not prediction.any() or not reference.any():
        return (ONE_EMPTY_HD95_MM, 0.0) if prediction.any() or reference.any() else (0.0, 1.0)
    # Lossless: every voxel outside the box is outside both masks, like the border that ``corner_codes`` adds.
    box = smallest_box(prediction | reference)
    codes = corner_codes(prediction[box]), corner_codes(reference[box])
    found = surface_distances(*codes, spacing_mm, surface_areas_mm2(spacing_mm))
    assert found is not None
    return found.robust_mm, found.share_within(tolerance_mm)


def region_scores(
    prediction_codes: npt.NDArray[np.uint8],
    reference_codes: npt.NDArray[np.uint8],
    spacing_mm: Spacing,
    *,
    nsd_mm: float = NSD_MM,
) -> dict[Region, RegionScores]:
    """Compute all scores of one case, for whole tumour, tumour core and enhancing tumour.

    Args:
        prediction_codes: predicted label map in the program's codes 0 to 3 (see ``data.labels``), shape (X, Y, Z).
        reference_codes: reference label map of the same shape and grid.
        spacing_mm: voxel edge lengths in mm along X, Y, Z.
        nsd_mm: tolerance of :func:`surface_dice` in mm, default 1.

    Returns:
        scores by region, in the order of ``data.labels.REGIONS``.

    Raises:
        ValueError: shapes differ, a code is above 3, the spacing is not three positive finite numbers, or the tolerance
            is negative or not finite.

    Example:
        >>> codes = np.full((10, 10, 10), 2, dtype=np.uint8)  # oedema everywhere: no core
        >>> scores = region_scores(codes, codes, (1.0, 1.0, 1.0))
        >>> scores["WT"].volume_ml, scores["TC"].volume_ml, scores["TC"].dice
        (1.0, 0.0, 1.0)
    """
    scores: dict[Region, RegionScores] = {}
    for region in REGIONS:
        prediction, reference = _region_mask(prediction_codes, region), _region_mask(reference_codes, region)
        predicted_ml, reference_ml = volume_ml(prediction, spacing_mm), volume_ml(reference, spacing_mm)
        hd95_mm, nsd = _surface_scores(prediction, reference, spacing_mm, nsd_mm)
        scores[region] = RegionScores(
            dice=dice(prediction, reference),
            hd95_mm=hd95_mm,
            sensitivity=sensitivity(prediction, reference),
            specificity=specificity(prediction, reference),
            volume_ml=predicted_ml,
            reference_volume_ml=reference_ml,
            volume_error_ml=predicted_ml - reference_ml,
            nsd=nsd,
        )
    return scores


def _count(mask: Mask) -> int:
    """Count the voxels of a mask as a plain int, so that ratios are plain floats and not numpy scalars."""
    return int(np.count_nonzero(mask))


def _region_mask(codes: npt.NDArray[np.uint8], region: Region) -> Mask:
    """Return the mask of one region; computing one at a time saves the memory of a stack of three."""
    inside = np.zeros(ENHANCING + 1, dtype=np.bool_)
    inside[list(region_codes(region))] = True
    if codes.size and codes.max() > ENHANCING:
        raise ValueError(
            f"label codes range from 0 to {ENHANCING}, but {codes.max()} occurs; decode the file's labels first"
        )
    return inside[codes]


def _require_masks(prediction: Mask, reference: Mask) -> None:
    if prediction.shape != reference.shape:
        raise ValueError(
            f"prediction and reference must have the same shape, got {prediction.shape} and {reference.shape}"
        )
    if prediction.dtype != np.bool_ or reference.dtype != np.bool_:
        raise ValueError(f"masks must be boolean, not {prediction.dtype} and {reference.dtype}")


def _require_spacing(spacing_mm: Spacing) -> None:
    if len(spacing_mm) != 3 or not all(np.isfinite(edge) and edge > 0 for edge in spacing_mm):
        raise ValueError(f"the spacing must be three positive lengths in mm, not {spacing_mm}")
