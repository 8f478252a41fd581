"""``znormseg plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import terminal

EXAMPLES = """\
znormseg plan BraTS2021 --out plan.yaml --dry-run
znormseg train BraTS2021 RUN --config plan.yaml"""


def plan(
    *,
    data: Annotated[
        Path, typer.Argument(metavar="DATA", help="Data set with label maps, in a layout that data check recognises.")
    ],
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            help="Base for everything that is not planned; default: laptop on a CPU, resunet-znorm on a GPU.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Fix one key of the plan; may be repeated."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="YAML file for the plan; default: stdout.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Try some real training steps; if they run out of memory, plan a smaller run."),
    ] = False,
    max_memory_gb: Annotated[
        float | None,
        typer.Option("--max-memory-gb", help="RAM that the run may use, in GB; default: all that is free."),
    ] = None,
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help=terminal.LABELS_HELP)] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside DATA.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Choose a config for a data set and this machine, with a reason for each choice.

    Chooses patch, batch, depth, steps, threads and spacing by the data and the available memory. Pass the file to
    train --config. --dry-run also reports how much memory and time the run will take.
    """
    if max_memory_gb is not None and not 0 < max_memory_gb < 1e6:
        raise typer.BadParameter(f"--max-memory-gb takes a number above 0, got {max_memory_gb:g}")
    from app.planning.plan import plan_run, require_new_file
    from data.datasets.source import DataSource
    from data.files import replacing

    if out is not None:
        require_new_file(out)
    with terminal.watched() as on_progress:
        planned = plan_run(
            DataSource(data, labels=labels, follow_links=follow_links),
            config=config,
            overrides=overrides or (),
            with_dry_run=dry_run,
            max_memory_bytes=None if max_memory_gb is None else int(max_memory_gb * 1e9),
            on_progress=on_progress,
        )
    if out is not None:
        with replacing(out) as beside:
            beside.write_text(planned.to_yaml(), encoding="utf-8")
    if as_json:
        terminal.json_result({**planned.to_json(), "out": None if out is None else str(out)})
        return
    if out is None:
        terminal.result(planned.to_yaml().rstrip())
        return
    for line in planned.lines():
        terminal.result(line)
    terminal.result(f"next: znormseg train {data} RUN --config {out}")
