"""``znormseg demo``."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal

EXAMPLES = "znormseg demo --out demo"


def demo(
    *,
    out: Annotated[Path, typer.Option("--out", "-o", help="Output folder; must be empty or not exist yet.")] = Path(
        "znormseg-demo"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON on stdout.")] = False,
) -> None:
    """Try the whole workflow on synthetic cases, in about five minutes.

    Makes the cases, trains on some, predicts and evaluates the others, and writes a page with the results.
    """
    from app.experiments.demo import run_demo
    from app.reports.demo import COMMANDS, write_demo_page

    with terminal.watched() as on_progress:
        outcome = run_demo(out, on_progress=on_progress)
        write_demo_page(outcome)
    if as_json:
        terminal.json_result(outcome.to_json())
        return
    terminal.result(terminal.table(outcome.evaluation.rows()))
    terminal.result(f"\nThe page with pictures and curves: {outcome.page.resolve()}\n\nOn your own data, try next:")
    if shutil.which("znormseg") is None:
        terminal.result(
            f"  source {Path(sys.prefix) / 'bin' / 'activate'}\n      makes the command known to this terminal"
        )
    for what, command in COMMANDS:
        terminal.result(f"  {command}\n      {what}")
