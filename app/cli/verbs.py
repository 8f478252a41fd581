"""What all verbs have in common: help with options by task and examples, and ``--quiet``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from app.cli import terminal

#: Panel of options that every verb has.
_EVERYWHERE = "Everywhere"


_Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="No progress and no notes on stderr; warnings and errors stay.",
    ),
]


def quietly(function: Callable[..., None]) -> Callable[..., None]:
    """A verb with the option ``--quiet`` besides its own."""

    @functools.wraps(function)
    def call(*, quiet: bool, **options: Any) -> None:
        terminal.settings.quiet = quiet
        function(**options)

    hints = get_type_hints(function, include_extras=True)
    signature = inspect.signature(function)
    own = [one.replace(annotation=hints[one.name]) for one in signature.parameters.values()]
    quiet = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=_Quiet)
    call.__signature__ = signature.replace(parameters=[*own, quiet])  # type: ignore[attr-defined]
    call.__annotations__ = {**hints, "quiet": _Quiet}
    return call


class Verb(TyperCommand):
    """A command whose help shows its options by task, then its examples (``epilog``)."""

    panels: Mapping[str, Sequence[str]] = {}
    """By heading: names of the parameters under it; those without one come first, under Options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, options without a heading, each heading, then what is the same everywhere."""
        heading = {name: panel for panel, names in self.panels.items() for name in names}
        heading |= dict.fromkeys(("quiet", "help"), _EVERYWHERE)
        rows: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                argument = parameter.param_type_name == "argument"
                rows.setdefault("Arguments" if argument else heading.get(parameter.name, "Options"), []).append(record)
        for panel in ("Arguments", "Options", *self.panels, _EVERYWHERE):
            if panel in rows:
                with formatter.section(panel):
                    formatter.write_dl(rows[panel])

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - as in the class above it
        """The examples, a line each, as they are typed."""
        if not self.epilog:
            return
        with formatter.section("Examples"):
            for line in self.epilog.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def verb(panels: Mapping[str, Sequence[str]]) -> type[Verb]:
    """The class of a command with these headings."""
    return type("Verb", (Verb,), {"panels": panels})


class Verbs(TyperGroup):
    """A group whose help shows its commands by task (``rich_help_panel``)."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Each panel with its commands, in the order in which they came."""
        panels: dict[str, list[Any]] = {}
        for name in self.list_commands(ctx):
            command: Any = self.get_command(ctx, name)
            if not command.hidden:
                panels.setdefault(command.rich_help_panel or "Commands", []).append((name, command))
        width = max(len(name) for commands in panels.values() for name, _ in commands)
        for panel, commands in panels.items():
            with formatter.section(panel):
                limit = formatter.width - 6 - width
                rows = [(f"{name:{width}}", command.get_short_help_str(limit)) for name, command in commands]
                formatter.write_dl(rows)
