"""Checks on one contrast: empty image, skull not stripped, thick slices, cut field of view."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from data.nifti import Spacing
from data.quality.digest import Digest
from data.quality.finding import Finding

#: Slices are thick from this spacing on if it is also at least ``THICK_RATIO`` times the finest spacing.
THICK_MM: Final = 3.0
THICK_RATIO: Final = 1.5
#: Slices this many times the finest spacing are thick at any spacing.
VERY_THICK_RATIO: Final = 3.0
#: A brain with its fluid takes 1 to 2 litres; MNI152's mask has 1.9, a head with its skull 3 or more.
MOST_BRAIN_LITRES: Final = 2.5
#: A brain that ends in a larger plane was cut off. The brain stem in a BraTS volume takes up to 5 cm2.
CUT_CM2: Final = 25.0
#: Area that the convex end of a head gains per mm (2 pi 70 mm2 at a radius of 70 mm, with a margin), so that its last
#: thick slice does not count as a cut.
_END_MM: Final = 900.0
#: Depths in mm below the outermost tissue: a skull lies above the first, and brain between the first and the second.
_BAND_MM: Final = 24.0
_INNER_MM: Final = 45.0
#: Longer steps along a ray could miss the skull.
_LONGEST_STEP_MM: Final = 6.0
#: A skull's band is darker than rim and brain by this factor; sulci average out over many rays.
_DARK_BAND: Final = 0.55
#: Quantile used as the darkest tissue.
_DARKEST: Final = 0.005
#: Minimum number of rays into the head for a verdict.
_LEAST_RAYS: Final = 30

_AXES: Final = ("left-right", "anterior-posterior", "inferior-superior")
_STRIP: Final = "strip it with HD-BET or SynthStrip"


def judge_volume(seen: Digest, contrast: str) -> list[Finding]:
    """All findings on one contrast.

    Args:
        seen: digest of the contrast.
        contrast: name of the contrast.
    """
    if seen.is_empty:
        message, action = "every voxel is 0", "Export the image again, or leave the case out"
        return [Finding(kind="empty", severity="problem", contrast=contrast, message=message, action=action)]
    if not seen.has_range:
        message, action = "every voxel that is not 0 has the same value", "Is it a mask? Give the image"
        return [Finding(kind="constant", severity="problem", contrast=contrast, message=message, action=action)]
    findings = [thick_slices(seen.spacing_mm, contrast), skull(seen, contrast)]
    if not seen.has_background:
        findings.append(cut_field_of_view(seen, contrast))
    return [finding for finding in findings if finding is not None]


def thick_slices(spacing_mm: Spacing, contrast: str) -> Finding | None:
    """A note if slices are thick; a coarse grid with equal spacing along all axes has no slices.

    Example:
        >>> thick_slices((1.0, 1.0, 5.0), "t2").message
        'slices of 5 mm, 5 times the finest spacing'
    """
    thickest, finest = max(spacing_mm), min(spacing_mm)
    ratio = thickest / finest
    if ratio < THICK_RATIO or (thickest < THICK_MM and ratio < VERY_THICK_RATIO):
        return None
    return Finding(
        kind="thick slices",
        severity="note",
        contrast=contrast,
        message=f"slices of {thickest:.3g} mm, {ratio:.2g} times the finest spacing",
        action="Usable; a network that works at another spacing resamples it. Expect rough outlines across slices",
    )


def skull(seen: Digest, contrast: str) -> Finding | None:
    """A problem if the image is not a skull-stripped brain.

    Each of three signs is enough: most of the volume's faces are not 0 (air was not removed); more than
    :data:`MOST_BRAIN_LITRES` are not 0; there is a dark band (skull) between a bright rim (scalp) and the brain.
    """
    if seen.has_background:
        message = (
            f"the background is not 0: {seen.nonzero_faces:.0%} of the voxels on the volume's six faces have a value"
        )
        return Finding(
            kind="background",
            severity="problem",
            contrast=contrast,
            message=message,
            action=f"A skull-stripped image is needed: {_STRIP}, or set everything outside the brain to 0",
        )
    tissue = seen.coarse != 0
    litres = float(np.count_nonzero(tissue)) * float(np.prod(seen.coarse_spacing_mm)) / 1e6
    if litres > MOST_BRAIN_LITRES:
        message = (
            f"the non-zero voxels take {litres:.1f} litres, but a brain has 1 to 2: the skull was not removed, or the "
            "spacing is wrong"
        )
    elif has_dark_band(seen.coarse, tissue, seen.coarse_spacing_mm):
        message = "there is a dark band between a bright rim and the brain: the skull was not removed"
    else:
        return None
    action = f"Look at it, then {_STRIP}. Training and prediction accept it as it is"
    return Finding(kind="skull", severity="problem", contrast=contrast, message=message, action=action)


def has_dark_band(
    voxels: npt.NDArray[np.float32], tissue: npt.NDArray[np.bool_], spacing_mm: tuple[float, float, float]
) -> bool:
    """Return whether, along most directions into the head, intensities go bright, dark, bright within 45 mm.

    If there are negative values, as after z-scoring, darkness is measured from the darkest tissue instead of from 0.

    Rays enter along both directions of each axis. The profile of a direction is the median over its rays, by depth
    below the first tissue, so that single sulci and vessels do not show.

    Args:
        voxels: shape (X, Y, Z).
        tissue: mask of the tissue, same shape.
        spacing_mm: voxel size.
    """
    if voxels.min() < 0:
        voxels = voxels - np.quantile(voxels[tissue], _DARKEST)
    verdicts = [
        _band_along(view, inside, spacing_mm[axis])
        for axis in range(3)
        for view, inside in _both_ways(voxels, tissue, axis)
    ]
    decided = [verdict for verdict in verdicts if verdict is not None]
    return len(decided) >= 3 and sum(decided) > len(decided) / 2


def _both_ways(
    voxels: npt.NDArray[np.float32], tissue: npt.NDArray[np.bool_], axis: int
) -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]]:
    """The rays from both ends of an axis, depth first, limited to those through the middle third of the tissue."""
    marked = np.argwhere(tissue.any(axis=axis))
    if not marked.size:
        return []
    low, high = marked.min(axis=0), marked.max(axis=0) + 1
    third = (high - low) // 3
    middle = tuple(slice(int(a), max(int(a) + 1, int(b))) for a, b in zip(low + third, high - third, strict=True))
    rays, inside = np.moveaxis(voxels, axis, 0)[:, *middle], np.moveaxis(tissue, axis, 0)[:, *middle]
    return [(rays, inside), (rays[::-1], inside[::-1])]


def _band_along(rays: npt.NDArray[np.float32], inside: npt.NDArray[np.bool_], step_mm: float) -> bool | None:
    """Return whether one direction is bright, dark, then bright; None if too few rays go deep or steps are too long."""
    depth = round(_INNER_MM / step_mm) + 1
    if step_mm > _LONGEST_STEP_MM:
        return None
    first = inside.argmax(axis=0)
    whole = inside.any(axis=0) & (first + depth <= rays.shape[0])
    if np.count_nonzero(whole) < _LEAST_RAYS:
        return None
    index = first[None] + np.arange(depth)[:, None, None]
    profile = np.median(np.take_along_axis(rays, np.minimum(index, rays.shape[0] - 1), axis=0)[:, whole], axis=1)
    at_mm = np.arange(depth) * step_mm
    brain = float(np.median(profile[at_mm > _BAND_MM]))
    rim = np.maximum.accumulate(profile)
    dark = profile[1:] < _DARK_BAND * np.minimum(rim[:-1], brain)
    return bool(dark[at_mm[1:] <= _BAND_MM].any())


def cut_field_of_view(seen: Digest, contrast: str) -> Finding | None:
    """A note if the brain ends in a plane, at the volume's border or before it."""
    tissue = seen.coarse != 0
    ends = []
    for axis, mm in enumerate(seen.coarse_spacing_mm):
        others = tuple(other for other in range(3) if other != axis)
        pixel_mm2 = float(np.prod([seen.coarse_spacing_mm[other] for other in others]))
        areas_mm2 = np.count_nonzero(tissue, axis=others) * pixel_mm2
        taken = np.flatnonzero(areas_mm2)
        limit_mm2 = max(CUT_CM2 * 100, _END_MM * mm)
        ends += [(float(areas_mm2[end]), axis) for end in (taken[0], taken[-1]) if areas_mm2[end] > limit_mm2]
    if not ends or len(ends) > 3:  # a box filled on all sides was not cut, so there is no verdict
        return None
    area_mm2, axis = max(ends)
    return Finding(
        kind="cut field of view",
        severity="note",
        contrast=contrast,
        message=f"the brain ends in a plane of {area_mm2 / 100:.0f} cm2 across {_name(seen, axis)}: it was cut",
        action="Usable; nothing beyond it is segmented. Scan or export the whole head if possible",
    )


def _name(seen: Digest, axis: int) -> str:
    """The anatomical name of an array axis."""
    return _AXES[int(np.abs(seen.grid.affine[:3, axis]).argmax())]
