"""Charts that compare several runs: the mean over seeds of each arm, in a band from the lowest to the highest seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Final

import numpy as np
from markupsafe import Markup

from app.html.chart import Chart, FloatArray, Line, arm_line, arm_style, draw_chart
from app.html.curves import running_mean
from app.html.elements import charts_html, figure
from app.html.records import MEASURE_NAMES, Records, mapping, measure_in, number_or_nan

Series = Mapping[int, float]
"""Value by step."""

_MOST_POINTS: Final = 250  # per line; a band has twice as many, still too few to be thinned


def figures_html(arms: Mapping[str, Sequence[Records]], *, target_dice: float | None = None) -> Markup:
    """Return charts of loss, validation scores and, if it was recorded, gradient overlap at skip connections.

    Args:
        arms: by arm, the metric records of each seed.
        target_dice: value at which to draw a line across the validation chart; None draws no line.
    """
    loss = {arm: [_losses(records) for records in seeds] for arm, seeds in arms.items()}
    measure = measure_in([record for seeds in arms.values() for records in seeds for record in records])
    scores = {arm: [_validations(records, measure) for records in seeds] for arm, seeds in arms.items()}
    name = MEASURE_NAMES[measure]
    figures = [
        _figure("loss", "Training loss", loss, "Running mean of the training loss."),
        _figure(
            f"mean {name}",
            f"Validation {name}",
            scores,
            f"{name} of the validation cases, mean over the {'regions' if measure == 'dice' else 'outputs'}"
            + ("." if target_dice is None else f"; the dashed line is {target_dice:.3f}."),
            y_range=(0.0, 1.0),
            level=target_dice,
        ),
    ]
    for key, name, words in (
        ("cosine", "cosine", "Cosine between the two gradients that meet at a skip connection, mean over junctions."),
        ("ratio", "ratio", "Norm of the sum of these gradients over the sum of their norms, mean over junctions."),
    ):
        overlap = {arm: [_overlaps(records, key) for records in seeds] for arm, seeds in arms.items()}
        if any(series for seeds in overlap.values() for series in seeds):
            figures.append(_figure(name, f"Overlap: {name}", overlap, words))
    return charts_html(figures)


def bands(seeds: Sequence[Series]) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Return the steps recorded for every seed, and the mean, lowest and highest value over seeds, each of shape (N,).

    Example:
        >>> [array.tolist() for array in bands([{1: 0.0, 2: 1.0}, {1: 1.0}])]
        [[1.0], [0.5], [0.0], [1.0]]
    """
    common = sorted(set.intersection(*(set(series) for series in seeds))) if seeds else []
    values = np.array([[series[step] for step in common] for series in seeds], dtype=np.float64)
    if not common:
        empty = np.empty(0)
        return empty, empty, empty, empty
    return np.array(common, dtype=np.float64), values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _figure(
    quantity: str,
    title: str,
    arms: Mapping[str, Sequence[Series]],
    words: str,
    *,
    y_range: tuple[float, float] | None = None,
    level: float | None = None,
) -> Markup:
    """Draw one chart, with the bands behind the lines."""
    back, front = [], []
    several = any(len(seeds) > 1 for seeds in arms.values())
    for number, (arm, seeds) in enumerate(arms.items()):
        steps, mean, low, high = (_every(array) for array in bands(seeds))
        if several:
            # A closed outline: forward along the highest values, back along the lowest.
            around = np.concatenate([steps, steps[::-1]])
            outline = np.concatenate([high, low[::-1]])
            back.append(Line(label="", style=f"band {arm_style(number)}", x=around, y=outline))
        front.append(arm_line(number, arm, steps, mean))
    if level is not None and front and len(front[0].x):
        ends = np.array([min(line.x[0] for line in front if len(line.x)), max(line.x[-1] for line in front)])
        back.append(Line(label="", style="level", x=ends, y=np.array([level, level])))
    chart = Chart(title=f"{title} over steps", y_label=quantity, lines=[*back, *front], y_range=y_range, height=300)
    about_bands = " Line: mean over seeds; band: from the lowest to the highest seed." if several else ""
    return figure(draw_chart(chart), f"{title}. {words}{about_bands}")


def _every(array: FloatArray) -> FloatArray:
    return array[:: max(1, -(-len(array) // _MOST_POINTS))]


def _losses(records: Records) -> Series:
    found = _series(records, "train", lambda record: number_or_nan(record.get("loss")))
    steps, values = list(found), np.array(list(found.values()))
    smooth = running_mean(values, window=max(5, len(values) // 25)) if len(values) else values
    return dict(zip(steps, smooth.tolist(), strict=True))


def _validations(records: Records, measure: str) -> Series:
    return _series(records, "validation", lambda record: number_or_nan(record.get(f"mean_{measure}")))


def _overlaps(records: Records, key: str) -> Series:
    """Return the mean over the junctions of each ``overlap`` record, ignoring junctions without a finite value."""

    def mean(record: Mapping[str, Any]) -> float:
        values = [number_or_nan(mapping(one).get(key)) for one in mapping(record.get("junctions")).values()]
        finite = [value for value in values if math.isfinite(value)]
        return fmean(finite) if finite else math.nan

    return _series(records, "overlap", mean)


def _series(records: Records, kind: str, value: Callable[[Mapping[str, Any]], float]) -> dict[int, float]:
    pairs = [(int(record["step"]), value(record)) for record in records if record.get("kind") == kind]
    return {step: number for step, number in sorted(pairs) if math.isfinite(number)}
