"""From the files of a case to the array a network sees, and from its answer back to the files' grid.

The way in: same grid checked, reoriented to LPS, cropped to the brain, each contrast z-scored over its own non-zero
voxels, resampled where the spacing asks for it. The way back undoes crop and orientation; the answer is resampled by
whoever holds it (as probabilities, not labels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from data.errors import DataError
from data.labels import CONTRASTS, LabelConvention, decode, from_regions, to_regions
from data.layouts import Case
from data.nifti import (
    Spacing,
    Volume,
    canonical_spacing,
    grid_difference,
    read_label_map,
    read_volume,
    reorient,
    to_native_order,
)

#: A grid whose spacing is this close to the wanted one, relative, is left as it is.
SPACING_TOLERANCE: Final = 0.02


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case as the network sees it, with what is needed to go back."""

    image: npt.NDArray[np.float32]
    """Shape (4, X, Y, Z), order of :data:`data.labels.CONTRASTS`; brain z-scored, 0 outside."""
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

    @property
    def box_shape(self) -> tuple[int, int, int]:
        """Shape of the box at the file's own spacing."""
        x, y, z = (part.stop - part.start for part in self.box)
        return (x, y, z)


def prepare(case: Case, *, spacing_mm: Spacing | None = None, convention: LabelConvention | None = None) -> Prepared:
    """Read and prepare one case.

    Args:
        case: all four contrasts present.
        spacing_mm: spacing the network works at; None keeps the file's own.
        convention: read the label map too, its numbers meaning this; None leaves it.

    Raises:
        DataError: a contrast is missing or unreadable, the contrasts lie on different grids, one of them is zero
            everywhere, or the label map is missing, on another grid or outside the convention.
    """
    case.require()
    volumes = {contrast: read_volume(case.contrasts[contrast]) for contrast in CONTRASTS}
    reference = volumes["t1c"]
    for contrast, volume in volumes.items():
        _require_same_grid(case, reference, volume, contrast)
    native_affine = reference.affine
    image = np.stack([reorient(volume).voxels for volume in volumes.values()])
    del volumes
    for contrast, voxels in zip(CONTRASTS, image, strict=True):
        if not voxels.any():
            raise DataError(f"case {case.id}, contrast {contrast}: every voxel is 0 in {case.contrasts[contrast]}")
        if np.ptp(voxels[voxels != 0]) == 0:
            raise DataError(
                f"case {case.id}, contrast {contrast}: every voxel that is not 0 has the same value in "
                f"{case.contrasts[contrast]}. Is it a mask?"
            )
    box = brain_box(image)
    own_spacing = canonical_spacing(native_affine)
    canonical_shape = (int(image.shape[1]), int(image.shape[2]), int(image.shape[3]))
    brain = (image[:, *box] != 0).any(axis=0)
    image = np.stack([zscore_nonzero(voxels[box]) for voxels in image])
    codes = _read_codes(case, reference, convention)[box] if convention is not None else None
    target = spacing_mm if spacing_mm is not None and not _close(own_spacing, spacing_mm) else own_spacing
    if target is not own_spacing:
        shape = resampled_shape(image.shape[1:], own_spacing, target)
        image = np.stack([resample(voxels, shape) for voxels in image])
        codes = None if codes is None else resample_codes(codes, shape)
    return Prepared(
        image=image,
        brain=brain,
        codes=codes,
        spacing_mm=target,
        box=box,
        canonical_shape=canonical_shape,
        native_affine=native_affine,
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


def zscore_nonzero(voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale the non-zero voxels to mean 0 and standard deviation 1; zeros stay 0.

    Args:
        voxels: one contrast, any shape.

    Example:
        >>> zscore_nonzero(np.array([0.0, 1.0, 3.0], dtype=np.float32)).tolist()
        [0.0, -1.0, 1.0]
    """
    brain = voxels != 0
    values = voxels[brain].astype(np.float64)
    if values.size == 0:
        return np.zeros_like(voxels)
    spread = values.std()
    scaled = np.zeros_like(voxels)
    scaled[brain] = (values - values.mean()) / (spread if spread > 0 else 1.0)
    return scaled


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
    parts = []
    for axis in range(3):
        marked = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        parts.append(slice(int(marked[0]), int(marked[-1]) + 1))
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


def _require_same_grid(case: Case, reference: Volume, volume: Volume, name: str) -> None:
    difference = grid_difference(reference, volume)
    if difference is not None:
        raise DataError(
            f"case {case.id}: {name} is not on the grid of t1c: {difference} ({volume.path} against {reference.path}). "
            "Register and resample the contrasts to one grid first."
        )


def _read_codes(case: Case, reference: Volume, convention: LabelConvention) -> npt.NDArray[np.uint8]:
    """The label map in canonical voxel order and the program's codes."""
    if case.label is None:
        raise DataError(f"case {case.id}: no label map (a file that ends in seg) in {case.folder}")
    label = read_label_map(case.label)
    _require_same_grid(case, reference, label, "the label map")
    try:
        return decode(reorient(label).voxels, convention)
    except DataError as error:
        raise DataError(f"case {case.id}: {case.label}: {error}") from error


def _close(own: Spacing, wanted: Spacing) -> bool:
    return all(abs(a - b) <= SPACING_TOLERANCE * b for a, b in zip(own, wanted, strict=True))
