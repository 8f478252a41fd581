"""A CSV file of what is present in each case: a column ``case``, and columns of 0 and 1."""

from __future__ import annotations

import csv
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from data.datasets.naming import composed
from data.errors import DataError
from data.filesystem import why

_CASE: Final = "case"
_SHOWN: Final = 5


def read_presence_table(
    path: Path, columns: Sequence[str], *, known: Collection[str] | None = None, needed: Collection[str] = ()
) -> dict[str, tuple[int, ...]]:
    """Read 0 or 1 for each case and column.

    Args:
        path: a CSV file with the columns ``case`` and ``columns``; others are ignored.
        columns: names of the columns to read, in the order of the result.
        known: ids of all cases of the data set; the file must have no others. None allows any.
        needed: ids of the cases that must have a row.

    Raises:
        DataError: the file cannot be read, lacks a column, has two rows for a case or one without a case, has a value
            other than 0 and 1, or a needed case has no row.
    """
    rows = _rows(path, columns)
    found: dict[str, tuple[int, ...]] = {}
    for number, row in rows:
        case_id = composed((row[_CASE] or "").strip())
        if not case_id:
            raise DataError(f"{path}: line {number} names no case. Fill in the column {_CASE}, or remove the line.")
        if case_id in found:
            raise DataError(f"{path}: two rows for case {case_id}, the second in line {number}. Keep one of them.")
        found[case_id] = tuple(_bit(path, number, case_id, name, row[name]) for name in columns)
    if strange := [case_id for case_id in found if known is not None and case_id not in known]:
        raise DataError(
            f"{path}: {_count(strange, 'row')} for cases that are not in the data set: {_some(strange)}. Remove "
            f"{'it' if len(strange) == 1 else 'them'}, or give the data set that has these cases."
        )
    if missing := sorted(case_id for case_id in needed if case_id not in found):
        raise DataError(
            f"{path}: no row for {_count(missing, 'case')}: {_some(missing)}. Add one for each, or leave the cases out "
            "with --split."
        )
    return found


def _rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str | None]]]:
    """Return the rows with their line numbers, after checking the header."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = [(name or "").strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as a table of labels ({why(error)})") from error
    for name in (_CASE, *columns):
        if name not in names:
            raise DataError(
                f"{path}: no column {name}; its columns are {', '.join(names) or 'none'}. The first line must name a "
                f"column {_CASE} and one for each of task.outputs ({', '.join(columns)})."
            )
    return rows


def _bit(path: Path, number: int, case_id: str, name: str, text: str | None) -> int:
    value = (text or "").strip()
    if value not in ("0", "1"):
        raise DataError(
            f"{path}: line {number}, case {case_id}: {name} is {value!r}; allowed are 0 (absent) and 1 (present). "
            "Correct the value, or remove the row and the case."
        )
    return int(value)


def _count(ids: Sequence[str], what: str) -> str:
    return f"1 {what}" if len(ids) == 1 else f"{len(ids)} {what}s"


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (" ..." if len(ids) > _SHOWN else "")
