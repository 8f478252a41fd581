"""Parts shared by all commands: ``--quiet``, and help with grouped options and examples."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from app.cli import terminal

#: Heading of the options that every command has.
_EVERYWHERE = "Common options"


_Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Show only warnings and errors on stderr, no progress or notes.",
    ),
]


def quietly(function: Callable[..., None]) -> Callable[..., None]:
    """Add the option ``--quiet`` to a command."""

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
    """A command whose help groups its options under headings and ends with examples (``epilog``)."""

    panels: Mapping[str, Sequence[str]] = {}
    """Parameter names by heading; parameters without a heading come first, under Options."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options without a heading, the headings, then the common options."""
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

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - signature of the base class
        """Write the examples, one per line, without wrapping."""
        if not self.epilog:
            return
        with formatter.section("Examples"):
            for line in self.epilog.splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")


def verb(panels: Mapping[str, Sequence[str]]) -> type[Verb]:
    """Return a command class with these headings."""
    return type("Verb", (Verb,), {"panels": panels})


class Verbs(TyperGroup):
    """A group whose help lists its commands under headings (``rich_help_panel``)."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write each heading with its commands, in order of registration."""
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
