"""Convert between the program's arrays and SimpleITK images; every voxel keeps its position.

The program measures millimetres to the right, anterior and superior (RAS, as NIfTI does) and stores (X, Y, Z); ITK
measures to the left, posterior and superior (LPS), and its arrays are (Z, Y, X). Modules that other tasks use as well
import this package inside functions, so that training does not load SimpleITK.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

#: From RAS to LPS millimetres, and back.
_RAS_LPS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])
#: A direction cosine this close to 0 or 1 counts as axis-aligned, to allow for the rounding of float32 headers.
_STRAIGHT: Final = 1e-4


@dataclass(frozen=True, kw_only=True)
class ImageGrid:
    """The grid of an image: ``size`` voxels, placed by a 4x4 affine to RAS millimetres."""

    size: tuple[int, int, int]
    affine: npt.NDArray[np.float64]


def to_itk(voxels: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> sitk.Image:
    """Convert voxels (X, Y, Z), float32 or uint8, and their 4x4 affine to RAS millimetres to a SimpleITK image."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    spacing, origin, direction = _geometry(affine)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction)
    return image


def grid_of(image: sitk.Image) -> ImageGrid:
    """The grid of an image."""
    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    x, y, z = image.GetSize()
    return ImageGrid(size=(x, y, z), affine=_RAS_LPS @ lps)


def voxels_of(image: sitk.Image) -> npt.NDArray[Any]:
    """The voxels of an image, shape (X, Y, Z)."""
    return np.ascontiguousarray(sitk.GetArrayFromImage(image).T)


def upright_grid(image: sitk.Image, spacing_mm: float) -> ImageGrid:
    """Isotropic grid along the world axes, in LPS voxel order, that covers an image's field of view.

    An axis-aligned image with this spacing keeps its voxel centres, whatever its axis order.

    Args:
        image: the image to cover.
        spacing_mm: edge of a voxel.
    """
    own = grid_of(image)
    return _cover(own.affine, np.zeros(3), np.array(own.size) - 1.0, spacing_mm)


def upright_grid_around(mask: sitk.Image, spacing_mm: float, *, margin_mm: float) -> ImageGrid:
    """Like :func:`upright_grid`, but covering the marked voxels of a mask (at least one) plus a margin."""
    marked = np.argwhere(voxels_of(mask))
    around = _cover(grid_of(mask).affine, marked.min(axis=0), marked.max(axis=0).astype(float), spacing_mm)
    more = int(np.ceil(margin_mm / spacing_mm))
    affine = around.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, float(more))
    x, y, z = (n + 2 * more for n in around.size)
    return ImageGrid(size=(x, y, z), affine=affine)


def refined(grid: ImageGrid, factors: tuple[int, int, int]) -> ImageGrid:
    """Grid of the same field of view with each voxel split into ``factors`` equal parts along the three axes."""
    parts = np.array(factors, dtype=np.float64)
    affine = grid.affine.copy()
    affine[:3, :3] /= parts
    affine[:3, 3] = (grid.affine @ [*((1 / parts - 1) / 2), 1.0])[:3]
    x, y, z = (n * k for n, k in zip(grid.size, factors, strict=True))
    return ImageGrid(size=(x, y, z), affine=affine)


def resampled(
    image: sitk.Image, grid: ImageGrid, transform: sitk.Transform | None = None, *, nearest: bool = False
) -> sitk.Image:
    """Resample an image linearly to another grid; voxels outside its field of view are 0.

    Args:
        image: float32 or uint8.
        grid: grid of the result.
        transform: from the grid's LPS millimetres to those of the image; None is the identity.
        nearest: use nearest-neighbour interpolation instead.

    Returns:
        an image of the same pixel type, computed with one thread so that it is the same on every machine.
    """
    spacing, origin, direction = _geometry(grid.affine)
    resample = sitk.ResampleImageFilter()
    resample.SetSize(grid.size)
    resample.SetOutputSpacing(spacing)
    resample.SetOutputOrigin(origin)
    resample.SetOutputDirection(direction)
    resample.SetTransform(sitk.Transform(3, sitk.sitkIdentity) if transform is None else transform)
    resample.SetInterpolator(sitk.sitkNearestNeighbor if nearest else sitk.sitkLinear)
    resample.SetDefaultPixelValue(0)
    resample.SetNumberOfThreads(1)
    made: sitk.Image = resample.Execute(image)
    return made


def smoothed_for(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    """Smooth an image along axes that are finer than a spacing, so that sampling at it does not alias.

    The Gaussian's standard deviation is half the difference in voxel size, as in :func:`data.preprocess.resample`.
    """
    # Differences below one per cent are rounding errors of headers.
    lacks = [max(0.0, spacing_mm - own) for own in image.GetSpacing()]
    if max(lacks) < 0.01 * spacing_mm:
        return image
    gaussian = sitk.DiscreteGaussianImageFilter()
    gaussian.SetVariance([(lack / 2) ** 2 for lack in lacks])
    gaussian.SetUseImageSpacing(True)
    gaussian.SetNumberOfThreads(1)
    smooth: sitk.Image = gaussian.Execute(image)
    return smooth


def _cover(
    affine: npt.NDArray[np.float64], low: npt.NDArray[np.floating], high: npt.NDArray[np.floating], spacing_mm: float
) -> ImageGrid:
    """Axis-aligned grid in LPS order whose voxel centres span those of a box of another grid."""
    lps = _RAS_LPS @ affine
    unit = lps[:3, :3] / np.linalg.norm(lps[:3, :3], axis=0)
    straight = bool(np.all((np.abs(unit) < _STRAIGHT) | (np.abs(unit) > 1 - _STRAIGHT)))
    corners = np.array([[*corner, 1.0] for corner in product(*zip(low, high, strict=True))]).T
    places = (lps @ corners)[:3]
    start, stop = places.min(axis=1), places.max(axis=1)
    steps = (stop - start) / spacing_mm
    # Allow for the rounding of headers when deciding whether the number of steps is whole.
    counts = np.where(np.abs(steps - np.rint(steps)) < 0.02, np.rint(steps), np.ceil(steps)).astype(int)
    if not straight or np.any(np.abs(steps - counts) >= 0.02):
        start = start - (counts - steps) * spacing_mm / 2  # distribute the excess evenly to both sides
    result = np.eye(4)
    result[:3, :3] *= spacing_mm
    result[:3, 3] = start
    x, y, z = (int(count) + 1 for count in counts)
    return ImageGrid(size=(x, y, z), affine=_RAS_LPS @ result)


def _geometry(affine: npt.NDArray[np.float64]) -> tuple[list[float], list[float], list[float]]:
    """Spacing, origin and direction of the ITK image that corresponds to an affine to RAS millimetres."""
    lps = _RAS_LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    return spacing.tolist(), lps[:3, 3].tolist(), (lps[:3, :3] / spacing).ravel().tolist()
