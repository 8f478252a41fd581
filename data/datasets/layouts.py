"""Recognise data sets: BraTS case folders of every year, flat folders, MSD, nnU-Net, manifests, folders of label maps.

File names by year: ``<case>_{t1,t1ce,t2,flair,seg}`` in BraTS 2017-2021, ``<case>-{t1n,t1c,t2w,t2f,seg}`` in BraTS 2023
and later, ignoring case (sources: see data/datasets/naming.py). Data sets described by a dataset.json or a manifest are
read in data/datasets/descriptions.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Final

from data.contrasts import missing_contrasts, reference_contrast
from data.datasets.case import Case, id_problems, missing_problems, some_names
from data.datasets.descriptions import (
    declared_convention,
    description_of,
    find_manifest,
    read_description,
    read_manifest,
)
from data.datasets.naming import (
    COMPANION_ENDINGS,
    ENDINGS_OF_A_YEAR,
    FileName,
    composed,
    naming_of,
    split_name,
    split_names,
)
from data.datasets.patients import possible_visits
from data.errors import DataError
from data.labels import (
    BACKGROUND,
    BRATS2021,
    BRATS2024,
    CONVENTIONS,
    Contrast,
    LabelConvention,
    convention_named,
    decide_convention,
)
from data.nifti import is_compressed, name_misleads, nifti_files, strip_nifti_ending

__all__ = [
    "Case",
    "case_from_files",
    "decide_for",
    "find_cases",
    "find_label_cases",
    "look_like_visits",
    "misnamed_files",
    "patients_of",
]

NAMING_RULES: Final = (
    "a case is a folder with <case>_t1, _t1ce, _t2, _flair (BraTS 2017-2021) or <case>-t1n, -t1c, -t2w, -t2f "
    "(BraTS 2023 and later), each .nii or .nii.gz, or other usual names of the contrasts, such as _t1gd, _t1_post or "
    "_fla; its label map ends in seg. All cases may be in one folder; "
    "MSD, nnU-Net raw (dataset.json, imagesTr) and a manifest (.csv: case, t1, t1c, t2, flair, seg) work too"
)

_DEEPEST_FOLDER: Final = 3
_SHOWN: Final = 6


def find_cases(root: Path, *, follow_links: bool = False) -> tuple[Case, ...]:
    """Find every case of a data set, sorted by id.

    Args:
        root: a case folder, or a folder of case folders up to three levels deep (as ``HGG/<case>`` in BraTS 2018); one
            folder with the files of all cases; a folder with dataset.json and imagesTr (MSD, nnU-Net), or its imagesTr;
            a manifest in CSV, or the folder that contains it.
        follow_links: accept symlinks that leave ``root``; otherwise a case behind one gets a problem.

    Raises:
        DataError: the folder does not exist or has no case, an id occurs in two folders, or a description of the data
            set is invalid.
    """
    expected = "the folder that contains the case, a manifest that ends in .csv, or predict's --t1 ... --flair"
    cases, links = _search(root, _cases_in, expected, follow_links=follow_links)
    if not cases:
        rules = f"{NAMING_RULES[0].upper()}{NAMING_RULES[1:]}."
        raise DataError(" ".join([f"{root}: no case found.", rules, *_not_taken(root, links), *links.not_followed()]))
    folders = defaultdict(list)
    for case in cases:
        folders[case.id].append(str(case.folder))
    for case_id, places in folders.items():
        if len(places) > 1:
            raise DataError(f"case {case_id} appears {len(places)} times: {', '.join(places)}. Keep one of them.")
    return tuple(sorted(cases, key=lambda case: case.id))


def patients_of(cases: Iterable[Case]) -> dict[str, str]:
    """The patient of every case, by case id."""
    return {case.id: case.patient for case in cases}


def misnamed_files(case: Case) -> list[str]:
    """One sentence for each file of a case whose name contradicts its content about compression."""
    found = []
    for path in case.files:
        with suppress(OSError):  # reported when the file is read
            if (what := name_misleads(path)) is not None:
                ending = ".nii.gz" if is_compressed(path) else ".nii"
                found.append(f"{path.name} is {what}; it is read by its content. Rename it to end in {ending}")
    return found


def look_like_visits(cases: Collection[Case]) -> tuple[tuple[str, ...], ...]:
    """Groups of case ids that look like visits of one patient, if neither a manifest nor the naming settles it."""
    return possible_visits(patients_of(cases), {case.id for case in cases if case.stated_patient is not None})


def case_from_files(files: dict[Contrast, Path], *, all_contrasts: bool = True) -> Case:
    """Build a case from individually named files, as in ``predict --t1 --t1c --t2 --flair``.

    The id is taken from the T1c file, or without one from the first file in project order: the part of its name before
    the contrast, or the whole name without its extension.

    Args:
        files: at least one file.
        all_contrasts: whether all four contrasts are required; if False, one is enough.

    Raises:
        DataError: a required contrast was not given, or the id is not usable as a file name.
    """
    reference = files[reference_contrast(files)]
    name = strip_nifti_ending(reference.name) or reference.stem
    match = split_name(name)
    return Case(
        id=match.case if match is not None else name,
        folder=reference.parent,
        contrasts=files,
        naming=naming_of(match.case, {match.ending}) if match is not None else None,
        problems=tuple(missing_problems(files)),
    ).require(all_contrasts=all_contrasts)


def find_label_cases(folder: Path, *, follow_links: bool = False) -> dict[str, Case]:
    """Label maps by case id: flat ``<case>``, ``<case>-seg`` or ``<case>_seg`` files, or those of a whole data set.

    Args:
        folder: the folder to search, or a manifest.
        follow_links: accept symlinks that leave ``folder``.

    Returns:
        cases that hold only the label map and hints about its numbers.

    Raises:
        DataError: the folder does not exist or has no label map, a case has two, or one is behind a symlink that
            leaves the folder.
    """
    cases, links = _search(
        folder, _label_cases_in, "the folder that contains the label maps", follow_links=follow_links
    )
    found: dict[str, Case] = {}
    for case in cases:
        if case.label is None:
            continue
        if problems := links.problems(case.label):
            raise DataError(f"label map {case.label}: {problems[0]}")
        if case.id in found:
            both = f"{found[case.id].label} and {case.label}"
            raise DataError(f"case {case.id} has two label maps: {both}. Keep one of them.")
        found[case.id] = case
    if not found:
        expected = "<case>.nii.gz, <case>-seg.nii.gz, <case>_seg.nii.gz, or case folders that hold one"
        raise DataError(" ".join([f"{folder}: no label map found; expected {expected}.", *links.not_followed()]))
    return dict(sorted(found.items()))


def decide_for(
    values: Mapping[str, Iterable[int]], cases: Sequence[Case], *, labels: str | None = None
) -> LabelConvention:
    """Infer the label convention from the values of all label maps of a data set, its names and its description.

    Args:
        values: the label numbers of each case, by case id.
        cases: all cases of the data set.
        labels: name of a convention that overrides the inference, as given to ``--labels``.

    Raises:
        DataError: the values fit no convention, or several, or are not in the one named by ``labels``; the message
            names a case for each value.
    """
    seen: dict[int, str] = {}
    for case_id, found in values.items():
        for value in found:
            seen.setdefault(value, case_id)
    labelled = [case for case in cases if case.id in values and set(values[case.id]) - {BACKGROUND}]
    implied = {(case.declared, case.naming, case.case_folder): case.id for case in labelled or cases} or {
        (None, None, True): ""
    }
    try:
        if labels is not None:
            return _require_fit(convention_named(labels), seen, "--labels")
        decided: dict[str, LabelConvention] = {}
        for (declared, naming, case_folder), case_id in implied.items():
            if declared is not None:
                decided[case_id] = _require_fit(CONVENTIONS[declared], seen, "the data set's description")
            else:
                decided[case_id] = decide_convention(seen, naming=naming, case_folders=case_folder)
            if naming == "gli" and decided[case_id] is BRATS2024:
                _require_cavities(values)
        return _only_one(decided, seen)
    except DataError as error:
        # List the values that belong to no convention first.
        shown = sorted(seen.keys() - {BACKGROUND}, key=lambda value: (value in range(5), value))[:_SHOWN]
        where = ", ".join(f"{value} in {seen[value]}" for value in shown)
        raise DataError(f"{error} Seen: {where}.") from error


def _require_fit(convention: LabelConvention, seen: Iterable[int], source: str) -> LabelConvention:
    foreign = sorted(set(seen) - convention.codes.keys())
    if foreign:
        raise DataError(
            f"label values {foreign} are not in {convention.name}, the convention stated by {source}; it has "
            f"{', '.join(map(str, sorted(convention.codes)))}. Convert the label maps, or give their convention with "
            f"--labels, one of {', '.join(CONVENTIONS)}."
        )
    return convention


def _require_cavities(values: Mapping[str, Iterable[int]]) -> None:
    """Check that some case has both 3 and 4: in 2024, cavities (4) occur next to enhancing tumour (3).

    If none has both, the data set may mix cases from different years.
    """
    if not any({3, 4} <= set(found) for found in values.values()):
        raise DataError(
            "the data set has the label values 3 and 4, but no case has both: does it mix cases of BraTS 2021 "
            "(enhancing tumour is 4) and 2023 (3)? If so, keep them in different folders; if 4 is the resection cavity "
            f"of 2024, give --labels {BRATS2024.name}."
        )


def _only_one(decided: Mapping[str, LabelConvention], seen: Iterable[int]) -> LabelConvention:
    """The convention of all parts of a data set; if there are several, they must agree on the values seen."""
    conventions = [c for c in CONVENTIONS.values() if c in decided.values()]
    if len({tuple(c.codes.get(value) for value in seen) for c in conventions}) > 1:
        parts = ", ".join(f"{convention.name} for {case_id}" for case_id, convention in decided.items())
        raise DataError(
            f"names and descriptions of the cases imply different label conventions: {parts}. Keep such data sets in "
            f"different folders, or give --labels, one of {', '.join(CONVENTIONS)}."
        )
    return BRATS2021 if BRATS2021 in conventions else conventions[0]


class _Links:
    """Decides which symlinks below a data folder to follow, and phrases the problems they cause."""

    def __init__(self, root: Path, *, follow: bool) -> None:
        self._root = root
        self._real_root = root.resolve()
        self._follow = follow
        self._left: list[Path] = []

    def enters(self, folder: Path) -> bool:
        """Whether to enter a folder. Links to folders inside the data folder are skipped: those are found anyway."""
        if not folder.is_symlink():
            return True
        if self._leads_out(folder) and not self._follow:
            self._left.append(folder)
        return self._leads_out(folder)

    def looks_below(self, folder: Path) -> bool:
        """Whether to descend into subfolders; outside the data folder only if links are followed."""
        return self._follow or not self._leads_out(folder)

    def problems(self, path: Path) -> list[str]:
        """One sentence if a path is a broken symlink or is outside the data folder; else empty."""
        if path.is_symlink() and not path.exists():
            return [f"{path.name} is a link to {path.readlink()}, which does not exist"]
        if self._follow or not self._leads_out(path):
            return []
        return [f"{path} is at {path.resolve()}, outside of {self._root}. {_LINK_REMEDY}"]

    def not_followed(self) -> list[str]:
        """One sentence if symlinked folders were not followed; else empty."""
        if not self._left:
            return []
        shown = ", ".join(str(path) for path in self._left[:3])
        return [f"Folders behind links that leave the data folder were not searched: {shown}. {_LINK_REMEDY}"]

    def _leads_out(self, path: Path) -> bool:
        return not path.resolve().is_relative_to(self._real_root)


_LINK_REMEDY: Final = "Copy the files, or accept such links with --follow-links."


def _folders(folder: Path, links: _Links, depth: int = 0) -> Iterator[Path]:
    """The folder itself and its subfolders, except hidden ones."""
    yield folder
    if depth == _DEEPEST_FOLDER or not links.looks_below(folder) or _is_described(folder):
        return
    for below in sorted(folder.iterdir()):
        if not below.name.startswith(".") and below.is_dir() and links.enters(below):
            yield from _folders(below, links, depth + 1)


def _search(
    root: Path, cases_in: Callable[[Path, _Links], Iterable[Case]], expected: str, *, follow_links: bool
) -> tuple[list[Case], _Links]:
    """The cases of a manifest (``root`` itself or a file in it) or, without one, of all folders; and the links seen."""
    is_manifest = root.is_file() and root.suffix.lower() == ".csv"
    if not is_manifest and not root.is_dir():
        raise DataError(f"{root}: " + (f"is a file; give {expected}" if root.exists() else "does not exist"))
    links = _Links(root.parent if is_manifest else root, follow=follow_links)
    manifest = root if is_manifest else find_manifest(root)
    if manifest is not None:
        return [_checked(case, links) for case in read_manifest(manifest)], links
    return [case for folder in _folders(root, links) for case in cases_in(folder, links)], links


def _is_described(folder: Path) -> bool:
    """Whether the images of a folder are listed in a dataset.json."""
    return description_of(folder) is not None and not folder.absolute().name.startswith("labels")


def _described_in(folder: Path, links: _Links) -> list[Case]:
    """The cases of a data set with a dataset.json, or of one of its image folders."""
    description = description_of(folder)
    if description is None or not _is_described(folder):
        return []
    only = None if description.parent == folder else folder.absolute().name
    return [_checked(case, links) for case in read_description(description, only)]


def _checked(case: Case, links: _Links) -> Case:
    """Add the problems of a case that a description states: missing contrasts, an unusable id, links."""
    problems = [*missing_problems(case.contrasts, case.unrecognised), *case.problems, *id_problems(case.id)]
    problems += [problem for path in case.files for problem in links.problems(path)]
    return replace(case, problems=tuple(problems))


def _named_files(folder: Path) -> list[tuple[Path, FileName]]:
    """The files of a folder that are named as a contrast or a label map."""
    paths = nifti_files(folder)
    names = split_names([strip_nifti_ending(path.name) or "" for path in paths])
    return [(path, name) for path, name in zip(paths, names, strict=True) if name is not None]


def _cases_in(folder: Path, links: _Links) -> list[Case]:
    """The cases whose files are in a folder: one, or all of a flat data set; empty if no name matches a contrast."""
    if _is_described(folder):
        return _described_in(folder, links)
    files = _named_files(folder)
    by_id: dict[str, list[tuple[Path, FileName]]] = defaultdict(list)
    for path, name in files:
        by_id[name.case].append((path, name))
    contrasts = {case_id: {name.contrast for _, name in own} - {None} for case_id, own in by_id.items()}
    if not any(contrasts.values()):
        return []
    named = {path for path, _ in files}
    others = [path.name for path in nifti_files(folder) if path not in named]
    if sum(len(own) > 1 for own in contrasts.values()) > 1:
        return [
            _case_of(folder, by_id[case_id], links, [o for o in others if composed(o).startswith(case_id)], flat=True)
            for case_id, own in contrasts.items()
            if own
        ]
    return [_case_of(folder, files, links, others)]


def _case_of(
    folder: Path, files: list[tuple[Path, FileName]], links: _Links, others: Sequence[str], *, flat: bool = False
) -> Case:
    """The case formed by files of a folder; ``others`` are file names in the folder that match no contrast."""
    contrasts: dict[Contrast, list[Path]] = defaultdict(list)
    # UCSF-PDGM has some images with and without bias field correction. Take the uncorrected one, since BraTS
    # publishes uncorrected images.
    plain = {name.contrast for _, name in files if not name.corrected}
    for path, name in files:
        if name.contrast is not None and not (name.corrected and name.contrast in plain):
            contrasts[name.contrast].append(path)
    labels = [path for path, name in files if name.is_label]
    # One label map of BraTS 2020 follows another naming scheme: W39_1998.09.19_Segm.
    ids = list(dict.fromkeys(name.case for _, name in files if name.ending != "segm"))
    unrecognised = tuple(others) if missing_contrasts(contrasts.keys()) else ()
    problems = missing_problems(contrasts, unrecognised)
    for what, paths in [*contrasts.items(), ("label map", labels)]:
        if len(paths) > 1:
            problems.append(f"two files for {what}: {', '.join(path.name for path in paths)}. Keep one of them")
    if len(ids) > 1:
        problems.append(f"{folder} contains files of several cases: {', '.join(ids)}. Keep one case in each folder")
    case_id = ids[0] if len(ids) == 1 else folder.name
    problems += id_problems(case_id)
    if any(name.is_target for _, name in files) or case_id.upper().startswith("BRATS-MEN-RT-"):
        problems.append(_RADIOTHERAPY)
    paths = [path for paths in [*contrasts.values(), labels] for path in paths]
    problems += links.problems(folder) or [problem for path in paths for problem in links.problems(path)]
    endings = {name.ending for _, name in files}
    return Case(
        id=case_id,
        folder=folder,
        contrasts={contrast: paths[0] for contrast, paths in contrasts.items()},
        label=labels[0] if labels else None,
        naming=naming_of(case_id, endings & ENDINGS_OF_A_YEAR if flat else endings),
        case_folder=not flat,
        unrecognised=unrecognised,
        problems=tuple(problems),
    )


_RADIOTHERAPY: Final = (
    "cases of meningioma radiotherapy (BraTS MEN-RT) have one contrast and a target volume (gtv), but no whole tumour, "
    "core and enhancing tumour to learn. Leave them out"
)


def _not_taken(root: Path, links: _Links) -> list[str]:
    """One sentence that lists the NIfTI files found, none of which is named as a contrast; empty if there are none."""
    if not root.is_dir():
        return []
    names = [path.name for folder in _folders(root, links) for path in nifti_files(folder)]
    return [f"These names match no contrast: {some_names(names)}."] if names else []


def _label_cases_in(folder: Path, links: _Links) -> Iterator[Case]:
    """Label maps in a flat folder, a case folder or a described data set; images next to them are skipped."""
    if _is_described(folder):
        yield from _described_in(folder, links)
        return
    named = dict(_named_files(folder))
    images = list(dict.fromkeys(name.case for name in named.values() if name.contrast is not None))
    described = description_of(folder) or (folder / "dataset.json" if (folder / "dataset.json").is_file() else None)
    declared = declared_convention(described) if described is not None else None
    renumbered = not images and (described is not None or folder.absolute().name in ("labelsTr", "labelsTs"))
    for path in nifti_files(folder):
        name = named.get(path)
        if (strip_nifti_ending(path.name) or "").endswith(COMPANION_ENDINGS):
            continue
        if not (name.is_label if name is not None else not images):
            continue
        case_id = name.case if name is not None else composed(strip_nifti_ending(path.name) or path.name)
        if name is not None and name.ending == "segm" and len(images) == 1:
            case_id = images[0]
        endings = {name.ending for name in named.values()}
        endings = endings if len(images) == 1 else endings & ENDINGS_OF_A_YEAR
        yield Case(
            id=case_id,
            folder=folder,
            label=path,
            # nnU-Net keeps the BraTS ids but renumbers the labels, so its names imply nothing about the numbers.
            naming=None if renumbered else naming_of(case_id, endings),
            declared=declared or _declared_next_to(path),
            case_folder=len(images) == 1,
        )


def _declared_next_to(label_map: Path) -> str | None:
    """The convention stated in the JSON file next to a predicted label map; None if there is no such file."""
    try:
        path = label_map.with_name(f"{strip_nifti_ending(label_map.name)}.json")
        name = json.loads(path.read_text(encoding="utf-8"))["labels"]["convention"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) and name in CONVENTIONS else None
