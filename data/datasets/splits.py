"""Training and validation splits: patient-wise folds with similar tumours, or a split given by the user."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from data.datasets.label_stats import LabelStats
from data.datasets.naming import composed, real_id
from data.errors import DataError
from data.filesystem import why

FOLDS: Final = 5


@dataclass(frozen=True, kw_only=True)
class Split:
    """Case ids for training and validation."""

    train: tuple[str, ...]
    validation: tuple[str, ...]

    @property
    def cases(self) -> tuple[str, ...]:
        """All case ids, those for training first."""
        return (*self.train, *self.validation)

    def to_json(self) -> dict[str, list[str]]:
        """The structure that :func:`read_split` reads."""
        return {"train": list(self.train), "validation": list(self.validation)}


def fold_split(patients: Mapping[str, str], fold: int, *, seed: int = 0, folds: int = FOLDS) -> Split:
    """One fold of a patient-wise cross-validation based on case ids only.

    All cases of a patient are in the same part. With fewer patients than folds, each patient gets a fold.

    Args:
        patients: the patient of every case, by case id, as returned by :func:`data.datasets.layouts.patients_of`.
        fold: index of the validation fold, from 0 and below ``folds``.
        seed: seed of the order in which patients are assigned to folds.
        folds: number of folds.

    Raises:
        DataError: the fold does not exist, or there is only one patient.
    """
    row = sorted(set(patients.values()))
    folds = fold_count(len(row), fold, folds)
    assigned = np.random.default_rng(seed).permutation(len(row))
    return _parts(patients, {row[index] for index in assigned[fold::folds]})


def stratified_split(
    tumours: Mapping[str, LabelStats], patients: Mapping[str, str], fold: int, *, seed: int = 0, folds: int = FOLDS
) -> Split:
    """One fold of a patient-wise cross-validation stratified by tumour.

    All cases of a patient are in the same part; the folds' numbers of patients differ by at most one.

    Args:
        tumours: tumour by case id, of all cases, in any order.
        patients: the patient of each case, by case id.
        fold: index of the validation fold, from 0 and below ``folds`` (or the number of patients, if smaller).
        seed: seed of the order among patients with similar volumes.
        folds: number of folds.

    Raises:
        DataError: the fold does not exist, or there is only one patient.
    """
    fold_of = stratified_folds(tumours, patients, seed=seed, folds=folds)
    fold_count(len(fold_of), fold, folds)
    validating = {patient for patient, its_fold in fold_of.items() if its_fold == fold}
    return _parts({case_id: patients[case_id] for case_id in tumours}, validating)


def stratified_folds(
    tumours: Mapping[str, LabelStats], patients: Mapping[str, str], *, seed: int = 0, folds: int = FOLDS
) -> dict[str, int]:
    """Assign each patient to a fold so that the folds have similar tumours.

    Patients are sorted: by the labels of a classification, if there are any; those with enhancing tumour first, then by
    tumour volume (the largest of a patient's cases).
    The sorted list is cut into groups as long as the number of folds, and each group gives every fold one patient. The
    folds therefore have similar volumes. Without labels of a classification, each has enhancing tumour if at least as
    many patients as folds do; with labels, a fold may lack a rare one.

    All randomness comes from the SHA-256 of seed and patient, and ties are broken by it and the patient's name, so the
    result is the same on every machine and with every library version.

    Args:
        tumours: tumour by case id, of all cases, in any order.
        patients: the patient of each case, by case id.
        seed: seed of the order among neighbours.
        folds: number of folds; capped at the number of patients.

    Example:
        >>> tumours = {f"p{n}": LabelStats(volume_um3=n, enhances=True) for n in range(4)}
        >>> sorted(stratified_folds(tumours, {case_id: case_id for case_id in tumours}).values())
        [0, 1, 2, 3]
    """
    of_patient: dict[str, list[LabelStats]] = defaultdict(list)
    for case_id, tumour in tumours.items():
        of_patient[patients[case_id]].append(tumour)

    def place(patient: str) -> tuple[tuple[int, ...], bool, int, str, str]:
        its = of_patient[patient]
        classes = tuple(max(values) for values in zip(*(tumour.classes for tumour in its), strict=True))
        volume = max(tumour.volume_um3 for tumour in its)
        return classes, not any(tumour.enhances for tumour in its), volume, _random_key(seed, patient), patient

    row = sorted(of_patient, key=place)
    folds = min(folds, len(row))
    assigned: dict[str, int] = {}
    for start in range(0, len(row), max(folds, 1)):
        group = row[start : start + folds]
        order = sorted(range(folds), key=lambda number: (_random_key(seed, f"{group[0]} {number}"), number))
        assigned.update(zip(group, order, strict=False))
    return assigned


def with_synthetic(split: Split, patients: Mapping[str, str], synthetic: Collection[str]) -> Split:
    """Add synthetic cases to the training cases of a split, except those of patients or cases used for validation.

    The split itself stays the same, so that runs with and without synthetic cases validate on the same cases.

    Args:
        split: a split of the real cases.
        patients: the patient of every case, by case id; that of a synthetic case is the patient of the real one.
        synthetic: ids of the synthetic cases.

    Example:
        >>> patients = {"a": "a", "b": "b", "synthetic-a": "a", "synthetic-b": "b"}
        >>> with_synthetic(Split(train=("a",), validation=("b",)), patients, ["synthetic-a", "synthetic-b"]).train
        ('a', 'synthetic-a')
    """
    real, validating = set(split.validation), {patients[case_id] for case_id in split.validation}
    added = tuple(
        case_id for case_id in sorted(synthetic) if patients[case_id] not in validating and real_id(case_id) not in real
    )
    return Split(train=(*split.train, *added), validation=split.validation)


def _random_key(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed} {name}".encode()).hexdigest()


def fold_count(patients: int, fold: int, folds: int = FOLDS) -> int:
    """The number of folds: as many as requested, but at most one per patient.

    Raises:
        DataError: there are too few patients to split, or the fold does not exist.
    """
    folds = min(folds, patients)
    if folds < 2:
        raise DataError(
            f"{patients} {'patient' if patients == 1 else 'patients'} cannot be split into training and validation; "
            'give --fold all, or --split FILE with {"train": [...], "validation": [...]}'
        )
    if not 0 <= fold < folds:
        raise DataError(f"fold {fold} does not exist; {patients} patients give the folds 0 to {folds - 1}")
    return folds


def _parts(patients: Mapping[str, str], validating: set[str]) -> Split:
    ordered = sorted(patients)
    return Split(
        train=tuple(c for c in ordered if patients[c] not in validating),
        validation=tuple(c for c in ordered if patients[c] in validating),
    )


def parted(groups: Iterable[Collection[str]], parts: Iterable[Collection[str]]) -> list[Collection[str]]:
    """The groups of case ids that occur in more than one part of a split.

    Example:
        >>> parted([("a1", "a2"), ("b1", "b2")], [("a1",), ("a2", "b1", "b2")])
        [('a1', 'a2')]
    """
    sets = [set(part) for part in parts]
    return [group for group in groups if sum(not part.isdisjoint(group) for part in sets) > 1]


def read_split(path: Path, patients: Mapping[str, str]) -> Split:
    """Read a split: a JSON object with lists of case ids ``train`` and ``validation`` (or ``val``).

    Cases of the data set in neither list are left out of the run. ``validation`` may be empty or absent.

    Args:
        path: the JSON file; its ids may have any Unicode form.
        patients: the patient of every case of the data set, by case id.

    Raises:
        DataError: the file has another form, a case is listed twice, in both lists or not in the data set, or a
            patient is in both.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a split ({why(error)})") from error
    form = f'{path}: a split is {{"train": [case ids], "validation": [case ids]}}'
    if not isinstance(content, dict) or not set(content) <= {"train", "validation", "val", "test"}:
        raise DataError(f"{form}; this file has another form")
    if {"validation", "val"} <= set(content):
        raise DataError(f"{form}; this file has both validation and val")
    train = ids_of(content.get("train"), f"{form}; train")
    validation = ids_of(content.get("validation", content.get("val", [])), f"{form}; validation")
    if not train:
        raise DataError(f"{form}; train is empty")
    unknown = sorted({*train, *validation} - set(patients))
    if unknown:
        raise DataError(f"{path}: not in the data set: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}")
    require_apart(path, patients, {"train": train, "validation": validation})
    return Split(train=tuple(train), validation=tuple(validation))


def require_apart(path: Path, patients: Mapping[str, str], parts: Mapping[str, Collection[str]]) -> None:
    """Check that no patient is in two parts of a split.

    Raises:
        DataError: a patient is in two; the message names the parts and a case in each.
    """
    first: dict[str, tuple[str, str]] = {}
    for part, case_ids in parts.items():
        for case_id in case_ids:
            other_part, other_case = first.setdefault(patients[case_id], (part, case_id))
            if other_part != part:
                cases = f" (case {other_case}, case {case_id})" if other_case != case_id else ""
                raise DataError(
                    f"{path}: patient {patients[case_id]} is in {other_part} and in {part}{cases}; "
                    "keep each patient in one part"
                )


def ids_of(listed: object, what: str) -> list[str]:
    """Validate a list of case ids from a split and normalise them to the Unicode form of case ids.

    Raises:
        DataError: not a list of case ids, or one is listed twice; the message begins with ``what``.
    """
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise DataError(f"{what} must be a list of case ids")
    case_ids = [composed(entry) for entry in listed]
    if len(set(case_ids)) != len(case_ids):
        raise DataError(f"{what} names a case twice")
    return case_ids
