"""``znormseg compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import options, terminal

if TYPE_CHECKING:
    from app.experiments.comparison.compare import Comparison

EXAMPLES = "znormseg compare BraTS2021 OUT --arms none,clip,znorm --seeds 3"

_comparison, _runs = options.panel("Comparison"), options.panel("Runs")


def compare_command(
    *,
    data: options.Data,
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output folder; the same command resumes an interrupted comparison.")
    ],
    arms: Annotated[
        str,
        _comparison(
            help="Rules to compare, as in gradient.transform: none, clip, clip-value, centralize, adaptive-clip, "
            "scale, znorm. bgn normalises gradients inside the network (network.backward_normalization=[auto]), "
            "bgn-znorm does both."
        ),
    ] = "none,clip,centralize,znorm",
    variants: Annotated[
        list[str] | None,
        _comparison(
            "--variant",
            metavar="NAME:KEY=VALUE",
            help="Define another arm, to be listed in --arms by its NAME: znorm with one changed key, such as "
            "everything:gradient.znorm.output_block=none; may be repeated.",
        ),
    ] = None,
    optimizers: Annotated[str, _comparison(help="adamw, sgd, or adamw,sgd for both.")] = "adamw",
    baseline: Annotated[
        str | None, _comparison(help="Arm to compare the others with; default: clip, or else the first arm.")
    ] = None,
    target_dice: Annotated[
        float | None, _comparison(help="Validation Dice to count the steps to; default: 90% of the best arm's last.")
    ] = None,
    seeds: Annotated[int, _runs(help="Number of runs per arm at its best learning rate.")] = 3,
    first_seed: Annotated[int, _runs(help="First seed; the others count up from it. Another one makes new runs.")] = 0,
    steps: Annotated[int, _runs(help="Optimiser steps per run.")] = 500,
    learning_rates: Annotated[
        list[str] | None,
        _runs(
            metavar="RATES",
            help="Peak learning rates to try for every arm, or sgd=1e-2,1e-1 for one optimizer; may be repeated. "
            "Default: 1e-3,3e-3,1e-2,3e-2 for adamw and 1e-3,1e-2,1e-1,1 for sgd.",
        ),
    ] = None,
    config: options.Config = None,
    overrides: options.Overrides = None,
    fold: Annotated[
        int | None,
        options.panel("Input")(
            "--fold", "-f", help="Test fold, 0 (default) to 4, split by patient; the next fold validates."
        ),
    ] = None,
    split: Annotated[
        Path | None,
        options.panel("Input")(
            help='JSON file to use instead of a fold: {"train": [ids], "validation": [ids], "test": [ids]}.'
        ),
    ] = None,
    labels: options.Labels = None,
    follow_links: options.FollowLinks = False,
) -> None:
    """Compare gradient rules fairly, with curves, Dice, statistics and a verdict.

    All arms share cases, initial weights and batches, and each tries the same number of learning rates. The first seed
    tries every rate, and the validation cases select one; the final Dice is measured on test cases that were not used
    for any choice. Writes OUT/compare.html, compare.json and compare.csv. If interrupted, run the same command to
    resume.
    """
    options.refuse(split is not None and fold is not None, "give either --fold or --split")
    from app.experiments.comparison.compare import compare as compare_arms
    from app.experiments.comparison.plan import plan_comparison
    from app.reports.comparison import write_comparison_page
    from data.datasets.source import DataSource

    plan = plan_comparison(
        config=config or "laptop",
        overrides=overrides or (),
        arms=_names(arms),
        optimizers=_names(optimizers),
        seeds=seeds,
        steps=steps,
        rates=learning_rates or (),
        baseline=baseline,
        target_dice=target_dice,
        variants=variants or (),
        first_seed=first_seed,
    )
    with terminal.watched() as on_progress:
        outcome = compare_arms(
            DataSource(data, labels=labels, follow_links=follow_links),
            out,
            plan,
            fold=fold or 0,
            split_file=split,
            on_progress=on_progress,
        )
        write_comparison_page(outcome)
    terminal.result(outcome.content, *_lines(outcome))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _lines(outcome: Comparison) -> list[str]:
    config = outcome.results.plan.config
    names = ("mean", *config.outputs)
    rows = [["arm", "rate", *names, "s/step"]]
    rows += [
        [
            f"{arm.arm}, {arm.optimizer}",
            f"{arm.rate:g}",
            *(f"{arm.dice[name]:.3f}" for name in names),
            "-" if arm.seconds_per_step is None else f"{arm.seconds_per_step:.3f}",
        ]
        for arm in outcome.analysis.arms
    ]
    part = "test" if outcome.analysis.tested else "validation"
    return [
        f"{config.measure.in_words} of the {part} cases, mean over seeds",
        terminal.table(rows),
        *outcome.analysis.verdicts(),
        *outcome.analysis.caveats,
        f"the page with curves and tables: {outcome.page}",
    ]
