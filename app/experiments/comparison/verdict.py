"""Verdicts in words, which claim no more than the numbers support."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from app.evaluation.statistics import SIGNIFICANCE, Difference

_FEW_SEEDS: Final = 3
_FEW_CASES: Final = 10


def verdict(arm: str, baseline: str, optimizer: str, difference: Difference, *, measure: str = "Dice") -> str:
    """Return one sentence on one arm.

    The sentence says "better" or "worse" only if the interval excludes 0 and the signed-rank test, corrected for the
    number of arms, agrees. Without a test it states the observation and that it proves nothing.

    Args:
        arm: the arm under test.
        baseline: the arm it is compared with.
        optimizer: the optimiser that both were trained with.
        difference: their difference in the mean score, from at least one seed and case.
        measure: name of the score.
    """
    pair = f"{arm} and {baseline}"
    size = f"{_short(abs(difference.mean))} {measure}"
    interval = f"95 % interval {_short(difference.low)} to {_short(difference.high)}"
    if difference.mean == difference.low == difference.high == 0:
        return f"{pair} had the same {measure} in every case under {optimizer}."
    if difference.low <= 0 <= difference.high:
        return (
            f"No difference between {pair} was shown under {optimizer}: {difference.mean:+.3f} {measure}, and the "
            f"{interval} contains 0."
        )
    direction = "better" if difference.mean > 0 else "worse"
    p = difference.p if difference.p_holm is None else difference.p_holm
    if p is None:
        seen = "higher" if difference.mean > 0 else "lower"
        return (
            f"{arm} scored {seen} than {baseline} by {size} ({interval}) under {optimizer}, but there is no "
            f"signed-rank test, {difference.no_test}: a hint, not a proof."
        )
    if p > SIGNIFICANCE:
        return (
            f"No difference between {pair} was shown under {optimizer}: {difference.mean:+.3f} {measure} ({interval}), "
            f"but the signed-rank test gives p {_p(p)}."
        )
    if difference.seeds == 1:
        return (
            f"{arm} was {direction} than {baseline} by {size} ({interval}; signed-rank p {_p(p)}) under {optimizer} "
            "in the one seed that was trained; another seed may give a different result."
        )
    return f"{arm} is {direction} than {baseline} by {size} ({interval}; signed-rank p {_p(p)}) under {optimizer}."


def caveats(
    *, seeds: int, cases: int, tested: bool, at_border: Sequence[str], same_start: bool, backends: Sequence[str]
) -> list[str]:
    """Return the limitations of every verdict of a comparison, one sentence each.

    Args:
        seeds: number of seeds.
        cases: number of scored cases.
        tested: whether the scored cases are test cases; False for validation cases.
        at_border: descriptions of the arms whose best learning rate is the lowest or highest one tried.
        same_start: whether the records show the same initial weights and first batch in every arm.
        backends: descriptions of the backends that computed the scored predictions; only one if all used the same.
    """
    found = []
    if seeds == 1:
        found.append(
            "One seed: it is unknown how much of a difference is due to chance in initial weights and patches."
        )
    elif seeds < _FEW_SEEDS:
        found.append(f"{seeds} seeds are too few to estimate the spread between seeds.")
    if cases < _FEW_CASES:
        noun = "case" if cases == 1 else "cases"
        found.append(f"{cases} scored {noun}: bootstrap intervals from so few cases are too narrow.")
    if not tested:
        found.append(
            "No test cases: the scores are those of the validation cases, on which learning rates and weights "
            "were chosen, and are too high for every arm."
        )
    if at_border:
        found.append(
            f"The best learning rate is the lowest or highest one tried for {', '.join(at_border)}: try more rates."
        )
    if not same_start:
        found.append(
            "The records do not show for every run that its initial weights and first batch were those of its seed."
        )
    if len(backends) > 1:
        found.append(
            f"The scored predictions were computed by different backends ({'; '.join(backends)}), so arms may differ "
            "by rounding."
        )
    return found


def _short(value: float) -> str:
    """Format a number with three decimals, or one significant digit if it would look like 0."""
    return f"{value:.3f}" if value == 0 or abs(value) >= 0.0005 else f"{value:.1g}"


def _p(value: float) -> str:
    return f"= {value:.3f}" if value >= 0.001 else "below 0.001"
