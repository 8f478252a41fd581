"""Lesions of a region: join components by dilation, drop small ones, and merge those that touch the same lesion."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Mask = npt.NDArray[np.bool_]
Numbers = npt.NDArray[np.int32]

_NEIGHBOURS_26: Final = ndimage.generate_binary_structure(3, 3)
_STEPS_18: Final = tuple(s for s in itertools.product((-1, 0, 1), repeat=3) if 0 < sum(map(abs, s)) <= 2)


@dataclass(frozen=True, kw_only=True)
class Lesions:
    """Numbered lesions of one region of one label map."""

    numbers: Numbers
    """Lesion number of each voxel of the region, 0 elsewhere, shape (X, Y, Z)."""
    grown: Numbers
    """The same for the dilated lesions; voxels of the region have the same number in both."""

    @property
    def most(self) -> int:
        """The highest lesion number, 0 without lesions; lower numbers may be unused."""
        return int(self.numbers.max(initial=0))

    def renumbered(self, table: Numbers) -> Lesions:
        """Replace each lesion number n by ``table[n]``; 0 removes the lesion."""
        return Lesions(numbers=table[self.numbers], grown=table[self.grown])


def components(mask: Mask) -> Lesions:
    """Return the 26-connected components of a mask, without joining any.

    Args:
        mask: shape (X, Y, Z).
    """
    numbers = np.asarray(ndimage.label(mask, _NEIGHBOURS_26)[0], dtype=np.int32)
    return Lesions(numbers=numbers, grown=numbers)


def joined_components(mask: Mask, dilation: int) -> Lesions:
    """Return components, joined if they touch after dilation, numbered by their first dilated voxel in C order.

    Args:
        mask: shape (X, Y, Z).
        dilation: number of 18-neighbour dilation steps.
    """
    grown = components(dilated(mask, dilation)).numbers
    return Lesions(numbers=np.where(mask, grown, np.int32(0)), grown=grown)


def dilated(mask: Mask, steps: int) -> Mask:
    """Dilate a mask ``steps`` times by the 18 neighbours of each voxel; voxels beyond the grid count as background.

    The neighbourhood is the union of three squares, one perpendicular to each axis, and a square is a step along one of
    its axes followed by a step along the other. That takes ten passes over bytes, where scipy's ``binary_dilation``
    visits 19 voxels for each voxel.

    Args:
        mask: shape (X, Y, Z).
        steps: number of steps, 0 or more.
    """
    for _ in range(steps):
        rows = [_spread(mask, axis) for axis in (0, 1)]
        mask = _spread(rows[0], 1)
        for row in rows:
            _spread(row, 2, into=mask)
    return mask


def _spread(mask: Mask, axis: int, *, into: Mask | None = None) -> Mask:
    """Dilate a mask by one voxel along an axis; add the result to ``into`` if that is given."""
    out = mask.copy() if into is None else into
    if into is not None:
        out |= mask
    after, before = [slice(None)] * 3, [slice(None)] * 3
    after[axis], before[axis] = slice(1, None), slice(None, -1)
    out[tuple(after)] |= mask[tuple(before)]
    out[tuple(before)] |= mask[tuple(after)]
    return out


def without_small_lesions(lesions: Lesions, most_voxels: float) -> Lesions:
    """Remove lesions of ``most_voxels`` voxels or fewer; the others keep their numbers."""
    sizes = np.bincount(lesions.numbers.ravel())
    table = np.arange(len(sizes), dtype=np.int32)
    table[sizes <= most_voxels] = 0
    return lesions.renumbered(table)


def joined_by(lesions: Lesions, other: Lesions) -> Lesions:
    """Merge lesions that touch the same lesion of another region, as the scripts of 2024 do.

    Of several lesions that a lesion touches, only the lowest-numbered one counts. Nothing changes if only one pair
    touches. Lesions that touch get new numbers above the existing ones.

    Args:
        lesions: lesions of one region.
        other: lesions of the other region, on the same grid.
    """
    pairs = touching(lesions.numbers, other.numbers)
    if len(pairs) <= 1:
        return lesions
    table = np.arange(lesions.most + 1, dtype=np.int32)
    new = {common: lesions.most + 1 + place for place, common in enumerate(dict.fromkeys(c for _, c in pairs))}
    for number, common in reversed(pairs):
        table[number] = new[common]
    return lesions.renumbered(table)


def counted(lesions: Lesions) -> Lesions:
    """Renumber lesions consecutively from 1, keeping their order."""
    used = np.flatnonzero(np.bincount(lesions.numbers.ravel()))
    table = np.zeros(lesions.most + 1, dtype=np.int32)
    table[used] = np.arange(len(used)) + (used[0] != 0)
    return lesions.renumbered(table)


def touching(first: Numbers, second: Numbers) -> list[tuple[int, int]]:
    """Return the sorted pairs of lesions that touch, that is, have voxels that are 18-neighbours.

    Args:
        first: lesion numbers, shape (X, Y, Z), 0 for background.
        second: lesion numbers of the same shape; no voxel is a lesion in both.
    """
    near = dilated(second > 0, 1) & (first > 0)
    places, padded = np.argwhere(near), np.pad(second, 1)
    numbers = first[near]
    found: set[tuple[int, int]] = set()
    for step in _STEPS_18:
        x, y, z = (places + 1 + np.array(step)).T
        neighbours = padded[x, y, z]
        found |= set(zip(numbers[neighbours > 0].tolist(), neighbours[neighbours > 0].tolist(), strict=True))
    return sorted(found)
