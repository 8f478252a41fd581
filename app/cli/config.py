"""``znormseg config``: the named configs and the documentation of their fields."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli import options, terminal
from app.cli.verbs import verb

app = typer.Typer(help="Show the named configs and explain their fields.", no_args_is_help=True)


@verb(
    app,
    "show",
    examples="znormseg config show laptop\nznormseg config show resunet --set training.hours=8 > mine.yaml",
)
def show(
    *,
    name: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="Named config or YAML file.", autocompletion=options.complete_config),
    ],
    overrides: options.Overrides = None,
) -> None:
    """Print every key of a config with an explanation, as YAML that train accepts."""
    from app.config.describe import documented_yaml
    from app.config.load import load_config, to_plain

    config = load_config(name, overrides or [])
    terminal.result(to_plain(config), documented_yaml(config).rstrip("\n"))


@verb(app, "list", examples="znormseg config list")
def list_names() -> None:
    """List the named configs."""
    from app.config.load import config_names, purpose

    purposes = {name: purpose(name) for name in config_names()}
    width = max(map(len, purposes))
    terminal.result(purposes, *(f"{name:{width}}  {what}" for name, what in purposes.items()))
