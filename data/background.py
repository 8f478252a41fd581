"""Replace non-zero backgrounds with 0: interpolation ringing, denoising residue, a fill value such as -1024.

The rest of the program takes 0 for background and any other value for brain, so each image is converted when it is
read. MR intensities have no unit; "almost 0" is relative to the bright tissue of the same image.

Only voxels connected to the volume's border count as background: values near 0 inside a brain, common in z-scored
images and dark fluid, are kept. A few dark voxels on a brain's rim are normal, so an image with only a few of them is
left unchanged, as is one whose background is already 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

#: Quantile of the non-zero magnitudes that counts as bright tissue; isolated hot voxels are above it.
_BRIGHT: Final = 0.99
#: Values below this share of bright tissue are noise, since signal-to-noise ratios are at most a few hundred. Used if
#: the volume's faces are 0, that is, if the brain has already been extracted.
NEGLIGIBLE: Final = 5e-3
#: The same share if the faces are not 0. Noise in the air around a head exceeds it, so a head is not taken for a brain.
_NEGLIGIBLE_ON_FACES: Final = 1e-3
#: Residue is removed only if it exceeds this share of all non-zero voxels. In sixteen real cases up to 0.2 % of them
#: (dark voxels of the rim) are within :data:`NEGLIGIBLE`; a shell one voxel thick holds 5 %.
_LEAST_SHARE: Final = 0.02
#: The same threshold for the first look at a subsample, which may see less of the residue.
_LEAST_SEEN: Final = 0.01
#: Minimum share of negative voxels that indicates ringing in an otherwise positive image; magnitude images have none.
_LEAST_NEGATIVE: Final = 0.01
#: Maximum share of negative voxels for ringing; above it they are intended, as after z-scoring.
_MOST_NEGATIVE: Final = 0.3
#: Share of voxels inside a brain that may be negative although the brain counts as positive.
_EXCEPTIONS: Final = 0.005
#: Quantile of the values inside a brain that counts as its darkest tissue.
_DARKEST: Final = 0.005
#: Interpolation mixes brain and background this many voxels deep; voxels further inside are pure.
_DEPTH_VOXELS: Final = 4
#: Fewer voxels than this are too few to judge.
_LEAST_VOXELS: Final = 1000
#: Share of a brain mask that must survive an erosion by one voxel; scattered voxels do not.
_LEAST_SOLID: Final = 0.3
#: Minimum share of the volume's faces that a fill value covers; it must also cover a corner.
_LEAST_FILL: Final = 0.01
#: If the darkest tissue is farther from the fill than this multiple of its distance from the brain's median, values
#: half-way between the fill and the darkest tissue can only be mixtures of brain and fill.
_GAP: Final = 1.5
#: The first look takes every fourth voxel along each axis, or every voxel of volumes smaller than ``_SMALL_VOXELS``.
_STEP: Final = 4
_SMALL_VOXELS: Final = 100_000
#: Replaces 0 inside a brain whose background was another value, so that these voxels do not count as background.
_ALMOST_NOTHING: Final = np.float32(1e-30)

_Voxels = npt.NDArray[np.float32]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """An image whose background has been set to 0."""

    voxels: _Voxels
    """Same shape as the input; the values of the brain are unchanged."""
    sentence: str
    """Describes the former background and the voxels set to 0; no full stop."""


def clean_background(voxels: _Voxels) -> Cleaned | None:
    """Replace a non-zero background with 0.

    Args:
        voxels: one contrast, finite, shape (X, Y, Z), any memory order; not modified.

    Returns:
        a copy whose background is 0; None if it is 0 already or cannot be distinguished from the image.

    Example:
        >>> image = np.full((20, 20, 20), -1024, dtype=np.float32)
        >>> image[5:15, 5:15, 5:15] = np.linspace(100, 900, 10)
        >>> cleaned = clean_background(image)
        >>> cleaned.sentence, float(cleaned.voxels.min())
        ('the background is -1024, not 0; 7000 voxels were taken as 0', 0.0)
    """
    if not _may_have_one(voxels):
        return None
    # Differences of the largest float32 values overflow; infinities never pass as background.
    with np.errstate(all="ignore"):
        filled = _without_fill(voxels)
        residue = _without_residue(voxels if filled is None else filled.voxels)
    if filled is None or residue is None:
        return filled or residue
    return Cleaned(voxels=residue.voxels, sentence=f"{filled.sentence}; {residue.sentence}")


def _may_have_one(voxels: _Voxels) -> bool:
    """Return whether a subsample suggests a non-zero background; takes a tenth of the time needed to read the file."""
    step = 1 if voxels.size < _SMALL_VOXELS else _STEP
    some = voxels[::step, ::step, ::step]
    values = some[some != 0]
    if not values.size:
        return False
    faces = np.concatenate([face[::step, ::step].ravel() for face in _faces(voxels)])
    if np.count_nonzero(faces) > _LEAST_FILL / 2 * faces.size and _is_corner_filled(voxels):
        return True
    bright = _bright(values)
    magnitudes = np.abs(values)
    few = _LEAST_SEEN * values.size
    near = np.count_nonzero(magnitudes <= NEGLIGIBLE * bright)
    around = np.count_nonzero(magnitudes <= 5 * NEGLIGIBLE * bright) - near
    negative = np.count_nonzero(values < -NEGLIGIBLE * bright)
    # Z-scored images have as many values at 0 as near it: subtract the count expected from the neighbouring bins.
    return bool(near - around / 4 > few or few < negative < _MOST_NEGATIVE * values.size)


def _without_fill(voxels: _Voxels) -> Cleaned | None:
    """Remove a fill value: a constant that covers a corner and more than half of the non-zero voxels on the faces."""
    faces = np.concatenate([face.ravel() for face in _faces(voxels)])
    values = faces[faces != 0]
    if values.size <= _LEAST_FILL * faces.size:
        return None
    fill = _middle(values)
    difference = voxels - fill
    others = difference[(difference != 0) & (voxels != 0)]
    if not others.size:
        return None
    tolerance = np.float32(_NEGLIGIBLE_ON_FACES * _bright(others))
    if abs(fill) <= tolerance or np.count_nonzero(np.abs(values - fill) <= tolerance) <= values.size / 2:
        return None
    off = np.abs(difference)
    same = off <= _reach(off[_connected(off <= tolerance)])
    difference[same] = 0
    if not any(same[corner] for corner in _corners()) or not _is_solid(difference != 0):
        return None
    background = same | _mixed_with_fill(difference) | _residue(difference)
    zero = voxels == 0
    outside = _connected(background | zero)
    if not (difference < 0).any():  # a fill below all other values is background everywhere, as 0 is in other images
        outside |= same
    cleaned = voxels.copy(order="K")
    if values.size > faces.size / 2:
        cleaned[zero & ~outside] = _ALMOST_NOTHING
    cleaned[outside] = 0
    count = int(np.count_nonzero(outside & ~zero))
    return Cleaned(voxels=cleaned, sentence=f"the background is {fill:g}, not 0; {count} voxels were taken as 0")


def _mixed_with_fill(difference: _Voxels) -> _Mask:
    """Mask of the voxels in which interpolation mixed brain and fill, at least half of it fill.

    Args:
        difference: difference from the fill value, 0 where the voxel holds the fill.
    """
    inside = difference[_deep(difference != 0)]
    if inside.size < _LEAST_VOXELS:
        return np.zeros(difference.shape, dtype=bool)
    side = np.sign(np.median(inside))
    darkest, middle = np.quantile(side * inside, (_DARKEST, 0.5))
    if darkest <= _GAP * (middle - darkest):
        return np.zeros(difference.shape, dtype=bool)
    near = side * difference <= darkest / 2
    mixed = _connected(near) & (difference != 0)
    return mixed if np.count_nonzero(mixed) > _LEAST_SHARE * np.count_nonzero(difference) else np.zeros_like(mixed)


def _without_residue(voxels: _Voxels) -> Cleaned | None:
    """Set almost-zero residue around a brain to exactly 0."""
    outside = _residue(voxels)
    if not outside.any():
        return None
    removed = voxels[outside]
    cleaned = voxels.copy(order="K")
    cleaned[outside] = 0
    return Cleaned(
        voxels=cleaned,
        sentence=(
            f"the background around the brain is not 0; {removed.size} voxels from {removed.min():.2g} to "
            f"{removed.max():.2g}, where bright tissue has {_bright(voxels[voxels != 0]):.4g}, were taken as 0"
        ),
    )


def _residue(voxels: _Voxels) -> _Mask:
    """Mask of the values that are almost 0 around a brain, and of ringing; empty if there are only a few."""
    nonzero = voxels != 0
    none: _Mask = np.zeros(nonzero.shape, dtype=bool)
    values = voxels[nonzero]
    if not values.size:
        return none
    on_faces = share_of_faces(nonzero) > 0.5
    limit = np.float32((_NEGLIGIBLE_ON_FACES if on_faces else NEGLIGIBLE) * _bright(values))
    size = np.abs(voxels)
    ringing, darkest = _rings(voxels, size > limit, limit)
    outside = _connected(voxels <= limit if ringing else size <= limit) & nonzero
    if np.count_nonzero(outside) <= _LEAST_SHARE * values.size:
        return none
    near = size[outside & (size <= limit)]
    if near.size:
        limit = _reach(near)
    outside = _connected(voxels <= max(limit, np.float32(darkest / 2)) if ringing else size <= limit) & nonzero
    if ringing:
        outside |= _faint_islands(voxels, nonzero & ~outside, darkest)
    left = nonzero & ~outside
    # Change nothing if what remains is air noise around a head, or only a few voxels thousands of times brighter than
    # the brain, because the brain itself would then be removed.
    return none if (on_faces and share_of_faces(left) > 0.5) or not _is_solid(left) else outside


def _rings(voxels: _Voxels, large: _Mask, limit: np.float32) -> tuple[bool, float]:
    """Return whether an image is positive in the brain but has many negative voxels, and its darkest tissue's value."""
    negative = np.count_nonzero(voxels < -limit)
    count = np.count_nonzero(large)
    if not _LEAST_NEGATIVE * count < negative < _MOST_NEGATIVE * count:
        return False, 0.0
    inside = voxels[_deep(large)]
    if inside.size < _LEAST_VOXELS or np.count_nonzero(inside < 0) > _EXCEPTIONS * inside.size:
        return False, 0.0
    return True, max(0.0, float(np.quantile(inside, _DARKEST)))


def _faint_islands(voxels: _Voxels, left: _Mask, darkest: float) -> _Mask:
    """Islands among the remaining voxels that are nowhere brighter than the brain's darkest tissue."""
    numbers, count = ndimage.label(left)
    if not count:
        return np.zeros(left.shape, dtype=bool)
    brightest = np.asarray(ndimage.maximum(voxels, numbers, np.arange(count + 1)))
    faint = brightest < darkest
    faint[0] = False
    return np.asarray(faint[numbers])


def _is_solid(mask: _Mask) -> bool:
    """Whether a mask is compact enough to be a brain."""
    count = int(np.count_nonzero(mask))
    inner = ndimage.binary_erosion(mask, border_value=1)
    return count >= _LEAST_VOXELS and int(np.count_nonzero(inner)) >= _LEAST_SOLID * count


def _deep(mask: _Mask) -> _Mask:
    """The part of a mask that is at least ``_DEPTH_VOXELS`` inside its surface."""
    return np.asarray(ndimage.binary_erosion(mask, iterations=_DEPTH_VOXELS, border_value=1))


def _connected(mask: _Mask) -> _Mask:
    """The marked voxels that are connected to the volume's border through marked voxels."""
    numbers, count = ndimage.label(mask)
    reached = np.zeros(count + 1, dtype=bool)
    for face in _faces(numbers):
        reached[np.unique(face)] = True
    reached[0] = False
    return np.asarray(reached[numbers])


def _reach(found: _Voxels) -> np.float32:
    """Largest distance from the background before the first gap of a factor of 2; dark tissue above the gap is kept."""
    tail = np.sort(found)[int(0.9 * found.size) :]
    gaps = np.flatnonzero(tail[1:] > 2 * tail[:-1])
    return np.float32(tail[gaps[0]] if gaps.size else tail[-1])


def _middle(values: _Voxels) -> np.float32:
    """The lower median, which is always one of the values."""
    return np.float32(np.quantile(values, 0.5, method="lower"))


def share_of_faces(voxels: npt.NDArray[Any]) -> float:
    """Share of the voxels on a volume's six faces that are not 0."""
    faces = _faces(voxels)
    return sum(int(np.count_nonzero(face)) for face in faces) / sum(face.size for face in faces)


def _bright(values: _Voxels) -> float:
    return float(np.quantile(np.abs(values), _BRIGHT, method="higher"))


def _faces(voxels: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    # np.take would copy the whole volume if its memory order is reversed, as in NIfTI files.
    return [np.moveaxis(voxels, axis, 0)[side] for axis in range(3) for side in (0, -1)]


def _corners() -> list[tuple[int, int, int]]:
    return [(x, y, z) for x in (0, -1) for y in (0, -1) for z in (0, -1)]


def _is_corner_filled(voxels: _Voxels) -> bool:
    return any(voxels[corner] != 0 for corner in _corners())
