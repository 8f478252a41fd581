"""Generate the reference from the code: command line, config and Python API; also find names without documentation.

The config and the API are read from the source without importing it. Pages are Markdown and are not committed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[2]
PACKAGES = ("znorm", "models", "data", "app")

_SECTION = re.compile(r"^(Args|Returns|Raises|Yields|Example|Examples):$")


class Page(NamedTuple):
    """A generated page, and the names on it that lack documentation."""

    text: str
    undocumented: list[str]
    """Names without documentation, each with the place of its definition."""


def pages() -> dict[str, Page]:
    """Every generated page by its path below docs/."""
    return {
        "reference/cli.md": command_line(),
        "reference/config.md": config(),
        "reference/znorm.md": exported("znorm"),
        "reference/models.md": exported("models"),
        "reference/data.md": modules("data"),
    }


# Command line


def command_line() -> Page:
    """All verbs with arguments and options, as ``--help`` shows them."""
    import typer.main

    from app.cli.main import app

    lines = ["# Command line", "", "Generated from the code; `znormseg VERB --help` shows the same.", ""]
    undocumented: list[str] = []
    for words, command, context in _commands("znormseg", typer.main.get_command(app), None):
        title = " ".join(words)
        lines += [f"## {title}", "", _text(command.help or ""), ""]
        if not command.help:
            undocumented.append(f"{title}: no docstring")
        lines += ["```text", " ".join([title, *command.collect_usage_pieces(context)]), "```", ""]
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in command.params:
            if getattr(parameter, "hidden", False):
                continue
            is_argument = parameter.param_type_name == "argument"
            name = parameter.metavar or parameter.name if is_argument else ", ".join(parameter.opts)
            if not getattr(parameter, "help", None):
                undocumented.append(f"{title} {name}: no help")
            record = parameter.get_help_record(context) or (name, "")
            panel = "Arguments" if is_argument else getattr(parameter, "rich_help_panel", None) or "Options"
            panels.setdefault(panel, []).append(record)
        for panel, records in panels.items():
            lines += [f"| {panel} | |", "|---|---|"]
            lines += [f"| {_code(left)} | {_cell(right)} |" for left, right in records] + [""]
        if command.epilog:
            lines += ["Examples:", "", "```text", *command.epilog.strip().splitlines(), "```", ""]
    return Page("\n".join(lines), undocumented)


def _commands(name: str, command: Any, parent: Any) -> Iterator[tuple[list[str], Any, Any]]:
    """A command and its subcommands, each with the words that call it and the context that its help needs."""
    context = command.context_class(command, info_name=name, parent=parent)
    words = [*(parent.meta["words"] if parent else []), name]
    context._meta = {**context.meta, "words": words}
    yield words, command, context
    for child, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _commands(child, below, context)


# Config


def config() -> Page:
    """Every key of a config: default, type, meaning, and its values in the named configs."""
    named = {
        path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
        for path in sorted(ROOT.glob("app/config/named/*.yaml"))
    }
    lines = [
        "# Config",
        "",
        "Every key of a config file or of `--set SECTION.KEY=VALUE`, generated from the code. The",
        f"complete config of a run is in `RUN/config.yaml`. Named configs: {', '.join(f'`{name}`' for name in named)}.",
        "",
    ]
    undocumented: list[str] = []
    for name, owner in _config_fields("RunConfig").items():
        _config_section(name, owner.type, named, lines, undocumented)
    return Page("\n".join(lines), undocumented)


class _ConfigField(NamedTuple):
    """A field of a dataclass as written in its source."""

    type: str
    default: str
    meaning: str


def _config_section(path: str, owner: str, named: dict[str, Any], lines: list[str], undocumented: list[str]) -> None:
    """Add a section, then the sections inside it."""
    lines += [f"## {path}", "", _text(ast.get_docstring(_class(owner)) or ""), ""]
    nested: list[tuple[str, str]] = []
    rows: list[str] = []
    keys: list[str] = []
    for key, field in _config_fields(owner).items():
        if not field.meaning:
            undocumented.append(f"{path}.{key} ({owner}): no docstring under the field")
        if field.type.endswith("Config"):
            nested.append((f"{path}.{key}", field.type.rpartition(".")[2]))
            continue
        keys.append(key)
        rows.append(f"| `{key}` | {_code(field.type)} | {_code(field.default)} | {_cell(field.meaning)} |")
    lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    sections = {name: _inside(content, path) for name, content in named.items()}
    shown = [key for key in keys if any(key in section for section in sections.values())]
    if shown:
        lines += [f"| in the named configs | {' | '.join(named)} |", "|---" * (1 + len(named)) + "|"]
        for key in shown:
            values = [_code(_plain(section[key])) if key in section else "" for section in sections.values()]
            lines.append(f"| `{key}` | {' | '.join(values)} |")
        lines.append("")
    for inner, inner_owner in nested:
        _config_section(inner, inner_owner, named, lines, undocumented)


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _inside(content: Any, path: str) -> dict[str, Any]:
    for key in path.split("."):
        content = (content or {}).get(key)
    return content or {}


def _config_fields(owner: str) -> dict[str, _ConfigField]:
    found = {}
    body, package = _class(owner).body, _package_of(owner)
    for line, under in zip(body, [*body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            meaning = _literal(under) or ""
            found[line.target.id] = _ConfigField(
                _spelt_out(line.annotation, package), _default(line.value, package), meaning
            )
    return found


def _default(value: ast.expr | None, package: str) -> str:
    """A default as written in YAML; empty if it is a section, which has a table."""
    if value is None or (isinstance(value, ast.Call) and ast.unparse(value.func) == "field"):
        return ""
    plain = ast.literal_eval(_spelt_out(value, package))
    return _plain(list(plain) if isinstance(plain, tuple) else plain)


def _spelt_out(node: ast.expr, package: str) -> str:
    """The source of an expression; a constant of the package is replaced by its value."""
    if isinstance(node, ast.Name) and node.id in _constants(package):
        return ast.unparse(_constants(package)[node.id])
    return ast.unparse(node)


# Python API


def exported(package: str) -> Page:
    """The page of the names in a package's ``__all__``, wherever they are defined."""
    source = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8"))
    lines = [f"# `{package}`", "", _text(ast.get_docstring(source) or ""), ""]
    undocumented: list[str] = []
    homes = {
        alias.name: line.module
        for line in source.body
        if isinstance(line, ast.ImportFrom) and line.module
        for alias in line.names
    }
    for name in _all(source):
        place = ROOT / (homes[name].replace(".", "/") + ".py")
        undocumented += _definition(name, place, lines, level=2, with_fields=True)
    return Page("\n".join(lines), undocumented)


def modules(package: str) -> Page:
    """The public functions and classes of every module of a package, by module."""
    lines = [f"# `{package}`", "", _text(_docstring(ROOT / package / "__init__.py")), ""]
    undocumented: list[str] = []
    for place in sorted((ROOT / package).rglob("*.py")):
        module = ".".join(place.relative_to(ROOT).with_suffix("").parts)
        if place.name == "__init__.py":
            continue
        lines += [f"## `{module}`", "", _text(_docstring(place)), ""]
        if not _docstring(place):
            undocumented.append(f"{module}: no docstring")
        names = [d.name for d in _definitions(place) if not d.name.startswith("_")]
        for name in names:
            undocumented += _definition(name, place, lines, level=3, with_fields=False)
    return Page("\n".join(lines), undocumented)


def _definition(name: str, place: Path, lines: list[str], *, level: int, with_fields: bool) -> list[str]:
    """Add a public name to a page; return its parts without documentation."""
    where = place.relative_to(ROOT)
    found = next((d for d in _definitions(place) if d.name == name), None)
    lines += [f"{'#' * level} {name}", ""]
    if found is None:
        meaning = _constant(name, place)
        lines += [_text(meaning), ""]
        return [] if meaning else [f"{name} ({where}): no `#:` comment or docstring"]
    missing = [] if ast.get_docstring(found) else [f"{name} ({where}): no docstring"]
    lines += ["```text", _signature(found), "```", "", _docstring_text(ast.get_docstring(found) or ""), ""]
    if not isinstance(found, ast.ClassDef):
        return missing
    rows = []
    for line, under in zip(found.body, [*found.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name) and line.target.id[0] != "_":
            meaning = _literal(under) or ""
            if with_fields and not meaning:
                missing.append(f"{name}.{line.target.id} ({where}): no docstring under the field")
            rows.append(f"| `{line.target.id}` | {_code(ast.unparse(line.annotation))} | {_cell(meaning)} |")
    if rows:
        lines += ["| field | type | meaning |", "|---|---|---|", *rows, ""]
    for method in found.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_"):
            meaning = ast.get_docstring(method) or ""
            if not meaning:
                missing.append(f"{name}.{method.name} ({where}): no docstring")
            lines += [
                f"**`{method.name}`**",
                "",
                "```text",
                _signature(method),
                "```",
                "",
                _docstring_text(meaning),
                "",
            ]
    return missing


def _signature(definition: ast.ClassDef | ast.FunctionDef) -> str:
    """The signature of a name, on one line if it fits."""
    if isinstance(definition, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in definition.bases)
        return f"class {definition.name}({bases})" if bases else f"class {definition.name}"
    returns = f" -> {ast.unparse(definition.returns)}" if definition.returns else ""
    arguments = ast.unparse(definition.args)
    line = f"{definition.name}({arguments}){returns}"
    if len(line) <= 100:
        return line
    return f"{definition.name}(\n    " + ",\n    ".join(_split(arguments)) + f",\n){returns}"


def _split(arguments: str) -> list[str]:
    """Arguments at the commas outside of brackets and quotes.

    Example:
        >>> _split("a: tuple[int, int], b=1")
        ['a: tuple[int, int]', 'b=1']
    """
    parts, depth = [""], 0
    for letter in arguments:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _definitions(place: Path) -> list[ast.ClassDef | ast.FunctionDef]:
    return [node for node in _tree(place).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]


def _all(source: ast.Module) -> list[str]:
    """The names of ``__all__``."""
    for line in source.body:
        if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "__all__":
            return [str(name) for name in ast.literal_eval(line.value)]
    raise ValueError("no __all__")


def _constant(name: str, place: Path) -> str:
    """The ``#:`` comment above a module's constant, or the string under it."""
    body = _tree(place).body
    for line, under in zip(body, [*body[1:], None], strict=True):
        target = (
            line.target
            if isinstance(line, ast.AnnAssign)
            else line.targets[0]
            if isinstance(line, ast.Assign)
            else None
        )
        if isinstance(target, ast.Name) and target.id == name:
            above = place.read_text(encoding="utf-8").splitlines()[: line.lineno - 1]
            comment: list[str] = []
            while above and above[-1].startswith("#:"):
                comment.insert(0, above.pop()[2:].strip())
            return " ".join(comment) or _literal(under) or ""
    raise ValueError(f"{name} is not defined in {place}")


@cache
def _constants(package: str) -> dict[str, ast.expr]:
    """The values that the modules of a package assign to names, for names assigned only once."""
    found: dict[str, list[ast.expr]] = {}
    for place in sorted((ROOT / package).rglob("*.py")):
        for line in _tree(place).body:
            targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
            value = getattr(line, "value", None)
            for target in targets:
                if isinstance(target, ast.Name) and value is not None:
                    found.setdefault(target.id, []).append(value)
    return {name: values[0] for name, values in found.items() if len(values) == 1}


@cache
def _package_of(owner: str) -> str:
    return next(p for p in PACKAGES if any(_class(owner) in _definitions(f) for f in (ROOT / p).rglob("*.py")))


@cache
def _class(name: str) -> ast.ClassDef:
    """The class with a name, which must be unique in the packages."""
    found = [
        d
        for package in PACKAGES
        for place in sorted((ROOT / package).rglob("*.py"))
        for d in _definitions(place)
        if isinstance(d, ast.ClassDef) and d.name == name
    ]
    if len(found) != 1:
        raise ValueError(f"{len(found)} classes are called {name}; the reference needs exactly one")
    return found[0]


@cache
def _tree(place: Path) -> ast.Module:
    return ast.parse(place.read_text(encoding="utf-8"))


def _docstring(place: Path) -> str:
    return ast.get_docstring(_tree(place)) or ""


def _literal(node: ast.stmt | None) -> str | None:
    """The text of a statement that is only a string."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return node.value.value
    return None


# Text


def _text(docstring: str) -> str:
    """Convert the markup of docstrings to Markdown.

    Example:
        >>> _text(":func:`a.b.c` takes ``None``")
        '`c` takes `None`'
    """
    named = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", docstring)
    return re.sub(r"``([^`]+)``", r"`\1`", named).replace("\b\n", "").replace("\b", "")


def _docstring_text(docstring: str) -> str:
    """Convert a Google docstring to Markdown: each section becomes a paragraph or a list."""
    lines: list[str] = []
    section = ""
    for line in docstring.splitlines():
        if match := _SECTION.match(line):
            section = match[1]
            lines += ["", f"*{section}*", ""] if not section.startswith("Example") else ["", "```pycon"]
        elif section.startswith("Example"):
            if line and not line.startswith(" "):
                lines.append("```")
                section = ""
            lines.append(line[4:] if section else _text(line))
        elif section in ("Args", "Raises") and re.match(r"^ {4}\S", line):
            name, _, rest = line.strip().partition(": ")
            lines.append(f"- `{name}`: {_text(rest)}" if rest else f"- {_text(line.strip())}")
        elif section in ("Args", "Raises") and line.strip():
            lines.append(f"    {_text(line.strip())}")
        else:
            if line and not line.startswith(" "):
                section = ""
            lines.append(_text(line.strip() if section else line))
    if section.startswith("Example"):
        lines.append("```")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(_text(text).replace("|", "\\|").split())


def _code(text: str) -> str:
    return f"`{' '.join(text.split())}`".replace("|", "\\|") if text else ""


def undocumented(made: Iterable[Page] | None = None) -> list[str]:
    """Every public name, option or key without documentation."""
    return [what for page in made or pages().values() for what in page.undocumented]
