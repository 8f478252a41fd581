"""``znormseg train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal

EXAMPLES = """\
znormseg train BraTS2021 RUN
znormseg train BraTS2021 RUN --config resunet --set training.hours=12 --fold 1
znormseg train BraTS2021 RUN --resume --set training.hours=24
znormseg train MYCASES TUNED --init-from RUN --set training.hours=1"""

#: Headings of the help, with the options below each.
PANELS = {
    "Config": ("config", "overrides"),
    "Cases": ("fold", "split", "labels", "nan_to_zero", "follow_links"),
    "Resume or start from another run": ("resume", "allow", "init_from"),
}


def train(
    *,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Data set with label maps, in a layout that data check recognises.")
    ],
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder; empty or not existing yet, except with --resume.")
    ],
    config: Annotated[
        str | None,
        typer.Option("--config", "-c", help="laptop (default), unet, resunet, resunet-znorm, large, or a YAML file."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override one key of the config; may be repeated."),
    ] = None,
    fold: Annotated[
        str | None,
        typer.Option(
            "--fold",
            "-f",
            help="Validation fold, 0 (default) to 4, split by patient; 'all' trains on every case.",
        ),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option("--split", help='JSON file to use instead of a fold: {"train": [ids], "validation": [ids]}.'),
    ] = None,
    nan_to_zero: Annotated[
        bool,
        typer.Option(
            "--nan-to-zero", help="Replace NaN and infinite voxels with 0; same as --set data.nan_to_zero=true."
        ),
    ] = False,
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help=terminal.LABELS_HELP)] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(
            "--init-from",
            metavar="RUN",
            help="Start from the best weights of another run; without --config, also use its network and patch size.",
        ),
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside DATA.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted run, or a finished run with a longer budget.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            "--allow", metavar="SECTION.KEY", help="Allow --resume to change this key of the config; may be repeated."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Train a network on a data set.

    The config sets the budget; override it with --set training.hours=2 or --set training.steps=5000.
    """
    number = _fold(fold)
    if split is not None and fold is not None:
        raise typer.BadParameter("give either --fold or --split")
    if resume and (split is not None or fold is not None):
        raise typer.BadParameter("a resumed run keeps its split; leave out --fold and --split")
    if resume and labels is not None:
        raise typer.BadParameter("a resumed run keeps its label convention; leave out --labels")
    if allow and not resume:
        raise typer.BadParameter("--allow is for --resume; a new run takes any config")
    if resume and init_from is not None:
        raise typer.BadParameter("a resumed run goes on from its own weights; leave out --init-from")
    overrides = [*(overrides or ()), *(["data.nan_to_zero=true"] if nan_to_zero else [])]
    from app.config.load import load_config
    from app.training import run as training
    from app.training.distributed import joined_processes
    from app.training.pretrained import sections_of
    from data.datasets.source import DataSource

    source = DataSource(data, labels=labels, follow_links=follow_links)
    with terminal.watched() as on_progress, joined_processes() as world:
        if resume:
            base = config or str(run / "config.yaml")
            asked = load_config(base, overrides) if config or (overrides and (run / "config.yaml").exists()) else None
            outcome = training.resume(
                source,
                run,
                asked,
                allow=allow or (),
                world=world,
                on_progress=on_progress,
            )
        else:
            sections = sections_of(init_from) if init_from is not None and config is None else None
            settings = load_config(config or "laptop", overrides, sections=sections)
            outcome = training.start(
                source,
                run,
                settings,
                fold=number,
                split_file=split,
                init_from=init_from,
                world=world,
                on_progress=on_progress,
            )
    if not world.is_first:
        return
    if as_json:
        terminal.json_result(outcome.to_json())
        return
    dice = ", ".join(f"{region} {value:.3f}" for region, value in (outcome.dice or {}).items())
    terminal.result(
        f"{outcome.steps} steps in {outcome.seconds:.0f} s; of {run} predict takes the weights of step "
        f"{outcome.best_step}, the best validation's"
    )
    terminal.result(f"validation Dice: {dice or 'no validation cases'}")
    if outcome.stopped_early:
        terminal.result("stopped early: the latest validations brought no better mean Dice (training.patience)")
    if outcome.skipped_steps:
        terminal.result(f"{outcome.skipped_steps} steps were skipped because a gradient was not finite")
    terminal.result(f"next: znormseg predict {run} CASES OUTPUT")


def _fold(text: str | None) -> int | str:
    if text is None:
        return 0
    if text == "all":
        return text
    if not text.isdecimal():
        raise typer.BadParameter(f"--fold takes 0 to 4 or all, got {text!r}")
    return int(text)
