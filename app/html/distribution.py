"""Distribution of a score over cases, by region: one dot per case, and a box for the quartiles."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Final

import numpy as np
from markupsafe import Markup

from app.html.chart import WIDTH, nice_ticks
from data.labels import REGIONS

_LEFT: Final = 40
_RIGHT: Final = 14
_ROW: Final = 54
_AXIS: Final = 40


def distribution_svg(values: Mapping[str, Sequence[float]], *, name: str, outputs: Sequence[str] = REGIONS) -> Markup:
    """Return an ``<svg>`` element with a row from 0 to 1 for each region; its label has the numbers as text.

    Args:
        values: by region, the score of every case, 0 to 1; non-finite values are left out.
        name: name of the score.
        outputs: the rows; default: the regions.
    """
    kept = {region: np.array([v for v in values.get(region, ()) if math.isfinite(v)]) for region in outputs}
    height = _ROW * len(outputs) + _AXIS
    parts = [_axis(height, name)]
    numbers = []
    for row, (region, scores) in enumerate(kept.items()):
        middle = _ROW * row + _ROW / 2
        parts.append(f'<text class="quantity" x="4" y="{middle + 4:.1f}">{escape(region)}</text>')
        if not len(scores):
            continue
        low, median, high = np.quantile(scores, (0.25, 0.5, 0.75))
        numbers.append(f"{region} median {median:.3f}, quartiles {low:.3f} and {high:.3f}, minimum {scores.min():.3f}")
        # Dots are spread vertically by rank, so that equal scores do not hide each other.
        ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable")
        style = region.lower() if region in REGIONS else ""
        for score, rank in zip(scores, ranks, strict=True):
            y = middle + (rank * 7 % 11 - 5) * 1.6
            parts.append(f'<circle class="dots {style}" cx="{_across(score):.1f}" cy="{y:.1f}" r="3"/>')
        parts.append(
            f'<path class="box" d="M{_across(low):.1f} {middle - 14:.1f}H{_across(high):.1f}v28H{_across(low):.1f}z'
            f'M{_across(median):.1f} {middle - 14:.1f}v28"/>'
        )
    label = escape(f"{name} by region: {'; '.join(numbers)}") if numbers else f"{name} by region: nothing recorded"
    svg = f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return Markup(svg)  # noqa: S704 - names are escaped


def _across(score: float) -> float:
    return _LEFT + score * (WIDTH - _LEFT - _RIGHT)


def _axis(height: int, name: str) -> str:
    bottom = height - _AXIS
    parts = [f'<path class="axis" d="M{_LEFT} {bottom}H{WIDTH - _RIGHT}"/>']
    for tick in nice_ticks(0.0, 1.0):
        parts.append(f'<path class="grid" d="M{_across(tick):.1f} 4V{bottom}"/>')
        parts.append(f'<text x="{_across(tick):.1f}" y="{bottom + 17}" text-anchor="middle">{tick:g}</text>')
    parts.append(f'<text x="{(_LEFT + WIDTH - _RIGHT) / 2}" y="{bottom + 34}" text-anchor="middle">{name}</text>')
    return "".join(parts)
