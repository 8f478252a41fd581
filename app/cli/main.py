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
    contrasts,
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
    remote,
    report,
    serve,
    terminal,
    train,
)
from app.cli.options import refuse
from app.cli.streams import outlasting_streams
from app.cli.verbs import Verbs, verb
from app.errors import EXIT_INTERRUPTED
from app.system.process import share_processors

_COMMON_TASKS = """\
Usage: znormseg COMMAND ...

Brain-tumour MRI segmentation. Common tasks:

  segment four images     znormseg predict starter OUTPUT --t1 A --t1c B --t2 C --flair D
  look at the result      znormseg report OUTPUT PAGES
  see it work             znormseg demo
  check a data set        znormseg data check DATA
  train on it             znormseg train DATA RUN
  segment scans with it   znormseg predict RUN SCANS OUTPUT
  score the result        znormseg evaluate OUTPUT REFERENCES

Images straight from the scanner need --prepare. starter was trained on sixteen
adult gliomas: znormseg model info starter shows its limits.
znormseg doctor checks this machine; znormseg --help lists all commands.
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
verb(app, "demo", panel=_BEGIN, examples=demo.EXAMPLES)(demo.demo)
verb(app, "doctor", panel=_BEGIN, examples=doctor.EXAMPLES)(doctor.doctor)
app.add_typer(data.app, name="data", rich_help_panel=_BEGIN)
app.add_typer(config.app, name="config", rich_help_panel=_TRAIN)
verb(app, "plan", panel=_TRAIN, examples=plan.EXAMPLES)(plan.plan)
verb(app, "train", panel=_TRAIN, examples=train.EXAMPLES)(train.train)
verb(app, "crossval", panel=_TRAIN, examples=crossval.EXAMPLES)(crossval.crossval)
verb(app, "compare", panel=_TRAIN, examples=compare.EXAMPLES)(compare.compare_command)
verb(app, "predict", panel=_USE, examples=predict.EXAMPLES)(predict.predict_command)
verb(app, "evaluate", panel=_USE, examples=evaluate.EXAMPLES)(evaluate.evaluate_command)
verb(app, "contrasts", panel=_USE, examples=contrasts.EXAMPLES)(contrasts.contrasts_command)
verb(app, "rank", panel=_USE, examples=rank.EXAMPLES)(rank.rank_command)
verb(app, "report", panel=_USE, examples=report.EXAMPLES)(report.report_command)
app.add_typer(serve.app, name="serve", rich_help_panel=_SHARE)
app.add_typer(remote.app, name="remote", rich_help_panel=_SHARE)
app.add_typer(model.app, name="model", rich_help_panel=_SHARE)
verb(app, "export", panel=_SHARE, examples=export.EXAMPLES)(export.export_network_command)


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
        terminal.say(_COMMON_TASKS)
        raise typer.Exit(2)
    several = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("WORLD_SIZE", "1") != "1"
    refuse(
        several and context.invoked_subcommand != "train",
        f"torchrun starts {context.invoked_subcommand} several times; only train supports that",
    )


def run() -> None:
    """Entry point of the console script."""
    share_processors()
    with outlasting_streams(), terminal.signals_unwind():
        try:
            code = app(standalone_mode=False)
            if code == EXIT_INTERRUPTED:  # typer silently turns KeyboardInterrupt into this code
                raise KeyboardInterrupt(terminal.settings.stopped_by)
        except BaseException as error:
            code = terminal.fail(error)
    sys.exit(code if isinstance(code, int) else 0)
