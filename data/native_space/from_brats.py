"""Map predictions on the grid of a converted case back to label maps on the grid of one of its native scans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from data.labels import from_regions
from data.native_space.itk import ImageGrid, refined, resampled, to_itk, voxels_of
from data.nifti import Volume, spacing_of
from data.preprocess import TIE_TOLERANCE

if TYPE_CHECKING:
    from pathlib import Path

    import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

#: Maximum number of sampling points per native voxel along each axis.
_MOST_PARTS: Final = 16


def bring_back(
    shares: npt.NDArray[np.float32],
    grid: ImageGrid,
    transform: sitk.Transform,
    native: ImageGrid,
    *,
    source: Path,
    thresholds: tuple[float, float, float] = (0.5, 0.5, 0.5),
) -> npt.NDArray[np.uint8]:
    """Map probabilities to a scan's own grid and threshold them there.

    A native voxel takes each region's mean probability over its extent, interpolated linearly at as many points along
    each axis as voxels of ``grid`` fit in, and belongs to the region if the mean is at least the region's threshold.
    Labels are never interpolated; the regions of the result are nested.

    Args:
        shares: float32, shape (3, X, Y, Z) on ``grid``, order of :data:`data.labels.REGIONS`, 0 to 1.
        grid: grid of the shares.
        transform: from LPS millimetres of ``grid`` to those of the scan, as returned by registration; invertible.
        native: the scan's grid.
        source: origin of the shares, for messages.
        thresholds: one per region, in the order of the shares.

    Returns:
        uint8, the program's codes, shape of ``native``; background outside ``grid``.
    """
    return cut_back(means_back(shares, grid, transform, native, source=source), thresholds)


def cut_back(
    means: npt.NDArray[np.float32], thresholds: tuple[float, float, float] = (0.5, 0.5, 0.5)
) -> npt.NDArray[np.uint8]:
    """Threshold the result of :func:`means_back`: a region is where its share is at least its threshold, nested."""
    bounds = np.array(thresholds).reshape(3, 1, 1, 1)
    return from_regions(means >= bounds - TIE_TOLERANCE)


def means_back(
    shares: npt.NDArray[np.float32], grid: ImageGrid, transform: sitk.Transform, native: ImageGrid, *, source: Path
) -> npt.NDArray[np.float32]:
    """Map shares to a scan's own grid: the mean over the extent of each native voxel, as in :func:`bring_back`.

    Args:
        shares: float32, shape (n, X, Y, Z) on ``grid``.
        grid: grid of the shares.
        transform: from LPS millimetres of ``grid`` to those of the scan, as returned by registration; invertible.
        native: the scan's grid.
        source: origin of the shares, for messages.

    Returns:
        float32, shape (n, then the shape of ``native``); 0 outside ``grid``.
    """
    own = np.array(spacing_of(native.affine))
    parts = np.clip(np.rint(own / min(spacing_of(grid.affine))), 1, _MOST_PARTS).astype(int)
    factors = (int(parts[0]), int(parts[1]), int(parts[2]))
    fine, back = refined(native, factors), transform.GetInverse()
    means = []
    for share in shares:
        image = to_itk(Volume(voxels=share.astype(np.float32), affine=grid.affine, path=source))
        there = voxels_of(resampled(image, fine, back))
        x, y, z = native.size
        cells = there.reshape(x, factors[0], y, factors[1], z, factors[2])
        means.append(cells.mean(axis=(1, 3, 5)))
    return np.stack(means)
