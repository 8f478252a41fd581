"""The page of a ranking: one self-contained HTML file that needs neither network nor scripts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Final

import numpy as np

from app.evaluation.ranking.rank import Ranking, difference_rows, is_lower_better, p_text, rank_rows
from app.html.chart import Chart, arm_line, draw_chart
from app.html.elements import DASH, document, figure, note, section, table_html, write_html

_WORST: Final = 10


def write_ranking_page(path: Path, ranking: Ranking) -> None:
    """Write the page atomically.

    Args:
        path: file to write.
        ranking: content of the page.
    """
    write_html(path, render_ranking(ranking))


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
    heads, *rows = rank_rows(ranking)
    tests = [
        [f"{test.first} - {test.second}", f"{test.difference:+.2f}", p_text(test.p), p_text(test.p_holm)]
        for test in ranking.tests
    ]
    return (
        _table("ranks", ["Set", "Mean rank", *heads[2:-1]], [row[:-1] for row in rows])
        + note(
            "Ranked within each case, region and metric, 1 the best, ties shared; averaged over each case, then over "
            "cases. The other columns are means over regions and cases; hd95_mm is in mm; of distances lower is better."
        )
        + _table("ranks", ["Difference", "Mean rank", "p", "p, Holm"], tests)
        + note("p: permutation test, the ranks of two sets swapped case by case at random, 10,000 times, seed 0.")
    )


def _differences_html(ranking: Ranking) -> str:
    why = sorted({d.no_test for d in ranking.differences if d.no_test})
    missing = f" {DASH}: {escape('; '.join(why))}." if why else ""
    heads = ["Difference", "Metric", "Mean", "95 % interval", "p", "p, Holm"]
    return _table("differences", heads, difference_rows(ranking)[1:]) + (
        '<p class="note">First less second, mean over regions. Interval: percentile bootstrap over cases, '
        "10,000 times, seed 0. p: Wilcoxon signed-rank test over cases; Holm's correction over the pairs of one metric."
        f"{missing}</p>"
    )


def _table(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of texts, which are escaped; a lone dash becomes that of the pages."""
    cells = [[DASH if cell == "-" else escape(cell) for cell in row] for row in rows]
    return table_html(name, [escape(head) for head in heads], cells)


def _charts_html(ranking: Ranking) -> str:
    figures = []
    for metric in ranking.metrics:
        values = ranking.by_case(metric)
        order = np.argsort(values.mean(axis=0), kind="stable")
        x = np.arange(1, len(order) + 1, dtype=np.float64)
        lines = [arm_line(place, name, x, values[place, order]) for place, name in enumerate(ranking.names)]
        title = f"{metric} of each case"
        chart = Chart(title=title, y_label=metric, lines=lines, x_label="case, in the order of the mean over the sets")
        figures.append(figure(draw_chart(chart), f"{escape(title)}, mean over regions."))
    return f'<div class="charts">{"".join(figures)}</div>'


def _worst_html(ranking: Ranking) -> str:
    metric = ranking.metrics[0]
    values = ranking.by_case(metric)
    worst = values.max(axis=0) * -1 if is_lower_better(metric) else values.min(axis=0)
    rows = [
        [
            ranking.cases[place],
            *(
                " / ".join(f"{ranking.by_case(m)[one, place]:.3f}" for m in ranking.metrics)
                for one in range(len(ranking.names))
            ),
        ]
        for place in np.argsort(worst, kind="stable")[:_WORST]
    ]
    return _table("worst", ["Case", *ranking.names], rows) + note(
        f"The cases with the worst {metric} of any set, mean over regions; in each cell {' / '.join(ranking.metrics)}."
    )
