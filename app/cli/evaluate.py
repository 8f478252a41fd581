"""``znormseg evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import typer

from app.cli import options, terminal
from app.cli.presence import holds_presence, show_presence_scores

EXAMPLES = """\
znormseg evaluate PREDICTIONS REFERENCES
znormseg evaluate PREDICTIONS REFERENCES --resample --out scores.csv
znormseg evaluate PREDICTIONS REFERENCES --rules brats2023 --task GLI"""


_presence = options.panel("Scores of presence")


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
    specificity: Annotated[
        float | None,
        _presence(min=0, max=1, help="State the sensitivity at this specificity.  [default: 0.9]"),
    ] = None,
    page: options.PresencePage = None,
    contrast_subsets: Annotated[  # noqa: ARG001 - its callback does the work
        bool,
        typer.Option("--contrast-subsets", "--cases", "--device", hidden=True, callback=_refer_to_contrasts),
    ] = False,
) -> None:
    """Score predictions against references: Dice, HD95 and more, by region and case.

    Also reports sensitivity, specificity, surface Dice and volumes. Predictions of a presence run get AUROC, AUPRC,
    Brier score and more; REFERENCES may then be a CSV file of 0 and 1. To measure what a run loses when contrasts are
    missing, use znormseg contrasts.
    """
    options.refuse(
        rules is not None and (resample or nsd_mm is not None),
        "--resample and --nsd-mm cannot be combined with --rules, which fix the grid and the tolerance",
    )
    if holds_presence(predictions):
        for option, value in {"--resample": resample, "--nsd-mm": nsd_mm, "--rules": rules, "--task": task}.items():
            given = value is not None and value is not False
            options.refuse(given, f"{option} is for label maps; {predictions} holds probabilities")
        show_presence_scores(
            predictions, references, labels, follow_links=follow_links, specificity=specificity, out=out, page=page
        )
        return
    for name, extra in {"--specificity": specificity, "--page": page}.items():
        options.refuse(extra is not None, f"{name} is for the predictions of a presence run, not for label maps")
    options.refuse(nsd_mm is not None and not math.isfinite(nsd_mm), "--nsd-mm takes a distance in mm")
    chosen = options.challenge(rules, task)
    from app import NOTICE
    from app.evaluation.brats.challenge import evaluate_by_rules
    from app.evaluation.evaluate import evaluate
    from app.evaluation.metrics import NSD_MM
    from app.evaluation.tables import FolderScores
    from data.datasets.source import DataSource

    of_predictions, of_references = options.conventions(labels)
    predicted = DataSource(predictions, labels=of_predictions, follow_links=follow_links)
    expected = DataSource(references, labels=of_references, follow_links=follow_links)
    with terminal.watched() as on_progress:
        ready = terminal.by_case(on_progress, "scoring")
        scores: FolderScores
        if chosen is not None:
            scores = evaluate_by_rules(predicted, expected, chosen, on_case=ready)
        else:
            tolerance_mm = NSD_MM if nsd_mm is None else nsd_mm
            scores = evaluate(predicted, expected, resample=resample, nsd_mm=tolerance_mm, on_case=ready)
    terminal.result(scores.to_json(), terminal.table(scores.rows()), *scores.remarks(), NOTICE)
    if out is not None:
        scores.write_table(out)
    terminal.complain(scores.failures)
    for note in scores.notes():
        terminal.say(note)
    terminal.exit_if_failed(scores.failures)
