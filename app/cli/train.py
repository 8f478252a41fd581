"""``znormseg train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options, terminal

EXAMPLES = """\
znormseg train BraTS2021 RUN
znormseg train BraTS2021 RUN --config resunet --set training.hours=12 --fold 1
znormseg train BraTS2021 RUN --resume --set training.hours=24
znormseg train BraTS2021 synthetic:BraTS2021 RUN --weights 3,1
znormseg train MYCASES TUNED --init-from RUN --set training.hours=1"""

_resume = options.panel("Resume or start from another run")


def train(
    *,
    data: options.DataSets,
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder; empty or not existing yet, except with --resume.")
    ],
    config: options.Config = None,
    overrides: options.Overrides = None,
    fold: Annotated[
        str | None,
        options.panel("Input")(
            "--fold", "-f", help="Validation fold, 0 (default) to 4, split by patient; 'all' trains on every case."
        ),
    ] = None,
    split: Annotated[
        Path | None,
        options.panel("Input")(help='JSON file to use instead of a fold: {"train": [ids], "validation": [ids]}.'),
    ] = None,
    weights: options.Weights = None,
    nan_to_zero: options.NanToZero = False,
    labels: options.LabelsOfEach = None,
    follow_links: options.FollowLinks = False,
    init_from: Annotated[
        Path | None,
        _resume(
            metavar="RUN",
            help="Start from the best weights of another run; without --config, also use its network and patch size.",
        ),
    ] = None,
    resume: Annotated[
        bool, _resume("--resume", help="Resume an interrupted run, or a finished run with a longer budget.")
    ] = False,
    allow: Annotated[
        list[str] | None,
        _resume(metavar="SECTION.KEY", help="Allow --resume to change this key of the config; may be repeated."),
    ] = None,
) -> None:
    """Train a network on one data set or several.

    The config sets the budget; override it with --set training.hours=2 or --set training.steps=5000.
    """
    number = _fold(fold)
    options.refuse(split is not None and fold is not None, "give either --fold or --split")
    for option, given in {"--fold": fold, "--split": split, "--labels": labels, "--init-from": init_from}.items():
        options.refuse(
            resume and given is not None, f"--resume uses the split, labels and weights of the run; leave out {option}"
        )
    options.refuse(allow and not resume, "--allow requires --resume; a new run accepts any config")
    of_weights = options.weights_override(weights, overrides)
    overrides = [*(overrides or ()), *(["data.nan_to_zero=true"] if nan_to_zero else []), *of_weights]
    source = options.data_sets(data, labels, follow_links=follow_links)
    from app.config.load import load_config
    from app.training import run as training
    from app.training.distributed import joined_processes
    from app.training.pretrained import sections_of

    init_from = None if init_from is None else options.installed_model(init_from)
    with terminal.watched() as on_progress, joined_processes() as world:
        if resume:
            base = config or str(run / "config.yaml")
            requested = (
                load_config(base, overrides) if config or (overrides and (run / "config.yaml").exists()) else None
            )
            outcome = training.resume(
                source,
                run,
                requested,
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
    scores = ", ".join(f"{output} {value:.3f}" for output, value in (outcome.validation_scores or {}).items())
    lines = [
        f"{outcome.steps} steps in {outcome.seconds:.0f} s; predict will use the best checkpoint of {run}, step "
        f"{outcome.best_step}",
        f"validation {outcome.measure.in_words}: {scores or 'no validation cases'}",
    ]
    if outcome.stopped_early:
        lines.append(
            f"stopped early: the mean {outcome.measure.in_words} of the latest validations did not improve "
            "(training.patience)"
        )
    if outcome.skipped_steps:
        lines.append(f"{outcome.skipped_steps} steps were skipped because a gradient was not finite")
    terminal.result(outcome.to_json(), *lines, f"next: znormseg predict {run} CASES OUTPUT")


def _fold(text: str | None) -> int | str:
    if text is None:
        return 0
    if text == "all":
        return text
    options.refuse(not text.isdecimal(), f"--fold takes 0 to 4 or all, got {text!r}")
    return int(text)
