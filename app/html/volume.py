"""Make volumes small enough to embed in a page: 8-bit slices on a coarser grid, tiled into one picture."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

from app.html.overlay import to_grey
from app.html.planes import shown_box

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

#: WebP quality of scans, 0 to 100; at 62, brain slices take about a fifth of their size as PNG.
QUALITY: Final = 62
#: Available grids in mm, and the size in bytes of a case page with two contrasts; measured on phantoms of 1 and 2 mm,
#: and rounded up.
_GRIDS: Final = ((1.0, 700_000), (1.5, 300_000), (2.0, 180_000))
#: Target for the total size of a cohort's pages.
MOST_BYTES: Final = 38_000_000
_CODE_STEP: Final = 16  # distance between codes in the picture, so that no decoder confuses them


@dataclass(frozen=True, kw_only=True)
class ViewerCase:
    """Content of the viewer of one case; arrays are in canonical LPS voxel order, all of shape (X, Y, Z)."""

    images: Mapping[str, Floats]
    """By contrast name: an image of any intensity scale, 0 outside the brain; at least one."""
    prediction: Bytes
    """Predicted label codes 0 to 3."""
    reference: Bytes | None
    """Expert label map in the same codes, or None."""
    uncertainty: Floats | None
    """Non-negative, larger where the network is less certain, or None."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along x, y and z."""


def grid_for(cases: int) -> float:
    """Return the finest grid, in mm, that keeps this many pages below :data:`MOST_BYTES`, or else the coarsest.

    Example:
        >>> grid_for(1), grid_for(200)
        (1.0, 2.0)
    """
    return next((mm for mm, size in _GRIDS if size * cases <= MOST_BYTES), _GRIDS[-1][0])


def viewer_data(case: ViewerCase, *, grid_mm: float) -> dict[str, Any]:
    """Return the data that ``viewer.js`` reads.

    Everything is cropped to the non-empty part and sampled at the centres of cubes of ``grid_mm``: scans linearly
    after smoothing, label maps and uncertainty by nearest voxel.

    Args:
        case: content of the viewer.
        grid_mm: edge of the cubes, above 0.

    Returns:
        plain data: ``shape`` and ``start`` (initial crosshair: the deepest voxel of the predicted tumour, or of the
        reference if nothing is predicted) in cubes along x, y, z; ``columns``, the tiles per row of the pictures;
        ``images``, ``labels`` and ``uncertainty`` as data URIs (labels: 16 * (prediction + 4 * reference));
        ``has_reference``; ``uncertainty_top``, the uncertainty shown as the brightest grey.
    """
    shown = (case.prediction != 0) | (next(iter(case.images.values())) != 0)
    if case.reference is not None:
        shown |= case.reference != 0
    box = shown_box(shown)
    places = _places(tuple(part.stop - part.start for part in box), case.spacing_mm, grid_mm)
    prediction = _nearest(case.prediction[box], places)
    reference = np.zeros_like(prediction) if case.reference is None else _nearest(case.reference[box], places)
    columns = max(1, math.ceil(math.sqrt(len(places[2]))))
    data: dict[str, Any] = {
        "shape": [len(along) for along in places],
        "columns": columns,
        "grid_mm": grid_mm,
        "start": list(_deepest(prediction, reference)),
        "has_reference": case.reference is not None,
        "images": {
            name: picture_uri(_mosaic(_smooth(to_grey(image[box]), places, case.spacing_mm, grid_mm), columns))
            for name, image in case.images.items()
        },
        "labels": picture_uri(_mosaic(_CODE_STEP * (prediction + 4 * reference), columns), "png"),
        "uncertainty": None,
        "uncertainty_top": 1.0,
    }
    if case.uncertainty is not None:
        values = np.nan_to_num(_nearest(case.uncertainty[box], places), nan=0.0, posinf=0.0, neginf=0.0)
        top = max(float(values.max()), 1e-6)
        data["uncertainty_top"] = top
        data["uncertainty"] = picture_uri(_mosaic(np.rint(255 * np.clip(values / top, 0, 1)).astype(np.uint8), columns))
    return data


def picture_uri(picture: Bytes, kind: Literal["webp", "png"] = "webp", *, quality: int = QUALITY) -> str:
    """Encode a picture as a data URI.

    Args:
        picture: uint8, shape (height, width) for grey or (height, width, 3) for colour.
        kind: lossy WebP, or PNG.
        quality: WebP quality, 0 to 100.
    """
    written = io.BytesIO()
    options: dict[str, Any] = {"quality": quality, "method": 4} if kind == "webp" else {"optimize": True}
    Image.fromarray(picture).save(written, kind.upper(), **options)
    return f"data:image/{kind};base64,{base64.b64encode(written.getvalue()).decode('ascii')}"


def shrunk(picture: Bytes, side_px: int) -> Bytes:
    """Downscale a square picture, averaging the pixels; uint8, shape (height, width, 3)."""
    return np.asarray(Image.fromarray(picture).resize((side_px, side_px), Image.Resampling.BOX), dtype=np.uint8)


def _places(
    shape: tuple[int, ...], spacing_mm: tuple[float, float, float], grid_mm: float
) -> tuple[npt.NDArray[np.float64], ...]:
    """Return the centres of the cubes along each axis, in voxels from the centre of the first voxel."""
    places = []
    for size, mm in zip(shape, spacing_mm, strict=True):
        count = max(1, round(size * mm / grid_mm))
        places.append((np.arange(count) + 0.5) * size / count - 0.5)
    return tuple(places)


def _nearest(volume: npt.NDArray[Any], places: tuple[npt.NDArray[np.float64], ...]) -> npt.NDArray[Any]:
    rounded = [
        np.clip(np.rint(along).astype(int), 0, size - 1) for along, size in zip(places, volume.shape, strict=True)
    ]
    return np.asarray(volume[np.ix_(*rounded)])


def _smooth(
    volume: Floats,
    places: tuple[npt.NDArray[np.float64], ...],
    spacing_mm: tuple[float, float, float],
    grid_mm: float,
) -> Bytes:
    """Smooth away detail finer than the grid, then sample linearly."""
    sigmas = [0.4 * max(0.0, grid_mm / mm - 1) for mm in spacing_mm]
    values = ndimage.gaussian_filter(volume, sigmas) if any(sigmas) else volume
    for axis, along in enumerate(places):
        low = np.clip(np.floor(along).astype(int), 0, values.shape[axis] - 1)
        high = np.minimum(low + 1, values.shape[axis] - 1)
        share = (along - low).clip(0, 1).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        values = values.take(low, axis) * (1 - share) + values.take(high, axis) * share
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


def _mosaic(volume: Bytes, columns: int) -> Bytes:
    """Tile the axial slices in rows of ``columns``, oriented as on the screen: x to the right, y down."""
    x, y, z = volume.shape
    rows = math.ceil(z / columns)
    tiles = np.zeros((rows * columns, y, x), dtype=np.uint8)
    tiles[:z] = volume.transpose(2, 1, 0)
    return np.ascontiguousarray(tiles.reshape(rows, columns, y, x).transpose(0, 2, 1, 3).reshape(rows * y, columns * x))


def _deepest(prediction: Bytes, reference: Bytes) -> tuple[int, int, int]:
    """Return the tumour voxel farthest from the tumour's surface, or the centre of the volume if there is no tumour."""
    for codes in (prediction, reference):
        if codes.any():
            depth = np.asarray(ndimage.distance_transform_edt(np.pad(codes != 0, 1)))[1:-1, 1:-1, 1:-1]
            x, y, z = np.unravel_index(int(depth.argmax()), depth.shape)
            return int(x), int(y), int(z)
    x, y, z = (size // 2 for size in prediction.shape)
    return int(x), int(y), int(z)
