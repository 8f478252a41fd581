"""The contrasts of a case: the possible subsets, the reference contrast, and the presence mask."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from typing import Final

from data.labels import CONTRASTS, Contrast

#: The fifteen non-empty subsets, largest first; the contrasts of each in project order.
SUBSETS: Final[tuple[tuple[Contrast, ...], ...]] = tuple(
    subset for size in range(len(CONTRASTS), 0, -1) for subset in combinations(CONTRASTS, size)
)

#: Label maps take their grid and header from this contrast's file, if the case has it.
_PREFERRED: Final[Contrast] = "t1c"


def reference_contrast(present: Collection[Contrast]) -> Contrast:
    """The contrast whose grid a case is processed on: T1c, or else the first one present in project order.

    Args:
        present: at least one contrast, in any order.

    Example:
        >>> reference_contrast({"flair", "t2"})
        't2'
    """
    return _PREFERRED if _PREFERRED in present else next(c for c in CONTRASTS if c in present)


def missing_contrasts(present: Collection[Contrast]) -> tuple[Contrast, ...]:
    """The contrasts that are not present, in project order.

    Example:
        >>> missing_contrasts(["t1", "t1c", "t2"])
        ('flair',)
    """
    return tuple(contrast for contrast in CONTRASTS if contrast not in present)


def presence_mask(present: Collection[Contrast]) -> tuple[bool, ...]:
    """One boolean per contrast, in project order.

    Example:
        >>> presence_mask({"flair", "t1"})
        (True, False, False, True)
    """
    return tuple(contrast in present for contrast in CONTRASTS)
