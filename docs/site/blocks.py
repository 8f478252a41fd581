"""Blocks of code in the documents, and the marks above them; tests/system/test_docs_commands.py runs the blocks.

A mark is an HTML comment on its own line above a block: ``<!-- no-run: why -->`` or ``<!-- given: RUN, OTHER=RUN -->``.
``<!-- no-run, whole page: why -->`` applies to every block below it.
A block is fenced, or indented by four spaces. Without a stated language it is ``bash`` if it has a command, else
``text``.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

#: Words that begin a line of commands.
PROGRAMS = (
    "znormseg",
    "make",
    "python",
    "torchrun",
    "docker",
    "podman",
    "buildah",
    "apptainer",
    "sudo",
    "git",
    "source",
)
#: Languages of the blocks that are run.
RUNNABLE = ("bash", "python")

_MARK = re.compile(r"^<!-- (no-run|given|no-run, whole page): (.+?) -->$")
_FENCE = re.compile(r"^( *)```(\w*)")
_SEPARATORS = {";", "&&", "||", "|", "&", "(", ")", ";;", "<", ">", ">>"}


class Block(NamedTuple):
    """A block of code in a document."""

    place: str
    """File and line of its first line of code."""
    language: str
    code: str
    no_run: str | None
    """Why it is not run; None if it is."""
    given: dict[str, str]
    """Files and folders that must exist before it runs: the name of a fixture by the name in the block."""

    @property
    def runs(self) -> bool:
        """Whether a test runs it."""
        return self.language in RUNNABLE and self.no_run is None


def blocks(document: Path, root: Path) -> list[Block]:
    """Every block of a document, with its marks."""
    name = document.relative_to(root).as_posix()
    return [
        Block(
            f"{name}:{number}", language or _language(code), code, marks.get("no-run"), _given(marks.get("given", ""))
        )
        for number, language, code, marks in _marked_blocks(document.read_text(encoding="utf-8").splitlines())
    ]


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a shell block, each as a list of words without comments and leading assignments."""
    pending = ""
    for line in code.splitlines():
        pending = f"{pending}\n{line}" if pending else line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            lexer = shlex.shlex(pending, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words = list(lexer)
        except ValueError:  # a quotation that continues on the next line
            continue
        pending = ""
        command: list[str] = []
        for word in [*words, ";"]:
            if word in _SEPARATORS:
                if command:
                    yield command
                command = []
            elif command or not re.match(r"^\w+=", word):
                command.append(word)


def _marked_blocks(lines: list[str]) -> Iterator[tuple[int, str, str, dict[str, str]]]:
    """Line number, language, code and marks of each block."""
    of_page: dict[str, str] = {}
    marks: dict[str, str] = {}
    number, in_list = 0, False
    while number < len(lines):
        line = lines[number]
        if match := _FENCE.match(line):
            indent = match[1]
            end = next(i for i in range(number + 1, len(lines)) if lines[i].startswith(f"{indent}```"))
            yield number + 2, match[2], _code(lines[number + 1 : end], len(indent)), marks
            marks, number = dict(of_page), end
        elif line.startswith("    ") and not in_list and not (number and lines[number - 1].strip()):
            end = next((i for i in range(number, len(lines)) if lines[i].strip() and lines[i][:4].strip()), len(lines))
            yield number + 1, "", _code(lines[number:end], 4), marks
            marks, number = dict(of_page), end - 1
        elif match := _MARK.match(line):
            if match[1] == "no-run, whole page":
                of_page["no-run"] = match[2]
            marks[match[1].partition(",")[0]] = match[2]
        elif line.strip():
            marks = dict(of_page)
            in_list = bool(re.match(r"^\s*([-*]|\d+\.) ", line)) or (in_list and line.startswith(" "))
        number += 1


def _code(lines: list[str], indent: int) -> str:
    return "\n".join(line[indent:] for line in lines).strip("\n") + "\n"


def _language(code: str) -> str:
    return "bash" if any(line.split(" ")[0] in PROGRAMS for line in code.splitlines()) else "text"


def _given(text: str) -> dict[str, str]:
    pairs = [part.strip().partition("=") for part in text.split(",") if part.strip()]
    return {name: thing or name for name, _, thing in pairs}
