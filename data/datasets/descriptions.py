"""Data sets described by a file: the dataset.json of the Decathlon (MSD) and of nnU-Net, and manifests in CSV.

``dataset.json`` is next to ``imagesTr``, ``labelsTr`` and ``imagesTs``. MSD stores the contrasts of a case as volumes
of one 4D file, nnU-Net as one file each: ``<case>_0000.nii.gz`` and so on. ``modality`` or ``channel_names`` lists the
contrasts (sources: the Decathlon's dataset.json, nnU-Net's documentation/dataset_format.md). A manifest has a
row for each case and columns ``case``, ``t1``, ``t1c``, ``t2``, ``flair``, ``seg`` with paths relative to the manifest;
``file.nii.gz#2`` is the third volume of a 4D file. The optional column ``labels`` names the label convention, the
optional column ``patient`` the patient.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from data.datasets.case import Case
from data.datasets.naming import ENDINGS_OF_A_YEAR, composed, contrast_of, naming_of, split_name
from data.errors import DataError
from data.labels import CONVENTIONS, MSD, Contrast, convention_of_names
from data.nifti import nifti_files, read_grid, strip_nifti_ending

DESCRIPTION: Final = "dataset.json"
_PARTS: Final = (("imagesTr", "labelsTr"), ("imagesTs", "labelsTs"))
_CHANNEL: Final = re.compile(r"^(?P<case>.+)_(?P<channel>\d{4})$", re.DOTALL)
_VOLUME: Final = re.compile(r"^(?P<path>.+\.nii(?:\.gz)?)#(?P<volume>\d{1,4})$", re.IGNORECASE)
_ID_COLUMNS: Final = {"case", "id", "case_id", "caseid", "case id"}
#: These columns hold the case id if a manifest has no other column for it; otherwise they hold the patient.
_SUBJECT_COLUMNS: Final = {"subject", "subject_id", "subject id", "subjectid"}
_PATIENT_COLUMNS: Final = {
    *("patient", "patient_id", "patient id", "patientid"),
    *("participant", "participant_id", "participant id", "participantid"),
}
_LABEL_COLUMNS: Final = {"seg", "label", "label_map", "segmentation", "mask", "tumor_segmentation"}


def description_of(folder: Path) -> Path | None:
    """The dataset.json that describes a folder: inside it, or next to it if the folder is one of its image folders."""
    names = {name for part in _PARTS for name in part}
    images = [images for images, _ in _PARTS]
    if (folder / DESCRIPTION).is_file() and any((folder / name).is_dir() for name in images):
        return folder / DESCRIPTION
    if folder.absolute().name in names and (folder.parent / DESCRIPTION).is_file():
        return folder.parent / DESCRIPTION
    return None


def declared_convention(description: Path) -> str | None:
    """Name of the convention implied by the ``labels`` of a dataset.json, or None if they imply none.

    Raises:
        DataError: the file cannot be parsed.
    """
    content = _read_json(description)
    convention = convention_of_names(_label_names(content))
    return None if convention is None else convention.name


def read_description(description: Path, only: str | None = None) -> tuple[Case, ...]:
    """The cases of an MSD or nnU-Net data set.

    Args:
        description: its dataset.json.
        only: read only this image folder, without label maps.

    Raises:
        DataError: the file cannot be parsed, or its channel names do not identify the contrasts.
    """
    content = _read_json(description)
    channels = _channels(content, description)
    others = _other_channels(content)
    declared = declared_convention(description)
    of_layout = MSD.name if declared is None and not _label_names(content) else declared
    cases: list[Case] = []
    for images, labels in _PARTS:
        if only not in (None, images) or not (description.parent / images).is_dir():
            continue
        paths = nifti_files(description.parent / images)
        label_folder = description.parent / labels
        named = nifti_files(label_folder) if label_folder.is_dir() and only is None else []
        label_maps = {_stem(path): path for path in named}
        if _has_one_file_per_channel(paths, channels, label_maps):
            cases += _one_file_per_channel(paths, channels, label_maps, declared)
        else:
            cases += _one_file_per_case(paths, channels, label_maps, of_layout)
    return tuple(replace(case, unrecognised=others) for case in cases)


def find_manifest(folder: Path) -> Path | None:
    """The manifest in a folder, or None; other tables, such as those with survival days, are ignored.

    Raises:
        DataError: there are several manifests.
    """
    tables = sorted(p for p in folder.iterdir() if p.suffix.lower() == ".csv" and p.name[0] != "." and p.is_file())
    found = [path for path in tables if _is_manifest(path)]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: {len(found)} manifests: {names}. Give one of them as the data set, or keep one.")
    return found[0] if found else None


def read_manifest(path: Path) -> tuple[Case, ...]:
    """The cases of a manifest, in file order.

    Raises:
        DataError: the file cannot be parsed, has no column for the case or for any contrast, has two columns for the
            same thing, a row without an id, a duplicate id, or an unknown label convention.
    """
    rows = _rows(path)
    if not rows:
        raise DataError(
            f"{path}: the manifest is empty. Its first row must name the columns: case, t1, t1c, t2, flair, seg."
        )
    columns = _columns(rows[0][1], path)
    contrasts = [column for column in columns if column not in ("case", "seg", "labels", "patient")]
    if "case" not in columns or not contrasts:
        raise DataError(
            f"{path}: not a manifest: its first row must name the columns case, t1, t1c, t2, flair and, for label "
            f"maps, seg; it has {', '.join(rows[0][1])[:200]}."
        )
    others = {at: text.strip() for at, text in enumerate(rows[0][1]) if at not in columns.values()}
    lines: dict[str, int] = {}
    cases = []
    for line, row in rows[1:]:
        cells = {name: row[at].strip() if at < len(row) else "" for name, at in columns.items()}
        if not any(cells.values()):
            continue
        case_id = composed(cells["case"])
        if not case_id:
            raise DataError(f"{path}, line {line}: no case id. Fill in the column of the case.")
        if case_id in lines:
            raise DataError(f"{path}: case {case_id} appears twice, in lines {lines[case_id]} and {line}. Keep one.")
        lines[case_id] = line
        images = [name for at, name in others.items() if at < len(row) and _names_an_image(row[at])]
        cases.append(_row_case(path, line, case_id, cells, [f"column {name}" for name in images]))
    return tuple(cases)


def _names_an_image(cell: str) -> bool:
    match = _VOLUME.match(cell.strip())
    return strip_nifti_ending(cell.strip() if match is None else match["path"]) is not None


def _row_case(path: Path, line: int, case_id: str, cells: Mapping[str, str], unrecognised: Sequence[str]) -> Case:
    """One row of a manifest."""
    contrasts: dict[Contrast, Path] = {}
    volumes: dict[Contrast, int] = {}
    problems: list[str] = []
    label: Path | None = None
    for name, text in cells.items():
        contrast = contrast_of(name)
        if not text or (contrast is None and name != "seg"):
            continue
        if not text.isprintable():
            raise DataError(f"{path}, line {line}: {name} is {text!r}, which is not a path. Repair the manifest.")
        match = _VOLUME.match(text)
        file = as_on_disk(path.parent / (match["path"] if match is not None else text))
        if not file.is_symlink() and not file.exists():
            problems.append(f"{name}: {path.name}, line {line} names {file}, which does not exist")
        if contrast is None:
            label = file
            continue
        contrasts[contrast] = file
        if match is not None:
            volumes[contrast] = int(match["volume"])
    declared = cells.get("labels") or None
    if declared is not None and declared not in CONVENTIONS:
        allowed = ", ".join(CONVENTIONS)
        raise DataError(f"{path}, line {line}: labels is {declared!r}, not one of {allowed}. Repair the manifest.")
    names = [split_name(strip_nifti_ending(file.name) or "") for file in contrasts.values()]
    return Case(
        id=case_id,
        folder=path.parent,
        contrasts=contrasts,
        volumes=volumes,
        label=label,
        naming=naming_of(case_id, ENDINGS_OF_A_YEAR & {name.ending for name in names if name is not None}),
        declared=declared,
        case_folder=False,
        stated_patient=composed(cells.get("patient", "")) or None,
        unrecognised=tuple(unrecognised),
        problems=tuple(problems),
    )


def as_on_disk(path: Path) -> Path:
    """The path as spelled on disk: a table from macOS may use a different Unicode form of the file's name."""
    if path.is_symlink() or path.exists() or path.parent == path:
        return path
    folder = as_on_disk(path.parent)
    wanted = composed(path.name)
    try:
        found = next((entry for entry in folder.iterdir() if composed(entry.name) == wanted), None)
    except OSError:
        found = None
    return path if found is None else found


def _is_manifest(path: Path) -> bool:
    """Whether a table's first row names a case and at least one contrast."""
    try:
        rows = _rows(path, at_most=1)
        columns = _columns(rows[0][1], path) if rows else {}
    except (DataError, OSError):
        return False
    return "case" in columns and any(contrast_of(name) is not None for name in columns)


def _rows(path: Path, at_most: int | None = None) -> list[tuple[int, list[str]]]:
    """Line number and cells of every non-blank row."""
    rows: list[tuple[int, list[str]]] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            first = file.readline(1 << 16)
            file.seek(0)
            reader = csv.reader(file, delimiter=max(",;\t", key=first.count), strict=True)
            for row in reader:
                if any(cell.strip() for cell in row):
                    rows.append((reader.line_num, row))
                if at_most is not None and len(rows) == at_most:
                    break
    except (csv.Error, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as CSV ({error}). Save it as CSV in UTF-8.") from error
    return rows


def _columns(header: list[str], path: Path) -> dict[str, int]:
    """Index of every known column, by its canonical name."""
    columns: dict[str, int] = {}
    words = [text.strip().lower() for text in header]
    own = {
        **dict.fromkeys(_SUBJECT_COLUMNS, "patient" if _ID_COLUMNS & set(words) else "case"),
        **dict.fromkeys(_ID_COLUMNS, "case"),
        **dict.fromkeys(_PATIENT_COLUMNS, "patient"),
        **dict.fromkeys(_LABEL_COLUMNS, "seg"),
        "labels": "labels",
    }
    for at, (text, word) in enumerate(zip(header, words, strict=True)):
        name = own.get(word) or contrast_of(word)
        if name is None:
            continue
        if name in columns:
            raise DataError(f"{path}: two columns for {name}: {header[columns[name]]} and {text}. Keep one of them.")
        columns[name] = at
    return columns


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({str(error)[:200]}). Repair it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: a dataset.json must be an object with channel_names or modality. Repair it.")
    return content


def _channel_names(content: Mapping[str, Any]) -> Any:
    names = content.get("channel_names", content.get("modality"))
    return dict(enumerate(names)) if isinstance(names, list) else names


def _other_channels(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The channels whose names match no contrast."""
    return tuple(f"channel {name}" for name in _channel_names(content).values() if contrast_of(name) is None)


def _channels(content: Mapping[str, Any], path: Path) -> dict[int, Contrast]:
    """The contrast of every channel that has one; others, such as a diffusion map, are ignored."""
    names = _channel_names(content)
    if not isinstance(names, dict) or not all(
        str(number).isdecimal() and len(str(number)) <= 4 and isinstance(name, str) for number, name in names.items()
    ):
        raise DataError(
            f'{path}: channel_names (or modality) must name the channels, such as {{"0": "T1", "1": "T1ce", "2": "T2", '
            '"3": "FLAIR"}. Add them.'
        )
    channels: dict[int, Contrast] = {}
    for number, name in names.items():
        contrast = contrast_of(name)
        if contrast is None:
            continue
        if contrast in channels.values():
            raise DataError(f"{path}: two channels are named {contrast}: {', '.join(names.values())}. Rename one.")
        channels[int(number)] = contrast
    if not channels:
        raise DataError(
            f"{path}: no channel is named after a contrast: {', '.join(names.values())[:200]}. List T1, T1ce, T2 and "
            "FLAIR in channel_names, in the order of the channels."
        )
    return channels


def _label_names(content: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Numbers by label name, from ``{"1": "edema"}`` (MSD), ``{"edema": 1}`` or ``{"core": [2, 3]}`` (nnU-Net)."""
    labels = content.get("labels")
    names: dict[str, tuple[int, ...]] = {}
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if key.isdecimal() and isinstance(value, str) and len(key) <= 3:
            names[value] = (int(key),)
        elif isinstance(value, int) and key != "ignore":
            names[key] = (value,)
        elif isinstance(value, list) and value and all(isinstance(number, int) for number in value):
            names[key] = tuple(value)
    return names


def _stem(path: Path) -> str:
    """The key by which an image and its label map are matched."""
    return composed(strip_nifti_ending(path.name) or "")


def _has_one_file_per_channel(
    paths: list[Path], channels: Mapping[int, Contrast], label_maps: Mapping[str, Path]
) -> bool:
    """Whether images are named as in nnU-Net, rather than being 4D files whose names happen to end in four digits."""
    stems = [_stem(path) for path in paths]
    matches = [_CHANNEL.match(stem) for stem in stems]
    if any(stem in label_maps for stem in stems) or (paths and _is_4d(paths[0])):
        return False
    most = max(channels) + 8  # further channels may follow that are not contrasts
    return all(match is not None and int(match["channel"]) <= most for match in matches)


def _is_4d(path: Path) -> bool:
    try:
        read_grid(path, 0)
    except DataError:
        return False
    return True


def _one_file_per_channel(
    paths: list[Path], channels: Mapping[int, Contrast], label_maps: Mapping[str, Path], declared: str | None
) -> Iterator[Case]:
    """Cases of nnU-Net. Their ids say nothing about label numbers: nnU-Net's conversions keep ids but renumber."""
    files: dict[str, dict[Contrast, Path]] = {}
    twice: dict[str, list[str]] = {}
    for path in paths:
        match = _CHANNEL.match(_stem(path))
        assert match is not None
        own = files.setdefault(match["case"], {})
        contrast = channels.get(int(match["channel"]))
        if contrast in own:
            twice.setdefault(match["case"], []).append(
                f"two files for {contrast}: {own[contrast].name}, {path.name}. Keep one of them"
            )
        elif contrast is not None:
            own[contrast] = path
    for case_id, contrasts in files.items():
        yield Case(
            id=case_id,
            folder=paths[0].parent,
            contrasts=contrasts,
            label=label_maps.get(case_id),
            declared=declared,
            case_folder=False,
            problems=tuple(twice.get(case_id, ())),
        )


def _one_file_per_case(
    paths: list[Path], channels: Mapping[int, Contrast], label_maps: Mapping[str, Path], declared: str | None
) -> Iterator[Case]:
    """Cases of the Decathlon, one 4D file each."""
    for path in paths:
        case_id = _stem(path)
        yield Case(
            id=case_id,
            folder=path.parent,
            contrasts=dict.fromkeys(channels.values(), path),
            volumes={contrast: channel for channel, contrast in channels.items()},
            label=label_maps.get(case_id),
            declared=declared,
            case_folder=False,
        )
