"""Lesions of a region: components joined by dilation, small ones dropped, touching ones made one."""

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
    """The numbered lesions of one region of one label map."""

    numbers: Numbers
    """Number of the lesion at each voxel of the region, 0 elsewhere, shape (X, Y, Z)."""
    grown: Numbers
    """The same for the dilated lesions; a voxel of the region has the same number in both."""

    @property
    def most(self) -> int:
        """The highest number, 0 without a lesion; numbers may be missing below it."""
        return int(self.numbers.max(initial=0))

    def renumbered(self, table: Numbers) -> Lesions:
        """The lesions with ``table[n]`` for number n; 0 takes a lesion away."""
        return Lesions(numbers=table[self.numbers], grown=table[self.grown])


def components(mask: Mask) -> Lesions:
    """26-connected components, each as it is.

    Args:
        mask: shape (X, Y, Z).
    """
    numbers = np.asarray(ndimage.label(mask, _NEIGHBOURS_26)[0], dtype=np.int32)
    return Lesions(numbers=numbers, grown=numbers)


def joined_components(mask: Mask, dilation: int) -> Lesions:
    """Components that touch after dilation are one; numbered by their first dilated voxel in C order.

    Args:
        mask: shape (X, Y, Z).
        dilation: steps with 18 neighbours.
    """
    grown = components(dilated(mask, dilation)).numbers
    return Lesions(numbers=np.where(mask, grown, np.int32(0)), grown=grown)


def dilated(mask: Mask, steps: int) -> Mask:
    """The mask and, ``steps`` times over, the 18 neighbours of each of its voxels; outside of it is nothing.

    The neighbourhood is three squares, one across each axis, and a square is a step along one of its axes after a step
    along the other: ten passes over bytes, where scipy's ``binary_dilation`` visits 19 neighbours of each voxel.

    Args:
        mask: shape (X, Y, Z).
        steps: 0 or more.
    """
    for _ in range(steps):
        rows = [_spread(mask, axis) for axis in (0, 1)]
        mask = _spread(rows[0], 1)
        for row in rows:
            _spread(row, 2, into=mask)
    return mask


def _spread(mask: Mask, axis: int, *, into: Mask | None = None) -> Mask:
    """The voxels of a mask and those beside them along an axis, added to ``into`` where one is given."""
    out = mask.copy() if into is None else into
    if into is not None:
        out |= mask
    after, before = [slice(None)] * 3, [slice(None)] * 3
    after[axis], before[axis] = slice(1, None), slice(None, -1)
    out[tuple(after)] |= mask[tuple(before)]
    out[tuple(before)] |= mask[tuple(after)]
    return out


def without_small_lesions(lesions: Lesions, most_voxels: float) -> Lesions:
    """Lesions of more voxels than ``most_voxels``; the others keep their numbers."""
    sizes = np.bincount(lesions.numbers.ravel())
    table = np.arange(len(sizes), dtype=np.int32)
    table[sizes <= most_voxels] = 0
    return lesions.renumbered(table)


def joined_by(lesions: Lesions, other: Lesions) -> Lesions:
    """Make lesions one that touch the same lesion of another region, as the scripts of 2024 do.

    A lesion that touches several counts with the one of the lowest number alone, and nothing happens where only one
    pair touches. What touched has new numbers, above those that were there.

    Args:
        lesions: of one region.
        other: of the other, on the same grid.
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
    """The lesions numbered 1, 2, 3 in the order of their numbers."""
    there = np.flatnonzero(np.bincount(lesions.numbers.ravel()))
    table = np.zeros(lesions.most + 1, dtype=np.int32)
    table[there] = np.arange(len(there)) + (there[0] != 0)
    return lesions.renumbered(table)


def touching(first: Numbers, second: Numbers) -> list[tuple[int, int]]:
    """Pairs of numbers of which a voxel of the first is one of the 18 neighbours of a voxel of the second, sorted.

    Args:
        first: shape (X, Y, Z), 0 where there is nothing.
        second: same shape, with no voxel in common.
    """
    near = dilated(second > 0, 1) & (first > 0)
    places, padded = np.argwhere(near), np.pad(second, 1)
    numbers = first[near]
    found: set[tuple[int, int]] = set()
    for step in _STEPS_18:
        x, y, z = (places + 1 + np.array(step)).T
        beside = padded[x, y, z]
        found |= set(zip(numbers[beside > 0].tolist(), beside[beside > 0].tolist(), strict=True))
    return sorted(found)
