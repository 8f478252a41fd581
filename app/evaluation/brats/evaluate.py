"""Score a folder of predicted label maps by the rules of a challenge."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from app.evaluation.brats.rules import Rules
from app.evaluation.brats.score import OfficialScores, official_scores
from app.evaluation.folders import Folders, OnCase, match, score_each
from app.evaluation.tables import FolderScores, Values
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import BRATS2024, decode_tissues


@dataclass(frozen=True, kw_only=True)
class OfficialCase:
    """Scores of one case."""

    case: str
    """Case id."""
    regions: Mapping[str, OfficialScores]
    """Scores by region, in the order of the script."""

    def values(self) -> dict[str, dict[str, float]]:
        """Return every metric that the script reports, by region and metric."""
        return {
            region: {name: value for name, value in dataclasses.asdict(scores).items() if value is not None}
            for region, scores in self.regions.items()
        }


@dataclass(frozen=True, kw_only=True)
class OfficialEvaluation(FolderScores):
    """Scores of all cases by the rules of a challenge."""

    in_terminal = (("lesion_dice", "lesion Dice", ".3f"), ("lesion_hd95_mm", "lesion HD95 mm", ".1f"))

    rules: Rules
    """Rules by which the cases were scored."""
    cases: tuple[OfficialCase, ...]
    """Sorted by case id, at least one."""

    @property
    def by_case(self) -> dict[str, Values]:
        """Every score by case id."""
        return {case.case: case.values() for case in self.cases}

    def remarks(self) -> list[str]:
        """Return explanations of the numbers in the terminal table, one sentence each."""
        found: dict[str, tuple[int, int]] = {}
        for rule in self.rules.scored:
            scores = [case.regions[rule.name] for case in self.cases]
            found[rule.name] = sum(one.false_positives for one in scores), sum(one.false_negatives for one in scores)
        sentences = ["means over lesions, by the rules of " + f"{self.rules.year} {self.rules.task}"]
        invented = {name: count for name, (count, _) in found.items() if count}
        missed = {name: count for name, (_, count) in found.items() if count}
        if invented:
            sentences.append(f"predicted lesions that touch no reference lesion: {_counts(invented)}")
        if missed:
            sentences.append(f"reference lesions that were missed: {_counts(missed)}")
        counted = self.rules.counts_invented
        if missed or (invented and counted):
            penalty = self.rules.penalty_mm
            hd95 = "an HD95 of the grid's diagonal in voxels" if penalty is None else f"an HD95 of {penalty:g} mm"
            each = "each of them" if counted else "each missed one"
            sentences.append(f"{each} counts with Dice 0 and {hd95} in these means")
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: ``rules``, ``task``, ``regions`` (means), ``cases``, missing cases etc."""
        ignored_mm = {case: list(edges) for case, edges in self.folders.pixdim_mm.items()}
        return self.json_with(
            before={"rules": self.rules.year, "task": self.rules.task},
            between={"pixdim_not_followed_mm": ignored_mm},
            after={},
        )


def match_for_task(predictions: DataSource, references: DataSource, task: str) -> Folders:
    """Match two folders with :func:`app.evaluation.folders.match`.

    For MEN-RT, whose label maps have only one label, the label convention is set instead of detected.
    """
    if task == "MEN-RT":
        predictions, references = (replace(side, labels=BRATS2024.name) for side in (predictions, references))
    return match(predictions, references)


def evaluate_officially(
    predictions: DataSource,
    references: DataSource,
    rules: Rules,
    *,
    on_case: OnCase | None = None,
) -> OfficialEvaluation:
    """Score every case that has a label map in both folders, as the challenge's script does.

    Unlike the scripts, which take the numbers in the files as they are, this first decodes each side by its label
    convention. Label maps on the same grid may be stored in different voxel orders.

    Args:
        predictions: the predicted label maps.
        references: the reference label maps.
        rules: rules from :func:`app.evaluation.brats.rules.rules_for`.
        on_case: called in order with each case id that is done, and the share of cases done so far.

    Raises:
        DataError: as raised by :func:`app.evaluation.evaluate.evaluate`.
    """
    folders = match_for_task(predictions, references, rules.task)

    def score(case: str) -> OfficialCase:
        prediction, reference = folders.same_grid_pair(case)
        for volume in (prediction, reference):
            if rules.task == "MEN-RT" and volume.voxels.max(initial=0) > 1:
                raise DataError(
                    f"{volume.path}: contains label values other than 0 and 1, the only ones of MEN-RT. Check --task."
                )
        tissues = (
            decode_tissues(prediction.voxels, folders.prediction_convention),
            decode_tissues(reference.voxels, folders.reference_convention),
        )
        return OfficialCase(case=case, regions=official_scores(*tissues, reference.spacing_mm, rules))

    cases, failures = score_each(folders, score, on_case=on_case)
    return OfficialEvaluation(rules=rules, cases=tuple(cases), folders=folders, failures=failures)


def _counts(numbers: Mapping[str, int]) -> str:
    """Format counts by region, as in ``WT 149, ET 3``."""
    return ", ".join(f"{name} {count}" for name, count in numbers.items())
