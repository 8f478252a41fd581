"""What lies around a brain and is not 0: rings of interpolation, what denoising left, a fill such as -1024.

Everything else in this program takes 0 for background and any other number for brain, so images are brought to that
once, as they are read. MR intensities have no unit; "almost 0" is measured against the image's own bright tissue.

Only what is connected with the volume's border is background: values near 0 inside of a brain, as z-scored images and
dark fluid have, stay. And a few dark voxels on a brain's rim are no sign of anything: unless there are many, nothing is
changed, and an image whose background is 0 already is given back as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

#: Bright tissue: this quantile of the magnitudes that are not 0. Single hot voxels lie above it.
_BRIGHT: Final = 0.99
#: Below this share of bright tissue nothing was measured: a signal is at best some hundred times its noise. Where the
#: volume's faces are 0, so that the brain was cut out already, ...
NEGLIGIBLE: Final = 5e-3
#: ... and where they are not: noise in the air around a head is above it, so a head is not taken for a brain.
_NEGLIGIBLE_ON_FACES: Final = 1e-3
#: What is not 0 and negligible counts from this share of all that is not 0. Sixteen real cases have up to 0.2 % within
#: :data:`NEGLIGIBLE`, dark voxels of the rim; a shell one voxel thick has 5 %.
_LEAST_SHARE: Final = 0.02
#: A look at a part of the voxels may see less of it.
_LEAST_SEEN: Final = 0.01
#: Negative voxels of an image that is otherwise positive are rings from this share on; magnitudes have none.
_LEAST_NEGATIVE: Final = 0.01
#: Negative voxels of an image that is otherwise positive: more than these are there on purpose, as after z-scoring.
_MOST_NEGATIVE: Final = 0.3
#: Inside of a brain, so many values on the other side of the background are exceptions.
_EXCEPTIONS: Final = 0.005
#: The quantile of the values inside of a brain that stands for its darkest tissue.
_DARKEST: Final = 0.005
#: Interpolation mixes brain and background over so many voxels; what lies deeper is pure.
_DEPTH_VOXELS: Final = 4
#: Fewer voxels than this say nothing.
_LEAST_VOXELS: Final = 1000
#: A brain is no scatter of voxels: at least so much of it is left when its outermost voxels are taken off.
_LEAST_SOLID: Final = 0.3
#: A fill takes this share of the volume's faces at the least, besides a corner.
_LEAST_FILL: Final = 0.01
#: Where the darkest tissue is farther from a fill than this many times its distance from the middle of the brain's
#: values, nothing but a mixture of both lies half-way.
_GAP: Final = 1.5
#: Every fourth voxel along each axis is looked at first; of volumes with fewer voxels than this, all.
_STEP: Final = 4
_SMALL_VOXELS: Final = 100_000
#: Stands for the value 0 where 0 is not the background.
_ALMOST_NOTHING: Final = np.float32(1e-30)

_Voxels = npt.NDArray[np.float32]
_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """An image whose background is 0 now."""

    voxels: _Voxels
    """Same shape; the brain's values as they were."""
    sentence: str
    """What was background and not 0, and that it was taken as 0; without a full stop."""


def clean_background(voxels: _Voxels) -> Cleaned | None:
    """Set to 0 what is background and is not 0.

    Args:
        voxels: one contrast, finite, shape (X, Y, Z), any memory order; left as they are.

    Returns:
        a copy with the background at 0; None where it is 0 already, or where it cannot be told from the image.

    Example:
        >>> image = np.full((20, 20, 20), -1024, dtype=np.float32)
        >>> image[5:15, 5:15, 5:15] = np.linspace(100, 900, 10)
        >>> cleaned = clean_background(image)
        >>> cleaned.sentence, float(cleaned.voxels.min())
        ('the background is -1024, not 0; 7000 voxels were taken as 0', 0.0)
    """
    if not _may_have_one(voxels):
        return None
    # Differences of the largest float32 overflow; what comes of that is no background.
    with np.errstate(all="ignore"):
        filled = _without_fill(voxels)
        residue = _without_residue(voxels if filled is None else filled.voxels)
    if filled is None or residue is None:
        return filled or residue
    return Cleaned(voxels=residue.voxels, sentence=f"{filled.sentence}; {residue.sentence}")


def _may_have_one(voxels: _Voxels) -> bool:
    """Whether a part of the voxels shows anything unusual; costs a tenth of reading the file."""
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
    # In z-scored images values about 0 are as frequent as those near them.
    return bool(near - around / 4 > few or few < negative < _MOST_NEGATIVE * values.size)


def _without_fill(voxels: _Voxels) -> Cleaned | None:
    """Take a constant that fills a corner and much of what is not 0 on the faces for background."""
    faces = np.concatenate([face.ravel() for face in _faces(voxels)])
    values = faces[faces != 0]
    if values.size <= _LEAST_FILL * faces.size:
        return None
    fill = _middle(values)
    apart = voxels - fill
    others = apart[(apart != 0) & (voxels != 0)]
    if not others.size:
        return None
    tolerance = np.float32(_NEGLIGIBLE_ON_FACES * _bright(others))
    if abs(fill) <= tolerance or np.count_nonzero(np.abs(values - fill) <= tolerance) <= values.size / 2:
        return None
    off = np.abs(apart)
    same = off <= _reach(off[_connected(off <= tolerance)])
    apart[same] = 0
    if not any(same[corner] for corner in _corners()) or not _is_solid(apart != 0):
        return None
    background = same | _mixed_with_fill(apart) | _residue(apart)
    zero = voxels == 0
    outside = _connected(background | zero)
    if not (apart < 0).any():  # as 0 elsewhere, the least value is background wherever it is
        outside |= same
    cleaned = voxels.copy(order="K")
    if values.size > faces.size / 2:
        cleaned[zero & ~outside] = _ALMOST_NOTHING
    cleaned[outside] = 0
    count = int(np.count_nonzero(outside & ~zero))
    return Cleaned(voxels=cleaned, sentence=f"the background is {fill:g}, not 0; {count} voxels were taken as 0")


def _mixed_with_fill(apart: _Voxels) -> _Mask:
    """Voxels that interpolation mixed from brain and fill, at least half of it fill.

    Args:
        apart: differences from the fill, 0 where there is nothing else.
    """
    inside = apart[_deep(apart != 0)]
    if inside.size < _LEAST_VOXELS:
        return np.zeros(apart.shape, dtype=bool)
    side = np.sign(np.median(inside))
    darkest, middle = np.quantile(side * inside, (_DARKEST, 0.5))
    if darkest <= _GAP * (middle - darkest):
        return np.zeros(apart.shape, dtype=bool)
    near = side * apart <= darkest / 2
    mixed = _connected(near) & (apart != 0)
    return mixed if np.count_nonzero(mixed) > _LEAST_SHARE * np.count_nonzero(apart) else np.zeros_like(mixed)


def _without_residue(voxels: _Voxels) -> Cleaned | None:
    """Take for background what is almost 0 around a brain."""
    outside = _residue(voxels)
    if not outside.any():
        return None
    gone = voxels[outside]
    cleaned = voxels.copy(order="K")
    cleaned[outside] = 0
    return Cleaned(
        voxels=cleaned,
        sentence=(
            f"the background around the brain is not 0; {gone.size} voxels from {gone.min():.2g} to {gone.max():.2g}, "
            f"where bright tissue has {_bright(voxels[voxels != 0]):.4g}, were taken as 0"
        ),
    )


def _residue(voxels: _Voxels) -> _Mask:
    """What is almost 0 around a brain, and rings of interpolation; nothing where there is little of it."""
    there = voxels != 0
    none: _Mask = np.zeros(there.shape, dtype=bool)
    values = voxels[there]
    if not values.size:
        return none
    on_faces = _share_of_faces(there) > 0.5
    limit = np.float32((_NEGLIGIBLE_ON_FACES if on_faces else NEGLIGIBLE) * _bright(values))
    size = np.abs(voxels)
    ringing, darkest = _rings(voxels, size > limit, limit)
    outside = _connected(voxels <= limit if ringing else size <= limit) & there
    if np.count_nonzero(outside) <= _LEAST_SHARE * values.size:
        return none
    near = size[outside & (size <= limit)]
    if near.size:
        limit = _reach(near)
    outside = _connected(voxels <= max(limit, np.float32(darkest / 2)) if ringing else size <= limit) & there
    if ringing:
        outside |= _faint_islands(voxels, there & ~outside, darkest)
    left = there & ~outside
    # Noise in the air around a head, of which a part is small, is not what lies around a brain; and where a few voxels
    # are thousands of times as bright as the brain, it is not the brain that goes.
    return none if (on_faces and _share_of_faces(left) > 0.5) or not _is_solid(left) else outside


def _rings(voxels: _Voxels, large: _Mask, limit: np.float32) -> tuple[bool, float]:
    """Whether an image that is positive inside of the brain is negative at many places, and its darkest tissue."""
    negative = np.count_nonzero(voxels < -limit)
    count = np.count_nonzero(large)
    if not _LEAST_NEGATIVE * count < negative < _MOST_NEGATIVE * count:
        return False, 0.0
    inside = voxels[_deep(large)]
    if inside.size < _LEAST_VOXELS or np.count_nonzero(inside < 0) > _EXCEPTIONS * inside.size:
        return False, 0.0
    return True, max(0.0, float(np.quantile(inside, _DARKEST)))


def _faint_islands(voxels: _Voxels, left: _Mask, darkest: float) -> _Mask:
    """Pieces of what is left, apart from the brain and nowhere brighter than its darkest tissue."""
    numbers, count = ndimage.label(left)
    if not count:
        return np.zeros(left.shape, dtype=bool)
    brightest = np.asarray(ndimage.maximum(voxels, numbers, np.arange(count + 1)))
    faint = brightest < darkest
    faint[0] = False
    return np.asarray(faint[numbers])


def _is_solid(mask: _Mask) -> bool:
    """Whether a mask may be a brain."""
    count = int(np.count_nonzero(mask))
    inner = ndimage.binary_erosion(mask, border_value=1)
    return count >= _LEAST_VOXELS and int(np.count_nonzero(inner)) >= _LEAST_SOLID * count


def _deep(mask: _Mask) -> _Mask:
    """What lies some voxels inside of a mask."""
    return np.asarray(ndimage.binary_erosion(mask, iterations=_DEPTH_VOXELS, border_value=1))


def _connected(mask: _Mask) -> _Mask:
    """The marked voxels that marked neighbours connect with the volume's border."""
    numbers, count = ndimage.label(mask)
    reached = np.zeros(count + 1, dtype=bool)
    for face in _faces(numbers):
        reached[np.unique(face)] = True
    reached[0] = False
    return np.asarray(reached[numbers])


def _reach(found: _Voxels) -> np.float32:
    """How far distances from the background go, up to a gap of a factor of 2: dark tissue beyond is spared."""
    tail = np.sort(found)[int(0.9 * found.size) :]
    gaps = np.flatnonzero(tail[1:] > 2 * tail[:-1])
    return np.float32(tail[gaps[0]] if gaps.size else tail[-1])


def _middle(values: _Voxels) -> np.float32:
    """The median, one of the values."""
    return np.float32(np.quantile(values, 0.5, method="lower"))


def _share_of_faces(mask: _Mask) -> float:
    faces = _faces(mask)
    return sum(int(np.count_nonzero(face)) for face in faces) / sum(face.size for face in faces)


def _bright(values: _Voxels) -> float:
    return float(np.quantile(np.abs(values), _BRIGHT, method="higher"))


def _faces(voxels: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    # Not np.take, which copies the whole volume where its memory runs the other way, as in NIfTI files.
    return [np.moveaxis(voxels, axis, 0)[side] for axis in range(3) for side in (0, -1)]


def _corners() -> list[tuple[int, int, int]]:
    return [(x, y, z) for x in (0, -1) for y in (0, -1) for z in (0, -1)]


def _is_corner_filled(voxels: _Voxels) -> bool:
    return any(voxels[corner] != 0 for corner in _corners())
