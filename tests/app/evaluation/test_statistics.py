"""Paired differences: the interval, the signed-rank test, Holm's correction, and the verdicts that follow from them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from app.evaluation.statistics import (
    Difference,
    bootstrap_interval,
    first_step_at,
    holm,
    paired_difference,
    signed_rank,
    spread,
)
from app.experiments.comparison.verdict import caveats, verdict

SCORES = arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.floats(0, 1))
P = st.one_of(st.none(), st.floats(0, 1))


# Statistics


@given(SCORES)
def test_an_arm_does_not_differ_from_itself(scores: np.ndarray) -> None:
    difference = paired_difference(scores, scores, resamples=50)
    assert (difference.mean, difference.low, difference.high, difference.p) == (0, 0, 0, None)


@given(SCORES)
def test_the_interval_is_within_the_range_of_the_values(values: np.ndarray) -> None:
    low, high = bootstrap_interval(values, resamples=50)
    assert values.min() - 1e-9 <= low <= high <= values.max() + 1e-9


@given(SCORES, st.floats(-1, 1))
def test_adding_a_constant_shifts_the_interval_by_it(values: np.ndarray, constant: float) -> None:
    before, after = bootstrap_interval(values, resamples=50), bootstrap_interval(values + constant, resamples=50)
    np.testing.assert_allclose(np.array(after) - before, constant, atol=1e-9)


def test_the_interval_is_reproducible() -> None:
    values = np.random.default_rng(0).normal(size=(3, 10))
    assert bootstrap_interval(values) == bootstrap_interval(values)


def test_with_many_cases_the_interval_approaches_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, size=(1, 400))
    low, high = bootstrap_interval(values)
    expected = 1.96 * values.std() / np.sqrt(400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.05)


def test_the_interval_includes_the_spread_between_seeds() -> None:
    by_seed = np.repeat([[0.0], [1.0]], 50, axis=1)
    assert bootstrap_interval(by_seed) == (0.0, 1.0)


def test_swapping_the_arms_flips_the_sign() -> None:
    one, other = np.random.default_rng(2).random((2, 2, 8))
    forth, back = paired_difference(one, other), paired_difference(other, one)
    assert forth.mean == pytest.approx(-back.mean)
    assert forth.p == back.p


def test_arrays_of_different_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        paired_difference(np.zeros((2, 3)), np.zeros((2, 4)))


def test_the_signed_rank_test_of_six_equal_signs_is_exact() -> None:
    assert signed_rank(np.arange(1.0, 7.0)) == (pytest.approx(2 / 2**6), "")


@pytest.mark.parametrize(
    ("differences", "said"),
    [
        ([0.0] * 8, "every difference is 0"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], "too few cases for a test (5; 6 are needed)"),
        ([0.0, 0.0, 0.0, 1.0, 2.0, 3.0], "too few cases that differ for a test (3; 6 are needed)"),
    ],
)
def test_with_too_few_cases_no_test_is_made_and_the_reason_is_given(differences: list[float], said: str) -> None:
    assert signed_rank(np.array(differences)) == (None, said)


def test_the_test_handles_tied_differences() -> None:
    p, said = signed_rank(np.array([0.1] * 10))
    assert p is not None
    assert (p < 0.05, said) == (True, "")


@given(st.lists(P, max_size=6))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p: list[float | None]) -> None:
    pairs = [(before, after) for before, after in zip(p, holm(p), strict=True) if before is not None]
    assert all(after is not None and before <= after <= 1 for before, after in pairs)
    assert [after for _, after in sorted(pairs)] == sorted(after for _, after in pairs)  # type: ignore[type-var]


def test_holm_multiplies_the_lowest_p_value_by_the_number_of_tests() -> None:
    assert holm([0.03, 0.01, None, 0.02]) == [pytest.approx(0.04), 0.03, None, pytest.approx(0.04)]


def test_the_spread_of_one_value_is_unknown() -> None:
    assert (spread([0.5]), spread([0.0, 2.0])) == (None, pytest.approx(2**0.5))


def test_a_dice_that_is_never_reached_has_no_step() -> None:
    assert first_step_at([10, 20], [0.1, float("nan")], 0.5) is None


# Words

BETTER = Difference(mean=0.021, low=0.004, high=0.038, cases=12, seeds=3, p=0.01, p_holm=0.02)


def words(**changes: object) -> str:
    """The verdict on znorm against clip under adamw, for a change of BETTER."""
    return verdict("znorm", "clip", "adamw", dataclasses.replace(BETTER, **changes))  # type: ignore[arg-type]


def test_the_verdict_better_states_size_interval_and_p_value() -> None:
    assert words() == (
        "znorm is better than clip by 0.021 Dice (95 % interval 0.004 to 0.038; signed-rank p = 0.020) under adamw."
    )


def test_the_verdict_worse_states_them_too() -> None:
    said = words(mean=-0.021, low=-0.038, high=-0.004)
    assert said.startswith("znorm is worse than clip by 0.021 Dice (95 % interval -0.038 to -0.004;")


def test_an_interval_with_0_shows_no_difference_even_if_the_test_does() -> None:
    said = words(low=-0.004)
    assert said.startswith("No difference between znorm and clip was shown under adamw")
    assert "contains 0" in said


def test_without_significance_no_difference_is_claimed() -> None:
    assert "was shown under adamw: +0.021 Dice" in words(p=0.03, p_holm=0.06)


def test_without_a_test_the_verdict_is_only_a_hint() -> None:
    said = words(p=None, p_holm=None, cases=3, no_test="too few cases for a test (3; 6 are needed)")
    assert said.startswith("znorm scored higher than clip by 0.021 Dice")
    assert said.endswith("too few cases for a test (3; 6 are needed): a hint, not a proof.")


def test_results_of_one_seed_are_stated_in_the_past_tense() -> None:
    assert "was better" in words(seeds=1)
    assert "in the one seed that was trained" in words(seeds=1)


def test_equal_scores_are_called_the_same() -> None:
    same = words(mean=0.0, low=0.0, high=0.0, p=None)
    assert same == "znorm and clip had the same Dice in every case under adamw."


def test_a_limit_close_to_0_is_not_rounded_to_0() -> None:
    assert "0.0002 to 0.038" in words(low=0.0002)


@given(
    st.tuples(*[st.floats(-1, 1)] * 3).map(sorted),
    P,
    st.integers(1, 5),
)
def test_better_and_worse_need_interval_and_test(ends: list[float], p: float | None, seeds: int) -> None:
    low, mean, high = ends
    said = words(low=low, mean=mean, high=high, p=p, p_holm=p, seeds=seeds)
    strong = " better than " in said or " worse than " in said
    assert strong == ((low > 0 or high < 0) and p is not None and p <= 0.05)


def test_a_comparison_with_enough_of_everything_has_no_caveat() -> None:
    assert caveats(seeds=3, cases=10, tested=True, at_border=[], same_start=True, backends=["torch"]) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": 1}, "One seed"),
        ({"seeds": 2}, "2 seeds"),
        ({"cases": 4}, "4 scored cases"),
        ({"tested": False}, "No test cases"),
        (
            {"at_border": ["znorm under adamw (0.01)"]},
            "is the lowest or highest one tried for znorm under adamw (0.01)",
        ),
        ({"same_start": False}, "do not show"),
        ({"backends": ["torch", "openvino"]}, "computed by different backends (torch; openvino)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_limitation_is_stated(change: dict[str, object], said: str) -> None:
    enough = {"seeds": 3, "cases": 10, "tested": True, "at_border": [], "same_start": True, "backends": ["torch"]}
    sentences = caveats(**{**enough, **change})  # type: ignore[arg-type]
    assert len(sentences) == 1
    assert said in sentences[0]
