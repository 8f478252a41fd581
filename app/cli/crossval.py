"""``znormseg crossval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import options, terminal
from app.cli.presence import presence_lines

if TYPE_CHECKING:
    from app.experiments.crossval.run import CrossValidation

EXAMPLES = """\
znormseg crossval BraTS2021 OUT --folds 5 --config resunet
znormseg predict OUT/ensemble NEW_CASES PREDICTIONS"""

_hardware = options.panel("Hardware")


def crossval(
    *,
    data: options.DataSets,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output folder; the same command resumes an interrupted job.")
    ],
    config: options.Config = None,
    overrides: options.Overrides = None,
    folds: Annotated[
        int | None,
        options.panel("Input")(
            "--folds",
            "-k",
            help="Number of folds, 2 to 20, split by patient; default: 5, or as many as ENSEMBLE has.",
        ),
    ] = None,
    weights: options.Weights = None,
    labels: options.LabelsOfEach = None,
    follow_links: options.FollowLinks = False,
    init_from: Annotated[
        Path | None,
        options.panel("Start from another cross-validation")(
            metavar="ENSEMBLE",
            help="Start each fold from the network of that fold in the ensemble of an earlier cross-validation of the "
            "same cases; its folds are kept.",
        ),
    ] = None,
    devices: Annotated[
        str | None, _hardware(help="Train folds in parallel, one process per device, such as cuda:0,cuda:1.")
    ] = None,
    jobs: Annotated[
        int | None, _hardware(help="Number of folds to train in parallel on the config's device; default: 1.")
    ] = None,
) -> None:
    """Cross-validate: train a network per fold, tune post-processing, build an ensemble.

    Each case is predicted by the network that was not trained on it. Thresholds, minimum component sizes and the
    minimum volume of enhancing tumour are tuned on these predictions. Writes OUT/ensemble, which predict accepts like
    a run, OUT/crossval.html, crossval.json and crossval.csv. With --config presence, thresholds and calibration of the
    probabilities are tuned instead. If interrupted, run the same command to resume.
    """
    from app.config.load import load_config
    from app.experiments.crossval.plan import require_ensemble
    from app.experiments.crossval.presence import PresenceCrossValidation
    from app.experiments.crossval.run import cross_validate
    from app.reports.crossval import write_crossval_page
    from app.reports.presence import write_presence_page
    from app.training.pretrained import sections_of

    settings = [*(overrides or ()), *options.weights_override(weights, overrides)]
    source = options.data_sets(data, labels, follow_links=follow_links)
    init_from = None if init_from is None else options.installed_model(init_from)
    # Without --config, use the ensemble's network and patch size, as train --init-from does.
    sections = None
    if init_from is not None:
        require_ensemble(init_from)
        sections = sections_of(init_from / "fold-0") if config is None else None
    settings_of_folds = load_config(config or "laptop", settings, sections=sections)
    if settings_of_folds.task.name == "presence":
        options.refuse(init_from is not None, "--init-from is for segmentations; presence starts from random weights")
    with terminal.watched() as on_progress:
        outcome = cross_validate(
            source,
            out,
            settings_of_folds,
            folds=folds,
            devices=devices,
            jobs=jobs,
            init_from=init_from,
            on_progress=on_progress,
        )
        if isinstance(outcome, PresenceCrossValidation):
            write_presence_page(outcome.scores, outcome.page)
            lines = presence_lines(outcome)
        else:
            write_crossval_page(outcome)
            lines = _lines(outcome)
    terminal.result(outcome.content, *lines)


def _lines(outcome: CrossValidation) -> list[str]:
    from app.experiments.runs import backends_sentence

    keys = ("mean", "WT", "TC", "ET")
    spread = outcome.raw.spread()
    rows = [["fold", *keys]]
    for fold in range(len(outcome.content["folds"])):
        means = outcome.raw.fold_means(fold)
        rows.append([f"fold {fold}", *(f"{means[key]:.3f}" for key in keys)])
    rows.append(["all", *(f"{spread[key].mean:.3f}" for key in keys)])
    rows.append(["SD of cases", *("-" if (sd := spread[key].sd_cases) is None else f"{sd:.3f}" for key in keys)])
    tuning = outcome.tuning
    lines = [
        "Dice of cases that a fold's network was not trained on, without post-processing",
        terminal.table(rows),
        f"predictions: {backends_sentence(outcome.content['out_of_fold'])}",
        f"post-processing: {tuning.chosen.sentence()}",
        f"gain {tuning.after - tuning.before:+.4f} on the cases it was chosen on; "
        f"estimated {tuning.estimated_gain:+.4f} on others",
    ]
    for region, one in outcome.calibrated.regions.items():
        covered = "" if one.coverage is None else f"; volume interval covers {one.coverage:.0%}"
        lines.append(
            f"calibration {region}: temperature {one.temperature:.2f} (fitted {one.fitted:.2f}); "
            f"ECE {one.before.ece:.4f} -> {one.after.ece:.4f} on folds it was not fitted on{covered}"
        )
    return [
        *lines,
        f"the page with curves and worst cases: {outcome.page}",
        f"next: znormseg predict {outcome.ensemble} CASES OUTPUT",
    ]
