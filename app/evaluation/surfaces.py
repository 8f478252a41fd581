"""Surfaces of masks on the corners of the voxel grid, and the distances between them.

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
_SLACK_MM: Final = 1e-4  # single precision turns a 1 mm voxel into 1.00000003 mm, still within a 1 mm tolerance
_SPARSE: Final = 60  # voxels per corner above which a tree search is faster than a distance transform
#: Marching-cubes patches of the codes 0 to 127; code 255 - c has the same patch as c. Each triangle has three digits:
#: its area in eighths as seen along X, Y and Z. The values are those in surface-distance (Apache-2.0), without signs.
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
    """Encode which of the eight voxels around each grid corner are inside, one bit each.

    The voxel before the corner on all three axes has the highest bit, the one after it on all three axes the lowest,
    and Z varies fastest: the bit order of the area table.

    Args:
        voxels: a mask, shape (X, Y, Z); or numbers by which the bits are multiplied before they are summed modulo 256,
            as ``surface-distance`` does with a map of lesion numbers (see ``app.evaluation.brats.score``).

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
    """Return the corners whose eight voxels are neither all outside nor all inside."""
    surface: Mask = (codes != 0) & (codes != _INSIDE_CODE)
    return surface


def surface_areas_mm2(spacing_mm: Spacing) -> FloatArray:
    """Return the area in mm^2 of the surface patch at a corner for each of the 256 codes, shape (256,).

    A patch has up to four triangles. The table gives each as a normal whose length is the triangle's area for voxels
    with unit edges; for other voxels each component is scaled by the area of the face perpendicular to its axis.
    The computation is in double precision, as single-precision errors can move the 95 % point to the next distance.
    """
    dx, dy, dz = spacing_mm
    face_mm2 = np.array([dy * dz, dx * dz, dx * dy])
    areas: FloatArray = np.linalg.norm(_triangles() * face_mm2, axis=-1).sum(axis=-1)
    return areas


def distances_mm(from_surface: Mask, to_surface: Mask, spacing_mm: Spacing, *, may_search: bool = False) -> FloatArray:
    """Return the Euclidean distance from each corner of the first surface to the nearest corner of the second.

    Args:
        from_surface: mask of corners, shape (X, Y, Z).
        to_surface: mask of the same shape, with at least one corner.
        spacing_mm: edge lengths in mm along X, Y, Z.
        may_search: allow a tree search, which is faster for few corners in a large box; the result is the same except
            for rounding where corners are equally near.

    Returns:
        distances in mm, shape (number of corners in ``from_surface``,), in C order.
    """
    start = np.nonzero(from_surface)
    if may_search and to_surface.size > _SPARSE * len(start[0]):
        places = np.argwhere(to_surface)
        nearest = places[cKDTree(places * spacing_mm).query(np.stack(start, axis=1) * spacing_mm)[1]].T
    else:
        # Request only the indices of the nearest corners, not the distance map: this halves the memory, and distances
        # are needed only at the few corners of one surface.
        indices = ndimage.distance_transform_edt(
            ~to_surface, sampling=spacing_mm, return_distances=False, return_indices=True
        )
        nearest = np.stack([along[start] for along in indices])
    x, y, z = ((nearest[axis] - start[axis]) * spacing_mm[axis] for axis in range(3))
    return cast(FloatArray, np.sqrt(x**2 + y**2 + z**2))


@dataclass(frozen=True, kw_only=True)
class SurfaceDistances:
    """Distances between two surfaces in both directions, corner by corner."""

    there_mm: FloatArray
    """Distances from the first surface's corners to the second surface in mm."""
    there_mm2: FloatArray
    """Area in mm^2 that each corner of the first surface represents."""
    back_mm: FloatArray
    """Distances from the second surface's corners to the first surface in mm."""
    back_mm2: FloatArray
    """Area in mm^2 that each corner of the second surface represents."""

    @property
    def robust_mm(self) -> float:
        """Distance from the other surface within which 95 % of a surface's area lies; the larger of both directions."""
        return max(_percentile_mm(self.there_mm, self.there_mm2), _percentile_mm(self.back_mm, self.back_mm2))

    def share_within(self, tolerance_mm: float) -> float:
        """Return the share of both surfaces' area that is within a distance of the other surface, 0 to 1."""
        near = (areas[mm <= tolerance_mm + _SLACK_MM].sum() for mm, areas in self._both)
        return float(sum(near) / sum(areas.sum() for _, areas in self._both))

    @property
    def _both(self) -> tuple[tuple[FloatArray, FloatArray], ...]:
        return (self.there_mm, self.there_mm2), (self.back_mm, self.back_mm2)


def surface_distances(
    first: Codes, second: Codes, spacing_mm: Spacing, areas_mm2: FloatArray, *, may_search: bool = False
) -> SurfaceDistances | None:
    """Return the distances between two surfaces; None if one of them is empty.

    Args:
        first: codes of the first mask, from :func:`corner_codes`.
        second: codes of the second mask, same shape.
        spacing_mm: edge lengths in mm along X, Y, Z.
        areas_mm2: areas from :func:`surface_areas_mm2`.
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
    """Return the robust distance between two surfaces; see :attr:`SurfaceDistances.robust_mm`.

    Args:
        first: codes of the first mask, from :func:`corner_codes`.
        second: codes of the second mask, same shape.
        spacing_mm: edge lengths in mm along X, Y, Z.
        areas_mm2: areas from :func:`surface_areas_mm2`.
        may_search: as for :func:`distances_mm`.

    Returns:
        distance in mm; infinite if either surface is empty.
    """
    found = surface_distances(first, second, spacing_mm, areas_mm2, may_search=may_search)
    return float("inf") if found is None else found.robust_mm


def _percentile_mm(distances: FloatArray, weights_mm2: FloatArray) -> float:
    # Equal distances are sorted by area, as in the original, so that the cumulative sum is rounded in the same way.
    order = np.lexsort((weights_mm2, distances))
    reached = np.cumsum(weights_mm2[order]) / np.sum(weights_mm2[order])
    position = min(int(np.searchsorted(reached, _SHARE)), len(order) - 1)
    return float(distances[order[position]])


@functools.cache
def _triangles() -> FloatArray:
    """Return up to four triangles per code, as unsigned normals with the triangle's area as length: (256, 4, 3)."""
    half = np.zeros((128, 12))
    for code, digits in enumerate(_PATCHES.split()):
        half[code, : len(digits)] = [int(digit) / 8 for digit in digits.strip("-")] or [0.0]
    return np.concatenate([half, half[::-1]]).reshape(256, 4, 3)
