"""Scores of sets of predictions by case: computed from label maps, or read from tables of ``evaluate``."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

from app.evaluation.brats import brats2026
from app.evaluation.brats.challenge import ChallengeRules, evaluate_by_rules
from app.evaluation.evaluate import evaluate
from app.evaluation.folders import OnCase
from data.datasets.source import DataSource
from data.errors import DataError
from data.filesystem import why

Measure = tuple[str, str]
"""Region and metric, e.g. ``("WT", "dice")``."""
_SUMMARY_ROWS: Final = {"mean", "median"}


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of one set of predictions."""

    name: str
    """Short name, for tables."""
    cases: Mapping[str, Mapping[Measure, float]]
    """Scores by case id."""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Reasons why other cases could not be scored, by case id."""
    missing: tuple[str, ...] = ()
    """Case ids that have a reference but no prediction."""
    scored_by: str | None = None
    """Rules and task, e.g. ``brats2023 GLI``, or ``no rules``; None if unstated, as in CSVs of rules before 2026."""
    nsd_definition: str | None = None
    """Definition of the surface Dice ``nsd`` in words; None if not stated."""


def load(
    sources: Sequence[DataSource],
    references: DataSource | None,
    rules: ChallengeRules | None,
    *,
    on_case: OnCase | None = None,
) -> list[Scored]:
    """Load the scores of every source, each under a unique name.

    Args:
        sources: two or more folders of label maps or tables of ``evaluate`` (.csv or .json), in any mix.
        references: the reference label maps, for sources that are folders.
        rules: rules by which folders are scored; None scores them like ``evaluate`` without ``--rules``.
        on_case: called with each case of a folder that is scored, prefixed by the folder's name, and the share of all
            sources done so far.

    Raises:
        DataError: there are fewer than two sources, one is given twice or unreadable, or a folder has no references.
    """
    if len(sources) < 2:
        raise DataError("a ranking needs two or more folders or tables, but only one was given. Add another.")
    resolved = [source.root.resolve() for source in sources]
    twice = next((source for source, path in zip(sources, resolved, strict=True) if resolved.count(path) > 1), None)
    if twice is not None:
        raise DataError(f"{twice.root}: given twice. Give each folder or table once.")
    found = []
    for number, (source, name) in enumerate(zip(sources, _names(resolved), strict=True)):
        if not source.root.is_dir():
            found.append(_read_table(source.root, name))
            continue
        if references is None:
            raise DataError(
                f"{source.root}: is a folder; give --references REFERENCES to score it, or a table from evaluate."
            )

        def announce(case: str, share: float, name: str = name, number: int = number) -> None:
            if on_case is not None:
                on_case(f"{name}: {case}", (number + share) / len(sources))

        score = evaluate if rules is None else partial(evaluate_by_rules, rules=rules)
        scores = score(source, references, on_case=announce)
        found.append(_of_json(name, scores.to_json()))
    return found


def _names(sources: Sequence[Path]) -> list[str]:
    """Name each source by the last part of its path, or by as many parts as it takes to make all names different."""
    for parts in range(1, max(len(source.parts) for source in sources) + 1):
        names = [
            "/".join((*source.parts[-parts:-1], source.stem if source.is_file() else source.name)) for source in sources
        ]
        if len(set(names)) == len(names):
            return names
    return [str(source) for source in sources]


def _read_table(source: Path, name: str) -> Scored:
    if not source.is_file():
        raise DataError(f"{source}: neither a folder of label maps nor a table from evaluate. Check the path.")
    try:
        text = source.read_text(encoding="utf-8-sig")  # spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{source}: cannot be read as text ({why(error)}). Give a table from evaluate, .csv or .json."
        ) from error
    try:
        found = _of_json(name, json.loads(text)) if source.suffix == ".json" else _of_csv(name, text)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{source}: not a table from evaluate ({error}). Write one with evaluate --out TABLE.csv or --json."
        ) from error
    if not found.cases:
        raise DataError(f"{source}: contains no case. Write the table again with evaluate.")
    return found


def _of_json(name: str, content: Any) -> Scored:
    """Read the output of ``evaluate --json``; older versions do not list the cases that failed."""
    by_package = content.get("rules") == brats2026.YEAR
    cases = {
        str(case["case"]): {
            (region, metric): value
            for region, values in case.items()
            if region != "case"
            for metric, value in (_of_package(values) if by_package else _finite(values)).items()
        }
        for case in content["cases"]
    }
    return Scored(
        name=name,
        cases=cases,
        failures={str(case): str(reason) for case, reason in content.get("failures", {}).items()},
        missing=tuple(map(str, content.get("missing_predictions", ()))),
        scored_by=content.get("scored_by")
        or (f"{content['rules']} {content['task']}" if "rules" in content else "no rules"),
        nsd_definition=content.get("nsd_definition"),
    )


def _of_csv(name: str, text: str) -> Scored:
    cases: dict[str, dict[Measure, float]] = {}
    scored_by: str | None = None
    for row in csv.DictReader(text.splitlines()):
        case = row.pop("case")
        scored_by = row.pop("scored_by", scored_by)
        if case in _SUMMARY_ROWS:
            continue
        by_region: dict[str, dict[str, str]] = {}
        for column, value in row.items():
            if value != "":  # ECE and Brier score of a case without probabilities
                region, _, metric = column.partition("_")
                by_region.setdefault(region, {})[metric] = value
        numbers = _of_package if (scored_by or "").startswith(brats2026.YEAR) else _finite
        cases[case] = {(r, metric): n for r, values in by_region.items() for metric, n in numbers(values).items()}
        if not cases[case]:
            raise ValueError(f"no score for {case}")
    return Scored(name=name, cases=cases, scored_by=scored_by)


def _of_package(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a region by the rules of 2026, with undefined and infinite values replaced."""
    return brats2026.rankable({metric: math.nan if n is None else float(n) for metric, n in values.items()})


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {metric: _number(value) for metric, value in values.items()}


def _number(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"a score is {number}")
    return number
