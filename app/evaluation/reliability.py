"""Calibration of probabilities: expected calibration error (ECE) and Brier score.

ECE: Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015,
computed for the probability of a region, not for that of the more likely answer. Brier, "Verification of forecasts
expressed in terms of probability", Monthly Weather Review 78, 1950.

Nearly all voxels of a head are certain background and would make every network look calibrated. So only voxels in a box
around the predicted and true tumour count. The box depends only on whether a probability is above one half, which
temperature scaling does not change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.labels import REGIONS, to_regions
from data.nifti import Spacing, Volume, grid_difference, in_order_of, read_volume
from data.preprocess import smallest_box

FloatArray = npt.NDArray[np.float64]
Box = tuple[slice, slice, slice]

#: Number of bins of equal width between 0 and 1; each includes its lower border, the last one also 1.
BINS: Final = 15
#: Margin of the box around the tumour in mm.
MARGIN_MM: Final = 10.0
#: Definition of the metrics in words; every result file contains it.
DEFINITION: Final = (
    "of the probability of each region, over the voxels of the smallest box that contains the whole tumour "
    f"(reference, and probability above one half), grown by {MARGIN_MM:g} mm on every side; ECE: {BINS} bins of equal "
    "width; Brier: mean squared difference; undefined for a case without predicted or true tumour"
)
#: Suffix of a case's probability file.
ENDING: Final = "_probabilities.nii.gz"
_ROUNDING: Final = 1e-4


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Voxel counts by predicted probability."""

    voxels: FloatArray
    """Number of voxels in each bin, shape (BINS,)."""
    probabilities: FloatArray
    """Sum of the voxels' probabilities in each bin, shape (BINS,)."""
    members: FloatArray
    """Number of voxels in each bin that are in the region, shape (BINS,)."""
    squares: float
    """Sum over all voxels of the squared difference of probability and truth (0 or 1)."""

    def __add__(self, other: Reliability) -> Reliability:
        """Combine two sets of voxels."""
        return Reliability(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    @property
    def ece(self) -> float:
        """Mean over voxels of the gap, in their bin, between mean probability and share in the region; 0 if empty."""
        return float(np.abs(self.probabilities - self.members).sum() / max(1.0, self.voxels.sum()))

    @property
    def brier(self) -> float:
        """Mean squared difference of probability and truth (0 or 1); 0 for no voxels."""
        return self.squares / max(1.0, float(self.voxels.sum()))


#: Reliability of an empty set of voxels.
NO_VOXELS: Final = Reliability(voxels=np.zeros(BINS), probabilities=np.zeros(BINS), members=np.zeros(BINS), squares=0.0)


def reliability(
    probabilities: npt.NDArray[np.floating], right: npt.NDArray[np.bool_], weights: FloatArray | None = None
) -> Reliability:
    """Count voxels by probability.

    Args:
        probabilities: 0 to 1, any shape.
        right: whether each voxel is in the region, same shape.
        weights: number of voxels that each entry represents; None means one each.

    Example:
        >>> found = reliability(np.array([0.1, 0.9, 0.9, 0.9]), np.array([False, True, True, False]))
        >>> round(found.ece, 3), round(found.brier, 3)
        (0.2, 0.21)
    """
    shares, members = probabilities.astype(np.float64).ravel(), right.ravel().astype(np.float64)
    many = np.ones(shares.size) if weights is None else weights.ravel()
    bins = np.minimum((shares * BINS).astype(np.intp), BINS - 1)

    def total(values: FloatArray) -> FloatArray:
        return np.bincount(bins, weights=values * many, minlength=BINS).astype(np.float64, copy=False)

    return Reliability(
        voxels=total(np.ones(shares.size)),
        probabilities=total(shares),
        members=total(members),
        squares=float(((shares - members) ** 2 * many).sum()),
    )


def box_around(marked: npt.NDArray[np.bool_], spacing_mm: Spacing) -> Box | None:
    """Return the smallest box that contains a mask, grown by at least :data:`MARGIN_MM` and clipped to the grid.

    Args:
        marked: mask of shape (X, Y, Z).
        spacing_mm: spacing of the grid.

    Returns:
        the box; None for an empty mask.
    """
    if not marked.any():
        return None
    x, y, z = (
        slice(max(0, side.start - grow), side.stop + grow)
        for side, grow in zip(
            smallest_box(marked), (int(np.ceil(MARGIN_MM / size - 1e-6)) for size in spacing_mm), strict=True
        )
    )
    return (x, y, z)


def case_reliability(
    probabilities: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8], spacing_mm: Spacing
) -> tuple[Reliability, ...] | None:
    """Count the voxels around the tumour of one case.

    Args:
        probabilities: shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`.
        codes: label codes of the reference, shape (X, Y, Z).
        spacing_mm: spacing of the grid.

    Returns:
        the reliability of each region; None if there is no predicted or true tumour.
    """
    box = box_around((probabilities[0] > 0.5) | (codes != 0), spacing_mm)
    if box is None:
        return None
    regions = to_regions(codes[box])
    return tuple(reliability(one[box], right) for one, right in zip(probabilities, regions, strict=True))


def read_probabilities(path: Path, reference: Volume) -> npt.NDArray[np.float32]:
    """Read the probabilities of the regions in the voxel order of the reference.

    Args:
        path: a 4D NIfTI file of three volumes, in the order of :data:`data.labels.REGIONS`.
        reference: volume whose grid the probabilities must have.

    Returns:
        float32, shape (3, X, Y, Z), 0 to 1.

    Raises:
        DataError: the file is damaged, has a different shape or grid, or contains values that are not probabilities.
    """
    parts: list[npt.NDArray[np.float32]] = []
    for number in range(len(REGIONS)):
        volume = in_order_of(reference, read_volume(path, number))
        if (difference := grid_difference(volume, reference)) is not None:
            raise DataError(
                f"{path}: on a different grid than {reference.path}: {difference}. Delete it to score the case "
                "without probabilities."
            )
        if volume.voxels.min() < -_ROUNDING or volume.voxels.max() > 1 + _ROUNDING:
            raise DataError(
                f"{path}: has values from {volume.voxels.min():g} to {volume.voxels.max():g}; probabilities are from "
                "0 to 1. Write it again with predict --save-probabilities, or delete it."
            )
        parts.append(volume.voxels.clip(0, 1))
    return np.stack(parts)


def pooled(cases: Sequence[Sequence[Reliability]]) -> tuple[Reliability, ...]:
    """Combine the voxels of all cases, by region; at least one case is required."""
    return tuple(sum(rest, first) for first, *rest in zip(*cases, strict=True))
