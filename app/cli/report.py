"""``znormseg report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options, terminal

EXAMPLES = """\
znormseg report RUN PAGES
znormseg report PREDICTIONS PAGES --references REFERENCES"""

_predictions = options.panel("Pages of predictions")


def report_command(
    *,
    what: Annotated[
        Path,
        typer.Argument(metavar="WHAT", help="Folder of a run, predictions, a comparison or a cross-validation."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the pages; open OUT/index.html.")],
    images: Annotated[
        Path | None,
        _predictions(metavar="DATA", help="Data set with their scans; default: the files they were predicted from."),
    ] = None,
    references: Annotated[
        Path | None, _predictions(metavar="DATA", help="Expert label maps, for scores and outlines.")
    ] = None,
    labels: options.Labels = None,
    follow_links: options.FollowLinks = False,
) -> None:
    """Write HTML pages that open offline, in any browser, on a phone and in print.

    For a run: curves, validation cases and gradients. For predictions: a table to sort and filter, and a page per case
    with pictures and a viewer. For a comparison or a cross-validation: its page, rebuilt.
    """
    options.refuse(labels is not None and references is None, "--labels requires --references")
    from app.reports.report import report
    from data.datasets.source import DataSource

    with terminal.watched() as on_progress:
        written = report(
            what,
            out,
            images=None if images is None else DataSource(images, follow_links=follow_links),
            references=None if references is None else DataSource(references, labels=labels, follow_links=follow_links),
            on_progress=on_progress,
        )
    pages = f", with {len(written.cases)} case pages" if written.cases else ""
    terminal.result(written.to_json(), f"{written.kind}: {written.page}{pages}")
    if written.failures:
        terminal.say(f"znormseg: {len(written.failures)} cases have no page: {', '.join(written.failures)}")
    terminal.exit_if_failed(written.failures)
