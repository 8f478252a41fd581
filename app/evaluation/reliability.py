"""How well probabilities tell how often they are right: expected calibration error (ECE) and Brier score.

ECE: Naeini, Cooper and Hauskrecht, "Obtaining well calibrated probabilities using Bayesian binning", AAAI 2015, of the
probability of a region, not of the more likely of two answers. Brier, "Verification of forecasts expressed in terms of
probability", Monthly Weather Review 78, 1950.

Nearly all voxels of a head are sure background, and would make every network look calibrated. So voxels count that lie
in a box around the tumour, marked or true. The box depends on which side of one half a probability lies, which
temperature scaling leaves as it is.
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

#: Bins of equal width between 0 and 1; each has its lower border, the last has 1 too.
BINS: Final = 15
#: How far the box reaches beyond the tumour, in mm.
MARGIN_MM: Final = 10.0
#: What the numbers mean, in words; it goes into every result file.
DEFINITION: Final = (
    f"of the probability of each region, over the voxels of the smallest box that holds the whole tumour (reference, "
    f"and probability above one half), grown by {MARGIN_MM:g} mm on every side; ECE: {BINS} bins of equal width; "
    "Brier: mean squared difference; a case without any tumour, marked or true, has none"
)
#: How the file of a case's probabilities is called.
ENDING: Final = "_probabilities.nii.gz"
_ROUNDING: Final = 1e-4


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Voxels by the probability that was said of them."""

    voxels: FloatArray
    """How many are in each bin, shape (BINS,)."""
    said: FloatArray
    """Sum of their probabilities, shape (BINS,)."""
    right: FloatArray
    """How many of them are in the region, shape (BINS,)."""
    squares: float
    """Sum over all of the squared difference."""

    def __add__(self, other: Reliability) -> Reliability:
        """Of both sets of voxels together."""
        return Reliability(
            voxels=self.voxels + other.voxels,
            said=self.said + other.said,
            right=self.right + other.right,
            squares=self.squares + other.squares,
        )

    @property
    def ece(self) -> float:
        """Mean over voxels of how far the share in the region is from the mean probability in their bin; 0 of none."""
        return float(np.abs(self.said - self.right).sum() / max(1.0, self.voxels.sum()))

    @property
    def brier(self) -> float:
        """Mean squared difference of probability and truth (0 or 1); 0 of no voxels."""
        return self.squares / max(1.0, float(self.voxels.sum()))


#: Of nothing.
NO_VOXELS: Final = Reliability(voxels=np.zeros(BINS), said=np.zeros(BINS), right=np.zeros(BINS), squares=0.0)


def reliability(
    probabilities: npt.NDArray[np.floating], right: npt.NDArray[np.bool_], weights: FloatArray | None = None
) -> Reliability:
    """Count voxels.

    Args:
        probabilities: 0 to 1, any shape.
        right: whether they are in the region, the same shape.
        weights: how many voxels each stands for; one each, where it is None.

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
        said=total(shares),
        right=total(members),
        squares=float(((shares - members) ** 2 * many).sum()),
    )


def box_around(marked: npt.NDArray[np.bool_], spacing_mm: Spacing) -> Box | None:
    """The smallest box that holds a mask, grown by at least :data:`MARGIN_MM`, cut at the grid.

    Args:
        marked: shape (X, Y, Z).
        spacing_mm: of the grid.

    Returns:
        None of an empty mask.
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
        codes: of the reference, shape (X, Y, Z).
        spacing_mm: of the grid.

    Returns:
        by region; None where there is no tumour, marked or true.
    """
    box = box_around((probabilities[0] > 0.5) | (codes != 0), spacing_mm)
    if box is None:
        return None
    regions = to_regions(codes[box])
    return tuple(reliability(one[box], right) for one, right in zip(probabilities, regions, strict=True))


def read_probabilities(path: Path, reference: Volume) -> npt.NDArray[np.float32]:
    """Probabilities of the regions in the voxel order of the reference.

    Args:
        path: a 4D NIfTI of three volumes, in the order of :data:`data.labels.REGIONS`.
        reference: on whose grid they must lie.

    Returns:
        float32, shape (3, X, Y, Z), 0 to 1.

    Raises:
        DataError: the file is damaged, of another shape or grid, or holds values that are no probabilities.
    """
    parts: list[npt.NDArray[np.float32]] = []
    for number in range(len(REGIONS)):
        volume = in_order_of(reference, read_volume(path, number))
        if (difference := grid_difference(volume, reference)) is not None:
            raise DataError(
                f"{path}: lies on another grid than {reference.path}: {difference}. Delete it, and the case is scored "
                "without probabilities."
            )
        if volume.voxels.min() < -_ROUNDING or volume.voxels.max() > 1 + _ROUNDING:
            raise DataError(
                f"{path}: holds {volume.voxels.min():g} to {volume.voxels.max():g}, and probabilities are from 0 to 1. "
                "Write it anew with predict --save-probabilities, or delete it."
            )
        parts.append(volume.voxels.clip(0, 1))
    return np.stack(parts)


def pooled(cases: Sequence[Sequence[Reliability]]) -> tuple[Reliability, ...]:
    """By region: the voxels of all cases together; at least one case."""
    return tuple(sum(rest, first) for first, *rest in zip(*cases, strict=True))
