"""``znormseg config``: the named configs and the documentation of their fields."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli import terminal
from app.cli.verbs import Verb, quietly

app = typer.Typer(help="Show the named configs and explain their fields.", no_args_is_help=True, rich_markup_mode=None)

_OVERRIDE_HELP = "Override one key first; may be repeated."


@app.command(
    cls=Verb,
    epilog="znormseg config show laptop\nznormseg config show resunet --set training.hours=8 > mine.yaml",
)
@quietly
def show(
    *,
    name: Annotated[
        str,
        typer.Argument(metavar="CONFIG", help="Named config or YAML file.", autocompletion=terminal.complete_config),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help=_OVERRIDE_HELP)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the values as JSON on stdout.")] = False,
) -> None:
    """Print every key of a config with an explanation, as YAML that train accepts."""
    from app.config.describe import documented_yaml
    from app.config.load import load_config, to_plain

    config = load_config(name, overrides or [])
    if as_json:
        terminal.json_result(to_plain(config))
    else:
        terminal.result(documented_yaml(config).rstrip("\n"))


@app.command(name="list", cls=Verb, epilog="znormseg config list")
@quietly
def list_names(
    *, as_json: Annotated[bool, typer.Option("--json", help="Print the names as JSON on stdout.")] = False
) -> None:
    """List the named configs."""
    from app.config.load import config_names, purpose

    purposes = {name: purpose(name) for name in config_names()}
    if as_json:
        terminal.json_result(purposes)
        return
    width = max(map(len, purposes))
    for name, what in purposes.items():
        terminal.result(f"{name:{width}}  {what}")
