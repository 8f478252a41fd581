"""Statistics of label maps, each read once: label numbers, tumour volume, and a hash to detect changes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from data.datasets.layouts import Case, decide_for
from data.errors import DataError
from data.labels import ENHANCING, REGIONS, LabelConvention, Region, convention_named, decode, region_codes
from data.nifti import read_label_map


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Statistics of one label map."""

    counts: Mapping[int, int]
    """Number of voxels by label number, without 0."""
    voxel_um3: int
    """Volume of a voxel in cubic micrometres."""
    sha256: str
    """Hash of shape and voxels, independent of compression."""
    stamp: tuple[int, int]
    """Size and modification time (ns) of the file."""


@dataclass(frozen=True, kw_only=True)
class LabelStats:
    """The tumour properties by which cases are stratified into folds."""

    volume_um3: int
    """Volume of the whole tumour in cubic micrometres; an integer, so that it is the same on every machine."""
    enhances: bool
    """Whether there is enhancing tumour."""
    classes: tuple[int, ...] = ()
    """Labels of a classification, by which cases are stratified first; empty for a segmentation."""


def read_label_maps(cases: Iterable[Case]) -> dict[str, LabelMap]:
    """Read every label map once, by case id; missing or unreadable ones are omitted and reported when they are used.

    Example:
        >>> read_label_maps([])
        {}
    """
    cases = list(cases)
    files = {case.label: case for case in cases}  # a synthetic case shares the label map of a real one
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(files, pool.map(_read, files.values()), strict=True))
    return {case.id: label_map for case in cases if (label_map := found[case.label]) is not None}


def label_map_from_json(content: Mapping[str, Any]) -> LabelMap:
    """Restore a label map's statistics that were converted with ``dataclasses.asdict`` and stored as JSON.

    Raises:
        ValueError: the content is damaged.
    """
    return TypeAdapter(LabelMap).validate_python(content)


def convention_of(cases: Sequence[Case], *, labels: str | None = None) -> LabelConvention:
    """Infer the label convention of a data set from all of its label maps; see :func:`decide_for`.

    Args:
        cases: all cases of the data set.
        labels: name of a convention that overrides the inference, as given to ``--labels``; no label map is read then.

    Raises:
        DataError: the values fit no convention, or several.
    """
    if labels is not None:
        return convention_named(labels)
    return decide_for(values_of([case.id for case in cases], read_label_maps(cases)), cases)


def tumour_of(label_map: LabelMap, convention: LabelConvention) -> LabelStats:
    """Tumour volume (number of non-zero codes times voxel volume), and whether the tumour enhances.

    Raises:
        DataError: a number is not in the convention.

    Example:
        >>> from data.labels import BRATS2021
        >>> tumour_of(LabelMap(counts={2: 10, 4: 1}, voxel_um3=10**9, sha256="", stamp=(0, 0)), BRATS2021)
        LabelStats(volume_um3=11000000000, enhances=True, classes=())
    """
    numbers = np.array(list(label_map.counts), dtype=np.uint8)
    codes = decode(numbers, convention).tolist()
    voxels = sum(count for count, code in zip(label_map.counts.values(), codes, strict=True) if code)
    return LabelStats(volume_um3=voxels * label_map.voxel_um3, enhances=ENHANCING in codes)


def region_volumes_ml(label_map: LabelMap, convention: LabelConvention) -> dict[Region, float]:
    """Volume of each region in ml.

    Raises:
        DataError: a number is not in the convention.

    Example:
        >>> from data.labels import BRATS2021
        >>> region_volumes_ml(LabelMap(counts={2: 10, 4: 1}, voxel_um3=10**9, sha256="", stamp=(0, 0)), BRATS2021)
        {'WT': 0.011, 'TC': 0.001, 'ET': 0.001}
    """
    numbers = np.array(list(label_map.counts), dtype=np.uint8)
    codes = decode(numbers, convention).tolist()
    voxels = dict.fromkeys(codes, 0)
    for code, count in zip(codes, label_map.counts.values(), strict=True):
        voxels[code] += count
    return {
        region: sum(voxels.get(code, 0) for code in region_codes(region)) * label_map.voxel_um3 / 1e12
        for region in REGIONS
    }


def values_of(case_ids: Iterable[str], label_maps: Mapping[str, LabelMap]) -> dict[str, tuple[int, ...]]:
    """Label numbers by case id, for :func:`data.datasets.layouts.decide_for`; empty for unreadable label maps."""
    return {case_id: tuple(label_maps[case_id].counts) if case_id in label_maps else () for case_id in case_ids}


def tumours_of(
    case_ids: Iterable[str], label_maps: Mapping[str, LabelMap], convention: LabelConvention
) -> dict[str, LabelStats]:
    """Tumours by case id, for the folds; volume 0 for unreadable label maps, which are rejected when they are used.

    Raises:
        DataError: see :func:`tumour_of`.
    """
    none = LabelStats(volume_um3=0, enhances=False)
    return {
        case_id: tumour_of(label_maps[case_id], convention) if case_id in label_maps else none for case_id in case_ids
    }


def hash_of(label_maps: Mapping[str, LabelMap]) -> str:
    """SHA-256 over case ids and label maps, independent of their order."""
    lines = "".join(f"{case_id} {label_maps[case_id].sha256}\n" for case_id in sorted(label_maps))
    return hashlib.sha256(lines.encode()).hexdigest()


def changed(before: Mapping[str, LabelMap], cases: Iterable[Case]) -> list[str]:
    """Ids of cases whose label map has changed or is gone. Files with the same size and time are not read again."""
    touched = [case for case in cases if case.id in before and _stamp(case) != before[case.id].stamp]
    now = read_label_maps(touched)
    return [case.id for case in touched if case.id not in now or now[case.id].sha256 != before[case.id].sha256]


def _read(case: Case) -> LabelMap | None:
    stamp = _stamp(case)
    if case.label is None or stamp is None:
        return None
    try:
        volume = read_label_map(case.label)
    except DataError:
        return None
    tumour = volume.voxels[volume.voxels != 0]
    counts = np.bincount(tumour, minlength=1)
    x, y, z = volume.spacing_mm
    digest = hashlib.sha256(repr(volume.voxels.shape).encode())
    digest.update(np.ascontiguousarray(volume.voxels.T).data)
    return LabelMap(
        counts={int(number): int(counts[number]) for number in np.flatnonzero(counts)},
        voxel_um3=round(x * y * z * 1e9),
        sha256=digest.hexdigest(),
        stamp=stamp,
    )


def _stamp(case: Case) -> tuple[int, int] | None:
    try:
        status = case.label.stat() if case.label is not None else None
    except OSError:
        return None
    return None if status is None else (status.st_size, status.st_mtime_ns)
