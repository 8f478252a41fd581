"""``znormseg evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal


def evaluate(
    *,
    predictions: Annotated[
        Path,
        typer.Argument(metavar="PREDICTIONS", help="Folder of label maps: <case>.nii.gz, <case>_seg, case folders."),
    ],
    references: Annotated[
        Path, typer.Argument(metavar="REFERENCES", help="Folder of expert label maps, named in any of these ways.")
    ],
    resample: Annotated[
        bool, typer.Option("--resample", help="Bring predictions on other grids to those of their references.")
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="NAME[,NAME]", help=f"{terminal.LABELS_HELP} Two: of PREDICTIONS and of REFERENCES."
        ),
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that lead out of the folders.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table as CSV.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON on stdout.")] = False,
) -> None:
    """Score predictions against references: Dice, HD95, sensitivity, specificity, volumes by region and case."""
    from app.evaluation.evaluate import evaluate as score  # noqa: PLC0415 - slow to import, not needed for the help
    from app.evaluation.evaluate import rows, write_table  # noqa: PLC0415

    first, comma, second = (labels or "").partition(",")
    conventions = (first or None, (second if comma else first) or None)
    scores = score(predictions, references, resample=resample, labels=conventions, follow_links=follow_links)
    if as_json:
        terminal.json_result(scores.to_json())
    else:
        terminal.result(terminal.table(rows(scores)))
    if out is not None:
        write_table(scores, out)
    for case, text in scores.failures.items():
        terminal.say(f"znormseg: {case}: {text}")
    if scores.resampled:
        count = len(scores.resampled)
        what = "prediction was resampled to its" if count == 1 else "predictions were resampled to their"
        terminal.say(f"{count} {what} reference's grid: {_some(scores.resampled)}")
    for what, ids in (("prediction", scores.missing_predictions), ("reference", scores.missing_references)):
        if ids:
            terminal.say(f"no {what} for {len(ids)} cases: {_some(ids)}")
    if scores.failures:
        from app.errors import EXIT_SOME_FAILED  # noqa: PLC0415

        raise typer.Exit(EXIT_SOME_FAILED)


def _some(ids: tuple[str, ...]) -> str:
    """The first few case ids."""
    return ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
