"""Convert a case's files to the network's input array, and the network's output back to the files' grid.

Forward: check that all contrasts share a grid, reorient to LPS, crop to the brain, z-score each contrast over its own
non-zero voxels, and resample if another spacing is requested. Backward: undo crop and orientation. The output is
resampled by the caller (as probabilities, not labels).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from data.datasets.layouts import Case
from data.errors import DataError
from data.labels import CONTRASTS, Contrast, LabelConvention, decode, from_regions, to_regions
from data.nifti import (
    Spacing,
    Volume,
    canonical_spacing,
    grid_difference,
    in_order_of,
    read_image,
    read_label_map,
    reorient,
    to_native_order,
    voxel_order,
)

_Number = TypeVar("_Number", bound=np.generic)

#: If more than this share of a volume's six faces is non-zero, the background was not removed. Brains cut by the field
#: of view touch one or two faces; air noise around a head, or a background shifted by normalisation, touches all.
MAX_NONZERO_FACES: Final = 0.5
#: A grid whose spacing is this close to the requested one (relative) is not resampled.
SPACING_TOLERANCE: Final = 0.02
#: A share this close to one half counts as one half, so that rounding of affines does not decide ties.
TIE_TOLERANCE: Final = 1e-3
#: Maximum number of voxels copied to float64 at once. No brain at 0.5 mm has more, so only larger volumes are summed
#: part by part.
_AT_ONCE: Final = 1 << 25

_NO_VOXELS: Final = np.zeros((0, 0, 0), dtype=np.float32)

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case as network input, with everything needed to map results back."""

    image: npt.NDArray[np.float32]
    """Shape (4, X, Y, Z), order of :data:`data.labels.CONTRASTS`; brain z-scored, 0 outside; missing contrasts 0."""
    present: tuple[Contrast, ...]
    """The contrasts that the case has, in project order."""
    brain: npt.NDArray[np.bool_]
    """Mask of the voxels in the box where any contrast is non-zero, at the files' own spacing."""
    codes: npt.NDArray[np.uint8] | None
    """Label map in the program's codes, shape (X, Y, Z); None if it was not requested."""
    spacing_mm: Spacing
    """Spacing of ``image``."""
    box: tuple[slice, slice, slice]
    """Bounds of the brain in the canonical (LPS) volume, before resampling."""
    canonical_shape: tuple[int, int, int]
    """Shape of the canonical volume the box was cut from."""
    native_affine: npt.NDArray[np.float64]
    """Affine of the reference contrast's file."""
    zeroed: dict[Contrast, int]
    """Number of NaN or infinite voxels that were set to 0, by contrast; contrasts without any are omitted."""
    backgrounds: dict[Contrast, str] = field(default_factory=dict)
    """Description of a background that was not 0 in the file, by contrast; other contrasts are omitted."""
    repairs: tuple[str, ...] = ()
    """How ambiguities and differences in the files' geometry were resolved, one sentence each; empty if none."""

    @property
    def box_shape(self) -> tuple[int, int, int]:
        """Shape of the box at the files' own spacing."""
        x, y, z = (part.stop - part.start for part in self.box)
        return (x, y, z)


def prepare(
    case: Case,
    *,
    spacing_mm: Spacing | None = None,
    convention: LabelConvention | None = None,
    nan_to_zero: bool = False,
    all_contrasts: bool = True,
) -> Prepared:
    """Read and prepare one case.

    Args:
        case: the case to read.
        spacing_mm: spacing of the network's input; None keeps the files' own.
        convention: label convention; None skips the label map.
        nan_to_zero: set image voxels that are NaN or infinite to 0 instead of rejecting the case.
        all_contrasts: whether all four contrasts are required. If False, one is enough, and box and brain are those of
            the contrasts present.

    Raises:
        DataError: a contrast is missing or unreadable, the contrasts are on different grids, a contrast is zero
            everywhere, constant or not skull-stripped, or the label map is missing, on another grid or not in the
            convention.
    """
    case.require(all_contrasts=all_contrasts)

    def read(contrast: Contrast) -> Volume:
        with _naming(case.id, f"contrast {contrast}"):
            return read_image(case.contrasts[contrast], case.volumes.get(contrast), nan_to_zero=nan_to_zero)

    in_order = (case.reference, *(one for one in case.contrasts if one != case.reference))
    return prepare_volumes(
        {contrast: partial(read, contrast) for contrast in in_order},
        case_id=case.id,
        spacing_mm=spacing_mm,
        read_codes=None if convention is None else partial(_read_codes, case, convention=convention),
    )


def prepare_volumes(
    volumes: Mapping[Contrast, Callable[[], Volume]],
    *,
    case_id: str,
    spacing_mm: Spacing | None = None,
    read_codes: Callable[[Volume], npt.NDArray[np.uint8]] | None = None,
) -> Prepared:
    """Prepare contrasts from any source.

    Args:
        volumes: functions that return the contrasts, first the one whose voxel order results are mapped back to. Each
            is called once, after the previous volume was released, so only one whole volume is held at a time.
        case_id: name of the case, for messages.
        spacing_mm: as for :func:`prepare`.
        read_codes: returns the label map in the program's codes and in the voxel order of the volume it is given.

    Raises:
        DataError: see :func:`prepare`.
    """
    reference = next(iter(volumes))
    canonical: Volume | None = None
    # Crop each volume to its own brain: four whole volumes of a large scan may not fit into memory.
    parts: dict[Contrast, tuple[Box, npt.NDArray[np.float32]]] = {}
    headers: dict[Contrast, Volume] = {}
    for contrast, read in volumes.items():
        volume = read()
        headers[contrast] = replace(volume, voxels=_NO_VOXELS)
        if canonical is None:
            volume = reorient(volume)
            canonical = replace(volume, voxels=np.broadcast_to(np.float32(0), volume.voxels.shape))  # uses no memory
        else:
            volume = in_order_of(canonical, volume)
            _require_same_grid(case_id, canonical, volume, contrast, reference)
        if (problem := image_problem(volume.voxels)) is not None:
            raise DataError(f"case {case_id}, contrast {contrast}: {volume.path}: {problem}.")
        own = smallest_box(volume.voxels != 0)
        parts[contrast] = (own, volume.voxels[own].copy())
        del volume
    assert canonical is not None
    present = tuple(contrast for contrast in CONTRASTS if contrast in volumes)
    box = _around([own for own, _ in parts.values()])
    image = np.zeros((len(CONTRASTS), *(part.stop - part.start for part in box)), dtype=np.float32)
    brain = np.zeros(image.shape[1:], dtype=bool)
    for contrast in present:
        own, voxels = parts.pop(contrast)
        inside = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(own, box, strict=True))
        brain[inside] |= voxels != 0
        image[CONTRASTS.index(contrast)][inside] = zscore_nonzero(voxels)
        del voxels
    codes = None if read_codes is None else read_codes(canonical)[box]
    native_affine = headers[reference].affine
    own_spacing = canonical_spacing(native_affine)
    target = spacing_mm if spacing_mm is not None and not _close(own_spacing, spacing_mm) else own_spacing
    if target is not own_spacing:
        shape = resampled_shape(image.shape[1:], own_spacing, target)
        image = np.stack([resample(voxels, shape) for voxels in image])
        codes = None if codes is None else resample_codes(codes, shape)
    x, y, z = canonical.voxels.shape
    return Prepared(
        image=image,
        present=present,
        brain=brain,
        codes=codes,
        spacing_mm=target,
        box=box,
        canonical_shape=(x, y, z),
        native_affine=native_affine,
        zeroed={contrast: headers[contrast].zeroed for contrast in present if headers[contrast].zeroed},
        backgrounds={one: found for one in present if (found := headers[one].background) is not None},
        repairs=_geometry_repairs({contrast: headers[contrast] for contrast in present}, reference),
    )


def image_problem(voxels: npt.NDArray[np.float32]) -> str | None:
    """Return why a volume is not a skull-stripped image, or None if it looks like one.

    Args:
        voxels: one contrast, shape (X, Y, Z).

    Example:
        >>> image_problem(np.zeros((4, 4, 4), dtype=np.float32))
        'every voxel is 0. Export the image again, or leave the case out'
    """
    values = voxels[voxels != 0]
    if not values.size:
        return "every voxel is 0. Export the image again, or leave the case out"
    if np.ptp(values) == 0:
        return "every voxel that is not 0 has the same value. Is it a mask? Give the image"
    # np.take would copy the whole volume if its memory order is reversed, as in NIfTI files.
    faces = [np.moveaxis(voxels, axis, 0)[side] != 0 for axis in range(3) for side in (0, -1)]
    share = sum(int(face.sum()) for face in faces) / sum(face.size for face in faces)
    if share <= MAX_NONZERO_FACES:
        return None
    return (
        f"the background is not 0: {share:.0%} of the voxels on the volume's six faces have a value. A skull-stripped "
        "image is needed: strip it (HD-BET, SynthStrip), or set what is outside the brain to 0"
    )


def to_native_grid(values: npt.NDArray[_Number], prepared: Prepared) -> npt.NDArray[_Number]:
    """Map an array of the brain box, such as a label map, back to the grid of the case's files.

    Args:
        values: an array of shape ``prepared.box_shape``, the box at the files' own spacing, or several such arrays,
            stacked: (n, X, Y, Z).
        prepared: the result of :func:`prepare` for the case.

    Returns:
        array of the same dtype in the files' own voxel order and shape, 0 outside the box; several arrays are stacked
            along the last axis.
    """
    if values.ndim == 4:
        return np.stack([to_native_grid(one, prepared) for one in values], axis=-1)
    canonical = np.zeros(prepared.canonical_shape, dtype=values.dtype)
    canonical[prepared.box] = values
    return to_native_order(canonical, prepared.native_affine)


def zscore_nonzero(voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale the non-zero voxels to mean 0 and standard deviation 1; zeros stay 0.

    Args:
        voxels: one contrast, any shape.

    Example:
        >>> zscore_nonzero(np.array([0.0, 1.0, 3.0], dtype=np.float32)).tolist()
        [0.0, -1.0, 1.0]
    """
    brain = voxels != 0
    scaled = np.zeros_like(voxels)
    if not brain.any():
        return scaled
    mean, spread = _mean_and_spread(voxels, brain)
    for part in _parts(voxels.shape):
        values = voxels[part][brain[part]].astype(np.float64)
        scaled[part][brain[part]] = (values - mean) / (spread if spread > 0 else 1.0)
    return scaled


def _mean_and_spread(voxels: npt.NDArray[np.float32], marked: npt.NDArray[np.bool_]) -> tuple[float, float]:
    """Mean and standard deviation of the marked voxels, in float64; very large volumes are summed part by part."""
    count = int(np.count_nonzero(marked))
    if count <= _AT_ONCE:
        values = voxels[marked].astype(np.float64)
        return float(values.mean()), float(values.std())
    mean = sum(float(voxels[part][marked[part]].sum(dtype=np.float64)) for part in _parts(voxels.shape)) / count
    squares = sum(
        float(((voxels[part][marked[part]].astype(np.float64) - mean) ** 2).sum()) for part in _parts(voxels.shape)
    )
    return mean, float(np.sqrt(squares / count))


def _parts(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slabs along the first axis, each a quarter of :data:`_AT_ONCE` voxels at most, but at least one plane."""
    planes = max(1, _AT_ONCE // 4 // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], planes):
        yield slice(start, start + planes)


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that contains all the given boxes."""
    x, y, z = (slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in range(3))
    return (x, y, z)


def smallest_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box that contains every marked voxel.

    Args:
        mask: shape (X, Y, Z), at least one voxel marked.

    Example:
        >>> mask = np.zeros((4, 4, 4), dtype=bool)
        >>> mask[1, 2, 0] = mask[2, 2, 3] = True
        >>> smallest_box(mask)
        (slice(1, 3, None), slice(2, 3, None), slice(0, 4, None))
    """
    parts = [slice(None)] * 3
    # Start with the axis whose planes are contiguous in memory, and search only the box found so far.
    for axis in sorted(range(3), key=lambda axis: -abs(mask.strides[axis])):
        others = tuple(other for other in range(3) if other != axis)
        marked = np.flatnonzero(mask[tuple(parts)].any(axis=others))
        parts[axis] = slice(int(marked[0]), int(marked[-1]) + 1)
    return (parts[0], parts[1], parts[2])


def resampled_shape(shape: tuple[int, ...], spacing_mm: Spacing, target_mm: Spacing) -> tuple[int, int, int]:
    """Shape that covers the same box at another spacing, with at least one voxel along each axis.

    Example:
        >>> resampled_shape((140, 170, 141), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
        (70, 85, 70)
    """
    x, y, z = (max(1, round(n * own / wanted)) for n, own, wanted in zip(shape, spacing_mm, target_mm, strict=True))
    return (x, y, z)


def resample(voxels: npt.NDArray[np.float32], shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Resample a volume linearly to another shape over the same box, with smoothing along axes that get coarser."""
    factors = [old / new for old, new in zip(voxels.shape, shape, strict=True)]
    # Gaussian sigma of half the excess factor, as in scikit-image's anti-aliasing.
    smoothing = [max(0.0, (factor - 1) / 2) for factor in factors]
    smooth = ndimage.gaussian_filter(voxels, smoothing, mode="nearest") if any(smoothing) else voxels
    zoomed: npt.NDArray[np.float32] = ndimage.zoom(
        smooth, [1 / factor for factor in factors], order=1, mode="nearest", grid_mode=True
    )
    return zoomed


def resample_codes(codes: npt.NDArray[np.uint8], shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Resample a label map: interpolate each region as a fraction and threshold it at one half."""
    fractions = np.stack([resample(mask.astype(np.float32), shape) for mask in to_regions(codes)])
    return from_regions(fractions >= 0.5)


def _geometry_repairs(headers: Mapping[Contrast, Volume], reference: Contrast) -> tuple[str, ...]:
    """Describe what was chosen or changed in the files' geometry to bring the contrasts to one grid.

    Args:
        headers: the volumes, of which only the geometry is used.
        reference: the contrast that determines the voxel order.
    """
    repairs = [f"{contrast}: {volume.doubt}" for contrast, volume in headers.items() if volume.doubt]
    own_order = voxel_order(headers[reference].affine)
    for contrast, volume in headers.items():
        if (order := voxel_order(volume.affine)) != own_order:
            repairs.append(f"{contrast} is stored in voxel order {order}, {reference} in {own_order}; it was reordered")
    return tuple(repairs)


def _require_same_grid(case_id: str, first: Volume, volume: Volume, name: str, reference: Contrast) -> None:
    difference = grid_difference(first, volume)
    if difference is not None:
        raise DataError(
            f"case {case_id}: {name} is not on the grid of {reference}: {difference} ({volume.path} against "
            f"{first.path}). Register and resample the contrasts to one grid first, for instance with data prepare or "
            "predict --prepare."
        )


def _read_codes(case: Case, canonical: Volume, *, convention: LabelConvention) -> npt.NDArray[np.uint8]:
    """The label map in canonical voxel order and in the program's codes."""
    if case.label is None:
        raise DataError(f"case {case.id}: no label map (a file that ends in seg) in {case.folder}")
    with _naming(case.id, "label map"):
        label = in_order_of(canonical, read_label_map(case.label))
    _require_same_grid(case.id, canonical, label, "the label map", case.reference)
    with _naming(case.id, f"label map {case.label}"):
        return decode(label.voxels, convention)


@contextmanager
def _naming(case_id: str, what: str) -> Iterator[None]:
    """Prefix DataErrors with the case and the item being read."""
    try:
        yield
    except DataError as error:
        raise DataError(f"case {case_id}, {what}: {error}") from error


def _close(own: Spacing, wanted: Spacing) -> bool:
    return all(abs(a - b) <= SPACING_TOLERANCE * b for a, b in zip(own, wanted, strict=True))


def resample_codes_onto(
    codes: npt.NDArray[np.uint8],
    affine: npt.NDArray[np.float64],
    shape: tuple[int, int, int],
    target_affine: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:
    """Resample a label map to any grid in the same world space: rotated, shifted, finer, coarser, of another extent.

    Voxel ``v`` of the target takes each region's share at ``inv(affine) @ target_affine @ v``, interpolated linearly,
    and belongs to the regions whose share is at least one half; :func:`from_regions` then makes the regions nested.
    Along axes where the target is coarser, the shares are smoothed first, as in :func:`resample`. Voxels outside the
    label map's field of view are background.

    Args:
        codes: uint8, shape (X, Y, Z), the program's codes.
        affine: 4x4, invertible, from an index of ``codes`` to RAS millimetres.
        shape: size of the target in voxels.
        target_affine: 4x4, invertible, from an index of the target to RAS millimetres.

    Returns:
        uint8, shape ``shape``; equal to ``codes`` if the grids are identical, shifted if they differ by whole voxels.

    Raises:
        DataError: no voxel of the target is in the label map's field of view.

    Example:
        >>> codes = np.array([0, 3, 3, 2], dtype=np.uint8).reshape(4, 1, 1)
        >>> one_voxel_on = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        >>> resample_codes_onto(codes, np.eye(4), (4, 1, 1), one_voxel_on).ravel().tolist()
        [3, 3, 2, 0]

    Linear interpolation of one mask per label is what nnU-Net does (Isensee et al., Nature Methods 18, 203, 2021).
    """
    to_source = np.linalg.inv(affine) @ target_affine
    _require_overlap(to_source, shape, codes.shape)
    result = np.zeros(shape, dtype=np.uint8)
    if not codes.any():
        return result
    # The norm of a row is the extent of a target voxel along one axis of the source, in source voxels.
    smoothing = np.maximum(0.0, (np.linalg.norm(to_source[:3, :3], axis=1) - 1) / 2)
    # gaussian_filter reaches four standard deviations, linear interpolation one voxel.
    margin = np.ceil(4 * smoothing).astype(int) + 1
    tumour = smallest_box(codes != 0)
    masks = np.pad(to_regions(codes[tumour]), [(0, 0), *((width, width) for width in margin)])
    smooth = [ndimage.gaussian_filter(mask.astype(np.float32), smoothing, mode="constant") for mask in masks]
    start = np.array([part.start for part in tumour]) - margin
    low, high = _reached(np.linalg.inv(to_source), start, start + smooth[0].shape, shape)
    turn, offset = to_source[:3, :3], (to_source @ [*low, 1])[:3] - start
    size = tuple((high - low).tolist())
    shares = [ndimage.affine_transform(share, turn, offset, size, order=1) for share in smooth]
    x, y, z = (slice(first, stop) for first, stop in zip(low, high, strict=True))
    result[x, y, z] = from_regions(np.stack(shares) >= 0.5 - TIE_TOLERANCE)
    return result


def _require_overlap(
    to_source: npt.NDArray[np.float64], target_shape: tuple[int, ...], source_shape: tuple[int, ...]
) -> None:
    """Reject two grids if no voxel of the target has its centre in the source's field of view."""
    x, y, z = np.ogrid[tuple(slice(size) for size in target_shape)]
    inside = np.ones(target_shape, dtype=bool)
    for (to_x, to_y, to_z, origin), size in zip(to_source[:3], source_shape, strict=True):
        place = to_x * x + to_y * y + to_z * z + origin
        inside &= (place > -0.5) & (place < size - 0.5)
    if not inside.any():
        raise DataError("the grids do not overlap: their fields of view have no voxel in common")


def _reached(
    transform: npt.NDArray[np.floating],
    start: npt.NDArray[np.int_],
    stop: npt.NDArray[np.int_],
    shape: tuple[int, int, int],
) -> tuple[npt.NDArray[np.int_], npt.NDArray[np.int_]]:
    """Start and stop of the part of another grid, of the given shape, that a box of this grid overlaps."""
    corners = np.array([[*corner, 1] for corner in product(*zip(start, stop - 1, strict=True))]).T
    places = (transform @ corners)[:3]
    low = np.clip(np.floor(places.min(axis=1)).astype(int), 0, shape)
    return low, np.clip(np.ceil(places.max(axis=1)).astype(int) + 1, low, shape)
