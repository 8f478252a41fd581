"""``znormseg evaluate``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli import options, terminal

EXAMPLES = """\
znormseg evaluate PREDICTIONS REFERENCES
znormseg evaluate PREDICTIONS REFERENCES --resample --out scores.csv
znormseg evaluate PREDICTIONS REFERENCES --rules brats2023 --task GLI"""


def _refer_to_contrasts(given: bool) -> None:
    if given:
        message = "to score a run with missing contrasts, use znormseg contrasts RUN DATA"
        raise typer.BadParameter(message, param_hint="'--contrast-subsets'")


def evaluate_command(
    *,
    predictions: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS", help="Folder of label maps: <case>.nii.gz, <case>_seg.nii.gz or case folders."
        ),
    ],
    references: Annotated[
        Path,
        typer.Argument(metavar="REFERENCES", help="Folder of expert label maps, named in any of these ways."),
    ],
    labels: options.LabelsOfTwo = None,
    follow_links: options.FollowLinks = False,
    resample: Annotated[
        bool,
        options.panel("Input")("--resample", help="Resample predictions to the grids of their references."),
    ] = False,
    nsd_mm: Annotated[
        float | None,
        options.panel("Scores")(min=0, metavar="MM", help="Tolerance of the surface Dice (nsd).  [default: 1]"),
    ] = None,
    rules: options.Rules = None,
    task: options.Task = None,
    out: options.Table = None,
    contrast_subsets: Annotated[  # noqa: ARG001 - its callback does the work
        bool,
        typer.Option("--contrast-subsets", "--cases", "--device", hidden=True, callback=_refer_to_contrasts),
    ] = False,
) -> None:
    """Score predictions against references: Dice, HD95 and more, by region and case.

    Also reports sensitivity, specificity, surface Dice and volumes. To measure what a run loses when contrasts are
    missing, use znormseg contrasts.
    """
    options.refuse(
        rules is not None and (resample or nsd_mm is not None),
        "--resample and --nsd-mm cannot be combined with --rules, which fix the grid and the tolerance",
    )
    options.refuse(nsd_mm is not None and not math.isfinite(nsd_mm), "--nsd-mm takes a distance in mm")
    chosen = options.challenge(rules, task)
    from app import NOTICE
    from app.evaluation.brats.challenge import (
        challenge_remarks,
        challenge_rows,
        evaluate_by_rules,
        write_challenge_table,
    )
    from app.evaluation.evaluate import evaluate, region_remarks, score_rows, write_score_table
    from app.evaluation.metrics import NSD_MM
    from data.datasets.source import DataSource

    of_predictions, of_references = options.conventions(labels)
    predicted = DataSource(predictions, labels=of_predictions, follow_links=follow_links)
    expected = DataSource(references, labels=of_references, follow_links=follow_links)
    content: Any
    write: Callable[[Path], None]
    notes = []
    with terminal.watched() as on_progress:
        ready = terminal.by_case(on_progress, "scoring")
        if chosen is not None:
            official = evaluate_by_rules(predicted, expected, chosen, on_case=ready)
            content, rows, remarks = official.to_json(), challenge_rows(official), challenge_remarks(official)
            write = partial(write_challenge_table, official)
        else:
            scores = evaluate(
                predicted,
                expected,
                resample=resample,
                nsd_mm=NSD_MM if nsd_mm is None else nsd_mm,
                on_case=ready,
            )
            content, rows, remarks = scores.to_json(), score_rows(scores), region_remarks(scores)
            write = partial(write_score_table, scores)
            if ours := scores.made_by_us:
                notes.append(
                    f"znormseg predict wrote references: {terminal.some(ours)}. Are PREDICTIONS and REFERENCES swapped?"
                )
            if moved := scores.resampled:
                what = "prediction was resampled to its" if len(moved) == 1 else "predictions were resampled to their"
                notes.append(f"{len(moved)} {what} reference's grid: {terminal.some(moved)}")
    terminal.result(content, terminal.table(rows), *remarks, NOTICE)
    if out is not None:
        write(out)
    for what in ("prediction", "reference"):
        if ids := content[f"missing_{what}s"]:
            notes += [f"no {what} for {len(ids)} cases: {terminal.some(ids)}"]
    terminal.complain(content["failures"])
    for note in notes:
        terminal.say(note)
    terminal.exit_if_failed(content["failures"])
