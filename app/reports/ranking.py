"""The page of a ranking: one self-contained HTML file that needs neither network nor scripts."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Final

import numpy as np

from app.evaluation.ranking.rank import Ranking, is_lower_better
from app.html.chart import Chart, Line, Marker, draw_chart
from app.html.elements import DASH, document, note, section, table_html
from data.files import replacing

_WORST: Final = 10
_STYLES: Final = 7  # arm classes in arms.css
_MARKERS: Final[tuple[Marker, ...]] = ("circle", "square", "triangle")


def write_ranking_page(path: Path, ranking: Ranking) -> None:
    """Write the page atomically.

    Args:
        path: file to write.
        ranking: content of the page.
    """
    with replacing(path) as beside:
        beside.write_text(render_ranking(ranking), encoding="utf-8", errors="replace")


def render_ranking(ranking: Ranking) -> str:
    """Render the page as one HTML document; every external string is escaped."""
    best = ranking.names[ranking.order[0]]
    lead = (
        f"{len(ranking.names)} sets of predictions of the same {len(ranking.cases)} cases, ranked by "
        f"{' and '.join(ranking.metrics)} of {', '.join(ranking.regions)}; lowest mean rank: {best}."
    )
    sections = [
        section("ranks", "Ranks", _ranks_html(ranking)),
        section("differences", "Differences", _differences_html(ranking)),
        section("cases", "Case by case", _charts_html(ranking)),
        section("worst", "Worst cases", _worst_html(ranking)),
    ]
    facts = [("sets", ", ".join(ranking.names)), ("cases left out, not scored in all sets", str(len(ranking.left_out)))]
    return document(title="Ranking", lead=lead, facts=facts, sections=sections, styles=("page.css", "arms.css"))


def _ranks_html(ranking: Ranking) -> str:
    rows = [
        [
            escape(ranking.names[place]),
            f"{ranking.mean_ranks[place]:.2f}",
            *(f"{ranking.by_case(metric)[place].mean():.3f}" for metric in ranking.metrics),
        ]
        for place in ranking.order
    ]
    tests = [
        [escape(f"{test.first} - {test.second}"), f"{test.difference:+.2f}", _p(test.p), _p(test.p_holm)]
        for test in ranking.tests
    ]
    return (
        table_html("ranks", ["Set", "Mean rank", *map(escape, ranking.metrics)], rows)
        + note(
            "Ranked within each case, region and metric, 1 the best, ties shared; averaged over each case, then over "
            "cases. The other columns are means over regions and cases; hd95_mm is in mm; of distances lower is better."
        )
        + table_html("ranks", ["Difference", "Mean rank", "p", "p, Holm"], tests)
        + note("p: permutation test, the ranks of two sets swapped case by case at random, 10,000 times, seed 0.")
    )


def _differences_html(ranking: Ranking) -> str:
    rows = [
        [
            escape(f"{d.first} - {d.second}"),
            escape(d.metric),
            f"{d.mean:+.3f}",
            f"{d.low:+.3f} to {d.high:+.3f}",
            _p(d.p),
            _p(d.p_holm),
        ]
        for d in ranking.differences
    ]
    why = sorted({d.no_test for d in ranking.differences if d.no_test})
    missing = f" {DASH}: {escape('; '.join(why))}." if why else ""
    return table_html("differences", ["Difference", "Metric", "Mean", "95 % interval", "p", "p, Holm"], rows) + (
        '<p class="note">First less second, mean over regions. Interval: percentile bootstrap over cases, '
        "10,000 times, seed 0. p: Wilcoxon signed-rank test over cases; Holm's correction over the pairs of one metric."
        f"{missing}</p>"
    )


def _p(value: float | None) -> str:
    """Format a p-value with three decimals, as "< 0.001" if it is smaller, or as a dash if there is none."""
    return DASH if value is None else f"{value:.3f}" if value >= 0.001 else "&lt; 0.001"


def _charts_html(ranking: Ranking) -> str:
    figures = []
    for metric in ranking.metrics:
        values = ranking.by_case(metric)
        order = np.argsort(values.mean(axis=0), kind="stable")
        lines = [
            Line(
                label=name,
                style=f"arm{place % _STYLES}",
                x=np.arange(1, len(order) + 1, dtype=np.float64),
                y=values[place, order],
                marker=_MARKERS[place % len(_MARKERS)],
            )
            for place, name in enumerate(ranking.names)
        ]
        title = f"{metric} of each case"
        chart = Chart(title=title, y_label=metric, lines=lines, x_label="case, in the order of the mean over the sets")
        figures.append(
            f"<figure>{draw_chart(chart)}<figcaption>{escape(title)}, mean over regions.</figcaption></figure>"
        )
    return f'<div class="charts">{"".join(figures)}</div>'


def _worst_html(ranking: Ranking) -> str:
    metric = ranking.metrics[0]
    values = ranking.by_case(metric)
    worst = values.max(axis=0) * -1 if is_lower_better(metric) else values.min(axis=0)
    rows = []
    for place in np.argsort(worst, kind="stable")[:_WORST]:
        row = [escape(ranking.cases[place])]
        for one in range(len(ranking.names)):
            shown = [f"{ranking.by_case(m)[one, place]:.3f}" for m in ranking.metrics]
            row.append(" / ".join(shown))
        rows.append(row)
    return table_html("worst", ["Case", *(escape(name) for name in ranking.names)], rows) + note(
        f"The cases with the worst {metric} of any set, mean over regions; in each cell {' / '.join(ranking.metrics)}."
    )
