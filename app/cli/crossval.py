"""``znormseg crossval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from app.experiments.crossval.run import CrossValidation

EXAMPLES = """\
znormseg crossval BraTS2021 OUT --folds 5 --config resunet
znormseg predict OUT/ensemble NEW_CASES PREDICTIONS"""

#: Headings of the help, with the options below each.
PANELS = {
    "Config": ("config", "overrides"),
    "Cases": ("folds", "labels", "follow_links"),
    "Hardware": ("devices", "jobs"),
    "Output": ("as_json",),
}


def crossval(
    *,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Data set with label maps, in a layout that data check recognises.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output folder; the same command resumes an interrupted job.")
    ],
    folds: Annotated[int, typer.Option("--folds", "-k", help="Number of folds, 2 to 20, split by patient.")] = 5,
    config: Annotated[
        str, typer.Option("--config", "-c", help="laptop, unet, resunet, resunet-znorm, or a YAML file.")
    ] = "laptop",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key of the config; may be repeated."),
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help=terminal.LABELS_HELP)] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside DATA.")
    ] = False,
    devices: Annotated[
        str | None,
        typer.Option("--devices", help="Train folds in parallel, one process per device, such as cuda:0,cuda:1."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", help="Number of folds to train in parallel on the config's device; default: 1."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Cross-validate: train a network per fold, tune post-processing, build an ensemble.

    Each case is predicted by the network that was not trained on it. Thresholds, minimum component sizes and the
    minimum volume of enhancing tumour are tuned on these predictions. Writes OUT/ensemble, which predict accepts like
    a run, OUT/crossval.html, crossval.json and crossval.csv. If interrupted, run the same command to resume.
    """
    from app.config.load import load_config
    from app.experiments.crossval.run import cross_validate
    from app.reports.crossval import write_crossval_page
    from data.datasets.source import DataSource

    with terminal.watched() as on_progress:
        outcome = cross_validate(
            DataSource(data, labels=labels, follow_links=follow_links),
            out,
            load_config(config, overrides or ()),
            folds=folds,
            devices=devices,
            jobs=jobs,
            on_progress=on_progress,
        )
        write_crossval_page(outcome)
    if as_json:
        terminal.json_result(outcome.content)
    else:
        _show(outcome)


def _show(outcome: CrossValidation) -> None:
    from app.experiments.runs import backends_sentence

    keys = ("mean", "WT", "TC", "ET")
    spread = outcome.raw.spread()
    rows = [["fold", *keys]]
    for fold in range(len(outcome.content["folds"])):
        means = outcome.raw.fold_means(fold)
        rows.append([f"fold {fold}", *(f"{means[key]:.3f}" for key in keys)])
    rows.append(["all", *(f"{spread[key].mean:.3f}" for key in keys)])
    rows.append(["SD of cases", *("-" if (sd := spread[key].sd_cases) is None else f"{sd:.3f}" for key in keys)])
    terminal.result("Dice of cases that a fold's network has not trained on, without post-processing")
    terminal.result(terminal.table(rows))
    terminal.result(f"predictions: {backends_sentence(outcome.content['out_of_fold'])}")
    tuning = outcome.tuning
    terminal.result(f"post-processing: {tuning.chosen.sentence()}")
    terminal.result(
        f"gain {tuning.after - tuning.before:+.4f} on the cases it was chosen on; "
        f"estimated {tuning.estimated_gain:+.4f} on others"
    )
    for region, one in outcome.calibrated.regions.items():
        covered = "" if one.coverage is None else f"; volume interval covers {one.coverage:.0%}"
        terminal.result(
            f"calibration {region}: temperature {one.temperature:.2f} (fitted {one.fitted:.2f}); "
            f"ECE {one.before.ece:.4f} -> {one.after.ece:.4f} on folds it was not fitted on{covered}"
        )
    terminal.result(f"the page with curves and worst cases: {outcome.page}")
    terminal.result(f"next: znormseg predict {outcome.ensemble} CASES OUTPUT")
