"""docs/errors.md lists errors by topic: the message, the exit code, and what to do.

tests/system/errors_shown.py has a command for each row. ``ZNORMSEG_REGENERATE=1`` writes the rows again from what the
commands print; review the diff.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "errors.md"
HEAD = "| message | exit code | what to do |\n|---|---|---|\n"
#: A row: the message in backticks, the code, and the rest.
ROW = re.compile(r"^\| (?P<ticks>`+) ?(?P<message>.+?) ?(?P=ticks) \| (?P<code>\d+) \| (?P<remedy>.+) \|$")
#: Progress where there is no terminal; when a line of it comes depends on the machine.
PROGRESS = re.compile(r"^[a-z ]+ +\d+%  ")
#: Lines that say how many cases failed, after the message of each.
SUMMARY = re.compile(r"^znormseg: \d+ of \d+ cases? failed")


def _errors_shown() -> Any:
    """The rows of tests/system/errors_shown.py."""
    spec = importlib.util.spec_from_file_location("errors_shown", ROOT / "tests" / "system" / "errors_shown.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


errors = _errors_shown()


def split_at_table(document: str, topic: str) -> tuple[str, list[str], str]:
    """A document before the rows of a topic, these rows, and the document after them."""
    start = document.index(HEAD, document.index(f"\n## {topic}\n")) + len(HEAD)
    rows = re.match(r"(\|.*\n)*", document[start:])
    assert rows is not None
    return document[:start], rows[0].splitlines(), document[start + rows.end() :]


# The document


def test_exactly_the_known_topics_have_a_table() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    sections = re.split(r"^## ", document, flags=re.MULTILINE)[1:]
    assert [part.partition("\n")[0] for part in sections if HEAD in part] == list(errors.TABLES)


@pytest.mark.parametrize("topic", errors.TABLES)
def test_each_row_has_an_exit_code_of_the_commands_of_its_topic(topic: str) -> None:
    _, rows, _ = split_at_table(DOCUMENT.read_text(encoding="utf-8"), topic)
    found = [ROW.match(row) for row in rows]
    assert [row for row, match in zip(rows, found, strict=True) if match is None] == []
    assert [int(match["code"]) for match in found if match] == [one.code for one in errors.TABLES[topic] if one.listed]


def test_no_table_has_a_duplicate_row() -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    for topic in errors.TABLES:
        _, rows, _ = split_at_table(document, topic)
        assert len(rows) == len(set(rows)), topic


def test_every_bad_input_of_the_tests_is_documented() -> None:
    titles = {one.title for table in errors.TABLES.values() for one in table if isinstance(one, errors.Shown)}
    bad = errors.bad
    assert {*bad.BAD_IMAGES, *bad.BAD_SETTINGS, *bad.BAD_RUNS} <= titles
    assert set(bad.BAD_LABELS) <= {title.removeprefix("label map: ") for title in titles}


# A row


def row(lines: list[str], code: int, remedy: str) -> str:
    """A row of a table, from the lines of a message."""
    message, advice = lines[0].rstrip(".:"), remedy
    if not remedy:
        message, advice = divided(lines)
    return f"| {in_code(message)} | {code} | {in_text(advice)} |"


def ending(text: str) -> tuple[str, str]:
    """The exit code and the advice of a row."""
    match = ROW.match(text)
    return (match["code"], match["remedy"]) if match else ("", "")


def divided(lines: list[str]) -> tuple[str, str]:
    """What is wrong, and what to do about it: the first line or the first sentence of a message, and the rest."""
    first, *others = lines
    if others:
        return first.rstrip(":"), capitalised(" ".join(line.strip().removeprefix("-> ") for line in others))
    for gap in (r"(?<=[.?]) (?=[A-Z`]|--)", r"; "):
        if found := re.search(gap, first):
            return first[: found.start()].rstrip("."), capitalised(first[found.end() :])
    return first.rstrip("."), ""


def capitalised(text: str) -> str:
    """Text that begins a cell; a name of a key stays as it is."""
    return text if re.match(r"[a-z]+[._][a-z]", text) else f"{text[0].upper()}{text[1:]}"


def in_code(text: str) -> str:
    """Text as code in a cell of a table."""
    text = text.replace("|", "\\|")
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def in_text(text: str) -> str:
    """Text in a cell of a table, in which Markdown and HTML have no meaning, except for code and links."""
    parts = re.split(r"(`[^`]*`|\[[^\]]*\]\([^)]*\))", text)
    parts[::2] = [re.sub(r"(\*|(?<!\w)_)", r"\\\1", part).replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a.nii: empty. Copy it again."], "| `a.nii: empty` | 3 | Copy it again. |"),
        (["OUT is a file; give a folder"], "| `OUT is a file` | 3 | Give a folder |"),
        (["changed:", "  steps: 1 -> 2", "Use --allow."], "| `changed` | 3 | Steps: 1 -> 2 Use --allow. |"),
        (["no `x`|`y`. Name it <case>_t1, _t2"], "| `` no `x`\\|`y` `` | 3 | Name it &lt;case>\\_t1, \\_t2 |"),
    ],
)
def test_a_message_is_split_into_problem_and_remedy(lines: list[str], expected: str) -> None:
    assert row(lines, 3, "") == expected
    assert ROW.match(expected)


# What the commands print


@pytest.fixture
def small(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line."""
    return [word for setting in tiny_settings for word in ("--set", setting)]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder in which commands name what they take by short names."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return folder


@pytest.fixture
def crossval(phantoms: Path, place: Path, tiny_run: Path, small: list[str], znormseg: Call) -> Path:
    """A cross-validation of the three cases, out of the way."""
    fresh(place, phantoms, tiny_run)
    ended = znormseg(*shlex.split(errors.CROSSVAL)[1:], *small)
    assert ended.code == 0, ended.err
    return Path(shutil.move(place / "CROSSVAL", place.parent))


def fresh(place: Path, phantoms: Path, tiny_run: Path) -> None:
    """Leave the folder with three cases as DATA and a run as RUN, and nothing else."""
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for case in sorted(phantoms.iterdir())[:3]:
        shutil.copytree(case, place / "DATA" / case.name)
    shutil.copytree(tiny_run, place / "RUN")


def ended(shown: Any, small: list[str], patch: pytest.MonkeyPatch, znormseg: Call, shell: Call) -> Any:
    """How a command ends, in this process or in a separate one."""
    words = shlex.split(shown.command)
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        patch.setenv(name, value)
    more = small if shown.small else []
    if shown.before is not None:
        return shell([*shown.before(), *words, *more])
    verb, *rest = words[words.index("znormseg") + 1 :]
    return znormseg(verb, *more, *rest)  # of two values of a key the later one counts


def as_printed(shown: Any, outcome: Any, place: Path) -> list[str]:
    """The lines of the message, with short paths and without what differs from run to run."""
    if shown.only:
        both = f"{outcome.err}{outcome.out}".splitlines()
        lines = list(dict.fromkeys(line for line in both if re.search(shown.only, line)))  # of two processes: once
    else:
        lines = [line for line in (outcome.err or outcome.out).splitlines() if line and not PROGRESS.match(line)]
        begin = next((n for n, line in enumerate(lines) if line.startswith(("znormseg:", "case ", "--", "Error:"))), 0)
        lines = [line for line in lines[begin:] if not SUMMARY.match(line)]
    text = "\n".join(lines).replace(f"{place}/", "").replace(str(place), ".")
    text = re.sub(r"^(znormseg|Error): ((not one|none) of [^.]{0,60} could be scored\. )?", "", text)
    case, other = errors.CASE, errors.OTHER
    named = {rf"DATA/{case}/{case}_(t2|seg)\.nii(\.gz)?": "FILE", case: "CASE", rf"{other}|{case[:-1]}9": "OTHER"}
    steady = {
        r"\b[0-9a-f]{12,}\b": "0123456789ab",
        r" Seen: .*": "",
        **shown.steady,
        **named,
    }  # the labels of some cases
    for pattern, instead in steady.items():
        text = re.sub(pattern, instead, text)
    return text.splitlines()


@pytest.mark.slow
def test_the_document_shows_what_the_commands_print(
    *,
    place: Path,
    phantoms: Path,
    tiny_run: Path,
    dicom_study: Path,
    crossval: Path,
    render: Call,
    small: list[str],
    znormseg: Call,
    shell: Call,
) -> None:
    document = DOCUMENT.read_text(encoding="utf-8")
    wrong: list[str] = []

    def row_of(shown: Any) -> str:
        fresh(place, phantoms, tiny_run)
        with pytest.MonkeyPatch.context() as patch, ExitStack() as held:
            shown.prepare(
                errors.Scene(
                    place=place,
                    phantoms=phantoms,
                    study=dicom_study,
                    crossval=crossval,
                    render=render,
                    znormseg=znormseg,
                    patch=patch,
                    held=held,
                )
            )
            outcome = ended(shown, small, patch, znormseg, shell)
        lines = as_printed(shown, outcome, place)
        if (outcome.code, "Traceback" in outcome.err and not shown.only) != (shown.code, False) or not lines:
            wrong.append(f"{shown.command}: {outcome}")
            return ""
        return row(lines, shown.code, shown.remedy)

    def rows_of(topic: str) -> Iterator[tuple[Any, str]]:
        present = iter(split_at_table(document, topic)[1])
        for one in errors.TABLES[topic]:
            kept = next(present, "") if one.listed else ""
            if isinstance(one, errors.Raised):
                yield one, row([one.message()], one.code, one.remedy)
            else:
                yield one, row_of(one) if one.possible() else kept

    made = {topic: list(rows_of(topic)) for topic in errors.TABLES}
    endings = {ending(text) for rows in made.values() for one, text in rows if one.listed}
    for one, text in (pair for rows in made.values() for pair in rows):
        if text and not ROW.match(text):
            wrong.append(f"{text}: the message does not say what to do, so errors_shown.py needs a remedy")
        if text and not one.listed and ending(text) not in endings:
            wrong.append(f"{text}: no row of the document has this code and this advice")
    assert not wrong, "\n".join(wrong)
    expected = document
    for topic, rows in made.items():
        before, _, after = split_at_table(expected, topic)
        expected = before + "".join(f"{text}\n" for one, text in rows if one.listed) + after
    if os.environ.get("ZNORMSEG_REGENERATE"):
        DOCUMENT.write_text(expected, encoding="utf-8")
        return
    assert document.splitlines() == expected.splitlines(), "write it again with ZNORMSEG_REGENERATE=1"
