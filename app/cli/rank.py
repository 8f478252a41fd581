"""``znormseg rank``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from app.evaluation.ranking.rank import Ranking
    from app.evaluation.ranking.scores import Scored

EXAMPLES = """\
znormseg rank OURS THEIRS --references REFERENCES --out ranking
znormseg rank a.csv b.csv c.csv"""

_SHOWN = 5


def rank_command(
    *,
    sets: Annotated[
        list[Path],
        typer.Argument(
            metavar="SETS", help="Two or more folders of label maps, or tables from evaluate (.csv, .json)."
        ),
    ],
    references: Annotated[
        Path | None, typer.Option("--references", "-r", help="Folder of expert label maps, to score folders against.")
    ] = None,
    rules: Annotated[
        str | None, typer.Option("--rules", metavar="YEAR", help="Score folders as evaluate --rules does.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="With --rules: task, as in evaluate; default: GLI.")
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Metrics to rank by, such as dice,sensitivity; default: Dice and HD95, lesion-wise if available.",
        ),
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="NAME[,NAME]", help=f"{terminal.LABELS_HELP} Give two for SETS and REFERENCES."
        ),
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside the folders.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option("--page", help="Write an HTML page with plots by case and the worst cases.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write ranks and scores by case to a CSV file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the ranking as JSON on stdout.")] = False,
) -> None:
    """Rank several sets of predictions for the same cases, as BraTS does.

    Reports mean ranks, paired tests and bootstrap intervals.
    """
    if task is not None and rules is None:
        raise typer.BadParameter("--task goes with --rules")
    if rules is not None and references is None:
        raise typer.BadParameter("--rules goes with --references")
    if labels is not None and references is None:
        raise typer.BadParameter("--labels goes with --references")
    from app.evaluation.brats.challenge import challenge_rules
    from app.evaluation.evaluate import require_table_place
    from app.evaluation.ranking.rank import difference_rows, rank_rows, write_rank_table
    from app.evaluation.ranking.rank import rank as rank_sets
    from app.evaluation.ranking.scores import load
    from app.reports.ranking import write_ranking_page
    from data.datasets.source import DataSource

    chosen = None if rules is None else challenge_rules(rules, task or "GLI")
    for place in (page, out):
        if place is not None:
            require_table_place(place)
    with terminal.watched() as on_progress:
        ready = terminal.by_case(on_progress, "scoring")
        of_sets, of_references = terminal.conventions(labels)
        sources = [DataSource(path, labels=of_sets, follow_links=follow_links) for path in sets]
        truth = None if references is None else DataSource(references, labels=of_references, follow_links=follow_links)
        scored = load(sources, truth, chosen, on_case=ready)
    _tell_failures(scored)
    ranking = rank_sets(scored, tuple(name.strip() for name in metrics.split(",")) if metrics else ())
    if as_json:
        terminal.json_result(ranking.to_json())
    else:
        terminal.result(terminal.table(rank_rows(ranking)))
        terminal.result("")
        terminal.result(terminal.table(difference_rows(ranking)))
    if out is not None:
        write_rank_table(ranking, out)
    if page is not None:
        write_ranking_page(page, ranking)
    _end(ranking)


def _tell_failures(scored: Sequence[Scored]) -> None:
    """Print why cases could not be scored, before ranking: if no case is left, ranking fails for these reasons."""
    for one in scored:
        for case, text in one.failures.items():
            terminal.say(f"znormseg: {one.name}: {case}: {text}")


def _end(ranking: Ranking) -> None:
    """List the cases that were left out; exit with code 6 if a case could not be scored."""
    if ranking.left_out:
        shown = ", ".join(ranking.left_out[:_SHOWN]) + (" ..." if len(ranking.left_out) > _SHOWN else "")
        terminal.say(f"left out, not scored in all of them: {len(ranking.left_out)} cases: {shown}")
    if ranking.failures:
        from app.errors import EXIT_SOME_FAILED

        raise typer.Exit(EXIT_SOME_FAILED)
