"""Which cases train and which validate: folds by patient, or a split the user gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from data.errors import DataError
from data.layouts import patient_of

FOLDS: Final = 5


@dataclass(frozen=True, kw_only=True)
class Split:
    """Case ids of the two parts."""

    train: tuple[str, ...]
    validation: tuple[str, ...]

    def to_json(self) -> dict[str, list[str]]:
        """The form that :func:`read_split` reads."""
        return {"train": list(self.train), "validation": list(self.validation)}


def fold_split(case_ids: Sequence[str], fold: int, *, seed: int = 0) -> Split:
    """One fold of a patient-wise cross-validation.

    All cases of one patient are in the same part. With fewer than five patients there are as many folds as patients.

    Args:
        case_ids: all cases.
        fold: 0 to 4; the fold that validates.
        seed: order in which patients are dealt to folds.

    Raises:
        DataError: no such fold, or only one patient.
    """
    patients = sorted({patient_of(case_id) for case_id in case_ids})
    folds = min(FOLDS, len(patients))
    if folds < 2:
        raise DataError(
            f"{len(patients)} patient cannot be split into training and validation; "
            'give --fold all, or a split: {"train": [...], "validation": [...]} with --split FILE'
        )
    if not 0 <= fold < folds:
        raise DataError(f"fold {fold} does not exist; {len(patients)} patients give the folds 0 to {folds - 1}")
    dealt = np.random.default_rng(seed).permutation(len(patients))
    validating = {patients[index] for index in dealt[fold::folds]}
    ordered = sorted(case_ids)
    return Split(
        train=tuple(c for c in ordered if patient_of(c) not in validating),
        validation=tuple(c for c in ordered if patient_of(c) in validating),
    )


def read_split(path: Path, case_ids: Sequence[str]) -> Split:
    """Read a split: a JSON object with the lists ``train`` and ``validation`` (``val`` does too) of case ids.

    Cases of the data set in neither list are left out of the run. ``validation`` may be empty or absent.

    Raises:
        DataError: not such a file, a case twice, in both lists or not in the data set, or one patient in both.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as a split ({error})") from error
    form = f'{path}: a split is {{"train": [case ids], "validation": [case ids]}}'
    if not isinstance(content, dict) or not set(content) <= {"train", "validation", "val", "test"}:
        raise DataError(f"{form}; this file has something else")
    if {"validation", "val"} <= set(content):
        raise DataError(f"{form}; this file has both validation and val")
    train = _ids(content.get("train"), f"{form}; train")
    validation = _ids(content.get("validation", content.get("val", [])), f"{form}; validation")
    if not train:
        raise DataError(f"{form}; train is empty")
    unknown = sorted({*train, *validation} - set(case_ids))
    if unknown:
        raise DataError(f"{path}: not in the data set: {', '.join(unknown[:5])}{' ...' if len(unknown) > 5 else ''}")
    shared = {patient_of(c) for c in train} & {patient_of(c) for c in validation}
    if shared:
        raise DataError(f"{path}: patient {sorted(shared)[0]} is in train and in validation; keep each in one part")
    return Split(train=tuple(train), validation=tuple(validation))


def _ids(listed: object, what: str) -> list[str]:
    if not isinstance(listed, list) or not all(isinstance(entry, str) for entry in listed):
        raise DataError(f"{what} must be a list of case ids")
    if len(set(listed)) != len(listed):
        raise DataError(f"{what} names a case twice")
    return listed
