"""Look a data set over before it is used: what was recognised, and what is wrong, case by case."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.labels import CONTRASTS
from data.layouts import Case, decide_for, find_cases, patient_of
from data.nifti import Volume, grid_difference, in_order_of, read_label_map, read_volume
from data.preprocess import image_problem


@dataclass(frozen=True, kw_only=True)
class CheckedCase:
    """One case as it was found."""

    case: str
    contrasts: tuple[str, ...]
    shape: tuple[int, ...] | None
    spacing_mm: tuple[float, float, float] | None
    labels: tuple[int, ...] | None
    """Values in the label map, 0 included; None without a readable one."""
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CheckedDataSet:
    """A data set as it was found."""

    root: Path
    cases: tuple[CheckedCase, ...]
    patients: int
    convention: str | None
    """Name of the label convention, None where no label map was found or they contradict each other."""
    problems: tuple[str, ...]
    """What is wrong with the data set as a whole."""

    @property
    def is_clean(self) -> bool:
        """Nothing wrong anywhere."""
        return not self.problems and not any(case.problems for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "root": str(self.root),
            "convention": self.convention,
            "patients": self.patients,
            "problems": list(self.problems),
            "cases": [
                {
                    "case": case.case,
                    "contrasts": list(case.contrasts),
                    "shape": None if case.shape is None else list(case.shape),
                    "spacing_mm": None if case.spacing_mm is None else list(case.spacing_mm),
                    "labels": None if case.labels is None else list(case.labels),
                    "problems": list(case.problems),
                }
                for case in self.cases
            ],
        }


def check(
    root: Path,
    *,
    follow_links: bool = False,
    labels: str | None = None,
    on_case: Callable[[str], None] | None = None,
) -> CheckedDataSet:
    """Read every file of a data set once and say what was found.

    Args:
        root: a data set in any layout of :func:`data.layouts.find_cases`.
        follow_links: accept symbolic links that lead out of ``root``.
        labels: name of the label convention, where the data set does not tell.
        on_case: called with the id of each case that is done.

    Raises:
        DataError: no data set at all (no folder, no case, one id twice).
    """
    cases = find_cases(root, follow_links=follow_links)

    def look(case: Case) -> CheckedCase:
        found = check_case(case)
        if on_case is not None:
            on_case(case.id)
        return found

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        checked = tuple(pool.map(look, cases))
    values = {case.case: case.labels for case in checked if case.labels is not None}
    convention, problems = None, []
    if values:
        try:
            convention = decide_for(values, cases, labels=labels).name
        except DataError as error:
            problems.append(str(error))
    return CheckedDataSet(
        root=root,
        cases=checked,
        patients=len({patient_of(case.id) for case in cases}),
        convention=convention,
        problems=tuple(problems),
    )


def check_case(case: Case) -> CheckedCase:
    """Read the files of one case; every problem is collected, none raised."""
    problems = list(case.problems)
    reference: Volume | None = None
    for contrast in CONTRASTS:
        if contrast not in case.contrasts:
            continue
        try:
            volume = read_volume(case.contrasts[contrast], case.volumes.get(contrast))
        except DataError as error:
            problems.append(f"{contrast}: {error}")
            continue
        problems += [f"{contrast}: {problem}"] if (problem := image_problem(volume.voxels)) is not None else []
        if reference is None:
            reference = volume
        elif (difference := grid_difference(reference, in_order_of(reference, volume))) is not None:
            problems.append(f"{contrast}: {difference} (compared with {reference.path.name})")
    labels = None
    if case.label is not None:
        try:
            label = read_label_map(case.label)
        except DataError as error:
            problems.append(f"label map: {error}")
        else:
            labels = tuple(int(value) for value in np.unique(label.voxels))
            difference = None if reference is None else grid_difference(reference, in_order_of(reference, label))
            if reference is not None and difference is not None:
                problems.append(f"label map: {difference} (compared with {reference.path.name})")
    return CheckedCase(
        case=case.id,
        contrasts=tuple(case.contrasts),
        shape=None if reference is None else reference.voxels.shape,
        spacing_mm=None if reference is None else reference.spacing_mm,
        labels=labels,
        problems=tuple(problems),
    )
