"""``znormseg plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import options, terminal

EXAMPLES = """\
znormseg plan BraTS2021 --out plan.yaml --dry-run
znormseg train BraTS2021 RUN --config plan.yaml"""


def plan(
    *,
    data: options.Data,
    config: Annotated[
        str | None,
        typer.Option(
            "--config",
            "-c",
            help="Base for everything that is not planned; default: laptop on a CPU, resunet-znorm on a GPU.",
            autocompletion=options.complete_config,
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
        float | None, typer.Option(help="RAM that the run may use, in GB; default: all free RAM.")
    ] = None,
    labels: options.Labels = None,
    follow_links: options.FollowLinks = False,
) -> None:
    """Choose a config for a data set and this machine, with a reason for each choice.

    Chooses patch, batch, depth, steps, threads and spacing from the data and the available memory. Pass the file to
    train --config. --dry-run also reports how much memory and time the run will take.
    """
    options.refuse(
        max_memory_gb is not None and not 0 < max_memory_gb < 1e6,
        f"--max-memory-gb takes a number of gigabytes above 0, got {max_memory_gb}",
    )
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
        with replacing(out) as partial:
            partial.write_text(planned.to_yaml(), encoding="utf-8")
    lines = (
        [planned.to_yaml().rstrip()]
        if out is None
        else [*planned.lines(), f"next: znormseg train {data} RUN --config {out}"]
    )
    terminal.result({**planned.to_json(), "out": None if out is None else str(out)}, *lines)
