"""The sliding window in numpy: windows are computed by any function of arrays, and blended in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from app.inference.sliding_window.grid import SURE_BACKGROUND, Place, Size, gaussian_array, place_windows

Array = npt.NDArray[np.float32]
#: Planes divided by their weights at a time, so that memory never holds a second volume.
_PLANES: Final = 16


def stitched_logits(
    compute: Callable[[Array], Array],
    image: Array,
    *,
    window: Size,
    overlap: float,
    batch: int = 1,
    half: bool = False,
) -> npt.NDArray[Any]:
    """Compute the logits of a whole volume, as :func:`app.inference.sliding_window.torch_blend.sliding_logits` does.

    If one window covers the volume, its answer is returned without any weighting.

    Args:
        compute: maps windows of shape (batch, contrasts, *window) to logits of shape (batch, regions, *window); it is
            always called with whole batches.
        image: shape (contrasts, X, Y, Z), not all zero.
        window: size of the window, in voxels.
        overlap: minimum share of a window that its neighbour also covers, from 0 to below 1.
        batch: windows per call; the last batch is filled up with zeros.
        half: blend in float16, for half the memory.

    Returns:
        float32, or float16 with ``half``, shape (regions, X, Y, Z); -30 where there is no brain nearby.
    """
    windows = place_windows(image, window, overlap)
    places, inner = windows.places, windows.inner
    padded = np.pad(image, ((0, 0), *windows.padding)) if any(map(any, windows.padding)) else image
    shape = padded.shape[1:]
    kept = np.dtype(np.float16 if half else np.float32)
    patches = np.zeros((batch, image.shape[0], *window), dtype=np.float32)
    if shape == window:
        patches[0] = padded
        answer: npt.NDArray[Any] = compute(patches)[0][inner].astype(kept)
        return answer
    weights = gaussian_array(window)
    total: npt.NDArray[Any] | None = None
    weight_sum = np.zeros(shape, dtype=kept)
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        _fill(patches, padded, some)
        for place, logits in zip(some, compute(patches), strict=False):
            if total is None:
                total = np.zeros((logits.shape[0], *shape), dtype=kept)
            for region, values in zip(total, logits, strict=True):
                region[place] += (values * weights).astype(kept, copy=False)
            weight_sum[place] += weights.astype(kept, copy=False)
    assert total is not None
    for start in range(0, shape[0], _PLANES):
        planes = slice(start, start + _PLANES)
        sums = weight_sum[planes]
        np.divide(total[:, planes], sums, out=total[:, planes], where=sums != 0)
        np.copyto(total[:, planes], kept.type(SURE_BACKGROUND), where=sums == 0)
    return total[inner]


def _fill(patches: Array, image: Array, places: Sequence[Place]) -> None:
    for number, place in enumerate(places):
        patches[number] = image[:, *place]
    patches[len(places) :] = 0


def resized(values: npt.NDArray[Any], shape: Size) -> npt.NDArray[Any]:
    """Interpolate linearly to another shape over the same box, with half-voxel centres and repeated borders.

    The result equals torch's trilinear interpolation with ``align_corners=False``. The first axis of the volume is
    interpolated last, plane by plane, so that memory holds little more than the result.

    Args:
        values: shape (n, X, Y, Z).
        shape: target shape.

    Returns:
        shape (n, *shape), dtype of ``values``.
    """
    low, high, share = _between(values.shape[1], shape[0])
    answer = np.empty((values.shape[0], *shape), dtype=values.dtype)
    planes: dict[int, npt.NDArray[Any]] = {}

    def plane(number: int) -> npt.NDArray[Any]:
        if number not in planes:
            flat = values[:, number].astype(np.float32)
            for axis in (1, 2):
                a, b, t = _between(flat.shape[axis], shape[axis])
                along = t.reshape([-1 if one == axis else 1 for one in range(3)])
                flat = np.take(flat, a, axis) * (1 - along) + np.take(flat, b, axis) * along
            planes[number] = flat
        return planes[number]

    for x in range(shape[0]):
        first = int(low[x])
        for passed in [number for number in planes if number < first]:
            del planes[passed]
        answer[:, x] = plane(first) * (1 - share[x]) + plane(int(high[x])) * share[x]
    return answer


def _between(size: int, wanted: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], Array]:
    """Return for each new index the two old indices around it, and the weight of the second."""
    at = np.clip((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0, None)
    low = np.minimum(np.floor(at).astype(np.intp), size - 1)
    return low, np.minimum(low + 1, size - 1), (at - low).astype(np.float32)
