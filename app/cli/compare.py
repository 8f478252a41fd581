"""``znormseg compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from app.experiments.comparison.compare import Comparison

EXAMPLES = "znormseg compare BraTS2021 OUT --arms none,clip,znorm --seeds 3"

#: Headings of the help, with the options below each.
PANELS = {
    "Comparison": ("arms", "variants", "optimizers", "baseline", "target_dice"),
    "Runs": ("seeds", "first_seed", "steps", "learning_rates"),
    "Config": ("config", "overrides"),
    "Cases": ("fold", "split", "labels", "follow_links"),
    "Output": ("as_json",),
}


def compare_command(
    *,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Data set with label maps, in a layout that data check recognises.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Output folder; the same command resumes an interrupted comparison.")
    ],
    arms: Annotated[
        str,
        typer.Option(
            "--arms",
            help="Rules to compare, as in gradient.transform: none, clip, clip-value, centralize, "
            "adaptive-clip, scale, znorm.",
        ),
    ] = "none,clip,centralize,znorm",
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME:KEY=VALUE",
            help="Define another arm, to be listed in --arms by its NAME: znorm with one changed key, such as "
            "everything:gradient.znorm.output_block=none; may be repeated.",
        ),
    ] = None,
    optimizers: Annotated[str, typer.Option("--optimizers", help="adamw, sgd, or adamw,sgd for both.")] = "adamw",
    seeds: Annotated[int, typer.Option("--seeds", help="Number of runs per arm at its best learning rate.")] = 3,
    first_seed: Annotated[
        int, typer.Option("--first-seed", help="First seed; the others count up from it. Another one makes new runs.")
    ] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps per run.")] = 500,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(
            "--learning-rates",
            metavar="RATES",
            help="Peak learning rates to try for every arm, or sgd=1e-2,1e-1 for one optimizer; may be repeated. "
            "Default: 1e-3,3e-3,1e-2,3e-2 for adamw and 1e-3,1e-2,1e-1,1 for sgd.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="Arm to compare the others with; default: clip, or else the first arm."),
    ] = None,
    target_dice: Annotated[
        float | None,
        typer.Option(
            "--target-dice", help="Validation Dice to count the steps to; default: 90% of the best arm's last."
        ),
    ] = None,
    config: Annotated[
        str, typer.Option("--config", "-c", help="laptop, unet, resunet, resunet-znorm, large, or a YAML file.")
    ] = "laptop",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key of the config; may be repeated."),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option("--fold", "-f", help="Test fold, 0 (default) to 4, split by patient; the next fold validates."),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option(
            "--split", help='JSON file to use instead of a fold: {"train": [ids], "validation": [ids], "test": [ids]}.'
        ),
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help=terminal.LABELS_HELP)] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside DATA.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Compare gradient rules fairly, with curves, Dice, statistics and a verdict.

    All arms share cases, initial weights and batches, and each tries the same number of learning rates. The first seed
    tries every rate, and the validation cases select one; the final Dice is measured on test cases that were not used
    for any choice. Writes OUT/compare.html, compare.json and compare.csv. If interrupted, run the same command to
    resume.
    """
    if split is not None and fold is not None:
        raise typer.BadParameter("give either --fold or --split")
    from app.experiments.comparison.compare import compare as compare_arms
    from app.experiments.comparison.plan import plan_comparison
    from app.reports.comparison import write_comparison_page
    from data.datasets.source import DataSource

    plan = plan_comparison(
        config=config,
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
    if as_json:
        terminal.json_result(outcome.content)
    else:
        _show(outcome)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _show(outcome: Comparison) -> None:
    rows = [["arm", "rate", "mean", "WT", "TC", "ET", "s/step"]]
    rows += [
        [
            f"{arm.arm}, {arm.optimizer}",
            f"{arm.rate:g}",
            *(f"{arm.dice[measure]:.3f}" for measure in ("mean", "WT", "TC", "ET")),
            "-" if arm.seconds_per_step is None else f"{arm.seconds_per_step:.3f}",
        ]
        for arm in outcome.analysis.arms
    ]
    terminal.result(f"Dice of the {'test' if outcome.analysis.tested else 'validation'} cases, mean over seeds")
    terminal.result(terminal.table(rows))
    for sentence in (*outcome.analysis.verdicts(), *outcome.analysis.caveats):
        terminal.result(sentence)
    terminal.result(f"the page with curves and tables: {outcome.page}")
