"""Placement and weights of windows in a volume; depends only on numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
Weights = npt.NDArray[np.float32]


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


def place_windows(
    image: npt.NDArray[np.float32], window: Size, overlap: float
) -> tuple[npt.NDArray[np.float32], list[Place], tuple[slice, ...]]:
    """Pad a volume with 0 so that a window fits, and place windows on it, skipping those that are zero everywhere.

    Args:
        image: shape (contrasts, X, Y, Z).
        window: size of each window.
        overlap: minimum share of a window that its neighbour also covers.

    Returns:
        the padded volume, the places of the windows, and the place of the image in the padded volume, as an index of
        four axes.

    Raises:
        ValueError: the volume is zero everywhere.
    """
    x, y, z = image.shape[1:]
    missing = [max(0, side - size) for size, side in zip((x, y, z), window, strict=True)]
    padded = np.pad(image, [(0, 0), *((gap // 2, gap - gap // 2) for gap in missing)]) if any(missing) else image
    inner = tuple(slice(gap // 2, gap // 2 + size) for gap, size in zip(missing, (x, y, z), strict=True))
    x, y, z = padded.shape[1:]
    places = [place for place in window_places((x, y, z), window, overlap) if padded[:, *place].any()]
    if not places:
        raise ValueError("the volume is zero everywhere")
    return padded, places, (slice(None), *inner)


def gaussian_array(window: Size, exp: Callable[[Weights], Weights] = np.exp) -> Weights:
    """Return weights that fall from the centre of a window to its borders; the largest is 1, none is 0.

    Source: the sliding window of nnU-Net (Isensee et al. 2021); sigma is 1/8 of each side.

    Args:
        window: size of the window, in voxels.
        exp: the exponential function; numpy's and torch's differ in the last bit.

    Returns:
        array of shape ``window``.
    """
    weights = np.ones(window, dtype=np.float32)
    for axis, side in enumerate(window):
        distance = np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)
        along = exp(np.float32(-0.5) * (distance / np.float32(SIGMA * side)) ** 2)
        weights *= along.reshape([-1 if a == axis else 1 for a in range(3)])
    weights /= weights.max()
    return np.maximum(weights, np.float32(LEAST_WEIGHT))


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
