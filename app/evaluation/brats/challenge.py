"""One interface to the rules of all challenges: those computed here, and those of 2026, computed by a command."""

from __future__ import annotations

from app.evaluation.brats.brats2026 import YEAR, PackageRules, evaluate_by_package, package_rules
from app.evaluation.brats.evaluate import evaluate_officially
from app.evaluation.brats.rules import Rules, rules_for
from app.evaluation.folders import OnCase
from app.evaluation.tables import FolderScores
from data.datasets.source import DataSource

ChallengeRules = Rules | PackageRules


def challenge_rules(year: str, task: str) -> ChallengeRules:
    """Return the rules of a year and a task, by their names on the command line.

    Raises:
        DataError: there is no such year, or the year does not have the task; the message lists the choices.
    """
    return package_rules(task) if year == YEAR else rules_for(year, task)


def evaluate_by_rules(
    predictions: DataSource,
    references: DataSource,
    rules: ChallengeRules,
    *,
    on_case: OnCase | None = None,
) -> FolderScores:
    """Score every case that has a label map in both folders.

    Args and errors are those of :func:`app.evaluation.brats.evaluate.evaluate_officially` and
    :func:`app.evaluation.brats.brats2026.evaluate_by_package`.
    """
    if isinstance(rules, PackageRules):
        return evaluate_by_package(predictions, references, rules, on_case=on_case)
    return evaluate_officially(predictions, references, rules, on_case=on_case)
