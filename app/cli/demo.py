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
) -> None:
    """Try the whole workflow on synthetic cases, in about five minutes.

    Makes the cases, trains on some, predicts and evaluates the others, and writes a page with the results.
    """
    from app.experiments.demo import run_demo
    from app.reports.demo import COMMANDS, write_demo_page

    with terminal.watched() as on_progress:
        outcome = run_demo(out, on_progress=on_progress)
        write_demo_page(outcome)
    steps = [*COMMANDS]
    if shutil.which("znormseg") is None:
        steps.insert(0, ("Put znormseg on the PATH of this terminal", f"source {Path(sys.prefix, 'bin', 'activate')}"))
    terminal.result(
        outcome.to_json(),
        terminal.table(outcome.evaluation.rows()),
        f"\nThe page with pictures and curves: {outcome.page.resolve()}\n\nOn your own data, try next:",
        *(f"  {command}\n      {what}" for what, command in steps),
    )
