"""The cases of a run: their split and spacing, and the record of their label maps."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeVar

from app.config.load import RunConfig
from app.errors import RunError
from app.progress import LOG
from app.runs.folder import read_json, write_json
from app.runs.training_record import INTENSITIES_FILE
from data.datasets.label_stats import LabelMap, LabelStats, changed, hash_of, label_map_from_json, tumours_of
from data.datasets.layouts import Case, look_like_visits, misnamed_files, patients_of
from data.datasets.naming import composed
from data.datasets.patients import grouped_by_words
from data.datasets.source import DataSource
from data.datasets.splits import FOLDS, Split, fold_count, parted, stratified_split, with_synthetic
from data.errors import DataError
from data.labels import BRATS2021, LabelConvention, convention_named
from data.nifti import Spacing, canonical_spacing, read_grid
from data.patches.sampler import CachedCase
from data.quality.intensity_range import quantiles_of, range_of

#: File in the run folder that lists the cases whose background was not 0.
BACKGROUNDS_FILE: Final = "backgrounds.json"
#: Maximum number of cases named in the log.
_MOST_WARNED: Final = 5
#: Value of ``fold`` that trains on every case and validates on none.
ALL_CASES: Final = "all"
#: Target number of training cases whose intensities are read (at most twice as many are); each takes a few hundredths
#: of a second.
_MOST_LOOKED_AT: Final = 100
_GROUPS_SHOWN: Final = 3

_Case = TypeVar("_Case", Case, CachedCase)


def report_visits(cases: Collection[Case], parts: Collection[Collection[str]]) -> None:
    """Log how cases were grouped into patients; warn if the split separates (likely) visits of one patient.

    Args:
        cases: all cases of the data set.
        parts: case ids of each part of the split, e.g. training and validation.
    """
    used = {case_id for part in parts for case_id in part}
    by_words = grouped_by_words([case.id for case in cases if case.stated_patient is None and case.id in used])
    if by_words:
        LOG.info(
            "words or dates in the case ids mark visits of the same patient, which stay in one part of the split: %s",
            _some_groups([f"{patient} ({', '.join(ids)})" for patient, ids in by_words.items()]),
        )
    patients = patients_of(cases)
    of_patient: dict[str, list[str]] = {}
    for case_id in sorted(used & patients.keys()):
        of_patient.setdefault(patients[case_id], []).append(case_id)
    separated = parted(of_patient.values(), parts)
    if separated:
        LOG.warning(
            "the recorded split has cases of the same patient in several parts, as older versions did not recognise "
            "their names: %s. The split is kept, and its scores are too good. A new run keeps each patient in one "
            "part.",
            _some_groups([", ".join(ids) for ids in separated]),
        )
    maybe = parted(look_like_visits(cases), parts)
    if maybe:
        LOG.warning(
            "case ids in several parts of the split look like visits of the same patient: %s. If they are, scores will "
            "be too good: name the patients in a manifest (column patient), or keep their cases together with "
            "--split.",
            _some_groups([", ".join(ids) for ids in maybe]),
        )


def report_same_label_maps(label_maps: Mapping[str, LabelMap], splits: Collection[Split]) -> None:
    """Warn if cases for training and for validation have identical label maps: probably one scan under two ids.

    Empty label maps are not compared. A synthetic case and its real case may train together.

    Args:
        label_maps: by case id.
        splits: the split of a run, or those of all folds.
    """
    groups: dict[str, list[str]] = {}
    for case_id, label_map in sorted(label_maps.items()):
        if label_map.counts:
            groups.setdefault(label_map.sha256, []).append(case_id)
    same = [ids for ids in groups.values() if len(ids) > 1]
    separated = [ids for ids in same if any(parted([ids], (split.train, split.validation)) for split in splits)]
    if separated:
        LOG.warning(
            "cases in several parts of the split have identical label maps, so they are probably the same scan under "
            "two ids: %s. If they are, scores will be too good: name the patients in a manifest (column patient), or "
            "leave such cases out.",
            _some_groups([", ".join(ids) for ids in separated]),
        )


def report_misnamed_files(cases: Collection[Case]) -> None:
    """Warn about files whose extension contradicts their compression."""
    found = [f"case {case.id}: {text}" for case in describing(cases) for text in misnamed_files(case)]
    if found:
        LOG.warning("%s", _some_groups(found))


def _some_groups(groups: Sequence[str]) -> str:
    """Join the first groups for a message, and count the rest."""
    more = f"; and {len(groups) - _GROUPS_SHOWN} more" if len(groups) > _GROUPS_SHOWN else ""
    return "; ".join(groups[:_GROUPS_SHOWN]) + more


def split_on_record(path: Path) -> Split:
    """Read the recorded split of a run or fold.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return Split(**{part: tuple(composed(case_id) for case_id in ids) for part, ids in read_json(path).items()})
    except (TypeError, AttributeError) as error:
        raise RunError(
            f"{path}: damaged, it does not contain the lists train and validation ({error}). Restore it from a copy."
        ) from error


def cases_of(split: Split, data: DataSource) -> dict[str, Case]:
    """Return all cases of a data set by id, and require those of a split to be among them.

    Raises:
        DataError: a case of the split is missing.
    """
    cases = data.find_cases()
    gone = [case_id for case_id in split.cases if case_id not in cases]
    if gone:
        raise DataError(
            f"{data.name}: cases of the run are missing: {', '.join(gone[:5])}. Give the data folder of the run."
        )
    return cases


def without_synthetic(cases: Mapping[str, Case]) -> dict[str, Case]:
    """Return the cases that are not synthetic, by id: only these are used for validation."""
    return {case_id: case for case_id, case in cases.items() if not case.synthetic}


def describing(cases: Iterable[_Case]) -> list[_Case]:
    """Return the cases that represent a set of cases: the real ones, or all if all are synthetic."""
    cases = list(cases)
    return [case for case in cases if not case.synthetic] or cases


def tumours_in(
    cases: Mapping[str, Case], label_maps: Mapping[str, LabelMap], conventions: Sequence[LabelConvention]
) -> dict[str, LabelStats]:
    """Return the tumour statistics of every case; see :func:`data.datasets.label_stats.tumours_of`.

    Args:
        cases: by id.
        label_maps: by case id.
        conventions: label convention of each data set.

    Raises:
        DataError: a label number is not in the convention of its data set.
    """
    found: dict[str, LabelStats] = {}
    for number, convention in enumerate(conventions):
        found |= tumours_of([one.id for one in cases.values() if one.data_set == number], label_maps, convention)
    return found


def require_real(data: DataSource, cases: Mapping[str, Case], *, advice: str) -> dict[str, Case]:
    """Return the real cases, by id, and require that there are some to validate on.

    Args:
        data: the data sets.
        cases: all cases, by id.
        advice: end of the message: what the user can do about it.

    Raises:
        DataError: all cases are synthetic.
    """
    real = without_synthetic(cases)
    if not real:
        raise DataError(f"{data.name}: synthetic cases only train, and there are no others to validate on. {advice}")
    return real


def require_fold(data: DataSource, cases: Mapping[str, Case], fold: int) -> None:
    """Require that the fold exists and that there are real cases to validate on.

    Raises:
        DataError: there is no such fold, or all cases are synthetic.
    """
    advice = "Add a data set without synthetic:, or train on all cases with --fold all."
    real = require_real(data, cases, advice=advice)
    fold_count(len({case.patient for case in real.values()}), fold)


def deal_fold(
    cases: Mapping[str, Case],
    label_maps: Mapping[str, LabelMap],
    conventions: Sequence[LabelConvention],
    fold: int,
    *,
    folds: int = FOLDS,
    classes: Mapping[str, tuple[int, ...]] | None = None,
) -> Split:
    """Return the split of one fold; folds are dealt by patient, with similar tumours in each.

    Synthetic cases are added to the training cases unless the split validates on their patient.

    Args:
        cases: by id.
        label_maps: by case id.
        conventions: label convention of each data set.
        fold: number of the fold, from 0.
        folds: number of folds.
        classes: labels of a classification by case id, by which the folds are stratified first.

    Raises:
        DataError: as raised by :func:`data.datasets.splits.stratified_split` and :func:`tumours_in`.
    """
    real, patients = without_synthetic(cases), patients_of(cases.values())
    tumours = tumours_in(real, label_maps, conventions)
    if classes is not None:
        tumours = {case_id: replace(one, classes=classes[case_id]) for case_id, one in tumours.items()}
    split = stratified_split(tumours, patients, fold, folds=folds)
    return with_synthetic(split, patients, cases.keys() - real.keys())


def unlabelled_conventions(data: DataSource) -> tuple[LabelConvention, ...]:
    """Return a label convention for each data set without label maps, whose labels come from a CSV file."""
    names = [one.labels for one in data.data_sets]
    return tuple(BRATS2021 if name is None else convention_named(name) for name in names)


def require_labels(cases: Sequence[Case], *, advice: str = "Add them, or leave the cases out with --split.") -> None:
    """Require that every case has a label map.

    Args:
        cases: the cases to check.
        advice: end of the message: what the user can do about it.

    Raises:
        DataError: cases have no label map; the message names the first five.
    """
    without = [case.id for case in cases if case.label is None]
    if without:
        have = "case has" if len(without) == 1 else "cases have"
        raise DataError(
            f"{len(without)} {have} no label map (a file that ends in seg): {', '.join(without[:5])}. {advice}"
        )


def labels_on_record(split: Split, label_maps: Mapping[str, LabelMap]) -> dict[str, Any]:
    """Return the record of a run's label maps at its start, which reveals later changes."""
    used = {case_id: label_maps[case_id] for case_id in split.cases if case_id in label_maps}
    return {"sha256": hash_of(used), "cases": {case_id: asdict(one) for case_id, one in sorted(used.items())}}


def require_same_labels(run: Path, data: DataSource, cases: Mapping[str, Case]) -> None:
    """Refuse a data set whose label maps have changed since a run began.

    Runs of older versions have no record and are not checked.

    Raises:
        DataError: label maps have changed.
        RunError: the record is damaged.
    """
    path = run / "labels.json"
    if not path.exists():
        return
    try:
        before = {composed(case_id): label_map_from_json(one) for case_id, one in read_json(path)["cases"].items()}
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: damaged. Delete it to resume without checking the label maps.") from error
    others = changed(before, cases.values())
    if others:
        shown = f"{', '.join(others[:5])}{' ...' if len(others) > 5 else ''}"
        raise DataError(
            f"{data.name}: the label maps of {len(others)} cases have changed since the run began: {shown}. "
            "Restore the old ones, or start a new run."
        )


def record_intensities(run: Path, prepared: Sequence[CachedCase]) -> None:
    """Record the training cases' intensity range if the run has none yet; ``predict`` flags cases outside it.

    Args:
        run: the run's folder.
        prepared: the training cases; if there are many, only evenly spaced ones are read. Synthetic ones are left
            out, unless there are no others.
    """
    path = run / INTENSITIES_FILE
    if not path.exists():
        prepared = describing(prepared)
        looked_at = prepared[:: max(1, len(prepared) // _MOST_LOOKED_AT)]
        write_json(path, range_of(quantiles_of(case.image()) for case in looked_at).to_json())


def record_backgrounds(run: Path, prepared: Sequence[CachedCase]) -> None:
    """Record the cases whose background was not 0 in their files, and warn about them; write no file if there are none.

    Args:
        run: the run's folder.
        prepared: all cases of the run. Synthetic ones are left out, unless there are no others.
    """
    found = {case.id: texts for case in describing(prepared) if (texts := case.backgrounds())}
    if not found:
        return
    write_json(run / BACKGROUNDS_FILE, found)
    for case_id, texts in list(found.items())[:_MOST_WARNED]:
        LOG.warning("case %s: %s", case_id, "; ".join(f"{contrast}: {one}" for contrast, one in texts.items()))
    if len(found) > _MOST_WARNED:
        LOG.warning(
            "and %d more cases whose background is not 0; %s lists all",
            len(found) - _MOST_WARNED,
            run / BACKGROUNDS_FILE,
        )


def patch_settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run's :class:`data.patches.sampler.PatchSource`."""
    training = config.training
    return {
        "patch_voxels": training.patch_voxels,
        "tumour_probability": training.tumour_probability,
        "enhancing_probability": training.enhancing_probability,
        "augmentation": config.augment,
        "seed": training.seed,
        "weights": config.data.weights,
    }


def network_spacing(config: RunConfig, cases: Sequence[Case]) -> Spacing:
    """Return the configured spacing, or else the median of the training cases along each axis (:func:`describing`)."""
    if config.data.spacing_mm is not None:
        return (config.data.spacing_mm,) * 3
    return median_by_axis(map(case_spacing, describing(cases)))


def case_spacing(case: Case) -> Spacing:
    """Read the voxel spacing of a case along the canonical axes, from the header of its T1c image."""
    return canonical_spacing(read_grid(case.contrasts["t1c"], case.volumes.get("t1c"))[1])


def median_by_axis(sizes: Iterable[Spacing]) -> Spacing:
    """Return the median along each axis, rounded to 0.1 micrometres for sizes in millimetres."""
    x, y, z = (round(median(along), 4) for along in zip(*sizes, strict=True))
    return (x, y, z)
