"""The page of a ranking: one self-contained HTML file that needs neither network nor scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from markupsafe import Markup

from app.evaluation.ranking.rank import Ranking, difference_rows, is_lower_better, p_text, rank_rows
from app.html.chart import Chart, arm_line, draw_chart
from app.html.elements import Row, charts_html, document, figure, write_html
from app.html.templates import fill

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
    body = fill(
        "ranking.html",
        names=list(ranking.names),
        metrics=list(ranking.metrics),
        ranks=[row[:-1] for row in rank_rows(ranking)[1:]],
        tests=[
            [f"{test.first} - {test.second}", f"{test.difference:+.2f}", p_text(test.p), p_text(test.p_holm)]
            for test in ranking.tests
        ],
        differences=difference_rows(ranking)[1:],
        no_tests=sorted({difference.no_test for difference in ranking.differences if difference.no_test}),
        charts=charts_html([_chart(metric, ranking) for metric in ranking.metrics]),
        worst=_worst_rows(ranking),
    )
    facts = [("sets", ", ".join(ranking.names)), ("cases left out, not scored in all sets", str(len(ranking.left_out)))]
    return document(title="Ranking", lead=lead, facts=facts, body=body, styles=("page.css", "arms.css"))


def _chart(metric: str, ranking: Ranking) -> Markup:
    values = ranking.by_case(metric)
    order = np.argsort(values.mean(axis=0), kind="stable")
    x = np.arange(1, len(order) + 1, dtype=np.float64)
    title = f"{metric} of each case"
    chart = Chart(
        title=title,
        y_label=metric,
        lines=[arm_line(place, name, x, values[place, order]) for place, name in enumerate(ranking.names)],
        x_label="case, ordered by the mean over the sets",
    )
    return figure(draw_chart(chart), f"{title}, mean over regions.")


def _worst_rows(ranking: Ranking) -> list[Row]:
    values = ranking.by_case(ranking.metrics[0])
    worst = values.max(axis=0) * -1 if is_lower_better(ranking.metrics[0]) else values.min(axis=0)
    scores = np.stack([ranking.by_case(metric) for metric in ranking.metrics], axis=-1)
    return [
        [ranking.cases[place], *(" / ".join(f"{value:.3f}" for value in one) for one in scores[:, place])]
        for place in np.argsort(worst, kind="stable")[:_WORST]
    ]
