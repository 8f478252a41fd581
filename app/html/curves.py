"""Learning curves of a run: charts of its metric records, with captions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from markupsafe import Markup

from app.html.chart import MARKERS, Chart, FloatArray, Line, draw_chart
from app.html.elements import charts_html, figure
from app.html.records import MEASURE_NAMES, Records, column, mapping, measure_in, number_or_nan, outputs_in
from data.labels import REGIONS

#: Number of junction colours in the style sheet; further junctions repeat them with dashes.
_COLOURS: Final = 8
_WHEN: Final = ("before", "after")
_LEAST_TO_SMOOTH: Final = 20


def curves_html(metrics: Records) -> Markup:
    """Return figures of training loss, learning rate and validation scores.

    Args:
        metrics: records of ``metrics.jsonl``; unknown kinds and keys are ignored, and null counts as non-finite.

    Returns:
        self-contained HTML; a single paragraph if there are no records.
    """
    train = [record for record in metrics if record.get("kind") == "train"]
    validation = [record for record in metrics if record.get("kind") == "validation"]
    if not train and not validation:
        return Markup('<p class="empty">No training was recorded.</p>')
    return charts_html([_training_figure(train), _validation_figure(validation)])


def gradients_html(metrics: Records) -> Markup:
    """Return figures of the gradient norms before and after the gradient rule, and of the gradient overlap.

    Args:
        metrics: records of ``metrics.jsonl``, as for :func:`curves_html`.

    Returns:
        self-contained HTML; empty if neither was measured.
    """
    gradients = [record for record in metrics if record.get("kind") == "gradients"]
    overlap = [record for record in metrics if record.get("kind") == "overlap"]
    figures = [draw(records) for draw, records in ((_norms_figure, gradients), (_overlap_figure, overlap)) if records]
    return charts_html(figures) if figures else Markup("")


def running_mean(y: FloatArray, *, window: int) -> FloatArray:
    """Return the mean of the ``window`` values around each value, or of fewer values at the two ends.

    Example:
        >>> running_mean(np.array([0.0, 3.0, 6.0]), window=3).tolist()
        [1.5, 3.0, 4.5]
    """
    before, after = (window - 1) // 2, window // 2
    total = np.concatenate([[0.0], np.cumsum(y)])
    first = np.maximum(np.arange(len(y)) - before, 0)
    last = np.minimum(np.arange(len(y)) + after + 1, len(y))
    return np.asarray((total[last] - total[first]) / (last - first), dtype=np.float64)


def _training_figure(train: Records) -> Markup:
    steps, loss = column(train, "step"), column(train, "loss")
    rate = column(train, "learning_rate")
    lines, about = _loss_lines(steps, loss)
    loss_chart = Chart(title="Training loss over steps", y_label="loss", lines=lines, height=230)
    rate_line = Line(label="", style="rate", x=steps, y=rate)
    rate_chart = Chart(title="Learning rate over steps", y_label="learning rate", lines=[rate_line], height=145)
    return figure(draw_chart(loss_chart) + draw_chart(rate_chart), f"Training. {about}")


def _loss_lines(steps: FloatArray, loss: FloatArray) -> tuple[list[Line], str]:
    """Return the lines of the loss, and a sentence about them."""
    good = np.isfinite(steps) & np.isfinite(loss)
    x, y = steps[good], loss[good]
    missing = f" {len(loss) - len(y):,} of {len(loss):,} records have no finite loss." if len(y) < len(loss) else ""
    if len(y) < _LEAST_TO_SMOOTH:
        last = f"Last loss {y[-1]:.4g} at step {x[-1]:,.0f}." if len(y) else "No loss was recorded."
        return [Line(label="loss", style="smooth", x=x, y=y)], last + missing
    window = max(5, len(y) // 25)
    smooth = running_mean(y, window=window)
    lines = [
        Line(label="each record", style="raw", x=x, y=y),
        Line(label="running mean", style="smooth", x=x, y=smooth),
    ]
    return (
        lines,
        f"Running mean of {window:,} records; the last value is {smooth[-1]:.4g} at step {x[-1]:,.0f}.{missing}",
    )


def _validation_figure(validation: Records) -> Markup:
    steps = column(validation, "step")
    measure = measure_in(validation)
    name, outputs = MEASURE_NAMES[measure], outputs_in(validation, measure)
    scores = {output: column([mapping(record.get(measure)) for record in validation], output) for output in outputs}
    lines = [
        Line(
            label=output,
            style=output.lower() if output in REGIONS else "smooth",
            x=steps,
            y=scores[output],
            marker=MARKERS[place % len(MARKERS)],
        )
        for place, output in enumerate(outputs)
    ]
    chart = Chart(title=f"Validation {name} over steps", y_label=name, lines=lines, height=375, y_range=(0.0, 1.0))
    return figure(draw_chart(chart), f"Validation. {_last_scores(steps, scores, name)}")


def _last_scores(steps: FloatArray, scores: Mapping[str, FloatArray], name: str) -> str:
    if not len(steps):
        return "No validation was recorded."
    last = ", ".join(f"{output} {_score_text(values[-1])}" for output, values in scores.items())
    return f"Last {name} at step {steps[-1]:,.0f}: {last}."


def _score_text(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not defined"


def _norms_figure(gradients: Records) -> Markup:
    steps = column(gradients, "step")
    layers = [{n: mapping(v) for n, v in mapping(record.get("layers")).items()} for record in gradients]
    names = {name for record in layers for name in record}
    changed = {name for record in layers for name, values in record.items() if _is_changed(values)}
    shown = changed or names
    norms = {when: [[v for n, v in record.items() if n in shown] for record in layers] for when in _WHEN}
    lines = [line for when in _WHEN for line in _norm_lines(norms[when], steps, when)]
    chart = Chart(title="Gradient norm over steps", y_label="log10 of the gradient's norm", lines=lines, height=300)
    skipped = number_or_nan(gradients[-1].get("skipped_steps"))
    return figure(
        draw_chart(chart),
        "Norm of a layer's gradient before and after the gradient rule, over the "
        f"{len(shown):,} of {len(names):,} tensors that {'it changed' if changed else 'have one'}: "
        f"median, with quartiles as thin lines.{f' Steps skipped so far: {skipped:,.0f}.' if skipped > 0 else ''}",
    )


def _is_changed(layer: Mapping[str, object]) -> bool:
    before, after = (number_or_nan(layer.get(f"norm_{when}")) for when in _WHEN)
    return math.isfinite(before) and math.isfinite(after) and before != after


def _norm_lines(norms: Sequence[Records], steps: FloatArray, when: str) -> list[Line]:
    """Return lines of the quartiles and, on top, the median of log10 of each record's layer norms."""
    low, middle, high = np.array([_log_quartiles(column(layers, f"norm_{when}")) for layers in norms]).T
    return [
        Line(label="", style=f"{when} quartile", x=steps, y=low),
        Line(label="", style=f"{when} quartile", x=steps, y=high),
        Line(label=when, style=when, x=steps, y=middle),
    ]


def _log_quartiles(norms: FloatArray) -> FloatArray:
    """Return lower quartile, median and upper quartile of log10 of the norms; NaN if no norm is above 0."""
    logs = np.log10(norms[norms > 0])
    return np.quantile(logs, [0.25, 0.5, 0.75]) if len(logs) else np.full(3, math.nan)


def _overlap_figure(overlap: Records) -> Markup:
    steps = column(overlap, "step")
    names = list(dict.fromkeys(name for record in overlap for name in mapping(record.get("junctions"))))
    lines, entries = [], []
    for number, name in enumerate(names):
        at = [mapping(mapping(record.get("junctions")).get(name)) for record in overlap]
        cosine, ratio = column(at, "cosine"), column(at, "ratio")
        style = f"junction j{number % _COLOURS}{' dashed' if number // _COLOURS % 2 else ''}"
        lines.append(Line(label="", style=style, x=steps, y=cosine))
        last = f"cosine {_score_text(cosine[-1])}, ratio {_score_text(ratio[-1])}"
        entries.append(Markup('<li class="{}">{} <small>{}</small></li>').format(style, name, last))
    chart = Chart(title="Gradient overlap over steps", y_label="cosine", lines=lines, height=300)
    return figure(
        draw_chart(chart) + Markup('<ul class="legend">{}</ul>').format(Markup("").join(entries)),
        "Cosine of the two gradients that meet where a skip path and a transformation split: at 1 they add up, at 0 "
        "they are orthogonal, at -1 they cancel. Ratio: norm of their sum as a share of the sum of their norms. Next "
        f"to each junction: its last values{f', at step {steps[-1]:,.0f}' if math.isfinite(steps[-1]) else ''}.",
    )
