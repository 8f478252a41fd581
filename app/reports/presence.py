"""The page of presence scores: measures with intervals, ROC and calibration curves, wrong decisions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from markupsafe import Markup
from sklearn.metrics import roc_curve

from app.evaluation.presence import PRESENCE_MEASURES, FloatArray, Interval, calibration_bins
from app.evaluation.presence_scores import PresenceScores
from app.html.chart import Chart, Line, arm_line, draw_chart
from app.html.elements import Row, charts_html, document, figure, number, write_html
from app.html.templates import fill

_DIAGONAL = np.array([0.0, 1.0])


def write_presence_page(scores: PresenceScores, page: Path) -> None:
    """Write the page atomically.

    Raises:
        OSError: ``page`` cannot be written.
    """
    write_html(page, render_presence(scores))


def render_presence(scores: PresenceScores) -> str:
    """Render the page as one HTML document; every external string is escaped."""
    rows: list[Row] = [
        [name, heading.format(scores.specificity), number(one.value), _interval(one), definition]
        for name, of_output in scores.measures.items()
        for measure, (heading, definition) in PRESENCE_MEASURES.items()
        for one in [of_output[measure]]
    ]
    charts = [_chart(scores, *kind) for kind in (("ROC", "sensitivity"), ("calibration", "share present"))]
    body = fill("presence.html", rows=rows, charts=charts_html(charts), wrong=_wrong(scores))
    facts = [("cases", str(len(scores.truth))), ("sensitivity stated at specificity", f"{scores.specificity:g}")]
    return document(
        title="Presence",
        lead=". ".join(scores.remarks()[:-1]) + ".",
        facts=facts,
        body=body,
        styles=("page.css", "arms.css"),
    )


def roc_points(truth: FloatArray, probability: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return 1 - specificity and sensitivity of every threshold; empty if all examples are of one kind.

    Example:
        >>> [points.tolist() for points in roc_points(np.array([0.0, 1.0]), np.array([0.1, 0.9]))]
        [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0]]
    """
    if len(set(truth.tolist())) < 2:
        return np.zeros(0), np.zeros(0)
    false_positive, sensitivity, _ = roc_curve(truth, probability)
    return false_positive, sensitivity


def _chart(scores: PresenceScores, kind: str, y_label: str) -> Markup:
    """Draw the ROC or the calibration curve of every output."""
    lines = [Line(label="", style="quartile", x=_DIAGONAL, y=_DIAGONAL)]
    for place, name in enumerate(scores.outputs):
        truth, probability = scores.of_output(name)
        if kind == "ROC":
            x, y = roc_points(truth, probability)
        else:
            x, y, _ = (
                np.array(column, dtype=np.float64) for column in zip(*calibration_bins(truth, probability), strict=True)
            )
        lines.append(arm_line(place, name, x, y))
    x_label = "1 - specificity" if kind == "ROC" else "mean probability of a bin"
    chart = Chart(title=f"{kind} curve", y_label=y_label, lines=lines, x_label=x_label, y_range=(0.0, 1.0))
    about = {
        "ROC": "Sensitivity and specificity at every threshold. The diagonal is that of chance.",
        "calibration": "Share of present cases by probability, in ten bins. On the diagonal, probabilities are right.",
    }
    return figure(draw_chart(chart), about[kind])


def _interval(one: Interval) -> str | None:
    return None if one.low is None or one.high is None else f"{one.low:.3f} to {one.high:.3f}"


def _wrong(scores: PresenceScores) -> list[Row]:
    """List the cases whose decision is wrong, the most wrong first."""
    found = []
    for place, (name, threshold) in enumerate(zip(scores.outputs, scores.thresholds, strict=True)):
        for case_id, truth in scores.truth.items():
            probability = scores.probability[case_id][place]
            if (probability >= threshold) != bool(truth[place]):
                row = [case_id, name, f"{probability:.3f}", "present" if truth[place] else "absent"]
                found.append((-abs(probability - truth[place]), row))
    return [row for _, row in sorted(found)]
