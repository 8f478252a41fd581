"""Recognise a data set: folders of cases in BraTS naming, label maps beside them, who is whose patient.

File names by year: ``<case>_{t1,t1ce,t2,flair,seg}`` in BraTS 2018-2021, ``<case>-{t1n,t1c,t2w,t2f,seg}`` in BraTS 2023
(sources: the data set conversions of nnU-Net, the BraTS 2023 data description). Case does not matter.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from data.errors import DataError
from data.labels import CONTRASTS, Contrast, LabelConvention, decide_convention
from data.nifti import read_label_map, strip_nifti_ending

NAMING_RULES: Final = (
    "a case is a folder with <case>_t1, _t1ce, _t2, _flair (BraTS 2018-2021) or <case>-t1n, -t1c, -t2w, -t2f "
    "(BraTS 2023), each .nii or .nii.gz; its label map ends in seg"
)

_CONTRAST_ENDINGS: Final[dict[str, Contrast]] = {
    "t1": "t1",
    "t1n": "t1",
    "t1ce": "t1c",
    "t1c": "t1c",
    "t1gd": "t1c",
    "t2": "t2",
    "t2w": "t2",
    "flair": "flair",
    "t2f": "flair",
}
_NAMES_OF_2021: Final = {"t1ce", "flair"}
_NAMES_OF_2023: Final = {"t1n", "t1c", "t2w", "t2f"}
_ENDING: Final = re.compile(r"^(?P<case>.+)[_-](?P<ending>t1ce|t1c|t1gd|t1n|t1|t2w|t2f|t2|flair|seg)$", re.IGNORECASE)
_PATIENT: Final = (
    re.compile(r"^(?P<patient>BraTS-[A-Z]+(?:-RT)?-\d+)-\d+$", re.IGNORECASE),  # 2023 and later: patient, time point
    re.compile(r"^(?P<patient>Brats1[789]_.+)_\d+$", re.IGNORECASE),  # 2017 to 2019: site, patient, scan
)
_DEEPEST_FOLDER: Final = 3


@dataclass(frozen=True, kw_only=True)
class Case:
    """The files of one case, and what is wrong with their names."""

    id: str
    """Case id: the file names before the contrast."""
    folder: Path
    contrasts: dict[Contrast, Path] = field(default_factory=dict)
    """File of each contrast that was found."""
    label: Path | None = None
    """The label map, where there is one."""
    naming: str | None = None
    """Name of the label convention that goes with the file names, where they tell."""
    problems: tuple[str, ...] = ()
    """One sentence each; an empty tuple where all contrasts are there once."""

    def require(self) -> Case:
        """Return the case itself.

        Raises:
            DataError: a contrast is missing or there twice.
        """
        if self.problems:
            raise DataError(f"case {self.id}: " + "; ".join(self.problems))
        return self


def find_cases(root: Path) -> tuple[Case, ...]:
    """Find every case below a folder, sorted by id.

    Args:
        root: a case folder, or a folder of them, up to three levels deep (as ``HGG/<case>`` in BraTS 2018).

    Raises:
        DataError: there is no such folder, no case in it, or one id in two folders.
    """
    if not root.is_dir():
        what = "is a file; give the folder that holds the case" if root.exists() else "does not exist"
        raise DataError(f"{root}: {what}")
    cases = [case for folder in _folders(root) if (case := _case_in(folder)) is not None]
    if not cases:
        raise DataError(f"{root}: no case found. {NAMING_RULES[0].upper()}{NAMING_RULES[1:]}.")
    folders = defaultdict(list)
    for case in cases:
        folders[case.id].append(str(case.folder))
    for case_id, places in folders.items():
        if len(places) > 1:
            raise DataError(f"case {case_id} is there {len(places)} times: {', '.join(places)}. Keep one of them.")
    return tuple(sorted(cases, key=lambda case: case.id))


def case_from_files(files: dict[Contrast, Path]) -> Case:
    """A case from four files named one by one, as ``predict --t1 --t1c --t2 --flair`` has them.

    The id is what the T1c file's name says before its contrast, or the whole name without its ending.

    Raises:
        DataError: a contrast was not given.
    """
    problems = _missing(files)
    if problems:
        raise DataError("; ".join(problems))
    name = strip_nifti_ending(files["t1c"].name) or files["t1c"].stem
    match = _ENDING.match(name)
    return Case(
        id=match["case"] if match is not None else name,
        folder=files["t1c"].parent,
        contrasts={contrast: files[contrast] for contrast in CONTRASTS},
        naming=_naming({match["ending"].lower()}) if match is not None else None,
    )


def find_label_maps(folder: Path) -> dict[str, Path]:
    """Label maps by case id: flat ``<case>``, ``<case>-seg`` or ``<case>_seg`` files, or case folders that hold a seg.

    Raises:
        DataError: there is no such folder, no label map in it, or two for one case.
    """
    if not folder.is_dir():
        what = "is a file; give the folder that holds the label maps" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {what}")
    found: dict[str, Path] = {}
    for path in _label_files(folder):
        name = strip_nifti_ending(path.name) or path.name
        match = _ENDING.match(name)
        case_id = match["case"] if match is not None else name
        if case_id in found:
            raise DataError(f"case {case_id} has two label maps: {found[case_id]} and {path}. Keep one of them.")
        found[case_id] = path
    if not found:
        raise DataError(
            f"{folder}: no label map found; expected <case>.nii.gz, <case>-seg.nii.gz, <case>_seg.nii.gz, "
            "or case folders that hold one"
        )
    return dict(sorted(found.items()))


def patient_of(case_id: str) -> str:
    """The patient a case belongs to; cases of one patient never part in a split.

    Example:
        >>> patient_of("BraTS-GLI-00012-001")
        'BraTS-GLI-00012'
    """
    for pattern in _PATIENT:
        match = pattern.match(case_id)
        if match is not None:
            return match["patient"]
    return case_id


def convention_of(cases: Sequence[Case]) -> LabelConvention:
    """Decide the label convention from all label maps of a data set; where they leave it open, from the file names.

    A label map that cannot be read has no say; whoever uses its case will be told.

    Raises:
        DataError: the values fit no convention; the message names a case for each that is in question.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        values = list(pool.map(lambda case: _label_values(case.label), cases))
    return decide_for({case.id: found for case, found in zip(cases, values, strict=True)}, cases)


def decide_for(values: Mapping[str, tuple[int, ...]], cases: Sequence[Case]) -> LabelConvention:
    """The same from label values that are known already, by case id.

    Raises:
        DataError: as :func:`convention_of`.
    """
    namings = {case.naming for case in cases}
    try:
        return decide_convention(
            (value for found in values.values() for value in found), naming=namings.pop() if len(namings) == 1 else None
        )
    except DataError as error:
        usual = {0, 1, 2}
        odd: dict[int, str] = {}
        for case_id, found in values.items():
            for value in found:
                if value not in usual:
                    odd.setdefault(value, case_id)
        where = ", ".join(f"{value} in {case_id}" for value, case_id in sorted(odd.items())[:5])
        raise DataError(f"{error} Seen: {where}.") from error


def _label_values(path: Path | None) -> tuple[int, ...]:
    """Values in a label map, or none where there is no readable one."""
    if path is None:
        return ()
    try:
        voxels = read_label_map(path).voxels
    except DataError:
        return ()
    return tuple(int(value) for value in np.flatnonzero(np.bincount(voxels.ravel())))


def _folders(root: Path) -> Iterator[Path]:
    """The folder itself and those below it, hidden ones left out."""
    for place, below, _ in os.walk(root):
        folder = Path(place)
        depth = len(folder.relative_to(root).parts)
        below[:] = sorted(name for name in below if not name.startswith(".")) if depth < _DEEPEST_FOLDER else []
        yield folder


def _nifti_files(folder: Path) -> list[Path]:
    """NIfTI files of one folder, sorted; hidden ones (among them the ``._`` files macOS leaves) are left out."""
    return sorted(
        p for p in folder.iterdir() if not p.name.startswith(".") and strip_nifti_ending(p.name) and p.is_file()
    )


def _case_in(folder: Path) -> Case | None:
    """The case whose files lie in a folder, or None where no file is named like a contrast."""
    contrasts: dict[Contrast, list[Path]] = defaultdict(list)
    labels: list[Path] = []
    ids: dict[str, None] = {}
    endings: set[str] = set()
    for path in _nifti_files(folder):
        match = _ENDING.match(strip_nifti_ending(path.name) or "")
        if match is None:
            continue
        ending = match["ending"].lower()
        ids.setdefault(match["case"])
        if ending == "seg":
            labels.append(path)
            continue
        contrasts[_CONTRAST_ENDINGS[ending]].append(path)
        endings.add(ending)
    if not contrasts:
        return None
    problems = _missing(contrasts)
    for what, paths in [*contrasts.items(), ("label map", labels)]:
        if len(paths) > 1:
            problems.append(f"two files for {what}: {', '.join(path.name for path in paths)}")
    if len(ids) > 1:
        problems.append(f"files of several cases in {folder}: {', '.join(ids)}; one folder holds one case")
    return Case(
        id=next(iter(ids)) if len(ids) == 1 else folder.name,
        folder=folder,
        contrasts={contrast: contrasts[contrast][0] for contrast in CONTRASTS if contrast in contrasts},
        label=labels[0] if labels else None,
        naming=_naming(endings),
        problems=tuple(problems),
    )


def _naming(endings: set[str]) -> str | None:
    """The label convention that goes with contrasts so named, or None where the names do not tell or contradict."""
    years = {year for year, names in (("brats2021", _NAMES_OF_2021), ("brats2023", _NAMES_OF_2023)) if names & endings}
    return years.pop() if len(years) == 1 else None


def _missing(contrasts: Iterable[Contrast]) -> list[str]:
    """One sentence for the contrasts that are not there, or none."""
    absent = [contrast for contrast in CONTRASTS if contrast not in set(contrasts)]
    return [f"contrast {', '.join(absent)} is missing"] if absent else []


def _label_files(folder: Path) -> Iterator[Path]:
    """Label maps of a flat folder or of case folders; an image beside them is no label map."""
    for place in _folders(folder):
        files = _nifti_files(place)
        endings = {path: match["ending"].lower() for path in files if (match := _match(path)) is not None}
        has_images = any(ending != "seg" for ending in endings.values())
        for path in files:
            if endings.get(path) == "seg" or (path not in endings and not has_images):
                yield path


def _match(path: Path) -> re.Match[str] | None:
    """The parts of a file name that ends in a contrast or in seg."""
    return _ENDING.match(strip_nifti_ending(path.name) or "")
