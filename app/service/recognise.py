"""Which cases and contrasts files are, by their names; the names are read, and never used as paths."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from data.datasets.naming import ENDINGS_OF_A_YEAR, FileName, naming_of, split_names
from data.labels import CONTRASTS, Contrast, Naming
from data.nifti import strip_nifti_ending


@dataclass(frozen=True, kw_only=True)
class NamedCase:
    """A case that was recognised by the names of its files."""

    name: str
    """Part of the file names before the contrast."""
    contrasts: Mapping[Contrast, int]
    """Number of the file of each contrast, in the sequence of names."""
    naming: Naming | None
    """What the names imply about label numbers."""
    problems: tuple[str, ...] = ()
    """Why the case cannot be used."""
    notes: tuple[str, ...] = ()
    """Files that are not used, one sentence each."""


def recognised_cases(names: Sequence[str], stated: Mapping[int, Contrast] | None = None) -> list[NamedCase]:
    """Group files into cases.

    Args:
        names: paths as a user gave them, such as ``P1/P1_t1.nii.gz``; files in different folders are different cases.
        stated: contrast of files by number, from the user; these files then form one case, whatever their names.

    Example:
        >>> [(case.name, dict(case.contrasts)) for case in recognised_cases(["a_t1.nii", "a_flair.nii"])]
        [('a', {'t1': 0, 'flair': 1})]
    """
    if stated:
        return [_stated_case(names, stated)]
    folders: dict[PurePosixPath, list[int]] = defaultdict(list)
    for number, name in enumerate(names):
        if strip_nifti_ending(PurePosixPath(name).name):
            folders[PurePosixPath(name).parent].append(number)
    found: list[NamedCase] = []
    for folder, numbers in sorted(folders.items()):
        found += _cases_of_folder(folder, names, numbers)
    return found


def _stated_case(names: Sequence[str], stated: Mapping[int, Contrast]) -> NamedCase:
    numbers = {contrast: number for number, contrast in stated.items()}
    readings = split_names([_stem(names[number]) for number in stated])
    ids = {reading.case for reading in readings if reading is not None}
    endings = {reading.ending for reading in readings if reading is not None}
    name = ids.pop() if len(ids) == 1 else _stem(names[numbers.get("t1c", next(iter(stated)))])
    twice = len(numbers) < len(stated)
    return NamedCase(
        name=name,
        contrasts=_ordered(numbers),
        naming=naming_of(name, endings),
        problems=("two files were given for one contrast. Keep one of them.",) if twice else (),
        notes=_unused(names, set(range(len(names))) - set(stated)),
    )


def _cases_of_folder(folder: PurePosixPath, names: Sequence[str], numbers: Sequence[int]) -> list[NamedCase]:
    readings = dict(zip(numbers, split_names([_stem(names[number]) for number in numbers]), strict=True))
    groups: dict[str, dict[int, FileName]] = defaultdict(dict)
    for number, reading in readings.items():
        if reading is not None:
            groups[reading.case][number] = reading
    groups = {case: own for case, own in groups.items() if any(one.contrast is not None for one in own.values())}
    others = {number for number in numbers if not any(number in own for own in groups.values())}
    several = sum(len({one.contrast for one in own.values()} - {None}) > 1 for own in groups.values()) > 1
    if not groups:
        return [NamedCase(name=folder.name or "case", contrasts={}, naming=None, notes=_unused(names, others))]
    if several:
        return [_case_of_group(case, names, own, set(), ENDINGS_OF_A_YEAR) for case, own in groups.items()]
    together = {number: reading for own in groups.values() for number, reading in own.items()}
    name = next(iter(groups)) if len(groups) == 1 else folder.name or "case"
    return [_case_of_group(name, names, together, others, None)]


def _case_of_group(
    name: str, names: Sequence[str], files: Mapping[int, FileName], others: set[int], endings: set[str] | None
) -> NamedCase:
    by_contrast: dict[Contrast, list[int]] = defaultdict(list)
    plain = {one.contrast for one in files.values() if not one.corrected}
    for number, one in files.items():
        if one.contrast is not None and not (one.corrected and one.contrast in plain):
            by_contrast[one.contrast].append(number)
    problems = [
        f"two files for {contrast}: {', '.join(PurePosixPath(names[number]).name for number in own)}. Keep one of them."
        for contrast, own in by_contrast.items()
        if len(own) > 1
    ]
    seen = {one.ending for one in files.values()}
    used = {number for own in by_contrast.values() for number in own}
    return NamedCase(
        name=name,
        contrasts=_ordered({contrast: own[0] for contrast, own in by_contrast.items()}),
        naming=naming_of(name, seen if endings is None else seen & endings),
        problems=tuple(problems),
        notes=_unused(names, (set(files) - used) | others),
    )


def _stem(name: str) -> str:
    last = PurePosixPath(name).name
    return strip_nifti_ending(last) or last


def _ordered(numbers: Mapping[Contrast, int]) -> dict[Contrast, int]:
    return {contrast: numbers[contrast] for contrast in CONTRASTS if contrast in numbers}


def _unused(names: Sequence[str], numbers: set[int]) -> tuple[str, ...]:
    return tuple(
        f"{PurePosixPath(names[number]).name}: not one of the four contrasts; not used." for number in sorted(numbers)
    )
