"""From the files of a case to the array a network sees, and from its answer back to the files' grid.

The way in: same grid checked, reoriented to LPS, cropped to the brain, each contrast z-scored over its own non-zero
voxels, resampled where the spacing asks for it. The way back undoes crop and orientation; the answer is resampled by
whoever holds it (as probabilities, not labels).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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

#: Where more of a volume's six faces than this share is not 0, the background was not removed. Brains cut by the field
#: of view reach one or two faces; the noise around a head, or a background shifted by normalisation, reaches all.
MAX_NONZERO_FACES: Final = 0.5
#: A grid whose spacing is this close to the wanted one, relative, is left as it is.
SPACING_TOLERANCE: Final = 0.02
#: A share this close to one half counts as one half, so that the rounding of affines decides no tie.
TIE_TOLERANCE: Final = 1e-3
#: Voxels whose float64 copies may be held at once: more than any brain at 0.5 mm has, so that only larger volumes are
#: summed part by part.
_AT_ONCE: Final = 1 << 25

Box = tuple[slice, slice, slice]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case as the network sees it, with what is needed to go back."""

    image: npt.NDArray[np.float32]
    """Shape (4, X, Y, Z), order of :data:`data.labels.CONTRASTS`; brain z-scored, 0 outside; 0 where it is missing."""
    present: tuple[Contrast, ...]
    """The contrasts that are there, in project order."""
    brain: npt.NDArray[np.bool_]
    """Where any contrast is non-zero in the box, at the files' own spacing."""
    codes: npt.NDArray[np.uint8] | None
    """Label map in the program's codes, shape (X, Y, Z), where it was asked for."""
    spacing_mm: Spacing
    """Spacing of ``image``."""
    box: tuple[slice, slice, slice]
    """Where the brain lies in the canonical (LPS) volume, before resampling."""
    canonical_shape: tuple[int, int, int]
    """Shape of the canonical volume the box was cut from."""
    native_affine: npt.NDArray[np.float64]
    """Affine of the reference contrast's file."""
    zeroed: dict[Contrast, int]
    """By contrast: how many voxels were NaN or infinite and were taken as 0; contrasts without any are not in it."""
    backgrounds: dict[Contrast, str] = field(default_factory=dict)
    """By contrast: what of it was background and not 0 in the file, in words; contrasts without any are not in it."""
    repairs: tuple[str, ...] = ()
    """What was done about the geometry of the files, a sentence each; empty where nothing had to be."""

    @property
    def box_shape(self) -> tuple[int, int, int]:
        """Shape of the box at the file's own spacing."""
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
        case: what to read.
        spacing_mm: spacing the network works at; None keeps the file's own.
        convention: read the label map too, its numbers meaning this; None leaves it.
        nan_to_zero: take image voxels that are NaN or infinite as 0 instead of refusing the case.
        all_contrasts: False takes a case with one contrast or more; box and brain are then those of the contrasts that
            are there.

    Raises:
        DataError: a contrast is missing or unreadable, the contrasts lie on different grids, one of them is zero
            everywhere, constant or not skull-stripped, or the label map is missing, on another grid or outside the
            convention.
    """
    case.require(all_contrasts=all_contrasts)
    present = tuple(contrast for contrast in CONTRASTS if all_contrasts or contrast in case.contrasts)
    canonical: Volume | None = None
    native_affine = np.eye(4)
    # One whole volume at a time is held, and of each its own box: of large scans the four together would not fit.
    parts: dict[Contrast, tuple[Box, npt.NDArray[np.float32]]] = {}
    zeroed: dict[Contrast, int] = {}
    backgrounds: dict[Contrast, str] = {}
    found: dict[Contrast, tuple[str, str]] = {}
    for contrast in (case.reference, *(one for one in present if one != case.reference)):
        with _naming(case, f"contrast {contrast}"):
            volume = read_image(case.contrasts[contrast], case.volumes.get(contrast), nan_to_zero=nan_to_zero)
        found[contrast] = volume.doubt or "", voxel_order(volume.affine)
        if canonical is None:
            native_affine, volume = volume.affine, reorient(volume)
            canonical = replace(volume, voxels=np.broadcast_to(np.float32(0), volume.voxels.shape))  # takes no memory
        else:
            volume = in_order_of(canonical, volume)
            _require_same_grid(case, canonical, volume, contrast)
        if volume.zeroed:
            zeroed[contrast] = volume.zeroed
        if volume.background is not None:
            backgrounds[contrast] = volume.background
        if (problem := image_problem(volume.voxels)) is not None:
            raise DataError(f"case {case.id}, contrast {contrast}: {case.contrasts[contrast]}: {problem}.")
        own = smallest_box(volume.voxels != 0)
        parts[contrast] = (own, volume.voxels[own].copy())
        del volume
    assert canonical is not None
    box = _around([own for own, _ in parts.values()])
    own_spacing = canonical_spacing(native_affine)
    canonical_shape = _shape_of(canonical.voxels)
    image = np.zeros((len(present), *(part.stop - part.start for part in box)), dtype=np.float32)
    brain = np.zeros(image.shape[1:], dtype=bool)
    for number, contrast in enumerate(present):
        own, voxels = parts.pop(contrast)
        inside = tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(own, box, strict=True))
        brain[inside] |= voxels != 0
        image[number][inside] = zscore_nonzero(voxels)
        del voxels
    codes = _read_codes(case, canonical, convention)[box] if convention is not None else None
    target = spacing_mm if spacing_mm is not None and not _close(own_spacing, spacing_mm) else own_spacing
    if target is not own_spacing:
        shape = resampled_shape(image.shape[1:], own_spacing, target)
        image = np.stack([resample(voxels, shape) for voxels in image])
        codes = None if codes is None else resample_codes(codes, shape)
    return Prepared(
        image=image if present == CONTRASTS else _at_their_places(image, present),
        present=present,
        brain=brain,
        codes=codes,
        spacing_mm=target,
        box=box,
        canonical_shape=canonical_shape,
        native_affine=native_affine,
        zeroed={contrast: zeroed[contrast] for contrast in present if contrast in zeroed},
        backgrounds={contrast: backgrounds[contrast] for contrast in present if contrast in backgrounds},
        repairs=_geometry_repairs({contrast: found[contrast] for contrast in present}, case.reference),
    )


def image_problem(voxels: npt.NDArray[np.float32]) -> str | None:
    """Say why a volume is no skull-stripped image, or return None where nothing speaks against it.

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
    # Not np.take, which copies the whole volume where its memory runs the other way, as in NIfTI files.
    faces = [np.moveaxis(voxels, axis, 0)[side] != 0 for axis in range(3) for side in (0, -1)]
    share = sum(int(face.sum()) for face in faces) / sum(face.size for face in faces)
    if share <= MAX_NONZERO_FACES:
        return None
    return (
        f"the background is not 0: {share:.0%} of the voxels on the volume's six faces have a value. A skull-stripped "
        "image is needed: strip it (HD-BET, SynthStrip), or set what is outside the brain to 0"
    )


def to_native_grid(codes: npt.NDArray[np.uint8], prepared: Prepared) -> npt.NDArray[np.uint8]:
    """Put a label map of the brain box back on the grid of the case's files.

    Args:
        codes: shape of the box at the files' own spacing (``prepared.box_shape``).
        prepared: what :func:`prepare` returned for the case.

    Returns:
        uint8 array in the files' own voxel order and shape, 0 outside the box.
    """
    canonical = np.zeros(prepared.canonical_shape, dtype=np.uint8)
    canonical[prepared.box] = codes
    return to_native_order(canonical, prepared.native_affine)


def values_to_native_grid(values: npt.NDArray[_Number], prepared: Prepared) -> npt.NDArray[_Number]:
    """Put several arrays of the brain box back on the grid of the case's files, as the volumes of one 4D array.

    Args:
        values: shape (n, X, Y, Z) of the box at the files' own spacing.
        prepared: what :func:`prepare` returned for the case.

    Returns:
        the same type in the files' own voxel order and shape, then n; 0 outside the box.
    """
    volumes = []
    for one in values:
        canonical = np.zeros(prepared.canonical_shape, dtype=values.dtype)
        canonical[prepared.box] = one
        volumes.append(to_native_order(canonical, prepared.native_affine))
    return np.stack(volumes, axis=-1)


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
    """Mean and standard deviation of the marked voxels, in float64; of very large volumes part by part."""
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
    """Slabs along the first axis, of at most :data:`_AT_ONCE` voxels where one plane is less."""
    planes = max(1, _AT_ONCE // 4 // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], planes):
        yield slice(start, start + planes)


def _around(boxes: Sequence[Box]) -> Box:
    """The smallest box that holds several."""
    x, y, z = (slice(min(box[axis].start for box in boxes), max(box[axis].stop for box in boxes)) for axis in range(3))
    return (x, y, z)


def _shape_of(voxels: npt.NDArray[np.float32]) -> tuple[int, int, int]:
    x, y, z = voxels.shape
    return (x, y, z)


def brain_box(image: npt.NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """The smallest box that holds every non-zero voxel of any contrast.

    Args:
        image: shape (contrasts, X, Y, Z), not all zero.
    """
    return smallest_box((image != 0).any(axis=0))


def smallest_box(mask: npt.NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box that holds every marked voxel.

    Args:
        mask: shape (X, Y, Z), at least one voxel marked.

    Example:
        >>> mask = np.zeros((4, 4, 4), dtype=bool)
        >>> mask[1, 2, 0] = mask[2, 2, 3] = True
        >>> smallest_box(mask)
        (slice(1, 3, None), slice(2, 3, None), slice(0, 4, None))
    """
    parts = [slice(None)] * 3
    # From the axis whose planes lie together in memory on, each time in what is left of the box.
    for axis in sorted(range(3), key=lambda axis: -abs(mask.strides[axis])):
        others = tuple(other for other in range(3) if other != axis)
        marked = np.flatnonzero(mask[tuple(parts)].any(axis=others))
        parts[axis] = slice(int(marked[0]), int(marked[-1]) + 1)
    return (parts[0], parts[1], parts[2])


def resampled_shape(shape: tuple[int, ...], spacing_mm: Spacing, target_mm: Spacing) -> tuple[int, int, int]:
    """Shape that covers the same box at another spacing; at least one voxel along each axis.

    Example:
        >>> resampled_shape((140, 170, 141), (1.0, 1.0, 1.0), (2.0, 2.0, 2.0))
        (70, 85, 70)
    """
    x, y, z = (max(1, round(n * own / wanted)) for n, own, wanted in zip(shape, spacing_mm, target_mm, strict=True))
    return (x, y, z)


def resample(voxels: npt.NDArray[np.float32], shape: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Interpolate a volume linearly to another shape over the same box, smoothed first where it gets coarser."""
    factors = [old / new for old, new in zip(voxels.shape, shape, strict=True)]
    # Gaussian of half the excess width: what scikit-image's anti-aliasing uses.
    smoothing = [max(0.0, (factor - 1) / 2) for factor in factors]
    smooth = ndimage.gaussian_filter(voxels, smoothing, mode="nearest") if any(smoothing) else voxels
    zoomed: npt.NDArray[np.float32] = ndimage.zoom(
        smooth, [1 / factor for factor in factors], order=1, mode="nearest", grid_mode=True
    )
    return zoomed


def resample_codes(codes: npt.NDArray[np.uint8], shape: tuple[int, int, int]) -> npt.NDArray[np.uint8]:
    """Bring a label map to another shape: each region interpolated as a fraction, then cut at one half."""
    fractions = np.stack([resample(mask.astype(np.float32), shape) for mask in to_regions(codes)])
    return from_regions(fractions >= 0.5)


def _geometry_repairs(found: Mapping[Contrast, tuple[str, str]], reference: Contrast) -> tuple[str, ...]:
    """What of the files' geometry had to be chosen or changed to have the contrasts on one grid.

    Args:
        found: by contrast: what was doubtful, empty where nothing was, and the voxel order of the file.
        reference: the contrast that decides the order.
    """
    repairs = [f"{contrast}: {doubt}" for contrast, (doubt, _) in found.items() if doubt]
    own_order = found[reference][1]
    for contrast, (_, order) in found.items():
        if order != own_order:
            repairs.append(f"{contrast} is stored in voxel order {order}, {reference} in {own_order}; it was reordered")
    return tuple(repairs)


def _at_their_places(image: npt.NDArray[np.float32], present: tuple[Contrast, ...]) -> npt.NDArray[np.float32]:
    """All contrasts of an image that has some of them; those missing are 0."""
    complete = np.zeros((len(CONTRASTS), *image.shape[1:]), dtype=np.float32)
    complete[[CONTRASTS.index(contrast) for contrast in present]] = image
    return complete


def _require_same_grid(case: Case, reference: Volume, volume: Volume, name: str) -> None:
    difference = grid_difference(reference, volume)
    if difference is not None:
        raise DataError(
            f"case {case.id}: {name} is not on the grid of {case.reference}: {difference} "
            f"({volume.path} against {reference.path}). "
            "Register and resample the contrasts to one grid first, or have it done: predict --prepare, data prepare."
        )


def _read_codes(case: Case, reference: Volume, convention: LabelConvention) -> npt.NDArray[np.uint8]:
    """The label map in canonical voxel order and the program's codes."""
    if case.label is None:
        raise DataError(f"case {case.id}: no label map (a file that ends in seg) in {case.folder}")
    with _naming(case, "label map"):
        label = in_order_of(reference, read_label_map(case.label))
    _require_same_grid(case, reference, label, "the label map")
    with _naming(case, f"label map {case.label}"):
        return decode(label.voxels, convention)


@contextmanager
def _naming(case: Case, what: str) -> Iterator[None]:
    """Add the case and what was read of it to a message."""
    try:
        yield
    except DataError as error:
        raise DataError(f"case {case.id}, {what}: {error}") from error


def _close(own: Spacing, wanted: Spacing) -> bool:
    return all(abs(a - b) <= SPACING_TOLERANCE * b for a, b in zip(own, wanted, strict=True))


def resample_codes_onto(
    codes: npt.NDArray[np.uint8],
    affine: npt.NDArray[np.float64],
    shape: tuple[int, int, int],
    target_affine: npt.NDArray[np.float64],
) -> npt.NDArray[np.uint8]:
    """Bring a label map to any other grid in the same world: turned, shifted, finer, coarser, of another extent.

    The target's voxel ``v`` takes each region's share at ``inv(affine) @ target_affine @ v``, interpolated linearly,
    and belongs to the region where that is one half or more; the regions are then nested by :func:`from_regions`. Along
    axes on which the target is coarser the shares are smoothed first, as in :func:`resample`. What lies outside the
    label map's field of view is background.

    Args:
        codes: uint8, shape (X, Y, Z), the program's codes.
        affine: 4x4, invertible, from an index of ``codes`` to RAS millimetres.
        shape: size of the target in voxels.
        target_affine: 4x4, invertible, from an index of the target to RAS millimetres.

    Returns:
        uint8, shape ``shape``; exactly ``codes`` where the grids are one, moved where they are whole voxels apart.

    Raises:
        DataError: not one voxel of the target lies in the label map's field of view.

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
    # The length of a row is the extent of a target voxel along one axis of the source, in voxels of the source.
    smoothing = np.maximum(0.0, (np.linalg.norm(to_source[:3, :3], axis=1) - 1) / 2)
    # gaussian_filter reaches four standard deviations far, linear interpolation one voxel.
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
    """Refuse grids of which not one target voxel has its centre in the source's field of view."""
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
    """First index and stop of the part of another grid that a box of this one touches, cut to that grid's shape."""
    corners = np.array([[*corner, 1] for corner in product(*zip(start, stop - 1, strict=True))]).T
    places = (transform @ corners)[:3]
    low = np.clip(np.floor(places.min(axis=1)).astype(int), 0, shape)
    return low, np.clip(np.ceil(places.max(axis=1)).astype(int) + 1, low, shape)
