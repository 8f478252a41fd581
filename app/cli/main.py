"""The ``znormseg`` command: its subcommands, and the handling of their errors."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from app.cli import (
    compare,
    config,
    crossval,
    data,
    demo,
    doctor,
    evaluate,
    export,
    model,
    plan,
    predict,
    rank,
    report,
    terminal,
    train,
)
from app.cli.streams import outlasting_streams
from app.cli.verbs import Verb, Verbs, quietly, verb
from app.errors import EXIT_INTERRUPTED
from app.system.process import share_processors

_FIVE_THINGS = """\
Usage: znormseg COMMAND ...

Brain-tumour MRI segmentation. What people come for:

  see it work             znormseg demo
  look over a data set    znormseg data check DATA
  train on it             znormseg train DATA RUN
  segment scans with it   znormseg predict RUN SCANS OUTPUT
  score the result        znormseg evaluate OUTPUT REFERENCES

znormseg doctor says whether this machine is fit; znormseg --help lists all commands.
Research use only; not a medical device."""

app = typer.Typer(
    name="znormseg",
    cls=Verbs,
    help="Brain-tumour MRI segmentation: train with ZNorm, predict NIfTI volumes, score them. Research use only.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
_BEGIN, _TRAIN, _USE, _SHARE = "Get started", "Train", "Predict and score", "Share"
app.command(name="demo", cls=Verb, rich_help_panel=_BEGIN, epilog=demo.EXAMPLES)(quietly(demo.demo))
app.command(name="doctor", cls=Verb, rich_help_panel=_BEGIN, epilog=doctor.EXAMPLES)(quietly(doctor.doctor))
app.add_typer(data.app, name="data", rich_help_panel=_BEGIN)
app.add_typer(config.app, name="config", rich_help_panel=_TRAIN)
app.command(name="plan", cls=Verb, rich_help_panel=_TRAIN, epilog=plan.EXAMPLES)(quietly(plan.plan))
app.command(name="train", cls=verb(train.PANELS), rich_help_panel=_TRAIN, epilog=train.EXAMPLES)(quietly(train.train))
app.command(name="crossval", cls=verb(crossval.PANELS), rich_help_panel=_TRAIN, epilog=crossval.EXAMPLES)(
    quietly(crossval.crossval)
)
app.command(name="compare", cls=verb(compare.PANELS), rich_help_panel=_TRAIN, epilog=compare.EXAMPLES)(
    quietly(compare.compare_command)
)
app.command(name="predict", cls=verb(predict.PANELS), rich_help_panel=_USE, epilog=predict.EXAMPLES)(
    quietly(predict.predict_command)
)
app.command(name="evaluate", cls=verb(evaluate.PANELS), rich_help_panel=_USE, epilog=evaluate.EXAMPLES)(
    quietly(evaluate.evaluate_command)
)
app.command(name="rank", cls=Verb, rich_help_panel=_USE, epilog=rank.EXAMPLES)(quietly(rank.rank_command))
app.command(name="report", cls=Verb, rich_help_panel=_USE, epilog=report.EXAMPLES)(quietly(report.report_command))
app.add_typer(model.app, name="model", rich_help_panel=_SHARE)
app.command(name="export", cls=Verb, rich_help_panel=_SHARE, epilog=export.EXAMPLES)(
    quietly(export.export_network_command)
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"znormseg {metadata.version('znormseg')}")
        raise typer.Exit


@app.callback()
def options(
    context: typer.Context,
    *,
    version: Annotated[  # noqa: ARG001 - its callback does the work
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.")] = False,
) -> None:
    """Handle the options that precede the command."""
    terminal.settings.debug = debug
    if context.invoked_subcommand is None:
        terminal.say(_FIVE_THINGS)
        raise typer.Exit(2)
    several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several and context.invoked_subcommand != "train":
        raise typer.BadParameter(
            f"torchrun starts {context.invoked_subcommand} several times; only train is made for it"
        )


def run() -> None:
    """Entry point of the console script."""
    share_processors()
    with outlasting_streams(), terminal.signals_unwind():
        try:
            code = app(standalone_mode=False)
            if code == EXIT_INTERRUPTED:  # typer silently turns KeyboardInterrupt into this
                raise KeyboardInterrupt(terminal.settings.stopped_by)
        except BaseException as error:
            code = terminal.fail(error)
    sys.exit(code if isinstance(code, int) else 0)
