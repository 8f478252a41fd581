"""``znormseg compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from app.experiments.comparison.compare import Comparison

EXAMPLES = "znormseg compare BraTS2021 OUT --arms none,clip,znorm --seeds 3"

#: Options by task, as the help shows them.
PANELS = {
    "What is compared": ("arms", "variants", "optimizers", "baseline", "target_dice"),
    "Runs": ("seeds", "first_seed", "steps", "learning_rates"),
    "Config": ("config", "overrides"),
    "Cases": ("fold", "split", "labels", "follow_links"),
    "Output": ("as_json",),
}


def compare_command(
    *,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="Data set with label maps: see data check.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder for the comparison; the same command goes on in it.")
    ],
    arms: Annotated[
        str,
        typer.Option(
            "--arms",
            help="Gradient rules, names of gradient.transform: none, clip, clip-value, centralize, "
            "adaptive-clip, scale, znorm.",
        ),
    ] = "none,clip,centralize,znorm",
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant",
            metavar="NAME:KEY=VALUE",
            help="An arm of your own, to be named in --arms: the config with znorm and this change, such as "
            "everything:gradient.znorm.output_block=none; may be repeated.",
        ),
    ] = None,
    optimizers: Annotated[str, typer.Option("--optimizers", help="adamw, sgd or both.")] = "adamw",
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of each arm at its best learning rate.")] = 3,
    first_seed: Annotated[
        int, typer.Option("--first-seed", help="Seeds count up from it; another one makes fresh runs.")
    ] = 0,
    steps: Annotated[int, typer.Option("--steps", help="Optimiser steps of every run.")] = 500,
    learning_rates: Annotated[
        list[str] | None,
        typer.Option(
            "--learning-rates",
            metavar="RATES",
            help="Peak rates that every arm is tried with, or sgd=1e-2,1e-1 for one optimizer; may be repeated. "
            "Default 1e-3,3e-3,1e-2,3e-2 for adamw and 1e-3,1e-2,1e-1,1 for sgd.",
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option("--baseline", help="Arm the others are compared with; default clip, else the first."),
    ] = None,
    target_dice: Annotated[
        float | None,
        typer.Option("--target-dice", help="Validation Dice to count steps to; default 90% of the best arm's last."),
    ] = None,
    config: Annotated[
        str, typer.Option("--config", "-c", help="laptop, unet, resunet, resunet-znorm, large, or a YAML file.")
    ] = "laptop",
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one key of the config; may be repeated."),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option("--fold", "-f", help="Fold that tests, 0 (default) to 4, by patient; the next one validates."),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option("--split", help='JSON instead of a fold: {"train": [ids], "validation": [ids], "test": [ids]}.'),
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help=terminal.LABELS_HELP)] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that lead out of DATA.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Compare gradient rules fairly: curves, Dice, statistics, a verdict.

    Cases, initial weights and batches are the same in every arm, and each arm gets as many learning rates. The first
    seed tries every rate and validation cases choose; the final Dice is of test cases that chose nothing. Writes
    OUT/compare.html, compare.json and compare.csv. Interrupted, the same command goes on where it was.
    """
    if split is not None and fold is not None:
        raise typer.BadParameter("give either --fold or --split")
    from app.experiments.comparison.compare import compare as compare_arms
    from app.experiments.comparison.plan import plan_comparison
    from app.reports.comparison import write_comparison_page

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
            data,
            out,
            plan,
            fold=fold or 0,
            split_file=split,
            labels=labels,
            follow_links=follow_links,
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
