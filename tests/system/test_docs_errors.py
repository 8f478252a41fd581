"""docs/errors.md shows each row of its tables as it prints, or says why not; tests/system/errors_shown.py has the
commands.

``ZNORMSEG_REGENERATE=1`` writes that part anew: look at the difference.
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
BEGIN, END = "<!-- as printed: written by tests/system/test_docs_errors.py -->\n", "<!-- as printed: end -->\n"
WHY_NOT = "Not shown: "
#: Progress where there is no terminal; when a line of it comes depends on the machine.
PROGRESS = re.compile(r"^[a-z ]+ +\d+%  ")


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


def parts(document: str) -> tuple[str, str, str]:
    """What stands before the part that is written, that part, and what comes after it."""
    before, _, rest = document.partition(BEGIN)
    found, _, after = rest.partition(END)
    return before, found, after


def rows_of_tables(text: str) -> dict[str, list[str]]:
    """First columns of tables of what came, by heading without exit codes."""
    found: dict[str, list[str]] = {}
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        heading = re.sub(r" \([^)]*\)", "", section.partition("\n")[0])
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        if lines:
            found[heading] = [re.split(r" \| ", line.removeprefix("| "))[0] for line in lines[1:]]
    return found


# What holds of the document


def test_every_row_of_every_table_has_commands_or_a_reason_and_there_are_no_others() -> None:
    before, _, _ = parts(DOCUMENT.read_text(encoding="utf-8"))
    assert {section: list(rows) for section, rows in errors.ROWS.items()} == rows_of_tables(before)
    assert all(shown for rows in errors.ROWS.values() for shown in rows.values())


def test_every_row_of_every_table_is_shown_with_a_block_or_a_reason() -> None:
    before, shown, _ = parts(DOCUMENT.read_text(encoding="utf-8"))
    assert shown.count("\n### ") == len(rows_of_tables(before))
    for section, rows in rows_of_tables(before).items():
        _, _, part = shown.partition(f"### {section}\n")
        for row in rows:
            _, _, beneath = part.partition("\n### ")[0].partition(f"\n**{row}**\n")
            first = beneath.partition("\n**")[0]
            assert "```text\n$ " in first or WHY_NOT in first, f"{section}: {row}"


def every_command() -> list[Any]:
    return [
        one for rows in errors.ROWS.values() for shown in rows.values() if not isinstance(shown, str) for one in shown
    ]


def test_every_command_of_a_row_stands_in_the_document_with_what_it_prints() -> None:
    _, document, _ = parts(DOCUMENT.read_text(encoding="utf-8"))
    blocks = [kept(document, heading_of(shown)).removeprefix(heading_of(shown)) for shown in every_command()]
    assert [shown.command for shown, block in zip(every_command(), blocks, strict=True) if block == "```\n"] == []


def test_every_bad_input_of_the_tests_is_shown() -> None:
    titles = {shown.title for shown in every_command()}
    bad = errors.bad
    assert {*bad.BAD_IMAGES, *bad.BAD_SETTINGS, *bad.BAD_RUNS} <= titles
    assert set(bad.BAD_LABELS) <= {title.removeprefix("label map: ") for title in titles}


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
    """How a command ends: in this process, or in one of its own."""
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
    """The message alone, with short paths and without what differs from run to run."""
    lines = [line for line in (outcome.err or outcome.out).strip("\n").splitlines() if not PROGRESS.match(line)]
    if shown.only:
        both = f"{outcome.err}{outcome.out}".splitlines()
        lines = list(dict.fromkeys(line for line in both if re.search(shown.only, line)))  # of two processes: once
    else:
        begins = [number for number, line in enumerate(lines) if line.startswith(("znormseg:", "case ", "--"))]
        lines = lines[begins[0] :] if begins else lines
    text = "\n".join(lines)
    text = re.sub(r"^(Usage: |Try ')\S.*?znormseg", r"\1znormseg", text, flags=re.MULTILINE)
    text = text.replace(f"{place}/", "").replace(str(place), ".")
    for pattern, instead in {r"\b[0-9a-f]{12,}\b": "0123456789ab", **shown.steady}.items():
        text = re.sub(pattern, instead, text)
    return text.splitlines()


def heading_of(shown: Any) -> str:
    """What stands above a block: it is found by it again."""
    title = f"{shown.title[0].upper()}{shown.title[1:]}, exit code" if shown.title else "Exit code"
    return f"{title} {shown.code}:\n\n```text\n$ {shown.command}\n"


def kept(document: str, heading: str) -> str:
    """A block as the document has it."""
    _, _, rest = document.partition(heading)
    return heading + rest.partition("```\n")[0] + "```\n"


@pytest.mark.slow
def test_the_document_shows_each_row_as_it_prints(
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
    before, document, after = parts(DOCUMENT.read_text(encoding="utf-8"))
    wrong: list[str] = []

    def block(shown: Any) -> str:
        if not shown.possible():
            return kept(document, heading_of(shown))
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
        return heading_of(shown) + "".join(f"{line}\n" for line in lines) + "```\n"

    def written() -> Iterator[str]:
        for section, rows in errors.ROWS.items():
            yield f"### {section}\n"
            for row, shown in rows.items():
                yield f"**{row}**\n"
                yield from [f"{WHY_NOT}{shown}.\n"] if isinstance(shown, str) else map(block, shown)

    text = "\n".join(written())
    assert not wrong, "\n".join(wrong)
    if os.environ.get("ZNORMSEG_REGENERATE"):
        DOCUMENT.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")
        return
    assert document.strip().splitlines() == text.strip().splitlines(), "write it anew with ZNORMSEG_REGENERATE=1"
