"""Line charts as inline SVG: axes, ticks, labels and legend, with colours from the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Final, Literal

import numpy as np
import numpy.typing as npt
from markupsafe import Markup

FloatArray = npt.NDArray[np.float64]
Marker = Literal["circle", "square", "triangle"]

#: Width of every chart in SVG units; the page scales it to the column.
WIDTH: Final = 460
#: Maximum number of points per line; longer lines are thinned.
MOST_POINTS: Final = 600

_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 34, 40
_MOST_MARKERS: Final = 40
_ARM_STYLES: Final = 7  # arm classes in arms.css
_MARKER_PATHS: Final[dict[Marker, str]] = {
    "circle": "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "square": "m-3.2 -3.2h6.4v6.4h-6.4z",
    "triangle": "m0 -4.2l4.2 7.4h-8.4z",
}


#: Markers in the order in which the lines of a chart take them.
MARKERS: Final = tuple(_MARKER_PATHS)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart; non-finite points are left out."""

    label: str
    """Name in the legend; empty for no entry."""
    style: str
    """CSS class that sets colour, width and dashes."""
    x: FloatArray
    """Shape (N,), in ascending order."""
    y: FloatArray
    """Shape (N,)."""
    marker: Marker | None = None
    """Symbol at every point; drawn only if there are few points."""


def arm_line(number: int, label: str, x: FloatArray, y: FloatArray) -> Line:
    """Return the line of one of several arms, with the style and marker of its number."""
    return Line(label=label, style=arm_style(number), x=x, y=y, marker=MARKERS[number % len(MARKERS)])


def arm_style(number: int) -> str:
    """Return the CSS class of an arm."""
    return f"arm{number % _ARM_STYLES}"


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of one or more lines over a common x axis."""

    title: str
    """Text for screen readers."""
    y_label: str
    """Label of the y axis."""
    lines: Sequence[Line]
    """The lines; later ones are drawn over earlier ones."""
    x_label: str = "training step"
    """Label of the x axis."""
    height: int = 260
    """Height in the units of WIDTH."""
    y_range: tuple[float, float] | None = None
    """Limits of the y axis; None fits them to the data."""


def thin(x: FloatArray, y: FloatArray, *, most: int = MOST_POINTS) -> tuple[FloatArray, FloatArray]:
    """Thin a line to at most ``most`` points: the lowest and highest of each segment, so that spikes are kept.

    Args:
        x: shape (N,).
        y: shape (N,), finite.
        most: 2 or more; default :data:`MOST_POINTS`.

    Returns:
        x and y of the remaining points, in their original order.
    """
    if len(y) <= most:
        return x, y
    edges = np.linspace(0, len(y), most // 2 + 1).astype(int)
    kept = {start + pick(y[start:stop]) for start, stop in itertools.pairwise(edges) for pick in (np.argmin, np.argmax)}
    order = np.array(sorted(kept))
    return x[order], y[order]


def nice_ticks(low: float, high: float, *, about: int = 5) -> FloatArray:
    """Return round numbers within [low, high], spaced by 1, 2 or 5 times a power of ten.

    Example:
        >>> nice_ticks(0.0, 1.0).tolist()
        [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda m: abs(m * power - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return np.array([round(n * step, digits) for n in range(first, last + 1)])


def draw_chart(chart: Chart) -> Markup:
    """Return the chart as an ``<svg>`` element, or a paragraph with a note if no point is finite."""
    lines = [_finite(line) for line in chart.lines]
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return Markup('<p class="empty">Nothing recorded for: {}.</p>').format(chart.title)
    frame = _frame(chart, lines)
    parts = [_grid(chart, frame), *(_line(line, frame) for line in lines), _legend(lines)]
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH,
        chart.height,
        chart.title,
        Markup("".join(parts)),  # noqa: S704 - labels are escaped
    )


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Limits of the data, and their mapping to the picture."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    bottom: float

    def across(self, x: FloatArray) -> FloatArray:
        return _LEFT + (x - self.x_low) / (self.x_high - self.x_low) * (WIDTH - _LEFT - _RIGHT)

    def down(self, y: FloatArray) -> FloatArray:
        return self.bottom - (y - self.y_low) / (self.y_high - self.y_low) * (self.bottom - _TOP)


def _finite(line: Line) -> Line:
    good = np.isfinite(line.x) & np.isfinite(line.y)
    x, y = thin(line.x[good], line.y[good])
    return replace(line, x=x, y=y)


def _frame(chart: Chart, lines: Sequence[Line]) -> _Frame:
    xs, ys = np.concatenate([line.x for line in lines]), np.concatenate([line.y for line in lines])
    y_low, y_high = chart.y_range or _widened(ys.min(), ys.max(), share=0.05)
    x_low, x_high = _widened(xs.min(), xs.max(), share=0.02)
    return _Frame(x_low=x_low, x_high=x_high, y_low=y_low, y_high=y_high, bottom=chart.height - _BOTTOM)


def _widened(low: float, high: float, *, share: float) -> tuple[float, float]:
    """Add a margin to the limits; non-negative data keep a non-negative lower limit, and constant data get a span."""
    span = (high - low) or abs(high) or 1.0
    lower = low - share * span
    return float(max(lower, 0.0) if low >= 0 else lower), float(high + share * span)


def _grid(chart: Chart, frame: _Frame) -> str:
    right, bottom = WIDTH - _RIGHT, frame.bottom
    parts = []
    y_ticks = nice_ticks(frame.y_low, frame.y_high, about=max(3, round((bottom - _TOP) / 40)))
    for value, y in zip(y_ticks, frame.down(y_ticks), strict=True):
        parts.append(f'<path class="grid" d="M{_LEFT} {y:.1f}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(value)}</text>')
    x_ticks = nice_ticks(frame.x_low, frame.x_high)
    for value, x in zip(x_ticks, frame.across(x_ticks), strict=True):
        parts.append(f'<path class="axis" d="M{x:.1f} {bottom}v5"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{_tick_text(value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{bottom + 34}" text-anchor="middle">{escape(chart.x_label)}</text>')
    parts.append(f'<text class="quantity" x="4" y="14">{escape(chart.y_label)}</text>')
    return "".join(parts)


def _line(line: Line, frame: _Frame) -> str:
    points = [f"{x:.1f} {y:.1f}" for x, y in zip(frame.across(line.x), frame.down(line.y), strict=True)]
    parts = [f'<path class="line {line.style}" d="M{"L".join(points)}"/>']
    if line.marker and len(points) <= _MOST_MARKERS:
        marks = "".join(f"M{point}{_MARKER_PATHS[line.marker]}" for point in points)
        parts.append(f'<path class="mark {line.style}" d="{marks}"/>')
    return "".join(parts)


def _legend(lines: Sequence[Line]) -> str:
    """Draw the legend at the top right: a sample and the name of each line."""
    parts: list[str] = []
    x = float(WIDTH - _RIGHT)
    for line in reversed([line for line in lines if line.label]):
        x -= 7.0 * len(line.label)
        parts.append(f'<text x="{x:.0f}" y="14">{escape(line.label)}</text>')
        x -= 32
        parts.append(f'<path class="line {line.style}" d="M{x:.0f} 10h26"/>')
        if line.marker:
            parts.append(f'<path class="mark {line.style}" d="M{x + 13:.0f} 10{_MARKER_PATHS[line.marker]}"/>')
        x -= 14
    return "".join(parts)


def _tick_text(value: float) -> str:
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:g}"
