"""Subsets of contrasts: fifteen subsets, one reference, one presence mask."""

from __future__ import annotations

from itertools import pairwise

import pytest

from data.contrasts import SUBSETS, missing_contrasts, presence_mask, reference_contrast
from data.labels import CONTRASTS


def test_fifteen_distinct_subsets_start_with_the_complete_one() -> None:
    assert len(SUBSETS) == len({frozenset(subset) for subset in SUBSETS}) == 15
    assert SUBSETS[0] == CONTRASTS
    assert all(len(one) >= len(other) for one, other in pairwise(SUBSETS))


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_a_subset_and_its_complement_are_all_contrasts_in_project_order(subset: tuple[str, ...]) -> None:
    lacks = missing_contrasts(subset)  # type: ignore[arg-type]
    assert [c for c in CONTRASTS if c in subset] == list(subset)
    assert [c for c in CONTRASTS if c in lacks] == list(lacks)
    assert {*subset, *lacks} == set(CONTRASTS)


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_the_mask_marks_the_available_contrasts(subset: tuple[str, ...]) -> None:
    mask = presence_mask(set(subset))  # type: ignore[arg-type]
    assert tuple(c for c, there in zip(CONTRASTS, mask, strict=True) if there) == subset


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_the_reference_is_t1c_or_otherwise_the_first_contrast(subset: tuple[str, ...]) -> None:
    assert reference_contrast(set(subset)) == ("t1c" if "t1c" in subset else subset[0])  # type: ignore[arg-type]
