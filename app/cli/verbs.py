"""Add commands with the options that every command has, and with headings and examples in their help."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from app.cli import terminal

_COMMON = "Common options"


def verb(
    group: typer.Typer, name: str, *, panel: str | None = None, examples: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to a group as a command, with ``--json`` and ``--quiet`` after its own options.

    Args:
        group: the command line, or a command with subcommands.
        name: word on the command line.
        panel: heading in the help of the group.
        examples: command lines, one per line.
    """

    def add(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def call(*, as_json: bool, quiet: bool, **options: Any) -> None:
            terminal.settings.as_json, terminal.settings.quiet = as_json, quiet
            function(**options)

        own, common = (inspect.signature(one, eval_str=True).parameters.values() for one in (function, _common))
        call.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
        group.command(name, cls=_Verb, rich_help_panel=panel, epilog=examples)(call)
        return function

    return add


def _common(
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON on stdout.", rich_help_panel=_COMMON)
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            help="Show only warnings and errors on stderr, no progress or notes.",
            rich_help_panel=_COMMON,
        ),
    ] = False,
) -> None:
    """Declare the options that every command has; only the signature is used."""


class _Verb(TyperCommand):
    """A command whose help has headings (``rich_help_panel``) and ends with examples (``epilog``).

    Typer's own headings need its rich help, which wraps the examples and leaves little space for descriptions.
    """

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments, then options without a heading, then the other headings in order of appearance."""
        _write_options(self, ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - signature of the base class
        """Write the examples, one per line, without wrapping."""
        _write_examples(self.epilog, formatter)


class Verbs(TyperGroup):
    """A group whose help lists its commands under headings (``rich_help_panel``)."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - signature of the base class
        """Write each heading with its commands, in order of registration."""
        width = max(map(len, self.commands))
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            record = f"{name:{width}}", command.get_short_help_str(limit=200)
            panels.setdefault(getattr(command, "rich_help_panel", None) or "Commands", []).append(record)
        _write(panels, formatter)


class VerbWithVerbs(Verbs):
    """A command that also has subcommands; its help has headings and examples, as that of other commands."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options under their headings, then the subcommands."""
        _write_options(self, ctx, formatter)
        self.format_commands(ctx, formatter)

    def format_epilog(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002 - signature of the base class
        """Write the examples, one per line, without wrapping."""
        _write_examples(self.epilog, formatter)


def _write_options(command: Any, ctx: Any, formatter: Any) -> None:
    panels: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
    for parameter in command.get_params(ctx):
        usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
        panel = _COMMON if parameter.name == "help" else getattr(parameter, "rich_help_panel", None) or usual
        if record := parameter.get_help_record(ctx):
            name, text = record
            panels.setdefault(panel, []).append((name.replace("<list[Path]>", "<path>..."), text))
    _write(panels, formatter)


def _write_examples(examples: str | None, formatter: Any) -> None:
    if examples:
        with formatter.section("Examples"):
            formatter.write("".join(f"  {line}\n" for line in examples.splitlines()))


def _write(panels: dict[str, list[tuple[str, str]]], formatter: Any) -> None:
    for heading, records in panels.items():
        if records:
            with formatter.section(heading):
                formatter.write_dl(records)
