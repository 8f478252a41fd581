"""Score a folder of predicted label maps by the rules of a challenge, and write the scores."""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from app.evaluation.brats.rules import Rules
from app.evaluation.brats.score import OfficialScores, official_scores
from app.evaluation.evaluate import Folders, match, require_table_place, score_each
from data.datasets.source import DataSource
from data.errors import DataError
from data.files import replacing
from data.labels import BRATS2024, decode_tissues
from data.nifti import grid_difference, in_order_of

#: Columns of the table in the terminal: metric, heading, format.
_IN_TERMINAL: Final = (
    ("lesion_dice", "lesion Dice", ".3f"),
    ("lesion_hd95_mm", "lesion HD95 mm", ".1f"),
)
Values = Mapping[str, Mapping[str, float]]
"""Value by region and metric."""


@dataclass(frozen=True, kw_only=True)
class OfficialCase:
    """Scores of one case."""

    case: str
    """Case id."""
    regions: Mapping[str, OfficialScores]
    """Scores by region, in the order of the script."""

    def values(self) -> dict[str, dict[str, float]]:
        """Return every metric that the script gives, by region and metric."""
        return {
            region: {name: value for name, value in dataclasses.asdict(scores).items() if value is not None}
            for region, scores in self.regions.items()
        }


@dataclass(frozen=True, kw_only=True)
class OfficialEvaluation:
    """Scores of all cases by the rules of a challenge."""

    rules: Rules
    """Rules by which the cases were scored."""
    cases: tuple[OfficialCase, ...]
    """Sorted by case id, at least one."""
    folders: Folders
    """The label maps that were compared."""
    failures: Mapping[str, str]
    """Reasons why cases with both label maps could not be scored, by case id."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics, in the order of every file."""
        return tuple(next(iter(self.cases[0].values().values())))

    def means(self) -> dict[str, dict[str, float]]:
        """Return means over cases, by region and metric."""
        return self._over_cases(statistics.fmean)

    def medians(self) -> dict[str, dict[str, float]]:
        """Return medians over cases, by region and metric."""
        return self._over_cases(statistics.median)

    def named_values(self) -> Iterator[tuple[str, Values]]:
        """Yield the rows of every table: cases, mean, median."""
        for case in self.cases:
            yield case.case, case.values()
        yield "mean", self.means()
        yield "median", self.medians()

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: ``rules``, ``task``, ``regions`` (means), ``cases``, missing cases etc."""
        return {
            "rules": self.rules.year,
            "task": self.rules.task,
            "regions": self.means(),
            "cases": [{"case": case.case, **case.values()} for case in self.cases],
            "regions_median": self.medians(),
            "missing_predictions": list(self.folders.missing_predictions),
            "missing_references": list(self.folders.missing_references),
            "failures": dict(self.failures),
            "pixdim_not_followed_mm": {case: list(edges) for case, edges in self.folders.pixdim_mm.items()},
            "prediction_convention": self.folders.prediction_convention.name,
            "reference_convention": self.folders.reference_convention.name,
        }

    def _over_cases(self, middle: Callable[[list[float]], float]) -> dict[str, dict[str, float]]:
        every = [case.values() for case in self.cases]
        return {
            rule.name: {
                metric: middle([float(values[rule.name][metric]) for values in every]) for metric in self.metrics
            }
            for rule in self.rules.scored
        }


def evaluate_officially(
    predictions: DataSource,
    references: DataSource,
    rules: Rules,
    *,
    on_case: Callable[[str, float], None] | None = None,
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
        DataError: as :func:`app.evaluation.evaluate.evaluate`.
    """
    only_one_label = rules.task == "MEN-RT"
    if only_one_label:
        predictions, references = (replace(side, labels=BRATS2024.name) for side in (predictions, references))
    folders = match(predictions, references)

    def score(case: str) -> OfficialCase:
        reference = folders.read(folders.expected[case])
        prediction = in_order_of(reference, folders.read(folders.predicted[case]))
        difference = grid_difference(prediction, reference)
        if difference is not None:
            raise DataError(
                f"case {case}: {prediction.path} and {reference.path} lie on different grids: {difference}. The "
                "challenge compares voxel by voxel: bring the prediction to the grid of the reference first."
            )
        for volume in (prediction, reference):
            if only_one_label and volume.voxels.max(initial=0) > 1:
                raise DataError(f"{volume.path}: label maps of MEN-RT hold 0 and 1, this one others. Which task is it?")
        tissues = (
            decode_tissues(prediction.voxels, folders.prediction_convention),
            decode_tissues(reference.voxels, folders.reference_convention),
        )
        return OfficialCase(case=case, regions=official_scores(*tissues, reference.spacing_mm, rules))

    cases, failures = score_each(folders, score, on_case=on_case)
    return OfficialEvaluation(rules=rules, cases=tuple(cases), folders=folders, failures=failures)


def lesion_rows(evaluation: OfficialEvaluation) -> list[list[str]]:
    """Return the table for the terminal: header, cases, mean, median; lesion-wise Dice and HD95 in mm by region."""
    regions = [rule.name for rule in evaluation.rules.scored]
    return [
        ["case", *(f"{region} {heading}" for region in regions for _, heading, _ in _IN_TERMINAL)],
        *(
            [name, *(f"{values[region][metric]:{form}}" for region in regions for metric, _, form in _IN_TERMINAL)]
            for name, values in evaluation.named_values()
        ),
    ]


def lesion_remarks(evaluation: OfficialEvaluation) -> list[str]:
    """Return explanations of the numbers in the terminal table, one sentence each."""
    found: dict[str, tuple[int, int]] = {}
    for rule in evaluation.rules.scored:
        scores = [case.regions[rule.name] for case in evaluation.cases]
        found[rule.name] = sum(one.false_positives for one in scores), sum(one.false_negatives for one in scores)
    said = ["means over lesions, by the rules of " + f"{evaluation.rules.year} {evaluation.rules.task}"]
    invented = {name: count for name, (count, _) in found.items() if count}
    missed = {name: count for name, (_, count) in found.items() if count}
    if invented:
        said.append(f"predicted lesions that touch none of the reference: {_counts(invented)}")
    if missed:
        said.append(f"lesions of the reference that were missed: {_counts(missed)}")
    counted = evaluation.rules.counts_invented
    if missed or (invented and counted):
        penalty = evaluation.rules.penalty_mm
        hd95 = "as HD95 the diagonal of the grid in voxels" if penalty is None else f"HD95 {penalty:g} mm"
        said.append(f"{'each' if counted else 'each missed one'} has Dice 0 and {hd95} in these means")
    return said


def _counts(numbers: Mapping[str, int]) -> str:
    """Format counts by region, as in ``WT 149, ET 3``."""
    return ", ".join(f"{name} {count}" for name, count in numbers.items())


def write_lesion_table(evaluation: OfficialEvaluation, path: Path) -> None:
    """Write all scores as CSV: columns ``case``, ``WT_lesion_dice``, ...; rows: cases, ``mean``, ``median``.

    Args:
        evaluation: scores to write.
        path: CSV file, written atomically; an existing one is replaced.

    Raises:
        DataError: the folder of ``path`` does not exist, or ``path`` is a folder.
        OSError: the disk is full or the folder cannot be written.
    """
    require_table_place(path)
    regions = [rule.name for rule in evaluation.rules.scored]
    with (
        replacing(path) as beside,
        beside.open(
            "w",
            newline="",
            encoding="utf-8",
            errors="backslashreplace",  # a file name may contain bytes that are not UTF-8
        ) as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", *(f"{region}_{metric}" for region in regions for metric in evaluation.metrics)])
        for name, values in evaluation.named_values():
            writer.writerow([name, *(values[region][metric] for region in regions for metric in evaluation.metrics)])
