"""Scores on a page: summary tiles, the table of scores by case, and the small table next to each picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

import numpy as np

from data.labels import REGIONS, Region

Scores = Mapping[str, Mapping[str, float]]

REGION_NAMES: Final[dict[Region, str]] = {"WT": "whole tumour", "TC": "tumour core", "ET": "enhancing tumour"}
#: The regions with their names, for captions.
REGIONS_IN_WORDS: Final = ", ".join(f"{region} {name}" for region, name in REGION_NAMES.items())
_UNDEFINED: Final = '<span role="img" aria-label="not defined">&ndash;</span>'


@dataclass(frozen=True, kw_only=True)
class _Metric:
    """One column of each region in the table."""

    key: str
    name: str
    digits: int
    best: Callable[[Sequence[float]], float]
    worst: Callable[[Sequence[float]], float]


_METRICS: Final = (
    _Metric(key="dice", name="Dice", digits=3, best=max, worst=min),
    _Metric(key="hd95_mm", name="HD95 (mm)", digits=1, best=min, worst=max),
)
_COLUMNS: Final = tuple((region, metric) for region in REGIONS for metric in _METRICS)


def number_html(value: float, digits: int) -> str:
    """Format a number for a table cell, e.g. ``0.912``; NaN becomes a dash, infinity its sign."""
    if math.isnan(value):
        return _UNDEFINED
    return f"{value:.{digits}f}" if math.isfinite(value) else ("∞" if value > 0 else "-∞")


def score(scores: Scores, region: Region, key: str) -> float:
    """Return one score of a case, or NaN if it has none."""
    return float(scores.get(region, {}).get(key, math.nan))


def summary_html(cases: Sequence[Scores]) -> str:
    """Return a tile per region with the mean Dice and, smaller, the median HD95; empty if no case has a Dice."""
    if not any(_defined(cases, region, "dice") for region in REGIONS):
        return ""
    tiles = []
    for region in REGIONS:
        dice, hd95 = _defined(cases, region, "dice"), _defined(cases, region, "hd95_mm")
        tiles.append(
            f'<li class="tile {region.lower()}"><span class="tile-name">{region} <small>{REGION_NAMES[region]}</small>'
            f'</span><span class="tile-value">{number_html(_mean(dice), 3)}</span>'
            f"<span>mean Dice; median HD95 {number_html(_median(hd95), 1)} mm</span></li>"
        )
    return f'<ul class="tiles">{"".join(tiles)}</ul>'


def scores_table_html(names: Sequence[str], cases: Sequence[Scores]) -> str:
    """Return a table of Dice and HD95 by case and region, with mean and median; best and worst values are marked.

    Args:
        names: case ids, one for each of ``cases``.
        cases: scores by region, with the keys ``dice`` and ``hd95_mm``.

    Returns:
        HTML: the table in its own scrolling container, and a note.
    """
    if not cases:
        return '<p class="empty">No case has been scored.</p>'
    groups = "".join(
        f'<th colspan="{len(_METRICS)}" scope="colgroup" class="group">{r} <small>{REGION_NAMES[r]}</small></th>'
        for r in REGIONS
    )
    heads = "".join(f'<th scope="col" class="{_cell_class(metric)}">{metric.name}</th>' for _, metric in _COLUMNS)
    rows = [
        _case_row(number, name, case, cases) for number, (name, case) in enumerate(zip(names, cases, strict=True), 1)
    ]
    summaries = [_summary_row("Mean", _mean, cases), _summary_row("Median", _median, cases)]
    return (
        '<div class="scroll" role="group" aria-labelledby="scores" tabindex="0"><table>'
        f'<thead><tr><th rowspan="2" scope="col">Case</th>{groups}</tr><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody><tfoot>{''.join(summaries)}</tfoot></table></div>"
        f'<p class="note">{_note(cases)}</p>'
    )


def case_table_html(scores: Scores) -> str:
    """Return a table of one case's scores and volumes, with a row per region."""
    keys = (
        ("dice", "Dice", 3),
        ("hd95_mm", "HD95 (mm)", 1),
        ("reference_volume_ml", "Reference (ml)", 1),
        ("volume_ml", "Predicted (ml)", 1),
    )
    shown = [k for k in keys if any(not math.isnan(score(scores, r, k[0])) for r in REGIONS)]
    heads = "".join(f'<th scope="col">{name}</th>' for _, name, _ in shown)
    rows = "".join(
        f'<tr><th scope="row"><abbr title="{REGION_NAMES[region]}">{region}</abbr></th>'
        + "".join(f"<td>{number_html(score(scores, region, key), digits)}</td>" for key, _, digits in shown)
        + "</tr>"
        for region in REGIONS
    )
    return (
        f'<div class="scroll"><table><thead><tr><th scope="col">Region</th>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _case_row(number: int, name: str, case: Scores, cases: Sequence[Scores]) -> str:
    cells = []
    for region, metric in _COLUMNS:
        value = score(case, region, metric.key)
        sign = _sign(value, metric, _defined(cases, region, metric.key))
        cells.append(f'<td class="{_cell_class(metric)}">{sign}{number_html(value, metric.digits)}</td>')
    return f'<tr><th scope="row"><a href="#case-{number}">{escape(name)}</a></th>{"".join(cells)}</tr>'


def _summary_row(name: str, summary: Callable[[Sequence[float]], float], cases: Sequence[Scores]) -> str:
    cells = "".join(
        f'<td class="{_cell_class(m)}">{number_html(summary(_defined(cases, region, m.key)), m.digits)}</td>'
        for region, m in _COLUMNS
    )
    return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def _sign(value: float, metric: _Metric, column: Sequence[float]) -> str:
    """Return the mark of a column's best or worst value; empty if all values are equal."""
    if math.isnan(value) or metric.best(column) == metric.worst(column):
        return ""
    if value == metric.best(column):
        return '<span class="best" role="img" aria-label="best">▲</span>'
    return '<span class="worst" role="img" aria-label="worst">▽</span>' if value == metric.worst(column) else ""


def _note(cases: Sequence[Scores]) -> str:
    note = (
        '<span class="best">▲</span> best and <span class="worst">▽</span> worst of a column. '
        "Dice: 1 is perfect overlap. HD95: 95th percentile of the distance between the two surfaces; 0 mm is perfect."
    )
    missing = sum(math.isnan(score(case, region, metric.key)) for case in cases for region, metric in _COLUMNS)
    return note + (f" &ndash; not defined: {missing} values, left out of mean and median." if missing else "")


def _defined(cases: Sequence[Scores], region: Region, key: str) -> list[float]:
    values = (score(case, region, key) for case in cases)
    return [value for value in values if not math.isnan(value)]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else math.nan


def _cell_class(metric: _Metric) -> str:
    return "first" if metric is _METRICS[0] else "later"
