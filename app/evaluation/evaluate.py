"""Score a folder of predicted label maps against a folder of reference label maps, case by case."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app import NOTICE
from app.evaluation.folders import Folders, OnCase, first_ids, match, score_each
from app.evaluation.metrics import (
    DICE_DEFINITION,
    HD95_DEFINITION,
    NSD_MM,
    ONE_EMPTY_HD95_MM,
    RegionScores,
    nsd_definition,
    region_scores,
)
from app.evaluation.reliability import DEFINITION as RELIABILITY_DEFINITION
from app.evaluation.reliability import ENDING, Reliability, case_reliability, pooled, read_probabilities
from app.evaluation.tables import FolderScores, Values, over_cases
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import REGIONS, Region, decode
from data.nifti import grid_difference, in_order_of, reorient, strip_nifti_ending
from data.preprocess import resample_codes_onto

#: Additional metrics of each region for cases with probabilities.
CALIBRATION: Final = ("ece", "brier")


@dataclass(frozen=True, kw_only=True)
class CaseScores:
    """Scores of one case."""

    case: str
    """Case id."""
    regions: Mapping[Region, RegionScores]
    """Scores of WT, TC and ET."""
    resampled: bool = False
    """Whether the prediction was on a different grid and was resampled to that of the reference."""
    reliability: tuple[Reliability, ...] | None = None
    """Reliability by region; None without a probability file on the reference's grid, or without any tumour."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(FolderScores):
    """Scores of all cases that could be scored, and the names of those that could not."""

    in_terminal = (("dice", "Dice", ".3f"), ("hd95_mm", "HD95 mm", ".1f"))

    cases: tuple[CaseScores, ...]
    """Sorted by case id, at least one."""
    nsd_mm: float = NSD_MM
    """Tolerance of the surface Dice in mm."""
    made_by_us: tuple[str, ...] = ()
    """Case ids whose reference has a JSON file written by ``predict`` next to it: the two sides may be swapped."""

    @property
    def by_case(self) -> dict[str, Values]:
        """Every score by case id."""
        return {
            scores.case: {region: dataclasses.asdict(scores.regions[region]) for region in REGIONS}
            for scores in self.cases
        }

    @property
    def resampled(self) -> tuple[str, ...]:
        """Sorted case ids whose prediction was resampled to the reference's grid."""
        return tuple(scores.case for scores in self.cases if scores.resampled)

    def calibration(self) -> dict[str, Values]:
        """Return ECE and Brier score by row: the cases that have them, then their ``mean`` and ``median``."""
        cases = {scores.case: _errors(scores.reliability) for scores in self.cases if scores.reliability is not None}
        every = list(cases.values())
        if not every:
            return {}
        return {**cases, "mean": over_cases(every, statistics.fmean), "median": over_cases(every, statistics.median)}

    def rows(self) -> list[list[str]]:
        """Return the table for the terminal; with probabilities, three more columns show the ECE."""
        return self._with_calibration(super().rows(), "{0} ECE", ("ece",), lambda value: f"{value:.4f}", "-")

    def csv_rows(self) -> list[list[object]]:
        """Return the table in full precision; with probabilities, columns ``WT_ece``, ``WT_brier``, ... follow."""
        return self._with_calibration(super().csv_rows(), "{0}_{1}", CALIBRATION, lambda value: value, "")

    def remarks(self) -> list[str]:
        """Return explanations of the table in the terminal, one sentence each."""
        found = ["sensitivity, specificity, surface Dice and volumes are in --out scores.csv and --json"]
        if any(one.hd95_mm == ONE_EMPTY_HD95_MM for case in self.cases for one in case.regions.values()):
            found.append(f"HD95 {ONE_EMPTY_HD95_MM:g} mm: only one label map has the region (rule of BraTS 2023)")
        return found

    def notes(self) -> list[str]:
        """Return notes on the folders: possibly swapped arguments, resampled predictions, missing cases."""
        found = super().notes()
        if self.resampled:
            found.insert(0, f"predictions resampled to the grid of their reference: {first_ids(self.resampled)}")
        if self.made_by_us:
            written = f"znormseg predict wrote some references: {first_ids(self.made_by_us)}."
            found.insert(0, f"{written} Are PREDICTIONS and REFERENCES swapped?")
        return found

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values: scores, cases without scores, and the definitions in words.

        Distances are in mm, volumes in ml, all other metrics from 0 to 1.
        """
        definitions = {
            "dice_definition": DICE_DEFINITION,
            "hd95_definition": HD95_DEFINITION,
            "nsd_definition": nsd_definition(self.nsd_mm),
        }
        return self.json_with(
            before={},
            between={"resampled": list(self.resampled)},
            after={**definitions, **self._calibration_json(), "notice": NOTICE},
        )

    def _with_calibration(
        self, rows: list[list[Any]], heading: str, names: Sequence[str], text: Callable[[float], Any], missing: str
    ) -> list[list[Any]]:
        """Add columns with calibration errors to a table if any case has them."""
        errors = self.calibration()
        columns = [(region, name) for region in REGIONS for name in names] if errors else []
        header, *others = rows
        return [
            [*header, *(heading.format(region, name) for region, name in columns)],
            *(
                [*row, *(text(errors[row[0]][r][name]) if row[0] in errors else missing for r, name in columns)]
                for row in others
            ),
        ]

    def _calibration_json(self) -> dict[str, object]:
        found = self.calibration()
        if not found:
            return {}
        counted = [scores.reliability for scores in self.cases if scores.reliability is not None]
        content = {
            "definition": RELIABILITY_DEFINITION,
            "regions": found.pop("mean"),
            "regions_median": found.pop("median"),
            "regions_pooled": _errors(pooled(counted)),
            "cases": [{"case": case, **errors} for case, errors in found.items()],
        }
        return {"calibration": content}


def evaluate(
    predictions: DataSource,
    references: DataSource,
    *,
    resample: bool = False,
    nsd_mm: float = NSD_MM,
    on_case: OnCase | None = None,
) -> Evaluation:
    """Score every case that has a label map in both folders.

    The label convention of each side is determined from all of its files, so predictions with 3 for enhancing tumour
    can be scored against references with 4. Label maps on the same physical grid may be stored in different voxel
    orders. References are never changed: scores, distances and volumes are computed on their grid.

    Args:
        predictions: the predicted label maps, in a layout that ``data.datasets.layouts.find_label_cases`` accepts.
        references: the reference label maps, in any such layout.
        resample: resample a prediction on a different grid to the grid of its reference; otherwise such a case fails.
        nsd_mm: tolerance of :func:`app.evaluation.metrics.surface_dice` in mm, default 1.
        on_case: called on the caller's thread, in sorted order, with each case id that was scored or failed, and the
            share of cases done so far.

    Returns:
        the scores, and the ids of all cases that are missing on one side or could not be scored.

    Raises:
        DataError: a folder cannot be used, a folder mixes label conventions, the folders have no case in common, or no
            case could be scored (the message then gives reasons).

    Example:
        >>> evaluation = evaluate(DataSource(Path("predicted")), DataSource(Path("BraTS2021")))  # doctest: +SKIP
        >>> evaluation.means()["WT"]["dice"]  # doctest: +SKIP
        0.912
    """
    folders = match(predictions, references)

    def score(case: str) -> CaseScores:
        return _score_case(case, folders, resample=resample, nsd_mm=nsd_mm)

    cases, failures = score_each(folders, score, on_case=on_case)
    return Evaluation(
        cases=tuple(cases),
        folders=folders,
        failures=failures,
        nsd_mm=nsd_mm,
        made_by_us=tuple(
            case for case in folders.common if "made_from" in _record_beside(folders.expected[case], case)
        ),
    )


def _score_case(case: str, folders: Folders, *, resample: bool, nsd_mm: float) -> CaseScores:
    prediction_path, reference_path = folders.predicted[case], folders.expected[case]
    reference = reorient(folders.read(reference_path))
    prediction = in_order_of(reference, folders.read(prediction_path))
    codes = decode(prediction.voxels, folders.prediction_convention)
    expected = decode(reference.voxels, folders.reference_convention)
    difference = grid_difference(prediction, reference)
    if difference is not None:
        place = f"case {case}: {prediction_path} and {reference_path}"
        if not resample:
            raise DataError(
                f"{place} are on different grids: {difference}. Use --resample to resample the prediction to the grid "
                "of the reference."
            )
        x, y, z = expected.shape
        try:
            codes = resample_codes_onto(codes, prediction.affine, (x, y, z), reference.affine)
        except DataError as error:
            raise DataError(f"{place}: {error} ({difference}). Do they belong to the same scan?") from error
    scores = region_scores(codes, expected, reference.spacing_mm, nsd_mm=nsd_mm)
    probabilities = _probabilities_of(case, prediction_path)
    counted = None
    if difference is None and probabilities is not None:
        counted = case_reliability(read_probabilities(probabilities, reference), expected, reference.spacing_mm)
    return CaseScores(case=case, regions=scores, resampled=difference is not None, reliability=counted)


def _probabilities_of(case: str, label_map: Path) -> Path | None:
    """Return the probability file of a label map, unless predict's JSON shows that it belongs to an earlier map."""
    names = dict.fromkeys((strip_nifti_ending(label_map.name), case))
    path = next((p for name in names if (p := label_map.with_name(f"{name}{ENDING}")).exists()), None)
    files = _record_beside(label_map, case).get("files")
    earlier = isinstance(files, dict) and files.get("probabilities", path) is None
    return None if earlier else path


def _record_beside(label_map: Path, case: str) -> dict[str, Any]:
    """Return the JSON of ``predict`` next to a label map; empty if there is none or the file is something else."""
    try:
        record = json.loads(label_map.with_name(f"{case}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _errors(found: Sequence[Reliability]) -> dict[str, dict[str, float]]:
    return {region: {"ece": one.ece, "brier": one.brier} for region, one in zip(REGIONS, found, strict=True)}
