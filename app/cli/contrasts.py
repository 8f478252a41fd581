"""``znormseg contrasts``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from app.cli import options, terminal

EXAMPLES = """\
znormseg contrasts RUN DATA
znormseg contrasts RUN DATA --cases all --out contrasts.csv"""


def contrasts_command(
    *,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Folder of a run with augment.contrast_dropout, or of an ensemble.")
    ],
    data: options.Data,
    cases: Annotated[
        Literal["unseen", "validation", "all"],
        options.panel("Input")(help="Cases to score: unseen means not trained on."),
    ] = "unseen",
    labels: options.Labels = None,
    follow_links: options.FollowLinks = False,
    device: options.Device = "auto",
    out: options.Table = None,
) -> None:
    """Measure how well a run predicts when contrasts are missing.

    Predicts the cases from each of the fifteen subsets of T1, T1c, T2 and FLAIR, as if the other files did not exist,
    and reports the mean Dice for each subset.
    """
    from app import NOTICE
    from app.inference.backends.choose import choose_backend
    from app.inference.ensemble import load_predictor
    from app.inference.subsets import choose_cases, convention_for, score_subsets, subset_rows, write_subset_table
    from data.datasets.source import DataSource

    runtime = choose_backend("auto", options.runtime_config(device))
    run = options.installed_model(run)
    with terminal.watched() as on_progress:
        model = load_predictor(run, runtime)
        found = tuple(DataSource(data, follow_links=follow_links).find_cases().values())
        scores = score_subsets(
            model,
            choose_cases(run, found, cases),
            runtime,
            nan_to_zero=model.config.data.nan_to_zero,
            convention=convention_for(model, found, labels=labels),
            on_progress=on_progress,
        )
    terminal.result(scores.to_json(), terminal.table(subset_rows(scores)), NOTICE)
    if out is not None:
        write_subset_table(scores, out)
    terminal.complain(scores.failures)
    terminal.exit_if_failed(scores.failures)
