"""Score a folder of predicted label maps against a folder of reference label maps, case by case."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Final, TypeVar

import numpy as np

from app import NOTICE
from app.errors import message
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
from app.progress import LOG
from data.datasets.layouts import Case, decide_for
from data.datasets.source import DataSource
from data.errors import DataError
from data.files import replacing
from data.labels import REGIONS, LabelConvention, Region, decode, require_known_values, values_in
from data.nifti import Spacing, Volume, grid_difference, in_order_of, read_label_map, reorient, strip_nifti_ending
from data.preprocess import resample_codes_onto, smallest_box

#: Additional metrics of each region for cases with probabilities.
CALIBRATION: Final = ("ece", "brier")

#: Values of :data:`CALIBRATION` by region.
CalibrationErrors = dict[Region, dict[str, float]]

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: Metrics of each region, in the order of every file and table.
METRICS: Final = tuple(field.name for field in dataclasses.fields(RegionScores))

_NAMING_RULES: Final = (
    "A label map is matched by its case id, the file name without -seg or _seg and .nii or .nii.gz: "
    "<case>.nii.gz, <case>-seg.nii.gz and <case>_seg.nii.gz all belong to <case>."
)
_SHOWN: Final = 3
_KEPT_BYTES: Final = 1 << 29
_IN_TERMINAL: Final = {"dice": ".3f", "hd95_mm": ".1f"}


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
class Evaluation:
    """Scores of all cases that could be scored, and the names of those that could not."""

    cases: tuple[CaseScores, ...]
    """Sorted by case id, at least one."""
    missing_predictions: tuple[str, ...]
    """Case ids that have a reference but no prediction; means do not include them."""
    missing_references: tuple[str, ...]
    """Case ids that have a prediction but no reference."""
    failures: Mapping[str, str]
    """Reasons why cases with both label maps could not be scored, by case id."""
    prediction_convention: str
    """Name of the label convention of the predictions, e.g. ``brats2023``."""
    reference_convention: str
    """Name of the label convention of the references."""
    nsd_mm: float = NSD_MM
    """Tolerance of the surface Dice in mm."""
    made_by_us: tuple[str, ...] = ()
    """Case ids whose reference has a JSON file of ``predict`` next to it: the two sides may be swapped."""

    def summary(self) -> dict[Region, dict[str, float]]:
        """Return the mean over cases of all :data:`METRICS`, by region, e.g. ``summary()["WT"]["dice"]``."""
        return self._over_cases(statistics.fmean)

    def medians(self) -> dict[Region, dict[str, float]]:
        """Return the median over cases of all :data:`METRICS`, by region."""
        return self._over_cases(statistics.median)

    @property
    def resampled(self) -> tuple[str, ...]:
        """Sorted case ids whose prediction was resampled to the reference's grid."""
        return tuple(scores.case for scores in self.cases if scores.resampled)

    def to_json(self) -> dict[str, object]:
        """Return everything as plain Python values that ``json.dumps`` accepts.

        Returns:
            ``regions`` (means), ``cases``, then the medians, the cases that are missing, failed or were resampled, and
            the definitions in words. Distances are in mm, volumes in ml, all other metrics from 0 to 1.
        """
        return {
            "regions": self.summary(),
            "cases": [
                {"case": scores.case, **{region: dataclasses.asdict(scores.regions[region]) for region in REGIONS}}
                for scores in self.cases
            ],
            "regions_median": self.medians(),
            "missing_predictions": list(self.missing_predictions),
            "missing_references": list(self.missing_references),
            "failures": dict(self.failures),
            "resampled": list(self.resampled),
            "prediction_convention": self.prediction_convention,
            "reference_convention": self.reference_convention,
            "dice_definition": DICE_DEFINITION,
            "hd95_definition": HD95_DEFINITION,
            "nsd_definition": nsd_definition(self.nsd_mm),
            **({"calibration": self._calibration_json()} if self.has_probabilities else {}),
            "notice": NOTICE,
        }

    @property
    def has_probabilities(self) -> bool:
        """Whether any case has ECE and Brier score."""
        return any(scores.reliability is not None for scores in self.cases)

    def calibration(self) -> dict[str, CalibrationErrors]:
        """Return ECE and Brier score by row: the cases that have them, then their ``mean`` and ``median``."""
        cases = {scores.case: _errors(scores.reliability) for scores in self.cases if scores.reliability is not None}

        def middle(of: Callable[[list[float]], float]) -> CalibrationErrors:
            return {
                region: {name: of([case[region][name] for case in cases.values()]) for name in CALIBRATION}
                for region in REGIONS
            }

        return {**cases, "mean": middle(statistics.fmean), "median": middle(statistics.median)} if cases else {}

    def _calibration_json(self) -> dict[str, object]:
        found = self.calibration()
        counted = [scores.reliability for scores in self.cases if scores.reliability is not None]
        return {
            "definition": RELIABILITY_DEFINITION,
            "regions": found.pop("mean"),
            "regions_median": found.pop("median"),
            "regions_pooled": _errors(pooled(counted)),
            "cases": [{"case": case, **errors} for case, errors in found.items()],
        }

    def _over_cases(self, middle: Callable[[list[float]], float]) -> dict[Region, dict[str, float]]:
        return {
            region: {
                metric: middle([float(getattr(scores.regions[region], metric)) for scores in self.cases])
                for metric in METRICS
            }
            for region in REGIONS
        }


def evaluate(
    predictions: DataSource,
    references: DataSource,
    *,
    resample: bool = False,
    nsd_mm: float = NSD_MM,
    on_case: Callable[[str, float], None] | None = None,
) -> Evaluation:
    """Score every case that has a label map in both folders.

    The label convention of each side is determined from all of its files, so predictions with 3 for enhancing tumour
    can be scored against references with 4. Label maps on the same physical grid may be stored in different voxel
    orders. References are never changed: scores, distances and volumes are computed on their grid.

    Args:
        predictions: the predicted label maps, in a layout that ``data.datasets.layouts.find_label_maps`` accepts.
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
        >>> evaluation.summary()["WT"]["dice"]  # doctest: +SKIP
        0.912
    """
    folders = match(predictions, references)

    def score(case: str) -> CaseScores:
        return _score_case(case, folders, resample=resample, nsd_mm=nsd_mm)

    cases, failures = score_each(folders, score, on_case=on_case)
    return Evaluation(
        cases=tuple(cases),
        missing_predictions=folders.missing_predictions,
        missing_references=folders.missing_references,
        failures=failures,
        prediction_convention=folders.prediction_convention.name,
        reference_convention=folders.reference_convention.name,
        nsd_mm=nsd_mm,
        made_by_us=tuple(
            case for case in folders.common if "made_from" in _record_beside(folders.expected[case], case)
        ),
    )


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Label maps of two folders, matched by case."""

    predicted: Mapping[str, Path]
    """Predicted label maps by case id."""
    expected: Mapping[str, Path]
    """Reference label maps by case id."""
    prediction_convention: LabelConvention
    """Label convention of the predictions."""
    reference_convention: LabelConvention
    """Label convention of the references."""
    faults: Mapping[str, str]
    """Reasons why cases with both label maps cannot be read, by case id."""
    read: Callable[[Path], Volume]
    """Reads one of the label maps, or returns it from memory; see :class:`LabelMapsOnce`."""
    pixdim_mm: Mapping[str, Spacing]
    """Voxel size in the header of the prediction (or else the reference) that disagrees with the affine, which takes
    precedence; by id of the cases with both label maps."""

    @property
    def common(self) -> list[str]:
        """Sorted case ids that both folders have; at least one."""
        return sorted(self.predicted.keys() & self.expected.keys())

    @property
    def missing_predictions(self) -> tuple[str, ...]:
        """Sorted case ids that have a reference but no prediction."""
        return tuple(sorted(self.expected.keys() - self.predicted.keys()))

    @property
    def missing_references(self) -> tuple[str, ...]:
        """Sorted case ids that have a prediction but no reference."""
        return tuple(sorted(self.predicted.keys() - self.expected.keys()))


def match(predictions: DataSource, references: DataSource) -> Folders:
    """Find the label maps of both folders and determine their label conventions.

    A header whose voxel size disagrees with its affine causes a warning; the affine takes precedence.

    Args:
        predictions: the predicted label maps.
        references: the reference label maps.

    Raises:
        DataError: as :func:`evaluate`, except for errors that only scoring reveals.
    """
    predicted_cases, expected_cases = predictions.find_label_cases(), references.find_label_cases()
    predicted, expected = _label_maps(predicted_cases), _label_maps(expected_cases)
    if not predicted.keys() & expected.keys():
        raise DataError(
            f"no case is in both folders: {predictions.root} holds {_some(predicted)}; {references.root} holds "
            f"{_some(expected)}. {_NAMING_RULES}"
        )
    maps = LabelMapsOnce(
        frozenset(side[case] for side in (predicted, expected) for case in predicted.keys() & expected)
    )
    prediction_convention, prediction_faults = _survey(predictions, predicted_cases, maps)
    reference_convention, reference_faults = _survey(references, expected_cases, maps)
    common = sorted(predicted.keys() & expected)
    pixdim_mm = {
        case: stated_mm
        for case in common
        if (stated_mm := maps.pixdim_mm.get(predicted[case]) or maps.pixdim_mm.get(expected[case])) is not None
    }
    if pixdim_mm:
        LOG.warning(_about_pixdim(pixdim_mm))
    return Folders(
        predicted=predicted,
        expected=expected,
        prediction_convention=prediction_convention,
        reference_convention=reference_convention,
        faults=reference_faults | prediction_faults,
        read=maps.give,
        pixdim_mm=pixdim_mm,
    )


def _about_pixdim(pixdim_mm: Mapping[str, Spacing]) -> str:
    """Return the warning about headers whose pixdim and affine state different voxel sizes."""
    first, (x, y, z) = next(iter(pixdim_mm.items()))
    return (
        f"the voxel size in the header (pixdim) is not that of the affine: {_some(pixdim_mm)}; in {first} pixdim is "
        f"{x:g} x {y:g} x {z:g} mm. The affine is followed. Programs that follow pixdim, such as the scripts of BraTS "
        "2023 and of MEN 2024, give other distances and volumes."
    )


class LabelMapsOnce:
    """Label maps that are used twice, to determine the convention from their values and to score, but read once.

    After the first use a label map is kept in memory, cropped to its foreground, as long as there is room.
    """

    def __init__(self, paths: frozenset[Path], *, room_bytes: int = _KEPT_BYTES) -> None:
        """Set up an empty store.

        Args:
            paths: the label maps that will be used twice.
            room_bytes: maximum size of the label maps kept at any time; default: 512 MiB.
        """
        self._paths, self._room_bytes, self._lock = paths, room_bytes, Lock()
        self._kept: dict[Path, tuple[Volume, tuple[slice, slice, slice], tuple[int, ...]]] = {}
        #: Voxel size in the header of each label map whose affine states a different one.
        self.pixdim_mm: dict[Path, Spacing] = {}

    def values(self, path: Path) -> set[int]:
        """Return the numbers in a label map.

        Raises:
            DataError: as :func:`data.nifti.read_label_map`.
        """
        volume = read_label_map(path)
        if volume.pixdim_mm is not None:
            with self._lock:
                self.pixdim_mm[path] = volume.pixdim_mm
        mask = volume.voxels != 0
        if not mask.any():
            return {0}
        box = smallest_box(mask)
        inside = volume.voxels[box].copy(order="K")
        with self._lock:
            if path in self._paths and inside.nbytes <= self._room_bytes:
                self._room_bytes -= inside.nbytes
                self._kept[path] = replace(volume, voxels=inside), box, volume.voxels.shape
        return {int(value) for value in values_in(inside)} | ({0} if inside.size < mask.size else set())

    def give(self, path: Path) -> Volume:
        """Return a label map: the copy kept in memory, which is then dropped, or else read from its file again.

        Raises:
            DataError: as :func:`data.nifti.read_label_map`.
        """
        with self._lock:
            kept = self._kept.pop(path, None)
            self._room_bytes += kept[0].voxels.nbytes if kept is not None else 0
        if kept is None:
            return read_label_map(path)
        volume, box, shape = kept
        voxels = np.zeros(shape, dtype=np.uint8, order="F" if volume.voxels.flags.f_contiguous else "C")
        voxels[box] = volume.voxels
        return replace(volume, voxels=voxels)


def score_each(
    folders: Folders,
    score: Callable[[str], _Result],
    *,
    on_case: Callable[[str, float], None] | None = None,
    workers: int | None = None,
    on_stop: Callable[[], None] | None = None,
) -> tuple[list[_Result], dict[str, str]]:
    """Score the cases that both folders have, several at once.

    Args:
        folders: folders from :func:`match`.
        score: scores the case with a given id.
        on_case: called in order with each case id that is done, and the share of cases done so far.
        workers: number of cases at a time; default: one per core.
        on_stop: called if the job is interrupted or fails, to end whatever ``score`` waits for in other threads.

    Returns:
        the results of ``score`` in the order of the ids, without failed cases; and the reasons of failures, by id.

    Raises:
        DataError: no case could be scored; the message gives reasons.
    """

    def outcome(case: str) -> _Result | _Failure:
        if case in folders.faults:
            return _Failure(folders.faults[case])
        try:
            return score(case)
        except (DataError, OSError) as error:
            return _Failure(message(error))

    common = folders.common
    scored: list[_Result] = []
    failures: dict[str, str] = {}
    share_of = {case: number / len(common) for number, case in enumerate(common, 1)}
    told = None if on_case is None else lambda case: on_case(case, share_of[case])
    for case, result in zip(
        common, _parallel(outcome, common, on_done=told, workers=workers, on_stop=on_stop), strict=True
    ):
        if isinstance(result, _Failure):
            failures[case] = result.reason
        else:
            scored.append(result)
    if not scored:
        reasons = " ".join(list(failures.values())[:_SHOWN])
        raise DataError(f"not one of the {len(common)} cases in both folders could be scored. {reasons}")
    return scored, failures


@dataclass(frozen=True)
class _Failure:
    reason: str


def score_rows(evaluation: Evaluation) -> list[list[str]]:
    """Return the table for the terminal: header, one row per case, then mean and median.

    Returns:
        rows of seven texts each: the case id, then Dice (3 decimals) and HD95 in mm (1 decimal) of WT, TC and ET,
        e.g. ``["BraTS2021_00000", "0.912", "4.1", ...]``; if any case has probabilities, three more: ECE (4 decimals).
    """
    errors = evaluation.calibration()
    ece = [f"{region} ECE" for region in REGIONS] if errors else []
    return [
        ["case", *(f"{region} {metric}" for region in REGIONS for metric in ("Dice", "HD95 mm")), *ece],
        *(
            [
                name,
                *(f"{values[region][metric]:{form}}" for region in REGIONS for metric, form in _IN_TERMINAL.items()),
                *(f"{errors[name][region]['ece']:.4f}" if name in errors else "-" for region in REGIONS if errors),
            ]
            for name, values in _named_values(evaluation)
        ),
    ]


def region_remarks(evaluation: Evaluation) -> list[str]:
    """Return explanations of the table in the terminal, one sentence each."""
    said = ["sensitivity, specificity, surface Dice and volumes are in --out scores.csv and --json"]
    if any(one.hd95_mm == ONE_EMPTY_HD95_MM for case in evaluation.cases for one in case.regions.values()):
        said.append(f"HD95 {ONE_EMPTY_HD95_MM:g} mm: marked by one side alone (the rule of BraTS 2023)")
    return said


def write_score_table(evaluation: Evaluation, path: Path) -> None:
    """Write all scores as CSV: columns ``case``, ``WT_dice``, ``WT_hd95_mm``, ...; rows: cases, ``mean``, ``median``.

    If any case has probabilities, columns ``WT_ece``, ``WT_brier``, ... follow; they are empty for cases without.
    Numbers are written in full precision. The file is written atomically.

    Args:
        evaluation: scores to write.
        path: CSV file; an existing one is replaced.

    Raises:
        DataError: the folder of ``path`` does not exist, or ``path`` is a folder.
        OSError: the disk is full or the folder cannot be written.
    """
    require_table_place(path)
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
        errors = evaluation.calibration()
        more = [(region, name) for region in REGIONS for name in CALIBRATION] if errors else []
        columns = [f"{region}_{metric}" for region in REGIONS for metric in METRICS]
        writer.writerow(["case", *columns, *(f"{region}_{name}" for region, name in more)])
        for row, values in _named_values(evaluation):
            known = [values[region][metric] for region in REGIONS for metric in METRICS]
            writer.writerow(
                [row, *known, *(errors[row][region][name] if row in errors else "" for region, name in more)]
            )


def require_table_place(path: Path) -> None:
    """Require that a table can be written to a path.

    Raises:
        DataError: the folder of ``path`` does not exist, or ``path`` is a folder.
    """
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give the name of a CSV file, e.g. {path / 'scores.csv'}")
    if not path.parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist. Create it first.")


def _named_values(evaluation: Evaluation) -> Iterator[tuple[str, dict[Region, dict[str, float]]]]:
    """Yield the rows of every table: the cases, then mean and median."""
    for scores in evaluation.cases:
        yield scores.case, {region: dataclasses.asdict(scores.regions[region]) for region in REGIONS}
    yield "mean", evaluation.summary()
    yield "median", evaluation.medians()


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
                f"{place} lie on different grids: {difference}. Give --resample to bring the prediction to the grid of "
                "the reference."
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
    """Return the probability file of a label map, unless predict's JSON shows that it belongs to an earlier one."""
    names = dict.fromkeys((strip_nifti_ending(label_map.name), case))
    path = next((p for name in names if (p := label_map.with_name(f"{name}{ENDING}")).exists()), None)
    files = _record_beside(label_map, case).get("files")
    earlier = isinstance(files, dict) and files.get("probabilities", path) is None
    return None if earlier else path


def _record_beside(label_map: Path, case: str) -> dict[str, Any]:
    """Return the JSON of ``predict`` next to a label map; empty if there is none, or it is something else."""
    try:
        record = json.loads(label_map.with_name(f"{case}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _errors(found: Sequence[Reliability]) -> CalibrationErrors:
    return {region: {"ece": one.ece, "brier": one.brier} for region, one in zip(REGIONS, found, strict=True)}


def _label_maps(cases: Mapping[str, Case]) -> dict[str, Path]:
    return {case_id: case.label for case_id, case in cases.items() if case.label is not None}


def _survey(
    source: DataSource, cases: Mapping[str, Case], maps: LabelMapsOnce
) -> tuple[LabelConvention, dict[str, str]]:
    """Determine one side's convention from all of its files; return unusable files as well, as reasons by case id.

    Cases without a counterpart are read too: they may contain the only 3 or 4 of the data set.
    """
    label_maps = _label_maps(cases)

    def values(path: Path) -> set[int] | str:
        try:
            found = maps.values(path)
            require_known_values(found)
        except (DataError, OSError) as error:
            text = message(error)
            return text if str(path) in text else f"{path}: {text}"
        return found

    outcomes = dict(zip(label_maps, _parallel(values, label_maps.values()), strict=True))
    faults = {case: outcome for case, outcome in outcomes.items() if isinstance(outcome, str)}
    seen = {case: outcome for case, outcome in outcomes.items() if not isinstance(outcome, str)}
    try:
        return decide_for(seen, list(cases.values()), labels=source.labels), faults
    except DataError as error:
        raise DataError(f"{source.root}: {error}") from error


def _parallel(
    function: Callable[[_Item], _Result],
    items: Collection[_Item],
    *,
    on_done: Callable[[_Item], None] | None = None,
    workers: int | None = None,
    on_stop: Callable[[], None] | None = None,
) -> list[_Result]:
    """Return results in the order of the items, computed in parallel; an exception or Ctrl-C cancels pending items."""
    results = []
    with ThreadPoolExecutor(max_workers=workers or os.cpu_count()) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for item, future in zip(items, futures, strict=True):
                results.append(future.result())
                if on_done is not None:
                    on_done(item)
        except BaseException:
            if on_stop is not None:
                on_stop()  # before the pool waits for its threads
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return results


def _some(ids: Collection[str]) -> str:
    """Format the first few case ids: ``a, b, c and 7 more``."""
    shown = ", ".join(list(ids)[:_SHOWN])
    return shown if len(ids) <= _SHOWN else f"{shown} and {len(ids) - _SHOWN} more"
