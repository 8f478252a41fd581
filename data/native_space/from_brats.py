"""Map predictions on the grid of a prepared case back to the grid of one of its scans."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

from data.labels import from_regions
from data.native_space.itk import ImageGrid, refined, resampled, to_itk, voxels_of
from data.nifti import spacing_of
from data.preprocess import TIE_TOLERANCE

#: Maximum number of sampling points per native voxel along each axis.
_MOST_PARTS: Final = 16


def resample_to_scan(
    shares: npt.NDArray[np.float32], grid: ImageGrid, transform: sitk.Transform, scan: ImageGrid
) -> npt.NDArray[np.float32]:
    """Map shares to a scan's own grid, averaged over the extent of each of the scan's voxels.

    They are interpolated linearly at as many points along each axis as voxels of ``grid`` fit into a voxel of the scan.

    Args:
        shares: float32, shape (n, X, Y, Z) on ``grid``.
        grid: grid of the shares.
        transform: from LPS millimetres of ``grid`` to those of the scan, as returned by registration; invertible.
        scan: the scan's grid.

    Returns:
        float32, shape (n, then the shape of ``scan``); 0 outside ``grid``.
    """
    own = np.array(spacing_of(scan.affine))
    x, y, z = np.clip(np.rint(own / min(spacing_of(grid.affine))), 1, _MOST_PARTS).astype(int).tolist()
    fine, back = refined(scan, (x, y, z)), transform.GetInverse()
    means = []
    for share in shares:
        samples = voxels_of(resampled(to_itk(share.astype(np.float32), grid.affine), fine, back))
        cells = samples.reshape(scan.size[0], x, scan.size[1], y, scan.size[2], z)
        means.append(cells.mean(axis=(1, 3, 5)))
    return np.stack(means)


def threshold_shares(
    shares: npt.NDArray[np.float32], thresholds: tuple[float, float, float] = (0.5, 0.5, 0.5)
) -> npt.NDArray[np.uint8]:
    """Threshold the result of :func:`resample_to_scan`: a voxel is in a region if its share reaches the threshold.

    The regions are then made nested. Labels are never interpolated.

    Args:
        shares: shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`, 0 to 1.
        thresholds: one per region, in the order of the shares.

    Returns:
        uint8, the program's codes.
    """
    bounds = np.array(thresholds).reshape(3, 1, 1, 1)
    return from_regions(shares >= bounds - TIE_TOLERANCE)
