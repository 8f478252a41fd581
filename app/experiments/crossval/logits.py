"""Logits of the voxels around a tumour as counts: what a temperature is fitted on.

Bins of 1/32 are fine enough that the likelihood of a temperature is that of the voxels: within a bin the probability
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

#: Logits beyond are counted as this; float32 probabilities less one half do not tell larger ones apart.
_EDGE: Final = 20.0
_WIDTH: Final = 1 / 32
_BINS: Final = round(2 * _EDGE / _WIDTH)
_CENTRES: Final = -_EDGE + _WIDTH * (np.arange(_BINS) + 0.5)
#: Where temperatures are sought.
_LEAST, _MOST = 0.1, 10.0


def count_logits(centred: npt.NDArray[np.float32], regions: npt.NDArray[np.bool_]) -> Counts:
    """Count voxels by their logit.

    Args:
        centred: probabilities less one half, shape (3, X, Y, Z).
        regions: what is right, the same shape.

    Returns:
        shape (3, 2, 1 + bins + 1): by region, not in it and in it, by logit from -20 to 20; the first and the last are
        of probabilities that are exactly 0 (outside of the brain) and 1, which no temperature changes.
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
    """Of no voxel."""
    return np.zeros((len(REGIONS), 2, _BINS + 2), dtype=np.int64)


def negative_log_likelihood(counts: Counts, temperature: float) -> float:
    """Mean over voxels of minus the log of the probability of what is right.

    Args:
        counts: of one region, shape (2, 1 + bins + 1); those of exactly 0 and 1 are left out.
        temperature: above 0.

    Returns:
        0 where nothing is left.
    """
    outside, inside = counts[0, 1:-1], counts[1, 1:-1]
    logits = _CENTRES / temperature
    total = (outside * np.logaddexp(0, logits)).sum() + (inside * np.logaddexp(0, -logits)).sum()
    return float(total / max(1, outside.sum() + inside.sum()))


def fit_temperature(counts: Counts) -> float:
    """The temperature with the least negative log likelihood.

    Args:
        counts: of one region, shape (2, 1 + bins + 1).

    Returns:
        0.1 to 10; 1 where all voxels are in the region, or none is.
    """
    if not counts[0, 1:-1].any() or not counts[1, 1:-1].any():
        return 1.0
    # The likelihood has one optimum in 1 / T, and so in log T.
    found = optimize.minimize_scalar(
        lambda log: negative_log_likelihood(counts, float(np.exp(log))),
        bounds=(np.log(_LEAST), np.log(_MOST)),
        method="bounded",
        options={"xatol": 1e-6},
    )
    return float(np.exp(found.x))


def under_temperature(counts: Counts, temperature: float) -> Reliability:
    """Voxels of one region by their probability under a temperature.

    Args:
        counts: of one region, shape (2, 1 + bins + 1).
        temperature: above 0.
    """
    shares = np.concatenate([[0.0], 1 / (1 + np.exp(-_CENTRES / temperature)), [1.0]])
    outside, inside = (
        reliability(shares, np.full(shares.shape, answer), counts[int(answer)].astype(np.float64))
        for answer in (False, True)
    )
    return outside + inside
