"""Split cases by patient into three parts: to train, to choose (validation), and to score (test)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data.datasets.label_stats import LabelStats, read_label_maps, tumours_of
from data.datasets.layouts import Case, patients_of
from data.datasets.patients import patient_by_older_versions
from data.datasets.source import DataSource
from data.datasets.splits import FOLDS, Split, fold_split, ids_of, read_split, require_apart, stratified_split
from data.errors import DataError

_LEAST_PATIENTS: Final = 3


@dataclass(frozen=True, kw_only=True)
class ThreeWaySplit:
    """Case ids of the three parts."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    """Cases on which the learning rate and the weights of each run are chosen."""
    test: tuple[str, ...]
    """Cases that are not used for any choice; if empty, the final scores are those of ``validation``."""

    @property
    def split(self) -> Split:
        """The training and validation cases of every run."""
        return Split(train=self.train, validation=self.validation)

    @property
    def cases(self) -> tuple[str, ...]:
        """The cases of all parts."""
        return (*self.train, *self.validation, *self.test)

    @property
    def scored(self) -> tuple[str, ...]:
        """The cases that the final Dice is measured on."""
        return self.test or self.validation

    def to_json(self) -> dict[str, list[str]]:
        """Return the three lists, in the form that :func:`read_parts` reads."""
        return {"train": list(self.train), "validation": list(self.validation), "test": list(self.test)}


def fold_parts(
    patients: Mapping[str, str], fold: int, tumours: Mapping[str, LabelStats] | None = None
) -> ThreeWaySplit:
    """Use fold ``fold`` for the test, the next one for validation, and the others for training.

    The folds are the same as in ``train``, so that every case is a test case in exactly one fold.

    Args:
        patients: the patient of each case, by case id.
        fold: 0 to 4; the maximum is lower with fewer than five patients.
        tumours: tumour statistics of all cases, for stratified folds; None deals the folds by case id only.

    Raises:
        DataError: fewer than three patients, or no such fold.
    """
    count = len(set(patients.values()))
    if count < _LEAST_PATIENTS:
        raise DataError(
            f"{count} {'patient' if count == 1 else 'patients'}: a comparison needs at least {_LEAST_PATIENTS}, "
            'one each for training, validation and test; or give --split with {"train": [...], "validation": [...]}'
        )
    test, validation = (
        (fold_split(patients, number) if tumours is None else stratified_split(tumours, patients, number)).validation
        for number in (fold, (fold + 1) % min(FOLDS, count))
    )
    left = tuple(case_id for case_id in sorted(patients) if case_id not in {*test, *validation})
    return ThreeWaySplit(train=left, validation=validation, test=test)


def deal_parts(data: DataSource, cases: Mapping[str, Case], fold: int, *, recorded: Any = None) -> ThreeWaySplit:
    """Return the parts of a fold, with similar tumours in each.

    Args:
        data: the data set.
        cases: all its cases, by id.
        fold: as in :func:`fold_parts`.
        recorded: the lists of a comparison that was started before, or None. They are kept if an older version dealt
            them, with its rules for patients or by case id only.

    Raises:
        DataError: as raised by :func:`fold_parts`, or the label convention cannot be determined.
    """
    patients = patients_of(cases.values())
    before = {case_id: patient_by_older_versions(case_id) for case_id in cases}
    maps = read_label_maps(cases.values())
    tumours = tumours_of(cases, maps, data.decide_convention(cases, maps))
    if recorded is not None:
        for by_patient, dealt_by in ((patients, None), (before, None), (before, tumours)):
            with suppress(DataError):
                if (parts := fold_parts(by_patient, fold, dealt_by)).to_json() == recorded:
                    return parts
    return fold_parts(patients, fold, tumours)


def read_parts(path: Path, patients: Mapping[str, str]) -> ThreeWaySplit:
    """Read the parts from a JSON object with the lists ``train``, ``validation`` and, optionally, ``test``.

    Raises:
        DataError: as raised by :func:`data.datasets.splits.read_split`; or ``validation`` is empty; or ``test`` is not
            a list of case ids, repeats one, names one that is not in the data set, or shares a patient with another
            part.
    """
    split = read_split(path, patients)
    if not split.validation:
        raise DataError(f"{path}: the list validation is empty, but a comparison needs validation cases to choose on")
    test = ids_of(json.loads(path.read_text(encoding="utf-8")).get("test", []), f"{path}: test")
    unknown = sorted(set(test) - set(patients))
    if unknown:
        raise DataError(f"{path}: not in the data set: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}")
    require_apart(path, patients, {"test": test, "another part": (*split.train, *split.validation)})
    return ThreeWaySplit(train=split.train, validation=split.validation, test=tuple(test))
