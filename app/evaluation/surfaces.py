"""The surface of a mask on the corners of the voxel grid, and distances from one such surface to another.

Sources: Nikolov et al., "Deep learning to achieve clinically applicable segmentation of head and neck anatomy for
radiotherapy", arXiv 1809.04430, and their package ``surface-distance``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.spatial import cKDTree

Mask = npt.NDArray[np.bool_]
Spacing = tuple[float, float, float]
Codes = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]

_INSIDE_CODE: Final = 255
_SHARE: Final = 0.95
_SLACK_MM: Final = 1e-4  # single precision makes 1.00000003 mm of a voxel of 1 mm; a distance is no longer for that
_SPARSE: Final = 60  # voxels a corner from which on a search is faster than a distance transform
#: The marching-cubes patch of the codes 0 to 127; 255 - c has that of c. Three digits a triangle: its area in eighths
#: seen along X, Y and Z. These are the numbers of the table in surface-distance (Apache-2.0), without signs.
_PATCHES: Final = """
    - 111 111 220220 111 202202 111111 400222111 111 111111 202202 400222111 220220 400222111 400222111 400400 111
    022022 111111 040222111 111111 004222111 111111111 111222222111 111111 022022111 202202111 111333022202
    111220220 333022111220 400111222111 400111222 111 111111 022022 040111222 111111 111202202 022022111
    333022111202 111111 111111111 004222111 222222111111 111220220 400222111111 022333111220 400222111 220220
    040222111 040111222 040040 220220111 333202111220 111040222111 040222111 111220220 040222111111 333220111202
    040222111 220220220220 220220111 111220220 220220 111 111111 111111 111220220 022022 004222111 022022111
    333022111220 111111 111111111 111202202 400222111111 040222111 222222111111 202333022111 400222111 202202
    004222111 111202202 202333220111 004222111 004004 111111222004 111222004 202202111 004222111111 202202202202
    111202202 202333220111 004222111 111202202 202202 111111 111111111 111022022 040111222111 022022111 004222111111
    022022022022 022022111 111111111 111111111111 004222111111 111111111 040222111111 111111111 022022111 111111
    400222111 222111222111 333022111202 040222111 333220022111 111222004 111022022 022022 400222111111 111111111
    202202111 111111 220220111 111111 111111 111
"""


def corner_codes(voxels: npt.NDArray[np.bool_] | npt.NDArray[np.uint8]) -> Codes:
    """Which of the eight voxels around each grid corner are inside, one bit each.

    The voxel before the corner on all three axes has the highest bit, the one after it on all three axes the lowest, Z
    running fastest: the bit order of the area table.

    Args:
        voxels: a mask, shape (X, Y, Z); or numbers, by which the bits are multiplied and then summed modulo 256 - what
            ``surface-distance`` makes of a map of lesion numbers, see ``app.evaluation.official``.

    Returns:
        uint8, shape (X + 1, Y + 1, Z + 1).
    """
    padded = np.pad(voxels, 1).astype(np.uint8, copy=False)
    codes = np.zeros(tuple(size + 1 for size in voxels.shape), dtype=np.uint8)
    x, y, z = voxels.shape
    for bit in range(8):
        i, j, k = bit >> 2 & 1, bit >> 1 & 1, bit & 1
        codes += padded[i : i + x + 1, j : j + y + 1, k : k + z + 1] << (7 - bit)
    return codes


def on_surface(codes: Codes) -> Mask:
    """The corners whose eight voxels are neither all outside nor all inside."""
    surface: Mask = (codes != 0) & (codes != _INSIDE_CODE)
    return surface


def surface_areas_mm2(spacing_mm: Spacing) -> FloatArray:
    """Area of the surface patch at a corner for each of the 256 codes, shape (256,), in mm^2.

    A patch is up to four triangles. The table gives each as a normal as long as the triangle's area in voxels of unit
    edges; on other voxels the area of the face perpendicular to each axis scales its component. In double precision:
    the error of single precision can move the 95 % point to the next distance.
    """
    dx, dy, dz = spacing_mm
    face_mm2 = np.array([dy * dz, dx * dz, dx * dy])
    areas: FloatArray = np.linalg.norm(_triangles() * face_mm2, axis=-1).sum(axis=-1)
    return areas


def distances_mm(from_surface: Mask, to_surface: Mask, spacing_mm: Spacing, *, may_search: bool = False) -> FloatArray:
    """Euclidean distance of each marked corner of the first to the nearest marked one of the second.

    Args:
        from_surface: shape (X, Y, Z).
        to_surface: same shape, at least one marked.
        spacing_mm: edge lengths in mm along X, Y, Z.
        may_search: search a tree of the marked corners where they are few in a large box, which is faster; the result
            is the same but for rounding where corners are equally near.

    Returns:
        millimetres, shape (number of corners marked in ``from_surface``,), in C order.
    """
    start = np.nonzero(from_surface)
    if may_search and to_surface.size > _SPARSE * len(start[0]):
        places = np.argwhere(to_surface)
        found = cKDTree(places * spacing_mm).query(np.stack(start, axis=1) * spacing_mm)[1]
        steps_mm = [(places[found, axis] - start[axis]) * spacing_mm[axis] for axis in range(3)]
        return cast(FloatArray, np.sqrt(steps_mm[0] ** 2 + steps_mm[1] ** 2 + steps_mm[2] ** 2))
    # Only the nearest corners are asked for, not the map of distances: half the memory, and the distances below are
    # needed at the few corners of one surface only.
    nearest = ndimage.distance_transform_edt(
        ~to_surface, sampling=spacing_mm, return_distances=False, return_indices=True
    )
    steps_mm = [(nearest[axis][start] - start[axis]) * spacing_mm[axis] for axis in range(3)]
    return cast(FloatArray, np.sqrt(steps_mm[0] ** 2 + steps_mm[1] ** 2 + steps_mm[2] ** 2))


@dataclass(frozen=True, kw_only=True)
class SurfaceDistances:
    """How far each of two surfaces lies from the other, corner by corner."""

    there_mm: FloatArray
    """From the first surface's corners to the second surface, mm."""
    there_mm2: FloatArray
    """Area that each of these corners stands for, mm^2."""
    back_mm: FloatArray
    """From the second to the first."""
    back_mm2: FloatArray
    """Area of the corners of the second."""

    @property
    def robust_mm(self) -> float:
        """The larger of the two distances within which 95 % of one surface's area lies of the other surface."""
        return max(_percentile_mm(self.there_mm, self.there_mm2), _percentile_mm(self.back_mm, self.back_mm2))

    def share_within(self, tolerance_mm: float) -> float:
        """Share of both surfaces' area that lies within a distance of the other surface, 0 to 1."""
        near = (areas[mm <= tolerance_mm + _SLACK_MM].sum() for mm, areas in self._both)
        return float(sum(near) / sum(areas.sum() for _, areas in self._both))

    @property
    def _both(self) -> tuple[tuple[FloatArray, FloatArray], ...]:
        return (self.there_mm, self.there_mm2), (self.back_mm, self.back_mm2)


def surface_distances(
    first: Codes, second: Codes, spacing_mm: Spacing, areas_mm2: FloatArray, *, may_search: bool = False
) -> SurfaceDistances | None:
    """The distances of two surfaces from each other; None where one of them is empty.

    Args:
        first: codes of :func:`corner_codes`.
        second: the same of the other mask, same shape.
        spacing_mm: edge lengths in mm along X, Y, Z.
        areas_mm2: of :func:`surface_areas_mm2`.
        may_search: as for :func:`distances_mm`.
    """
    one, other = on_surface(first), on_surface(second)
    if not one.any() or not other.any():
        return None
    return SurfaceDistances(
        there_mm=distances_mm(one, other, spacing_mm, may_search=may_search),
        there_mm2=areas_mm2[first[one]],
        back_mm=distances_mm(other, one, spacing_mm, may_search=may_search),
        back_mm2=areas_mm2[second[other]],
    )


def robust_distance_mm(
    first: Codes, second: Codes, spacing_mm: Spacing, areas_mm2: FloatArray, *, may_search: bool = False
) -> float:
    """The larger of the two distances within which 95 % of one surface's area lies of the other surface.

    Args:
        first: codes of :func:`corner_codes`, with some surface.
        second: the same of the other mask, same shape.
        spacing_mm: edge lengths in mm along X, Y, Z.
        areas_mm2: of :func:`surface_areas_mm2`.
        may_search: as for :func:`distances_mm`.

    Returns:
        millimetres; infinite where exactly one has a surface.
    """
    found = surface_distances(first, second, spacing_mm, areas_mm2, may_search=may_search)
    return float("inf") if found is None else found.robust_mm


def _percentile_mm(distances: FloatArray, weights_mm2: FloatArray) -> float:
    # Area breaks ties of distance, as in the original: it fixes the rounding of the cumulative sum.
    order = np.lexsort((weights_mm2, distances))
    reached = np.cumsum(weights_mm2[order]) / np.sum(weights_mm2[order])
    position = min(int(np.searchsorted(reached, _SHARE)), len(order) - 1)
    return float(distances[order[position]])


@functools.cache
def _triangles() -> FloatArray:
    """Up to four triangles a code, as normals without their signs, as long as the triangle's area: (256, 4, 3)."""
    half = np.zeros((128, 12))
    for code, digits in enumerate(_PATCHES.split()):
        half[code, : len(digits)] = [int(digit) / 8 for digit in digits.strip("-")] or [0.0]
    return np.concatenate([half, half[::-1]]).reshape(256, 4, 3)
