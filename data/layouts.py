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
from data.presence import missing_contrasts, reference_contrast

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
_ENDING: Final = re.compile(
    r"^(?P<case>.+)[_-](?P<ending>t1ce|t1c|t1gd|t1n|t1|t2w|t2f|t2|flair|seg)$", re.IGNORECASE | re.DOTALL
)
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

    @property
    def reference(self) -> Contrast:
        """The contrast whose file lends its grid to label maps; there must be one."""
        return reference_contrast(self.contrasts)

    def require(self, *, all_contrasts: bool = True) -> Case:
        """Return the case itself.

        Args:
            all_contrasts: False takes a case with one contrast or more; those missing are then no problem.

        Raises:
            DataError: a contrast is missing, there twice or behind a link out of the data folder, or the id is no
                file name.
        """
        problems = self.problems
        if not all_contrasts and self.contrasts:
            absent = _missing(self.contrasts)
            problems = tuple(problem for problem in problems if problem not in absent)
        problems = problems or tuple(_id_problems(self.id))
        if problems:
            name = self.id if self.id.isprintable() else repr(self.id)
            raise DataError(f"case {name}: " + "; ".join(problems))
        return self


def find_cases(root: Path, *, follow_links: bool = False) -> tuple[Case, ...]:
    """Find every case below a folder, sorted by id.

    Args:
        root: a case folder, or a folder of them, up to three levels deep (as ``HGG/<case>`` in BraTS 2018).
        follow_links: accept symbolic links that lead out of ``root``; without, a case behind one has a problem.

    Raises:
        DataError: there is no such folder, no case in it, or one id in two folders.
    """
    if not root.is_dir():
        what = "is a file; give the folder that holds the case" if root.exists() else "does not exist"
        raise DataError(f"{root}: {what}")
    links = _Links(root, follow=follow_links)
    cases = [case for folder in _folders(root, links) if (case := _case_in(folder, links)) is not None]
    if not cases:
        rules = f"{NAMING_RULES[0].upper()}{NAMING_RULES[1:]}."
        raise DataError(" ".join([f"{root}: no case found.", rules, *links.not_followed()]))
    folders = defaultdict(list)
    for case in cases:
        folders[case.id].append(str(case.folder))
    for case_id, places in folders.items():
        if len(places) > 1:
            raise DataError(f"case {case_id} is there {len(places)} times: {', '.join(places)}. Keep one of them.")
    return tuple(sorted(cases, key=lambda case: case.id))


def case_from_files(files: dict[Contrast, Path], *, all_contrasts: bool = True) -> Case:
    """A case from files named one by one, as ``predict --t1 --t1c --t2 --flair`` has them.

    The id is what the name of the T1c file - without one, of the first file in project order - says before its
    contrast, or the whole name without its ending.

    Args:
        files: at least one.
        all_contrasts: False takes fewer than four.

    Raises:
        DataError: a contrast was not given, or the id is no file name.
    """
    reference = files[reference_contrast(files)]
    name = strip_nifti_ending(reference.name) or reference.stem
    match = _ENDING.match(name)
    return Case(
        id=match["case"] if match is not None else name,
        folder=reference.parent,
        contrasts={contrast: files[contrast] for contrast in CONTRASTS if contrast in files},
        naming=_naming({match["ending"].lower()}) if match is not None else None,
        problems=tuple(_missing(files)),
    ).require(all_contrasts=all_contrasts)


def find_label_maps(folder: Path, *, follow_links: bool = False) -> dict[str, Path]:
    """Label maps by case id: flat ``<case>``, ``<case>-seg`` or ``<case>_seg`` files, or case folders that hold a seg.

    Args:
        folder: where to look.
        follow_links: accept symbolic links that lead out of ``folder``.

    Raises:
        DataError: there is no such folder, no label map in it, two for one case, or one behind a link out of it.
    """
    if not folder.is_dir():
        what = "is a file; give the folder that holds the label maps" if folder.exists() else "does not exist"
        raise DataError(f"{folder}: {what}")
    found: dict[str, Path] = {}
    links = _Links(folder, follow=follow_links)
    for path in _label_files(folder, links):
        if problems := links.problems(path):
            raise DataError(f"label map {path}: {problems[0]}")
        name = strip_nifti_ending(path.name) or path.name
        match = _ENDING.match(name)
        case_id = match["case"] if match is not None else name
        if case_id in found:
            raise DataError(f"case {case_id} has two label maps: {found[case_id]} and {path}. Keep one of them.")
        found[case_id] = path
    if not found:
        expected = "<case>.nii.gz, <case>-seg.nii.gz, <case>_seg.nii.gz, or case folders that hold one"
        raise DataError(" ".join([f"{folder}: no label map found; expected {expected}.", *links.not_followed()]))
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


class _Links:
    """Symbolic links below a data folder: which lead out of it, and what to say about that."""

    def __init__(self, root: Path, *, follow: bool) -> None:
        self._root = root
        self._real_root = root.resolve()
        self._follow = follow
        self._left: list[Path] = []

    def enters(self, folder: Path) -> bool:
        """Whether to look below a folder. One linked to from within the data folder is found where it lies."""
        if not folder.is_symlink():
            return True
        if self._leads_out(folder) and not self._follow:
            self._left.append(folder)
        return self._leads_out(folder)

    def looks_below(self, folder: Path) -> bool:
        """Whether folders below a folder are looked at: behind a link that leads out only where links are followed."""
        return self._follow or not self._leads_out(folder)

    def problems(self, path: Path) -> list[str]:
        """One sentence where a path is a dangling link, or where it lies outside of the data folder."""
        if path.is_symlink() and not path.exists():
            return [f"{path.name} is a link to {path.readlink()}, which does not exist"]
        if self._follow or not self._leads_out(path):
            return []
        return [f"{path} lies at {path.resolve()}, outside of {self._root}. {_LINK_REMEDY}"]

    def not_followed(self) -> list[str]:
        """One sentence where links to folders were not followed."""
        if not self._left:
            return []
        shown = ", ".join(str(path) for path in self._left[:3])
        return [f"Not looked into, as they are links out of the folder: {shown}. {_LINK_REMEDY}"]

    def _leads_out(self, path: Path) -> bool:
        return not path.resolve().is_relative_to(self._real_root)


_LINK_REMEDY: Final = "Copy the files, or accept such links with --follow-links."


def _folders(folder: Path, links: _Links, depth: int = 0) -> Iterator[Path]:
    """The folder itself and those below it, hidden ones left out."""
    yield folder
    if depth == _DEEPEST_FOLDER or not links.looks_below(folder):
        return
    for below in sorted(folder.iterdir()):
        if not below.name.startswith(".") and below.is_dir() and links.enters(below):
            yield from _folders(below, links, depth + 1)


def _nifti_files(folder: Path) -> list[Path]:
    """NIfTI files of one folder, sorted; hidden ones (among them the ``._`` files macOS leaves) are left out.

    Links that lead nowhere are in it, to be complained of.
    """
    return sorted(
        p
        for p in folder.iterdir()
        if not p.name.startswith(".") and strip_nifti_ending(p.name) and (p.is_file() or not p.exists())
    )


def _case_in(folder: Path, links: _Links) -> Case | None:
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
            problems.append(f"two files for {what}: {', '.join(path.name for path in paths)}. Keep one of them")
    if len(ids) > 1:
        problems.append(f"files of several cases in {folder}: {', '.join(ids)}; one folder holds one case")
    case_id = next(iter(ids)) if len(ids) == 1 else folder.name
    problems += _id_problems(case_id)
    files = [path for paths in [*contrasts.values(), labels] for path in paths]
    problems += links.problems(folder) or [problem for path in files for problem in links.problems(path)]
    return Case(
        id=case_id,
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


def _id_problems(case_id: str) -> list[str]:
    """One sentence where a case id cannot be the name of a file: it becomes one in output and cache folders."""
    bad = [part for part in ("..", "/", "\\") if part in case_id]
    if case_id.isprintable() and case_id and not case_id.startswith(".") and not bad:
        return []
    return [f"{case_id!r} cannot name the files to be written: no leading dot, no '..', no slash. Rename the case"]


def _missing(contrasts: Iterable[Contrast]) -> list[str]:
    """One sentence for the contrasts that are not there, or none."""
    absent = missing_contrasts(set(contrasts))
    return [f"contrast {', '.join(absent)} is missing. Add its file, or leave the case out"] if absent else []


def _label_files(folder: Path, links: _Links) -> Iterator[Path]:
    """Label maps of a flat folder or of case folders; an image beside them is no label map."""
    for place in _folders(folder, links):
        files = _nifti_files(place)
        endings = {path: match["ending"].lower() for path in files if (match := _match(path)) is not None}
        has_images = any(ending != "seg" for ending in endings.values())
        for path in files:
            if endings.get(path) == "seg" or (path not in endings and not has_images):
                yield path


def _match(path: Path) -> re.Match[str] | None:
    """The parts of a file name that ends in a contrast or in seg."""
    return _ENDING.match(strip_nifti_ending(path.name) or "")
