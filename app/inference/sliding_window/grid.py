"""Placement and weights of windows in a volume; depends only on numpy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from math import ceil
from typing import Final

import numpy as np
import numpy.typing as npt

#: Width of the Gaussian weights as a share of the window, as in nnU-Net and MONAI.
SIGMA: Final = 0.125
#: Minimum weight: without it, a voxel that is only in corners of windows would be noise divided by noise.
LEAST_WEIGHT: Final = 1e-3
#: Logit of voxels that are not covered by any window with brain in it.
SURE_BACKGROUND: Final = -30.0

Size = tuple[int, int, int]
Place = tuple[slice, slice, slice]
#: Voxels before and after an image along each axis.
Padding = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
Weights = npt.NDArray[np.float32]
_NO_PADDING: Final[Padding] = ((0, 0), (0, 0), (0, 0))
#: Every so many voxels of a window are examined first: almost always one of them is in the brain.
_STRIDE: Final = 8


def window_places(shape: Size, window: Size, overlap: float) -> Iterator[Place]:
    """Return the places of the windows, evenly spread from border to border along each axis.

    Args:
        shape: shape of the volume, at least ``window`` along each axis.
        window: size of each window.
        overlap: minimum share of a window that its neighbour also covers.
    """
    starts = [window_starts(size, side, overlap) for size, side in zip(shape, window, strict=True)]
    for x, y, z in product(*starts):
        yield (slice(x, x + window[0]), slice(y, y + window[1]), slice(z, z + window[2]))


def window_starts(size: int, side: int, overlap: float) -> list[int]:
    """Return the first voxel of each window along one axis.

    Example:
        >>> window_starts(100, 64, 0.5)
        [0, 18, 36]
    """
    if size <= side:
        return [0]
    steps = ceil((size - side) / max(1, side * (1 - overlap)))
    return [round(step * (size - side) / steps) for step in range(steps + 1)]


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows on an image that is padded with 0, so that at least one fits."""

    size: Size
    padding: Padding
    """Voxels that the padded volume has around the image."""
    places: tuple[Place, ...]
    """Places in the padded volume."""
    inner: tuple[slice, slice, slice, slice]
    """Place of the image in an array of shape (channels, X, Y, Z) over the padded volume."""


def place_windows(
    image: npt.NDArray[np.floating], window: Size, overlap: float, *, around: Padding | None = None
) -> Windows:
    """Pad a volume with 0 so that a window fits, and place windows on it, skipping those that are zero everywhere.

    Args:
        image: shape (contrasts, X, Y, Z), in any memory layout.
        window: size of each window.
        overlap: minimum share of a window that its neighbour also covers.
        around: voxels of 0 that surround the image in any case; None for none.

    Raises:
        ValueError: the volume is zero everywhere.
    """
    around = around or _NO_PADDING
    sizes = [before + size + after for size, (before, after) in zip(image.shape[1:], around, strict=True)]
    missing = [max(0, side - size) for size, side in zip(sizes, window, strict=True)]
    x, y, z = (
        (before + gap // 2, after + gap - gap // 2) for gap, (before, after) in zip(missing, around, strict=True)
    )
    padding: Padding = (x, y, z)
    width, depth, height = (size + gap for size, gap in zip(sizes, missing, strict=True))
    places = tuple(
        place
        for place in window_places((width, depth, height), window, overlap)
        if _is_filled(image[:, *_in_image(place, padding)])
    )
    if not places:
        raise ValueError("the volume is zero everywhere")
    a, b, c = (slice(before, before + size) for size, (before, _) in zip(image.shape[1:], padding, strict=True))
    return Windows(size=window, padding=padding, places=places, inner=(slice(None), a, b, c))


def _in_image(place: Place, padding: Padding) -> tuple[slice, ...]:
    """Return the part of a window that covers the image, as a place in the image."""
    return tuple(
        slice(max(0, part.start - before), max(0, part.stop - before))
        for part, (before, _) in zip(place, padding, strict=True)
    )


def _is_filled(values: npt.NDArray[np.floating]) -> bool:
    """Whether any value is not 0."""
    few = values[:, *(slice(_STRIDE // 2, None, _STRIDE),) * 3]
    return bool(few.any() or values.any())


def gaussian_array(window: Size) -> Weights:
    """Return weights that fall from the centre of a window to its borders; the largest is 1, none is 0.

    Source: the sliding window of nnU-Net (Isensee et al. 2021); sigma is 1/8 of each side.

    Args:
        window: size of the window, in voxels.

    Returns:
        array of shape ``window``.
    """
    along_x, along_y, along_z = (np.exp(exponents) for exponents in gaussian_exponents(window))
    weights: Weights = along_x[:, None, None] * along_y[None, :, None] * along_z[None, None, :]
    weights /= weights.max()
    return np.maximum(weights, np.float32(LEAST_WEIGHT))


def gaussian_exponents(window: Size) -> tuple[Weights, ...]:
    """Return, for each axis, the exponents whose exponential functions are multiplied into the weights."""
    distances = (np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2) for side in window)
    return tuple(
        np.float32(-0.5) * (distance / np.float32(SIGMA * side)) ** 2
        for distance, side in zip(distances, window, strict=True)
    )


def rounded_up(sizes: Size, divisor: int) -> Size:
    """Return the smallest window that holds a volume; sides are multiples of ``divisor``, at least twice ``divisor``.

    Example:
        >>> rounded_up((141, 170, 9), 8)
        (144, 176, 16)
    """
    x, y, z = (max(2 * divisor, ceil(size / divisor) * divisor) for size in sizes)
    return (x, y, z)


def smaller(window: Size, divisor: int) -> Size | None:
    """Halve the longest side of a window, rounded up to a multiple of ``divisor``; return None if it is too short.

    Example:
        >>> smaller((64, 64, 96), 8)
        (64, 64, 48)
    """
    axis = max(range(3), key=lambda one: window[one])
    half = ceil(window[axis] / 2 / divisor) * divisor
    if half >= window[axis] or half < 2 * divisor:
        return None
    x, y, z = (half if a == axis else side for a, side in enumerate(window))
    return (x, y, z)
