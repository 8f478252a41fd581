"""Score a folder of predicted label maps with the command of the 2026 challenges.

The command gets copies of the label maps with the label numbers of the task, prediction and reference both with the
reference's header. Its results keep its own metric names and values.
"""

from __future__ import annotations

import csv
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from app.evaluation.brats.brats_evaluate import (
    COMMAND,
    FILE,
    PACKAGE,
    TIMEOUT_S,
    Installed,
    Runner,
    find_installed,
    processes_at_once,
)
from app.evaluation.evaluate import Folders, match, require_table_place, score_each
from app.progress import LOG
from data.datasets.source import DataSource
from data.errors import DataError
from data.files import replacing
from data.labels import (
    BRATS2024,
    CAVITY,
    CYST,
    ENHANCING,
    NECROSIS,
    OEDEMA,
    LabelConvention,
    decode_tissues,
    values_in,
)
from data.nifti import Volume, grid_difference, in_order_of, write_label_map

YEAR: Final = "brats2026"
#: The command's metrics of each region, under its names: lesion counts; F1 of detection (rq); means over matched
#: lesions (sq), and those times F1 (pq); the whole region (global_bin).
METRICS: Final = (
    "sq_dsc",
    "sq_hd95",
    "sq_nsd",
    "rq",
    "pq_dsc",
    "global_bin_dsc",
    "global_bin_hd95",
    "global_bin_nsd",
    "tp",
    "fp",
    "fn",
    "prec",
    "rec",
    "n_ref_instances",
    "n_pred_instances",
    "sq_dsc_std",
    "sq_hd95_std",
    "sq_nsd_std",
    "instance_voxel_count_ref",
    "instance_volume_ref",
    "global_bin_volume_pred",
    "global_bin_volume_ref",
)
#: Metrics that the command omits if they are undefined.
_MAY_LACK: Final = ("prec", "rec")
#: Metrics that describe size, count or spread, not quality.
NO_SCORE: Final = METRICS[METRICS.index("n_ref_instances") :]
#: Metrics of which a lower value is better.
LOWER: Final = ("sq_hd95", "global_bin_hd95", "fp", "fn")
#: Value of an infinite HD95 in means and ranks: brats-parse-metrics, of the same package, uses it for whole regions in
#: the table of the challenge.
FINITE_HD95: Final = 373.0
#: Columns of the table in the terminal: metric, heading, format.
_IN_TERMINAL: Final = (
    ("sq_dsc", "lesion Dice", ".3f"),
    ("sq_hd95", "lesion HD95", ".1f"),
    ("rq", "lesion F1", ".3f"),
)
_EDGE_TOLERANCE_MM: Final = 1e-3
_SHOWN: Final = 3

Values = Mapping[str, Mapping[str, float]]
"""Value by region and metric."""


@dataclass(frozen=True, kw_only=True)
class PackageRules:
    """Scoring rules of one task of 2026."""

    task: str
    """Name of the task, e.g. ``GLI``."""
    config: str
    """Name of the package's configuration."""
    regions: tuple[str, ...]
    """Regions in table order; the package has the same names in lower case."""
    numbers: Mapping[int, int]
    """Label number that the configuration expects, by code of ``data.labels.decode_tissues``; others are refused."""


_THREE: Final = ("WT", "TC", "ET")
_CORE: Final = {NECROSIS: 1, CYST: 1, OEDEMA: 2, ENHANCING: 3}
_ALL: Final = (
    PackageRules(
        task="GLI", config="gli", regions=("WT", "TC", "NETC", "SNFH", "ET", "RC"), numbers={**_CORE, CAVITY: 4}
    ),
    PackageRules(
        task="PED",
        config="ped",
        regions=("WT", "TC", "ET", "NETC", "CC", "ED"),
        numbers={ENHANCING: 1, NECROSIS: 2, CYST: 3, OEDEMA: 4},
    ),
    PackageRules(task="MET", config="mets", regions=(*_THREE, "RC"), numbers={**_CORE, CAVITY: 4}),
    PackageRules(task="MEN-PRE", config="MenPre", regions=_THREE, numbers=_CORE),
    PackageRules(task="MEN-RT", config="MenRT", regions=("GTV",), numbers={NECROSIS: 1}),
    PackageRules(task="GOAT", config="GoAT", regions=_THREE, numbers=_CORE),
)
#: The tasks of 2026 by name.
TASKS: Final[Mapping[str, PackageRules]] = {rules.task: rules for rules in _ALL}


@dataclass(frozen=True, kw_only=True)
class PackageCase:
    """Scores of one case."""

    case: str
    """Case id."""
    regions: Values
    """Values by region and metric, in the order of :data:`METRICS`; NaN and infinity as the command gives them."""
    uneven: bool = False
    """Whether the voxels are not 1 mm cubes."""


@dataclass(frozen=True, kw_only=True)
class PackageEvaluation:
    """Scores of all cases."""

    rules: PackageRules
    """Rules of the scored task."""
    installed: Installed
    """The command that computed the scores."""
    cases: tuple[PackageCase, ...]
    """Sorted by case id, at least one."""
    folders: Folders
    """The label maps that were compared."""
    failures: Mapping[str, str]
    """Reasons why cases with both label maps could not be scored, by case id."""

    @property
    def scored_by(self) -> str:
        """Year, task, configuration and versions in words; sets for which these differ are not ranked together."""
        versions = ", ".join(f"{name} {version or '?'}" for name, version in self.installed.versions.items())
        return f"{YEAR} {self.rules.task} (configuration {self.rules.config}, {versions})"

    @property
    def uneven(self) -> tuple[str, ...]:
        """Ids of the cases whose voxels are not 1 mm cubes."""
        return tuple(case.case for case in self.cases if case.uneven)

    def means(self) -> dict[str, dict[str, float]]:
        """Return means over the cases in which a metric is defined; an infinite HD95 counts :data:`FINITE_HD95`."""
        return self._over_cases(statistics.fmean)

    def medians(self) -> dict[str, dict[str, float]]:
        """Return medians over the same cases as :meth:`means`."""
        return self._over_cases(statistics.median)

    def named_values(self) -> Iterator[tuple[str, Values]]:
        """Yield the rows of every table: cases, mean, median."""
        for case in self.cases:
            yield case.case, case.regions
        yield "mean", self.means()
        yield "median", self.medians()

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold: NaN becomes null, infinity ``"inf"``."""
        return {
            "rules": YEAR,
            "task": self.rules.task,
            "scored_by": self.scored_by,
            "package": {
                "name": PACKAGE,
                "version": self.installed.versions[PACKAGE],
                "panoptica": self.installed.versions["panoptica"],
                "configuration": self.rules.config,
            },
            "regions": _plain(self.means()),
            "cases": [{"case": case.case, **_plain(case.regions)} for case in self.cases],
            "regions_median": _plain(self.medians()),
            "missing_predictions": list(self.folders.missing_predictions),
            "missing_references": list(self.folders.missing_references),
            "failures": dict(self.failures),
            "not_1_mm_cubes": list(self.uneven),
            "infinite_hd95_counts": FINITE_HD95,
            "prediction_convention": self.folders.prediction_convention.name,
            "reference_convention": self.folders.reference_convention.name,
        }

    def _over_cases(self, middle: Callable[[list[float]], float]) -> dict[str, dict[str, float]]:
        return {
            region: {metric: _over([case.regions[region][metric] for case in self.cases], middle) for metric in METRICS}
            for region in self.rules.regions
        }


def package_rules(task: str) -> PackageRules:
    """Return the rules of a task of 2026.

    Raises:
        DataError: there is no such task; the message lists the tasks.
    """
    if task not in TASKS:
        raise DataError(f"--task {task}: {YEAR} has {', '.join(TASKS)}. Give one of them.")
    return TASKS[task]


def evaluate_by_package(
    predictions: DataSource,
    references: DataSource,
    rules: PackageRules,
    *,
    on_case: Callable[[str, float], None] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> PackageEvaluation:
    """Score every case that has a label map in both folders with ``brats-evaluate``, several cases at once.

    Args:
        predictions: the predicted label maps.
        references: the reference label maps.
        rules: rules from :func:`package_rules`.
        on_case: called in order with each case id that is done, and the share of cases done so far.
        timeout_s: time limit for one case in seconds; default: one hour.

    Raises:
        MissingToolError: the command is not installed or cannot be started.
        DataError: as :func:`app.evaluation.evaluate.evaluate`.
    """
    installed = find_installed()
    if installed.doubt is not None:
        LOG.warning("%s", installed.doubt)
    if rules.task == "MEN-RT":
        predictions, references = (replace(side, labels=BRATS2024.name) for side in (predictions, references))
    folders = match(predictions, references)
    runner = Runner(installed, rules.config, timeout_s=timeout_s)

    def score(case: str) -> PackageCase:
        try:
            return _score_case(case, folders, rules, runner)
        except DataError as error:
            raise DataError(f"case {case}: {error}") from error

    cases, failures = score_each(folders, score, on_case=on_case, workers=processes_at_once(), on_stop=runner.stop)
    found = PackageEvaluation(rules=rules, installed=installed, cases=tuple(cases), folders=folders, failures=failures)
    if found.uneven:
        LOG.warning(
            "voxels are no cubes of 1 mm in %d of the cases: %s. %s gives whole-region distances in voxels, and those "
            "of lesions with the spacings of x and z exchanged. Resample to 1 mm first, as the challenge does.",
            len(found.uneven),
            ", ".join(found.uneven[:_SHOWN]) + (" ..." if len(found.uneven) > _SHOWN else ""),
            COMMAND,
        )
    return found


def _score_case(case: str, folders: Folders, rules: PackageRules, runner: Runner) -> PackageCase:
    reference = folders.read(folders.expected[case])
    prediction = in_order_of(reference, folders.read(folders.predicted[case]))
    difference = grid_difference(prediction, reference)
    if difference is not None:
        raise DataError(
            f"{prediction.path} and {reference.path} lie on different grids: {difference}. The "
            "challenge compares voxel by voxel: bring the prediction to the grid of the reference first."
        )
    sides = {
        "prediction": _in_numbers_of(rules, prediction, folders.prediction_convention),
        "reference": _in_numbers_of(rules, reference, folders.reference_convention),
    }
    with tempfile.TemporaryDirectory(prefix="znormseg-brats2026-") as name:
        for side, numbers in sides.items():
            (Path(name) / side).mkdir()
            # The same header for both: the command refuses affines that differ by rounding; grid_difference does not.
            write_label_map(Path(name) / side / FILE, numbers, reference.path)
        found = runner.score(Path(name))
    edges = np.asarray(reference.spacing_mm)
    return PackageCase(
        case=case,
        regions={region: _numbers_of(region, found) for region in rules.regions},
        uneven=bool(np.abs(edges - 1).max() > _EDGE_TOLERANCE_MM),
    )


def _in_numbers_of(rules: PackageRules, volume: Volume, convention: LabelConvention) -> Any:
    """Convert a label map to the label numbers that the configuration expects.

    Raises:
        DataError: it contains a tissue for which the task has no number; the package would refuse it as well.
    """
    table = np.zeros(max(CAVITY, CYST) + 1, dtype=np.uint8)
    table[list(rules.numbers)] = list(rules.numbers.values())
    tissues = decode_tissues(volume.voxels, convention)
    foreign = [
        int(value)
        for value in values_in(volume.voxels)
        if value and int(decode_tissues(np.array([value]), convention)[0]) not in rules.numbers
    ]
    if foreign:
        raise DataError(
            f"{volume.path}: holds label values {', '.join(map(str, foreign))} (convention {convention.name}), which "
            f"are no part of task {rules.task}: its regions are {', '.join(rules.regions)}. Which task is it? Or say "
            "with --labels what the numbers mean."
        )
    return table[tissues]


def _numbers_of(region: str, found: Mapping[str, Any]) -> dict[str, float]:
    """Return all metrics of a region.

    Raises:
        DataError: the region or one of its metrics is missing.
    """
    told = found.get(region.lower())
    if not isinstance(told, dict):
        raise DataError(f"{COMMAND} told nothing of region {region}. Is it another version of {PACKAGE}?")
    numbers = {}
    for metric in METRICS:
        value = told.get(metric, math.nan if metric in _MAY_LACK else None)
        if not isinstance(value, int | float):
            raise DataError(
                f"{COMMAND} gave {value!r} for {metric} of region {region}. Is it another version of {PACKAGE}?"
            )
        numbers[metric] = value
    return numbers


def rankable(values: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of one region as finite numbers, which a ranking needs.

    An infinite HD95 becomes :data:`FINITE_HD95`. An undefined metric gets its best value if neither label map has the
    region, and its worst value if one of them has it (precision without a prediction, recall without a reference).

    Args:
        values: metrics of a region from :attr:`PackageCase.regions`; those in :data:`NO_SCORE` are dropped.
    """
    neither = values["n_ref_instances"] == values["n_pred_instances"] == 0
    best = {True: 0.0, False: 1.0}
    worst = {True: FINITE_HD95, False: 0.0}
    found = {}
    for metric, value in values.items():
        if metric in NO_SCORE:
            continue
        undefined = (best if neither else worst)[metric in LOWER]
        found[metric] = FINITE_HD95 if math.isinf(value) else undefined if math.isnan(value) else float(value)
    return found


def package_rows(evaluation: PackageEvaluation) -> list[list[str]]:
    """Return the table for the terminal: header, cases, mean, median; lesion-wise Dice, HD95 and F1 of each region."""
    regions = evaluation.rules.regions

    def text(value: float, form: str) -> str:
        return "-" if math.isnan(value) else f"{value:{form}}"

    return [
        ["case", *(f"{region} {heading}" for region in regions for _, heading, _ in _IN_TERMINAL)],
        *(
            [name, *(text(values[region][metric], form) for region in regions for metric, _, form in _IN_TERMINAL)]
            for name, values in evaluation.named_values()
        ),
    ]


def package_remarks(evaluation: PackageEvaluation) -> list[str]:
    """Return explanations of the numbers in the terminal table, one sentence each."""
    shown = [
        values[metric] for case in evaluation.cases for values in case.regions.values() for metric, *_ in _IN_TERMINAL
    ]
    said = [
        f"by {evaluation.scored_by}; all its numbers are in --out scores.csv and --json",
        "lesion Dice and HD95 (voxels of 1 mm): means over matched lesions; missed and invented ones count in F1 alone",
    ]
    if any(map(math.isnan, shown)):
        said.append("-: in neither label map, left out of mean and median")
    if any(map(math.isinf, shown)):
        said.append(f"inf: no lesion matched; mean and median count {FINITE_HD95:g}")
    return said


def write_package_table(evaluation: PackageEvaluation, path: Path) -> None:
    """Write all metrics as CSV: columns ``case``, ``WT_sq_dsc``, ..., ``scored_by``; rows: cases, ``mean``, ``median``.

    Args:
        evaluation: scores to write; NaN is written as ``nan``, infinity as ``inf``.
        path: CSV file, written atomically; an existing one is replaced.

    Raises:
        DataError: the folder of ``path`` does not exist, or ``path`` is a folder.
        OSError: the disk is full or the folder cannot be written.
    """
    require_table_place(path)
    columns = [(region, metric) for region in evaluation.rules.regions for metric in METRICS]
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["case", *(f"{region}_{metric}" for region, metric in columns), "scored_by"])
        for name, values in evaluation.named_values():
            writer.writerow([name, *(values[region][metric] for region, metric in columns), evaluation.scored_by])


def _over(values: list[float], middle: Callable[[list[float]], float]) -> float:
    """Return the mean or median of the defined values; NaN if there are none."""
    defined = [FINITE_HD95 if math.isinf(value) else float(value) for value in values if not math.isnan(value)]
    return middle(defined) if defined else math.nan


def _plain(values: Values) -> dict[str, dict[str, Any]]:
    return {
        region: {
            metric: None if math.isnan(value) else "inf" if math.isinf(value) else value
            for metric, value in numbers.items()
        }
        for region, numbers in values.items()
    }
