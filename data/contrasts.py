"""Which contrasts of a case are there: the subsets a network may be given, and what stands in for the rest."""

from __future__ import annotations

from collections.abc import Collection
from itertools import combinations
from typing import Final

from data.labels import CONTRASTS, Contrast

#: The fifteen non-empty subsets, the complete one first, then by size; each in project order.
SUBSETS: Final[tuple[tuple[Contrast, ...], ...]] = tuple(
    subset for size in range(len(CONTRASTS), 0, -1) for subset in combinations(CONTRASTS, size)
)

#: The contrast whose file lends its grid and header to a label map, where it is there.
_PREFERRED: Final[Contrast] = "t1c"


def reference_contrast(present: Collection[Contrast]) -> Contrast:
    """The contrast on whose grid a case is worked on: T1c, or the first in project order where it is missing.

    Args:
        present: at least one contrast, in any order.

    Example:
        >>> reference_contrast({"flair", "t2"})
        't2'
    """
    return _PREFERRED if _PREFERRED in present else next(c for c in CONTRASTS if c in present)


def missing_contrasts(present: Collection[Contrast]) -> tuple[Contrast, ...]:
    """The contrasts that are not there, in project order.

    Example:
        >>> missing_contrasts(["t1", "t1c", "t2"])
        ('flair',)
    """
    return tuple(contrast for contrast in CONTRASTS if contrast not in present)


def presence_mask(present: Collection[Contrast]) -> tuple[bool, ...]:
    """One truth value a contrast, in project order.

    Example:
        >>> presence_mask({"flair", "t1"})
        (True, False, False, True)
    """
    return tuple(contrast in present for contrast in CONTRASTS)
