"""From probabilities to masks: what post-processing never does, and what each rule does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from app.experiments.crossval.logits import no_counts
from app.experiments.crossval.out_of_fold import OutOfFoldPrediction, to_bytes
from app.inference.postprocess import Postprocess, postprocess_from_json, without_small_components
from data.labels import from_regions, to_regions

SHAPE = (3, 4, 5, 4)
SPACING = (1.0, 2.0, 1.0)
VOLUMES = st.sampled_from([0.0, 2.0, 3.0, 8.0, 40.0])
RULES = st.builds(
    Postprocess,
    thresholds=st.tuples(*[st.integers(1, 255).map(lambda k: k / 256)] * 3),
    smallest_mm3=st.tuples(VOLUMES, VOLUMES, VOLUMES),
    smallest_share=st.sampled_from([0.0, 0.3, 1.0]),
    fill_core=st.booleans(),
    least_enhancing_mm3=VOLUMES,
)
CENTRED = arrays(np.float32, SHAPE, elements=st.floats(-0.5, 0.5, width=32))
MASKS = arrays(np.bool_, SHAPE)


@settings(deadline=None)
@given(RULES, MASKS)
def test_cleaned_regions_are_nested(rules: Postprocess, masks: Any) -> None:
    whole, core, enhancing = rules.clean(masks, SPACING)
    assert not (enhancing & ~core).any()
    assert not (core & ~whole).any()


@settings(deadline=None)
@given(RULES, MASKS)
def test_cleaning_adds_voxels_only_when_filling_the_core(rules: Postprocess, masks: Any) -> None:
    whole, core, enhancing = rules.clean(masks, SPACING) & ~masks
    assert not whole.any()
    assert rules.fill_core or not core.any()
    assert not enhancing.any()


@settings(deadline=None)
@given(RULES, MASKS)
def test_cleaning_twice_equals_cleaning_once(rules: Postprocess, masks: Any) -> None:
    once = rules.clean(masks, SPACING)
    assert np.array_equal(rules.clean(once, SPACING), once)


@settings(deadline=None)
@given(MASKS)
def test_the_defaults_only_nest_the_regions(masks: Any) -> None:
    assert np.array_equal(Postprocess().clean(masks, SPACING), to_regions(from_regions(masks)))


@settings(deadline=None)
@given(CENTRED)
def test_the_default_threshold_is_one_half(centred: Any) -> None:
    assert np.array_equal(Postprocess().cut(centred), centred > 0)


@settings(deadline=None)
@given(RULES, CENTRED)
def test_stored_bytes_are_thresholded_like_the_probabilities(rules: Postprocess, centred: Any) -> None:
    kept = OutOfFoldPrediction(
        answers=to_bytes(centred),
        reference=np.zeros(SHAPE[1:], np.uint8),
        logit_counts=no_counts(),
        spacing_mm=SPACING,
        weights_sha256="",
    )
    assert np.array_equal(kept.cut(rules), rules.cut(centred))


@given(RULES)
def test_rules_survive_the_round_trip_through_json(rules: Postprocess) -> None:
    assert postprocess_from_json(rules.to_json()) == rules


def line(*voxels: int) -> Any:
    """The same mask for all regions, along one axis."""
    return np.tile(np.array(voxels, dtype=bool).reshape(1, -1, 1, 1), (3, 1, 1, 1))


def test_a_component_that_is_just_large_enough_is_kept() -> None:
    rules = Postprocess(smallest_mm3=(4.0, 0.0, 0.0))
    whole, _, _ = rules.clean(line(1, 0, 1, 1, 0, 1, 1, 1), (0.9999999999, 2.0, 1.0))
    assert whole.ravel().tolist() == [False, False, True, True, False, True, True, True]


def test_voxels_that_share_a_corner_are_one_component() -> None:
    mask = np.zeros((2, 2, 2), dtype=bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert np.array_equal(without_small_components(mask, 2), mask)


def test_components_below_the_fraction_of_the_largest_are_removed() -> None:
    whole, _, _ = Postprocess(smallest_share=0.5).clean(line(1, 0, 1, 1, 0, 1, 1, 1, 1), SPACING)
    assert whole.ravel().tolist() == [False, False, True, True, False, True, True, True, True]


@pytest.fixture
def shell() -> Any:
    """A core with a hole of two voxels, one of which is outside the whole tumour."""
    core = np.ones((3, 3, 4), dtype=bool)
    core[1, 1, 1:3] = False
    whole = np.ones_like(core)
    whole[1, 1, 2] = False
    return np.stack([whole, core, np.zeros_like(core)])


def test_a_hole_in_the_core_is_filled_within_the_tumour(shell: Any) -> None:
    whole, core, enhancing = Postprocess(fill_core=True).clean(shell, SPACING)
    assert np.array_equal(core, shell[0])
    assert np.array_equal(whole, shell[0])
    assert not enhancing.any()


def test_an_open_cavity_is_not_filled(shell: Any) -> None:
    shell[1, 1, 1, 3] = False
    _, core, _ = Postprocess(fill_core=True).clean(shell, SPACING)
    assert np.array_equal(core, shell[1])


def test_rules_of_earlier_versions_are_read() -> None:
    content = Postprocess(smallest_mm3=(10.0, 0.0, 0.0)).to_json()
    del content["smallest_share"], content["fill_core"]
    assert postprocess_from_json(content) == Postprocess(smallest_mm3=(10.0, 0.0, 0.0))


def test_voxels_removed_from_whole_tumour_are_also_removed_from_the_core() -> None:
    assert not Postprocess(smallest_mm3=(5.0, 0.0, 0.0)).clean(line(1, 1), SPACING).any()


@pytest.mark.parametrize(("least", "left"), [(4.0, 2), (4.1, 0)])
def test_too_little_enhancing_tumour_in_total_becomes_core(least: float, left: int) -> None:
    whole, core, enhancing = Postprocess(least_enhancing_mm3=least).clean(line(1, 0, 1), SPACING)
    assert [int(mask.sum()) for mask in (whole, core, enhancing)] == [2, 2, left]


@pytest.mark.parametrize(
    "changes",
    [
        {"thresholds": (0.0, 0.5, 0.5)},
        {"smallest_mm3": (-1.0, 0.0, 0.0)},
        {"least_enhancing_mm3": float("nan")},
        {"smallest_share": 1.1},
    ],
)
def test_invalid_rules_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"above 0|0 or more mm3|0 to 1"):
        Postprocess(**changes)


def test_rules_are_described_in_words() -> None:
    assert Postprocess().sentence() == "none: probabilities are cut at one half"
    rules = Postprocess(thresholds=(0.5, 0.375, 0.5), smallest_mm3=(0, 0, 10.0), least_enhancing_mm3=50.0)
    rules = replace(rules, smallest_share=0.3, fill_core=True)
    assert rules.sentence() == (
        "TC above 0.375; ET components of 10 mm3 or more; WT components of 30% of the largest or more; "
        "what TC encloses is TC; enhancing tumour below 50 mm3 is necrosis"
    )
