"""Scores of the cases of two folders as tables for terminal, CSV and JSON: a row per case, then mean and median."""

from __future__ import annotations

import csv
import math
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from app.evaluation.folders import Folders, first_ids
from data.errors import DataError
from data.files import replacing

Values = Mapping[str, Mapping[str, float]]
"""Scores by region and metric."""


@dataclass(frozen=True, kw_only=True)
class FolderScores(ABC):
    """Scores of all cases that could be scored, and the reasons why others could not."""

    folders: Folders
    """The label maps that were compared."""
    failures: Mapping[str, str]
    """Reasons why cases with both label maps could not be scored, by case id."""

    in_terminal: ClassVar[tuple[tuple[str, str, str], ...]]
    """Columns of each region in the terminal: metric, heading, format."""

    @property
    @abstractmethod
    def by_case(self) -> Mapping[str, Values]:
        """Every score by case id, at least one case, in the order of every table."""

    @abstractmethod
    def remarks(self) -> list[str]:
        """Return explanations of the table in the terminal, one sentence each."""

    def notes(self) -> list[str]:
        """Return notes about the folders: which cases are missing, one sentence each."""
        missing = {"prediction": self.folders.missing_predictions, "reference": self.folders.missing_references}
        return [f"no {side} for {len(ids)} cases: {first_ids(ids)}" for side, ids in missing.items() if ids]

    def means(self) -> dict[str, dict[str, float]]:
        """Return the mean of every metric over cases, e.g. ``means()["WT"]["dice"]``."""
        return self._over_cases(statistics.fmean)

    def medians(self) -> dict[str, dict[str, float]]:
        """Return the median of every metric over cases, by region."""
        return self._over_cases(statistics.median)

    def rows(self) -> list[list[str]]:
        """Return the table for the terminal: header, one row per case, then mean and median."""
        columns = [(region, *column) for region in next(iter(self.by_case.values())) for column in self.in_terminal]
        return [
            ["case", *(f"{region} {heading}" for region, _, heading, _ in columns)],
            *(
                [name, *(_cell(values[region][metric], form) for region, metric, _, form in columns)]
                for name, values in self._named_values()
            ),
        ]

    def csv_rows(self) -> list[list[object]]:
        """Return the table in full precision, with columns ``case``, ``WT_dice``, ``WT_hd95_mm``, ..."""
        columns = [
            (region, metric) for region, numbers in next(iter(self.by_case.values())).items() for metric in numbers
        ]
        return [
            ["case", *(f"{region}_{metric}" for region, metric in columns)],
            *([name, *(values[region][metric] for region, metric in columns)] for name, values in self._named_values()),
        ]

    def write_table(self, path: Path) -> None:
        """Write :meth:`csv_rows` as a CSV file; see :func:`write_csv`."""
        write_csv(path, self.csv_rows())

    def json_with(
        self, *, before: Mapping[str, Any], between: Mapping[str, Any], after: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return the scores and the cases without scores as plain values that ``json.dumps`` accepts.

        Args:
            before: entries before the scores.
            between: entries between the failures and the label conventions.
            after: entries at the end.

        Returns:
            ``regions`` (means), ``cases``, ``regions_median``, ``missing_predictions``, ``missing_references``,
            ``failures`` and the conventions. NaN becomes null, infinity ``"inf"``.
        """
        return {
            **before,
            "regions": _plain(self.means()),
            "cases": [{"case": case, **_plain(values)} for case, values in self.by_case.items()],
            "regions_median": _plain(self.medians()),
            "missing_predictions": list(self.folders.missing_predictions),
            "missing_references": list(self.folders.missing_references),
            "failures": dict(self.failures),
            **between,
            "prediction_convention": self.folders.prediction_convention.name,
            "reference_convention": self.folders.reference_convention.name,
            **after,
        }

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: :meth:`json_with`, and entries specific to these scores."""

    def _named_values(self) -> Iterator[tuple[str, Values]]:
        """Yield the rows of every table: cases, mean and median."""
        yield from self.by_case.items()
        yield "mean", self.means()
        yield "median", self.medians()

    def _over_cases(self, average: Callable[[Sequence[float]], float]) -> dict[str, dict[str, float]]:
        return over_cases(list(self.by_case.values()), average)


def over_cases(cases: Sequence[Values], average: Callable[[Sequence[float]], float]) -> dict[str, dict[str, float]]:
    """Average the scores of cases, by region and metric.

    Args:
        cases: at least one, all with the same regions and metrics.
        average: function of a sequence of numbers, such as ``statistics.fmean``.
    """
    return {
        region: {metric: average([float(values[region][metric]) for values in cases]) for metric in numbers}
        for region, numbers in cases[0].items()
    }


def require_table_place(path: Path) -> None:
    """Require that a table can be written to a path.

    Raises:
        DataError: the folder of ``path`` does not exist, or ``path`` is a folder.
    """
    if path.is_dir():
        raise DataError(f"{path}: a folder; give the name of a CSV file, e.g. {path / 'scores.csv'}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist. Create it first.")


def write_csv(path: Path, rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file atomically.

    Args:
        path: an existing file is replaced.
        rows: header and rows; floats are written in full precision.

    Raises:
        DataError: the folder of ``path`` does not exist, or ``path`` is a folder.
        OSError: the disk is full or the folder cannot be written.
    """
    require_table_place(path)
    # A file name may contain bytes that are not UTF-8.
    with (
        replacing(path) as partial,
        partial.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        csv.writer(file, lineterminator="\n").writerows(rows)


def _cell(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _plain(values: Values) -> dict[str, dict[str, Any]]:
    return {
        region: {
            metric: None if math.isnan(value) else "inf" if math.isinf(value) else value
            for metric, value in numbers.items()
        }
        for region, numbers in values.items()
    }
