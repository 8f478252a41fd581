"""``znormseg report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal

EXAMPLES = """\
znormseg report RUN PAGES
znormseg report PREDICTIONS PAGES --references REFERENCES"""


def report_command(
    *,
    what: Annotated[
        Path,
        typer.Argument(metavar="WHAT", help="Folder of a run, predictions, a comparison or a cross-validation."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pages; open OUT/index.html.")],
    images: Annotated[
        Path | None,
        typer.Option(
            "--images",
            metavar="DATA",
            help="For predictions: data set with their scans; default: the files they were predicted from.",
        ),
    ] = None,
    references: Annotated[
        Path | None,
        typer.Option(
            "--references", metavar="DATA", help="For predictions: expert label maps, for scores and outlines."
        ),
    ] = None,
    labels: Annotated[
        str | None, typer.Option("--labels", metavar="NAME", help=f"{terminal.LABELS_HELP} Needs --references.")
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside DATA.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as JSON on stdout.")] = False,
) -> None:
    """Write HTML pages that open offline, in any browser, on a phone and in print.

    For a run: curves, validation cases and gradients. For predictions: a table to sort and filter, and a page per case
    with pictures and a viewer. For a comparison or a cross-validation: its page, rebuilt.
    """
    if labels is not None and references is None:
        raise typer.BadParameter("--labels goes with --references")
    from app.reports.report import report as write_report
    from data.datasets.source import DataSource

    with terminal.watched() as on_progress:
        written = write_report(
            what,
            out,
            images=None if images is None else DataSource(images, follow_links=follow_links),
            references=None if references is None else DataSource(references, labels=labels, follow_links=follow_links),
            on_progress=on_progress,
        )
    if as_json:
        terminal.json_result(written.to_json())
    else:
        beside = f", with {len(written.cases)} case pages" if written.cases else ""
        terminal.result(f"{written.kind}: {written.page}{beside}")
    if written.failures:
        from app.errors import EXIT_SOME_FAILED

        terminal.say(f"znormseg: {len(written.failures)} cases have no page: {', '.join(written.failures)}")
        raise typer.Exit(EXIT_SOME_FAILED)
