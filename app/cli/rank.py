"""``znormseg rank``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options, terminal

EXAMPLES = """\
znormseg rank OURS THEIRS --references REFERENCES --out ranking
znormseg rank a.csv b.csv c.csv"""


def rank_command(
    *,
    sets: Annotated[
        list[Path],
        typer.Argument(
            metavar="SETS", help="Two or more folders of label maps, or tables from evaluate (.csv, .json)."
        ),
    ],
    references: Annotated[
        Path | None,
        options.panel("Input")("--references", "-r", help="Folder of expert label maps, to score folders against."),
    ] = None,
    labels: options.LabelsOfTwo = None,
    follow_links: options.FollowLinks = False,
    rules: options.Rules = None,
    task: options.Task = None,
    metrics: Annotated[
        str | None,
        options.panel("Scores")(
            help="Metrics to rank by, such as dice,sensitivity; default: Dice and HD95, lesion-wise if available."
        ),
    ] = None,
    page: options.Page = None,
    out: options.Table = None,
) -> None:
    """Rank several sets of predictions for the same cases, as BraTS does.

    Reports mean ranks, paired tests and bootstrap intervals.
    """
    options.refuse(rules is not None and references is None, "--rules requires --references")
    options.refuse(labels is not None and references is None, "--labels requires --references")
    from app.evaluation.ranking.rank import difference_rows, rank_rows, write_rank_table
    from app.evaluation.ranking.rank import rank as rank_sets
    from app.evaluation.ranking.scores import load
    from app.reports.ranking import write_ranking_page
    from data.datasets.source import DataSource

    chosen = options.challenge(rules, task)
    of_sets, of_references = options.conventions(labels)
    sources = [DataSource(path, labels=of_sets, follow_links=follow_links) for path in sets]
    truth = None if references is None else DataSource(references, labels=of_references, follow_links=follow_links)
    with terminal.watched() as on_progress:
        ready = terminal.by_case(on_progress, "scoring")
        scored = load(sources, truth, chosen, on_case=ready)
    failures = {f"{one.name}: {case}": text for one in scored for case, text in one.failures.items()}
    terminal.complain(failures)  # before ranking: if no case is left, ranking fails for these reasons
    ranking = rank_sets(scored, tuple(name.strip() for name in metrics.split(",")) if metrics else ())
    tables = [terminal.table(rank_rows(ranking)), "", terminal.table(difference_rows(ranking))]
    terminal.result(ranking.to_json(), *tables)
    if out is not None:
        write_rank_table(ranking, out)
    if page is not None:
        write_ranking_page(page, ranking)
    if ranking.left_out:
        terminal.say(
            f"{len(ranking.left_out)} cases left out, as not every set has scores for them: "
            f"{terminal.some(ranking.left_out)}"
        )
    terminal.exit_if_failed(failures)
