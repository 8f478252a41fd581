"""One interface to the rules of all challenges: those computed here, and those of 2026, computed by a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from app.evaluation.brats import brats2026, evaluate
from app.evaluation.brats.brats2026 import PackageEvaluation, PackageRules, evaluate_by_package, package_rules
from app.evaluation.brats.evaluate import OfficialEvaluation, evaluate_officially
from app.evaluation.brats.rules import Rules, rules_for
from data.datasets.source import DataSource

ChallengeRules = Rules | PackageRules
ChallengeEvaluation = OfficialEvaluation | PackageEvaluation


def challenge_rules(year: str, task: str) -> ChallengeRules:
    """Return the rules of a year and a task, by their names on the command line.

    Raises:
        DataError: there is no such year, or the year does not have the task; the message lists the choices.
    """
    return package_rules(task) if year == brats2026.YEAR else rules_for(year, task)


def evaluate_by_rules(
    predictions: DataSource,
    references: DataSource,
    rules: ChallengeRules,
    *,
    on_case: Callable[[str, float], None] | None = None,
) -> ChallengeEvaluation:
    """Score every case that has a label map in both folders.

    Args and errors are those of :func:`app.evaluation.brats.evaluate.evaluate_officially` and
    :func:`app.evaluation.brats.brats2026.evaluate_by_package`.
    """
    if isinstance(rules, PackageRules):
        return evaluate_by_package(predictions, references, rules, on_case=on_case)
    return evaluate_officially(predictions, references, rules, on_case=on_case)


def challenge_rows(evaluation: ChallengeEvaluation) -> list[list[str]]:
    """Return the table for the terminal: header, cases, mean and median."""
    return (
        brats2026.package_rows(evaluation)
        if isinstance(evaluation, PackageEvaluation)
        else evaluate.lesion_rows(evaluation)
    )


def challenge_remarks(evaluation: ChallengeEvaluation) -> list[str]:
    """Return explanations of the numbers in the terminal table, one sentence each."""
    return (
        brats2026.package_remarks(evaluation)
        if isinstance(evaluation, PackageEvaluation)
        else evaluate.lesion_remarks(evaluation)
    )


def write_challenge_table(evaluation: ChallengeEvaluation, path: Path) -> None:
    """Write all scores as CSV; see ``write_package_table`` and ``write_lesion_table``."""
    if isinstance(evaluation, PackageEvaluation):
        brats2026.write_package_table(evaluation, path)
    else:
        evaluate.write_lesion_table(evaluation, path)
