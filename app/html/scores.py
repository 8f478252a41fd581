"""Scores on a page: summary tiles, the table of scores by case, and the small table next to each picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, Final

import numpy as np
from markupsafe import Markup

from app.html.templates import fill
from data.labels import REGIONS, Region

Scores = Mapping[str, Mapping[str, float]]

REGION_NAMES: Final[dict[Region, str]] = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}
#: The regions with their names, for captions.
REGIONS_IN_WORDS: Final = ", ".join(f"{region} {name}" for region, name in REGION_NAMES.items())
_UNDEFINED: Final = Markup('<span role="img" aria-label="not defined">&ndash;</span>')

#: Columns of the table of scores: region, key, decimals, and 1 if higher is better or -1 if lower is better.
_COLUMNS: Final = tuple((region, *metric) for region, metric in product(REGIONS, (("dice", 3, 1), ("hd95_mm", 1, -1))))
#: Columns of the table of one case: key, heading, decimals.
_CASE_COLUMNS: Final = (
    ("dice", "Dice", 3),
    ("hd95_mm", "HD95 (mm)", 1),
    ("reference_volume_ml", "Reference (ml)", 1),
    ("volume_ml", "Predicted (ml)", 1),
)


def score(scores: Scores, region: Region, key: str) -> float:
    """Return one score of a case, or NaN if it has none."""
    return float(scores.get(region, {}).get(key, math.nan))


def scores_html(names: Sequence[str], cases: Sequence[Scores]) -> Markup:
    """Return tiles with mean Dice and median HD95, and a table by case with mean, median, best and worst values.

    Args:
        names: case ids, one for each of ``cases``.
        cases: scores by region, with the keys ``dice`` and ``hd95_mm``.

    Returns:
        HTML; without tiles if no case has a Dice.
    """
    table = [[score(case, region, key) for case in cases] for region, key, *_ in _COLUMNS]
    defined = [[value for value in column if not math.isnan(value)] for column in table]
    means, medians = (
        [
            _text(float(average(column)) if column else math.nan, digits)
            for column, (*_, digits, _) in zip(defined, _COLUMNS, strict=True)
        ]
        for average in (np.mean, np.median)
    )
    cells = [
        [(_text(value, digits), _mark(value, finite, sign)) for value in column]
        for column, finite, (*_, digits, sign) in zip(table, defined, _COLUMNS, strict=True)
    ]
    return fill(
        "scores.html",
        tiles=list(zip(REGIONS, means[::2], medians[1::2], strict=True)) if any(defined[::2]) else (),
        rows=list(zip(names, zip(*cells, strict=True), strict=True)),
        summaries={"Mean": means, "Median": medians},
        undefined=sum(len(column) - len(finite) for column, finite in zip(table, defined, strict=True)),
        region_names=REGION_NAMES,
    )


def case_table(scores: Scores) -> dict[str, Any]:
    """Return heads and rows of one case's scores and volumes, with a row per region."""
    shown = [column for column in _CASE_COLUMNS if any(column[0] in scores.get(region, {}) for region in REGIONS)]
    return {
        "heads": [heading for _, heading, _ in shown],
        "rows": {region: [_text(score(scores, region, key), places) for key, _, places in shown] for region in REGIONS},
    }


def _text(value: float, digits: int) -> str:
    """Format a number, e.g. ``0.912``; NaN becomes a dash, infinity its sign."""
    if math.isnan(value):
        return _UNDEFINED
    return f"{value:.{digits}f}" if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def _mark(value: float, column: Sequence[float], sign: int) -> str:
    """Return ``best`` or ``worst`` for such a value of a column; empty for any other, and if all values are equal."""
    if math.isnan(value) or max(column) == min(column):
        return ""
    best, worst = (max(column), min(column)) if sign > 0 else (min(column), max(column))
    return "best" if value == best else "worst" if value == worst else ""
