"""Histograms of the logits around a tumour, on which temperatures are fitted.

Bins of width 1/32 are fine enough for their likelihood to be close to that of the voxels: within a bin the probability
changes by less than 0.01.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import optimize

from app.evaluation.reliability import Reliability, reliability
from data.labels import REGIONS

Counts = npt.NDArray[np.int64]

#: Logits are clipped to this magnitude; float32 probabilities minus one half cannot resolve larger ones.
_EDGE: Final = 20.0
_WIDTH: Final = 1 / 32
_BINS: Final = round(2 * _EDGE / _WIDTH)
_CENTRES: Final = -_EDGE + _WIDTH * (np.arange(_BINS) + 0.5)
#: Range in which temperatures are searched.
_LEAST, _MOST = 0.1, 10.0


def count_logits(centred: npt.NDArray[np.float32], regions: npt.NDArray[np.bool_]) -> Counts:
    """Count voxels by their logit.

    Args:
        centred: probabilities minus one half, shape (3, X, Y, Z).
        regions: reference masks of the same shape.

    Returns:
        counts of shape (3, 2, 1 + bins + 1): by region; outside and inside it; by logit from -20 to 20. The first and
        last bins count probabilities of exactly 0 (outside the brain) and 1, which no temperature changes.
    """
    counts = no_counts()
    for into, shares, right in zip(counts, centred, regions, strict=True):
        inside = np.abs(shares) < 0.5
        place = np.where(shares > 0, _BINS + 1, 0)
        logits = 2 * np.arctanh(2 * shares[inside].astype(np.float64))
        place[inside] = np.clip(np.floor((logits + _EDGE) / _WIDTH).astype(np.int64), 0, _BINS - 1) + 1
        for answer in (0, 1):
            into[answer] = np.bincount(place[right == bool(answer)], minlength=_BINS + 2)
    return counts


def no_counts() -> Counts:
    """Return counts of zero for every bin."""
    return np.zeros((len(REGIONS), 2, _BINS + 2), dtype=np.int64)


def negative_log_likelihood(counts: Counts, temperature: float) -> float:
    """Return the mean over voxels of minus the log probability of the correct answer.

    Args:
        counts: counts of one region, shape (2, 1 + bins + 1); probabilities of exactly 0 and 1 are left out.
        temperature: above 0.

    Returns:
        the mean; 0 if no voxel is left.
    """
    outside, inside = counts[0, 1:-1], counts[1, 1:-1]
    logits = _CENTRES / temperature
    total = (outside * np.logaddexp(0, logits)).sum() + (inside * np.logaddexp(0, -logits)).sum()
    return float(total / max(1, outside.sum() + inside.sum()))


def fit_temperature(counts: Counts) -> float:
    """Return the temperature with the lowest negative log likelihood.

    Args:
        counts: counts of one region, shape (2, 1 + bins + 1).

    Returns:
        a temperature from 0.1 to 10; 1 if all voxels are in the region, or none is.
    """
    if not counts[0, 1:-1].any() or not counts[1, 1:-1].any():
        return 1.0
    # The likelihood has a single optimum in 1 / T, and so in log T.
    found = optimize.minimize_scalar(
        lambda log: negative_log_likelihood(counts, float(np.exp(log))),
        bounds=(np.log(_LEAST), np.log(_MOST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def under_temperature(counts: Counts, temperature: float) -> Reliability:
    """Return the reliability of one region's voxels under a temperature.

    Args:
        counts: counts of one region, shape (2, 1 + bins + 1).
        temperature: above 0.
    """
    shares = np.concatenate([[0.0], 1 / (1 + np.exp(-_CENTRES / temperature)), [1.0]])
    outside, inside = (
        reliability(shares, np.full(shares.shape, answer), counts[int(answer)].astype(np.float64))
        for answer in (False, True)
    )
    return outside + inside
