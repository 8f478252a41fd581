"""Export a data set to another layout: nnU-Net raw, Decathlon (MSD), or a manifest in CSV next to the files.

Grids and voxel values are preserved. A file that fits the new layout is copied; it is rewritten if contrasts are
combined into one 4D file, extracted from one, or reordered to the voxel order of the T1c.
``data.datasets.layouts.find_cases`` reads all three layouts.
"""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import numpy as np

from data.datasets.descriptions import DESCRIPTION
from data.datasets.label_stats import convention_of
from data.datasets.layouts import Case, find_cases
from data.datasets.patients import patient_of
from data.datasets.source import DataSource
from data.errors import DataError
from data.files import folder_when_complete
from data.labels import CONTRASTS, MSD, Contrast, LabelConvention, decode, encode
from data.nifti import (
    LOG,
    Volume,
    grid_difference,
    in_order_of,
    is_compressed,
    read_grid,
    read_image,
    read_label_map,
    write_image,
    write_label_map,
)

Layout = Literal["nnunet", "msd", "csv"]
LAYOUTS: Final[tuple[Layout, ...]] = get_args(Layout)

#: Folder name that nnU-Net requires inside nnUNet_raw; here OUT takes the place of nnUNet_raw.
NNUNET_NAME: Final = "Dataset001_BraTS"
MANIFEST: Final = "manifest.csv"
_NNUNET_CHANNELS: Final[dict[Contrast, str]] = {"t1": "T1", "t1c": "T1ce", "t2": "T2", "flair": "FLAIR"}
_MSD_CHANNELS: Final[dict[Contrast, str]] = {"flair": "FLAIR", "t1": "T1w", "t1c": "t1gd", "t2": "T2w"}
#: Maximum number of cases processed at once; each holds four volumes in memory.
_AT_ONCE: Final = 4


@dataclass(frozen=True, kw_only=True)
class ExportedDataset:
    """Summary of an export."""

    out: Path
    layout: Layout
    cases: int
    labelled: int
    """Number of cases with a label map."""
    labels: str | None
    """Name of the convention of the exported label maps; None if there are none."""
    notes: tuple[str, ...]
    """Sentences about information that the new layout cannot hold."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "folder": str(self.out),
            "format": self.layout,
            "cases": self.cases,
            "labelled": self.labelled,
            "labels": self.labels,
            "notes": list(self.notes),
        }


def export_dataset(
    source: DataSource,
    out: Path,
    layout: str,
    *,
    on_case: Callable[[str, float], None] | None = None,
) -> ExportedDataset:
    """Write every case of a data set in another layout; ``out`` appears only once the export is complete.

    Args:
        source: the data set.
        out: folder to write to; must be new or empty.
        layout: ``nnunet``: ``Dataset001_BraTS`` with dataset.json, using the label numbers of nnU-Net's conversions and
            the regions that nnU-Net trains; ``msd``: 4D files and dataset.json; ``csv``: ``manifest.csv`` and a folder
            for each case, with label maps unchanged.
        on_case: called with each case's id and the fraction of cases completed.

    Returns:
        a summary of the export.

    Raises:
        DataError: the data set is invalid, ``out`` is not empty or is in the data set, or the layout is unknown.
        OSError: ``out`` is not writable.
    """
    if layout not in LAYOUTS:
        raise DataError(f"no layout is named {layout!r}. Give one of {', '.join(LAYOUTS)}.")
    _require_place(source.root, out)
    cases = [case.require() for case in source.find_cases().values()]
    convention = convention_of(cases, labels=source.labels) if any(case.label is not None for case in cases) else None
    writers: dict[Layout, Callable[[Path, LabelConvention | None], _Writer]]
    writers = {"nnunet": _NNUNet, "msd": _Decathlon, "csv": _Manifest}
    with folder_when_complete(out) as folder:
        writer = writers[layout](folder, convention)
        with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
            futures = [pool.submit(writer.write, case) for case in cases]
            try:
                for number, (case, future) in enumerate(zip(cases, futures, strict=True), start=1):
                    future.result()
                    if on_case is not None:
                        on_case(case.id, number / len(cases))
            finally:
                pool.shutdown(cancel_futures=True)
        writer.describe(cases)
        if {case.id for case in find_cases(folder)} != {case.id for case in cases}:
            raise DataError(
                f"{source.root}: the layout {layout} does not preserve every case id; does one begin or end with a "
                "blank? Rename the cases, or choose another layout."
            )
    rewritten = convention is not None and layout != "csv"
    dropped = ", ".join(str(value) for value in convention.also_background) if convention and rewritten else ""
    merged = ", ".join(str(value) for value in convention.also_necrosis) if convention and rewritten else ""
    notes = [
        *([f"label {dropped} (resection cavity) became background"] if dropped else []),
        *([f"label {merged} became part of the non-enhancing core"] if merged else []),
        *([] if layout == "csv" else _patients_lost(cases, layout)),
    ]
    return ExportedDataset(
        out=out,
        layout=writer.layout,
        cases=len(cases),
        labelled=sum(case.label is not None for case in cases),
        labels=None if convention is None else MSD.name if rewritten else convention.name,
        notes=tuple(notes),
    )


def _patients_lost(cases: Sequence[Case], layout: str) -> list[str]:
    """A note if a manifest assigns cases to one patient but their ids alone would not; else empty."""
    by_id: dict[str, set[str]] = {}
    for case in cases:
        by_id.setdefault(case.patient, set()).add(patient_of(case.id))
    parted = sum(len(ids) > 1 for ids in by_id.values())
    if not parted:
        return []
    return [f"{layout} cannot store patients; judged by their ids, the cases of {parted} count as different patients"]


class _Writer(ABC):
    """Writes one layout into a folder: the files of each case and the description of the data set."""

    layout: Layout
    within: str = ""
    """Subfolder that contains everything else."""
    folders: tuple[str, ...] = ()
    """Folders created at the start."""

    def __init__(self, folder: Path, convention: LabelConvention | None) -> None:
        self._root = folder / self.within
        self._convention = convention
        for name in self.folders:
            (self._root / name).mkdir(parents=True)

    @abstractmethod
    def write(self, case: Case) -> None:
        """Write the files of one case."""

    @abstractmethod
    def describe(self, cases: Sequence[Case]) -> None:
        """Write the description of the data set."""

    def _write_labels(self, case: Case, path: Path) -> None:
        """Write the label map in the numbers of MSD and nnU-Net, on the grid and in the voxel order of the T1c."""
        assert case.label is not None
        assert self._convention is not None
        reference = _t1c_grid(case)
        label = _on_grid(case, reference, read_label_map(case.label), "the label map")
        try:
            codes = decode(label.voxels, self._convention)
        except DataError as error:
            raise DataError(f"case {case.id}, label map {case.label}: {error}") from error
        write_label_map(path, encode(codes, MSD), reference.path)


class _NNUNet(_Writer):
    """nnU-Net raw: one file per channel (nnU-Net, documentation/dataset_format.md)."""

    layout = "nnunet"
    within = NNUNET_NAME
    folders = ("imagesTr", "labelsTr", "imagesTs")

    def write(self, case: Case) -> None:
        images = self._root / ("imagesTs" if case.label is None else "imagesTr")
        for number, contrast in enumerate(_NNUNET_CHANNELS):
            _store(case, contrast, images / f"{case.id}_{number:04d}.nii.gz")
        if case.label is not None:
            self._write_labels(case, self._root / "labelsTr" / f"{case.id}.nii.gz")

    def describe(self, cases: Sequence[Case]) -> None:
        oedema, necrosis, enhancing = MSD.oedema, MSD.necrosis, MSD.enhancing
        _write_json(
            self._root / DESCRIPTION,
            {
                "channel_names": {str(number): name for number, name in enumerate(_NNUNET_CHANNELS.values())},
                "labels": {
                    "background": 0,
                    "whole tumor": [oedema, necrosis, enhancing],
                    "tumor core": [necrosis, enhancing],
                    "enhancing tumor": [enhancing],
                },
                # Regions are painted in this order, each with the number of the tissue that no smaller region contains.
                "regions_class_order": [oedema, necrosis, enhancing],
                "numTraining": sum(case.label is not None for case in cases),
                "file_ending": ".nii.gz",
            },
        )


class _Decathlon(_Writer):
    """Medical Segmentation Decathlon: one 4D file per case."""

    layout = "msd"
    folders = ("imagesTr", "labelsTr", "imagesTs")

    def write(self, case: Case) -> None:
        reference = _t1c_grid(case)
        volumes = [_on_grid(case, reference, _read(case, contrast), contrast).voxels for contrast in _MSD_CHANNELS]
        images = self._root / ("imagesTs" if case.label is None else "imagesTr")
        write_image(images / f"{case.id}.nii.gz", np.stack(volumes, axis=3), reference.path)
        if case.label is not None:
            self._write_labels(case, self._root / "labelsTr" / f"{case.id}.nii.gz")

    def describe(self, cases: Sequence[Case]) -> None:
        labelled = [case.id for case in cases if case.label is not None]
        others = [case.id for case in cases if case.label is None]
        names = {MSD.oedema: "edema", MSD.necrosis: "non-enhancing tumor", MSD.enhancing: "enhancing tumour"}
        _write_json(
            self._root / DESCRIPTION,
            {
                "name": "BRATS",
                "tensorImageSize": "4D",
                "modality": {str(number): name for number, name in enumerate(_MSD_CHANNELS.values())},
                "labels": {"0": "background", **{str(number): name for number, name in sorted(names.items())}},
                "numTraining": len(labelled),
                "numTest": len(others),
                "training": [
                    {"image": f"./imagesTr/{case}.nii.gz", "label": f"./labelsTr/{case}.nii.gz"} for case in labelled
                ],
                "test": [f"./imagesTs/{case}.nii.gz" for case in others],
            },
        )


class _Manifest(_Writer):
    """A manifest, and a folder with the files of each case."""

    layout = "csv"

    def write(self, case: Case) -> None:
        (self._root / case.id).mkdir()
        for contrast in CONTRASTS:
            _store(case, contrast, self._root / self._place(case, contrast))
        if case.label is not None:
            read_grid(case.label)
            _copy(case.label, self._root / self._place(case, "seg"))

    def describe(self, cases: Sequence[Case]) -> None:
        with (self._root / MANIFEST).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            # If no case states its patient, the column is omitted: every reader derives the patient from the id.
            stated = any(case.stated_patient is not None for case in cases)
            writer.writerow(["case", *(["patient"] if stated else []), *CONTRASTS, "seg", "labels"])
            for case in cases:
                named = self._convention is not None and case.label is not None
                writer.writerow(
                    [
                        case.id,
                        *([case.patient] if stated else []),
                        *(self._place(case, contrast) for contrast in CONTRASTS),
                        self._place(case, "seg") if case.label is not None else "",
                        self._convention.name if self._convention is not None and named else "",
                    ]
                )

    def _place(self, case: Case, what: str) -> str:
        return f"{case.id}/{case.id}_{what}.nii.gz"


def _read(case: Case, contrast: Contrast) -> Volume:
    """Read one contrast and set its background to 0, with a warning if it was not 0."""
    volume = read_image(case.contrasts[contrast], case.volumes.get(contrast), nan_to_zero=True)
    if volume.background is not None:
        LOG.warning("case %s, contrast %s: %s", case.id, contrast, volume.background)
    return volume


def _t1c_grid(case: Case) -> Volume:
    """The grid of the T1c, from its header only; the voxels are a broadcast zero."""
    path = case.contrasts["t1c"]
    shape, affine = read_grid(path, case.volumes.get("t1c"))
    return Volume(voxels=np.broadcast_to(np.float32(0), shape), affine=affine, path=path)


def _on_grid(case: Case, reference: Volume, volume: Volume, name: str) -> Volume:
    """Return a volume in the voxel order of the reference, ready to be rewritten.

    Raises:
        DataError: the volume is on another grid, or contains NaN or infinity, which would have to be replaced.
    """
    if volume.zeroed:
        raise DataError(
            f"case {case.id}, contrast {name}: {volume.path}: {volume.zeroed} voxels are NaN or infinite. Repair the "
            "file, or leave the case out."
        )
    ordered = volume if grid_difference(reference, volume) is None else in_order_of(reference, volume)
    difference = grid_difference(reference, ordered)
    if difference is not None:
        raise DataError(
            f"case {case.id}: {name} is not on the grid of t1c: {difference} ({volume.path} against {reference.path}). "
            "Register and resample the contrasts to one grid first."
        )
    return ordered


def _store(case: Case, contrast: Contrast, path: Path) -> None:
    """Store a contrast in its own file: copied if it is a 3D file in the T1c's voxel order, else rewritten.

    It is also rewritten if its background is not 0, because other programs would take the whole volume for brain.
    """
    reference, volume = _t1c_grid(case), _read(case, contrast)
    if contrast not in case.volumes and volume.background is None and grid_difference(reference, volume) is None:
        _copy(volume.path, path)
    else:
        write_image(path, _on_grid(case, reference, volume, contrast).voxels, reference.path)


def _copy(source: Path, target: Path) -> None:
    """Copy a NIfTI file to a compressed one; a compressed source is copied byte by byte."""
    if is_compressed(source):
        shutil.copyfile(source, target)
        return
    # Omit name and time, so that the same file always compresses to the same bytes.
    with (
        source.open("rb") as plain,
        target.open("wb") as file,
        gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as packed,
    ):
        shutil.copyfileobj(plain, packed)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _require_place(root: Path, out: Path) -> None:
    """Reject a folder that is not empty, or that is inside the data set being exported."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise DataError(f"{out} {what}; give a new folder to export to.")
    if root.is_dir() and out.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{out} is inside {root}, the data set to be exported; give a folder outside it.")
