"""Paired differences between arms: bootstrap interval, signed-rank test, correction for multiple tests.

Pure functions of arrays. The cases are the independent units: differences are averaged over seeds before the test. The
bootstrap draws both cases and seeds with replacement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import stats

FloatArray = npt.NDArray[np.float64]

#: With fewer differing cases, a two-sided signed-rank test cannot reach 0.05: for five, 2 / 2^5 is 0.0625.
LEAST_CASES: Final = 6
RESAMPLES: Final = 10_000
CONFIDENCE: Final = 0.95
SIGNIFICANCE: Final = 0.05


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean paired difference of one arm from the baseline; positive if the arm is better."""

    mean: float
    low: float
    """Lower end of the bootstrap interval."""
    high: float
    cases: int
    seeds: int
    p: float | None
    """Two-sided signed-rank test over cases; None if it is not possible."""
    p_holm: float | None = None
    """``p`` corrected for the other arms under the same optimiser."""
    no_test: str = ""
    """Reason why there is no ``p``; otherwise empty."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def paired_difference(arm: FloatArray, baseline: FloatArray, *, resamples: int = RESAMPLES) -> Difference:
    """Compare two arms on the same seeds and cases.

    Args:
        arm: scores, shape (seeds, cases).
        baseline: scores of the other arm, same shape and order.
        resamples: number of bootstrap resamples, default 10,000.

    Returns:
        the mean of ``arm - baseline`` with its 95 % interval and the signed-rank test; ``p_holm`` is left for
        :func:`holm`.

    Raises:
        ValueError: the shapes differ, or there is no seed or no case.
    """
    if arm.shape != baseline.shape or arm.ndim != 2 or not arm.size:
        raise ValueError(f"expected two arrays of one shape (seeds, cases), got {arm.shape} and {baseline.shape}")
    difference = arm - baseline
    low, high = bootstrap_interval(difference, resamples=resamples)
    p, no_test = signed_rank(difference.mean(axis=0))
    seeds, cases = difference.shape
    return Difference(mean=float(difference.mean()), low=low, high=high, cases=cases, seeds=seeds, p=p, no_test=no_test)


def bootstrap_interval(values: FloatArray, *, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean; rows and columns are independently drawn with replacement.

    Args:
        values: shape (seeds, cases).
        resamples: number of resamples; the same input gives the same interval.

    Source: Owen, "The pigeonhole bootstrap", Annals of Applied Statistics 1 (2007), arXiv 0712.1111, for resampling
    both axes. With few rows or columns the interval is too narrow, like that of every percentile bootstrap.
    """
    rng = np.random.default_rng(0)
    seeds, cases = values.shape
    of_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    of_cases = rng.multinomial(cases, np.full(cases, 1 / cases), size=resamples) / cases
    means = np.einsum("rs,sc,rc->r", of_seeds, values, of_cases, optimize=True)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(means, [tail, 100 - tail])
    # Rounded, so that a sum that should be 0 but is 1e-17 does not decide a verdict.
    return round(float(low), 12), round(float(high), 12)


def signed_rank(differences: FloatArray) -> tuple[float | None, str]:
    """Perform a two-sided Wilcoxon signed-rank test.

    Args:
        differences: one difference per case, shape (cases,); zeros are left out, as Wilcoxon did.

    Returns:
        p and an empty text, or None and the reason why there is no test.
    """
    nonzero = differences[differences != 0]
    if not len(nonzero):
        return None, "every difference is 0"
    if len(nonzero) < LEAST_CASES:
        which = "too few cases" if len(nonzero) == len(differences) else "too few cases that differ"
        return None, f"{which} for a test ({len(nonzero)}; {LEAST_CASES} are needed)"
    return float(stats.wilcoxon(nonzero).pvalue), ""


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Apply Holm's correction to the p values of one family; None stays None and does not count.

    Example:
        >>> holm([0.01, None, 0.04])
        [0.02, None, 0.04]

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Statistics 6 (1979).
    """
    corrected: list[float | None] = [None] * len(p)
    tested = sorted((value, place) for place, value in enumerate(p) if value is not None)
    largest = 0.0
    for rank, (value, place) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * value))
        corrected[place] = largest
    return corrected


def spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation of a sample; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def first_step_at(steps: Sequence[int], dice: Sequence[float], target: float) -> int | None:
    """Return the first step whose validation reached a target Dice, or None.

    Example:
        >>> first_step_at([10, 20, 30], [0.2, 0.6, 0.5], 0.5)
        20
    """
    return next((s for s, d in zip(steps, dice, strict=True) if math.isfinite(d) and d >= target), None)
