"""Documentation of every config field, read from the string literal below the field in the source."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from app.config.load import RunConfig, to_plain

_WIDTH = 100


def meanings(owner: type[Any]) -> dict[str, str]:
    """Return the documentation of a dataclass's fields by name, in source order.

    Args:
        owner: a dataclass whose fields are each followed by a string literal.

    Raises:
        ValueError: a field has no documentation.
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for line, under in zip(definition.body, [*definition.body[1:], None], strict=True):
        if not (isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)):
            continue
        if isinstance(under, ast.Expr) and isinstance(under.value, ast.Constant) and isinstance(under.value.value, str):
            text = re.sub(r":[a-z]+:`~?([^`]*)`", r"\1", under.value.value)  # Sphinx roles
            found[line.target.id] = " ".join(text.replace("``", "").split())
    missing = [field.name for field in dataclasses.fields(owner) if field.name not in found]
    if missing:
        raise ValueError(f"{owner.__name__}: no documentation under {', '.join(missing)}")
    return found


def documented_yaml(config: RunConfig) -> str:
    """Return a config as YAML with a comment above each key; it reads back as the same config."""
    lines: list[str] = []
    for section, part in vars(config).items():
        lines += [f"# {inspect.getdoc(part).splitlines()[0]}", f"{section}:"]  # type: ignore[union-attr]
        lines += [*_documented(part, to_plain(config)[section], "  "), ""]
    return "\n".join(lines)


def _documented(part: Any, plain: Mapping[str, Any], indent: str) -> Iterator[str]:
    for key, meaning in meanings(type(part)).items():
        comment = f"{indent}# "
        yield from textwrap.wrap(meaning, _WIDTH, initial_indent=comment, subsequent_indent=comment)
        if dataclasses.is_dataclass(inner := getattr(part, key)):
            yield f"{indent}{key}:"
            yield from _documented(inner, plain[key], indent + "  ")
        else:
            # Dumped as a one-element list: after a bare scalar, YAML writes an end-of-document marker.
            value = yaml.safe_dump([plain[key]], default_flow_style=True, width=10_000).strip()[1:-1]
            yield f"{indent}{key}: {value}"
