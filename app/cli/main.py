"""The command ``znormseg``: its verbs, and what happens to their errors."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from typing import Annotated

import typer

from app.cli import compare, crossval, data, demo, doctor, evaluate, plan, predict, report, terminal, train
from app.errors import EXIT_INTERRUPTED
from app.process import share_processors

app = typer.Typer(
    name="znormseg",
    help="Brain-tumour MRI segmentation: train with ZNorm, predict NIfTI volumes, score them. Research use only.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.add_typer(data.app, name="data")
app.command(name="plan")(plan.plan)
app.command(name="train")(train.train)
app.command(name="predict")(predict.predict)
app.command(name="evaluate")(evaluate.evaluate)
app.command(name="report")(report.report)
app.command(name="compare")(compare.compare)
app.command(name="crossval")(crossval.crossval)
app.command(name="demo")(demo.demo)
app.command(name="doctor")(doctor.doctor)


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
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback when something fails.")] = False,
) -> None:
    """Take the options that stand before the verb."""
    terminal.settings.debug = debug
    several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    if several and context.invoked_subcommand != "train":
        raise typer.BadParameter(
            f"torchrun starts {context.invoked_subcommand} several times; only train is made for it"
        )


def run() -> None:
    """Entry point of the console script."""
    share_processors()
    with terminal.sigterm_unwinds():
        try:
            code = app(standalone_mode=False)
            if code == EXIT_INTERRUPTED:  # typer turns KeyboardInterrupt into this, without a word
                raise KeyboardInterrupt(terminal.settings.stopped_by)
        except BaseException as error:
            code = terminal.fail(error)
    sys.exit(code if isinstance(code, int) else 0)
