"""Score a folder of predicted label maps with the command of the 2026 challenges.

The command gets copies of the label maps with the label numbers of the task; prediction and reference both get the
reference's header. The results keep the command's metric names and values.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from app.evaluation.brats.evaluate import match_for_task
from app.evaluation.folders import Folders, OnCase, first_ids, score_each
from app.evaluation.tables import FolderScores, Values
from app.progress import LOG
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import CAVITY, CYST, ENHANCING, NECROSIS, OEDEMA, LabelConvention, decode_tissues, values_in
from data.nifti import Volume, write_label_map

YEAR: Final = "brats2026"
#: The command's metrics of each region, under its names: means over matched lesions (sq), F1 of detection (rq), their
#: product (pq); the whole region (global_bin); lesion counts, precision and recall; spread; sizes.
METRICS: Final = (
    *("sq_dsc", "sq_hd95", "sq_nsd", "rq", "pq_dsc"),
    *("global_bin_dsc", "global_bin_hd95", "global_bin_nsd"),
    *("tp", "fp", "fn", "prec", "rec", "n_ref_instances", "n_pred_instances"),
    *("sq_dsc_std", "sq_hd95_std", "sq_nsd_std"),
    *("instance_voxel_count_ref", "instance_volume_ref", "global_bin_volume_pred", "global_bin_volume_ref"),
)
#: Metrics that the command omits if they are undefined.
_MAY_LACK: Final = ("prec", "rec")
#: Metrics that describe size, count or spread, not quality.
NO_SCORE: Final = METRICS[METRICS.index("n_ref_instances") :]
#: Metrics of which a lower value is better.
LOWER: Final = ("sq_hd95", "global_bin_hd95", "fp", "fn")
#: Value that replaces an infinite HD95 in means and ranks. The package's brats-parse-metrics uses it for whole regions
#: in the table of the challenge.
FINITE_HD95: Final = 373.0
_EDGE_TOLERANCE_MM: Final = 1e-3


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
    """Label number that the configuration expects, by code of ``decode_tissues``; other codes are refused."""


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
    """Values by region and metric, in the order of :data:`METRICS`; NaN and infinity as the command returns them."""
    uneven: bool = False
    """True if the voxels are not 1 mm cubes."""


@dataclass(frozen=True, kw_only=True)
class PackageEvaluation(FolderScores):
    """Scores of all cases."""

    in_terminal = (("sq_dsc", "lesion Dice", ".3f"), ("sq_hd95", "lesion HD95", ".1f"), ("rq", "lesion F1", ".3f"))

    rules: PackageRules
    """Rules of the scored task."""
    installed: Installed
    """The command that computed the scores."""
    cases: tuple[PackageCase, ...]
    """Sorted by case id, at least one."""

    @property
    def by_case(self) -> dict[str, Values]:
        """Every score by case id."""
        return {case.case: case.regions for case in self.cases}

    @property
    def scored_by(self) -> str:
        """Year, task, configuration and versions in words; ``rank`` refuses sets that differ in them."""
        versions = ", ".join(f"{name} {version or '?'}" for name, version in self.installed.versions.items())
        return f"{YEAR} {self.rules.task} (configuration {self.rules.config}, {versions})"

    @property
    def uneven(self) -> tuple[str, ...]:
        """Ids of the cases whose voxels are not 1 mm cubes."""
        return tuple(case.case for case in self.cases if case.uneven)

    def means(self) -> dict[str, dict[str, float]]:
        """Return means over the cases in which a metric is defined; an infinite HD95 counts as :data:`FINITE_HD95`."""
        return self._over_cases(partial(_over_defined, statistics.fmean))

    def medians(self) -> dict[str, dict[str, float]]:
        """Return medians over the same cases as :meth:`means`."""
        return self._over_cases(partial(_over_defined, statistics.median))

    def csv_rows(self) -> list[list[object]]:
        """Return the table with all metrics and the column ``scored_by``; NaN is ``nan``, infinity ``inf``."""
        header, *rows = super().csv_rows()
        return [[*header, "scored_by"], *([*row, self.scored_by] for row in rows)]

    def remarks(self) -> list[str]:
        """Return explanations of the numbers in the terminal table, one sentence each."""
        shown = [
            values[metric] for case in self.cases for values in case.regions.values() for metric, *_ in self.in_terminal
        ]
        sentences = [
            f"by {self.scored_by}; all its numbers are in --out scores.csv and --json",
            "lesion Dice and HD95 (1 mm voxels): means over matched lesions; missed and spurious ones count only in F1",
        ]
        if any(map(math.isnan, shown)):
            sentences.append("-: the region is in neither label map; the case is left out of mean and median")
        if any(map(math.isinf, shown)):
            sentences.append(f"inf: no lesion matched; mean and median use {FINITE_HD95:g} instead")
        return sentences

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values that JSON can hold: NaN becomes null, infinity ``"inf"``."""
        package = {
            "name": PACKAGE,
            "version": self.installed.versions[PACKAGE],
            "panoptica": self.installed.versions["panoptica"],
            "configuration": self.rules.config,
        }
        return self.json_with(
            before={"rules": YEAR, "task": self.rules.task, "scored_by": self.scored_by, "package": package},
            between={"not_1_mm_cubes": list(self.uneven), "infinite_hd95_counts": FINITE_HD95},
            after={},
        )


def package_rules(task: str) -> PackageRules:
    """Return the rules of a task of 2026.

    Raises:
        DataError: there is no such task; the message lists the tasks.
    """
    if task not in TASKS:
        raise DataError(f"--task {task}: {YEAR} has no such task; choose from {', '.join(TASKS)}.")
    return TASKS[task]


def evaluate_by_package(
    predictions: DataSource,
    references: DataSource,
    rules: PackageRules,
    *,
    on_case: OnCase | None = None,
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
        DataError: as raised by :func:`app.evaluation.evaluate.evaluate`.
    """
    installed = find_installed()
    if installed.doubt is not None:
        LOG.warning("%s", installed.doubt)
    folders = match_for_task(predictions, references, rules.task)
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
            f"the voxels of {len(found.uneven)} cases are not 1 mm cubes: {first_ids(found.uneven)}. {COMMAND} reports "
            "distances of whole regions in voxels, and swaps the spacings of x and z for distances of lesions. "
            "Resample to 1 mm first, as the challenge does."
        )
    return found


def _score_case(case: str, folders: Folders, rules: PackageRules, runner: Runner) -> PackageCase:
    prediction, reference = folders.same_grid_pair(case)
    sides = {
        "prediction": _in_numbers_of(rules, prediction, folders.prediction_convention),
        "reference": _in_numbers_of(rules, reference, folders.reference_convention),
    }
    with tempfile.TemporaryDirectory(prefix="znormseg-brats2026-") as name:
        for side, numbers in sides.items():
            (Path(name) / side).mkdir()
            # Both get the same header: the command refuses affines that differ by rounding, which we accept.
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
            f"{volume.path}: contains label values {', '.join(map(str, foreign))} (convention {convention.name}), "
            f"which are not part of task {rules.task}: its regions are {', '.join(rules.regions)}. Check --task, or "
            "give the label convention with --labels."
        )
    return table[tissues]


def _numbers_of(region: str, found: Mapping[str, Any]) -> dict[str, float]:
    """Return all metrics of a region.

    Raises:
        DataError: the region or one of its metrics is missing.
    """
    given = found.get(region.lower())
    if not isinstance(given, dict):
        raise DataError(
            f"{COMMAND} returned no scores for region {region}. Is a different version of {PACKAGE} installed?"
        )
    numbers = {}
    for metric in METRICS:
        value = given.get(metric, math.nan if metric in _MAY_LACK else None)
        if not isinstance(value, int | float):
            raise DataError(
                f"{COMMAND} returned {value!r} for {metric} of region {region}. Is a different version of "
                f"{PACKAGE} installed?"
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


def _over_defined(average: Callable[[Sequence[float]], float], values: Sequence[float]) -> float:
    """Average the defined values; NaN if there are none."""
    defined = [FINITE_HD95 if math.isinf(value) else value for value in values if not math.isnan(value)]
    return average(defined) if defined else math.nan
