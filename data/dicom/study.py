"""Read a DICOM study as a case: four contrasts as volumes, each on the grid it was acquired on.

Patient data from the headers is never repeated: cases are named after a hash of the StudyInstanceUID, and messages name
only series and files.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import SimpleITK

from data.datasets.layouts import Case
from data.datasets.naming import SUFFIXES_2021
from data.dicom.copies import without_copies
from data.dicom.files import DicomFile, dicom_files, quiet, text
from data.dicom.pixels import read_series
from data.dicom.series import Series, group
from data.dicom.series_choice import Choice, choose_series
from data.errors import DataError
from data.files import folder_when_complete
from data.labels import CONTRASTS, Contrast
from data.native_space.itk import to_itk
from data.nifti import Volume, in_16_bits, scanner_image


@dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """A study found in a folder or an archive; its series can be read while it is open."""

    uid: str
    """StudyInstanceUID."""
    series: tuple[Series, ...]

    @property
    def case_id(self) -> str:
        """Name for the case: a hash of the StudyInstanceUID, stable for a study and free of patient data."""
        return f"study-{hashlib.sha256(self.uid.encode()).hexdigest()[:12]}"


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyImages:
    """The four contrasts of a study, with the series each was read from."""

    case_id: str
    volumes: dict[Contrast, Volume]
    choices: dict[Contrast, Choice]
    """Series of each contrast, which :func:`data.dicom.segmentation.write_dicom_seg` can reference."""
    notes: dict[Contrast, tuple[str, ...]]
    """By contrast: errors in its files and how they were worked around, one sentence each."""

    @property
    def images(self) -> dict[Contrast, SimpleITK.Image]:
        """The volumes as ITK images (float32, LPS)."""
        return {contrast: to_itk(volume.voxels, volume.affine) for contrast, volume in self.volumes.items()}


@contextmanager
def open_study(path: Path, *, study_uid: str | None = None) -> Iterator[Study]:
    """Find the series of one study.

    Args:
        path: a folder (with subfolders, any file names), a .zip of one, a DICOMDIR, or a single DICOM file.
        study_uid: StudyInstanceUID, required if the path holds several studies of one patient.

    Raises:
        DataError: there is no DICOM file, there are several patients or several studies, or a file is damaged.
    """
    with dicom_files(path) as files:
        with quiet():
            _require_one_patient(path, files)
            chosen = _of_study(path, files, study_uid)
            study = Study(uid=text(chosen[0].header, "StudyInstanceUID"), series=group(without_copies(chosen)))
        yield study


def read_study(path: Path) -> StudyImages:
    """Identify and read T1, T1c, T2 and FLAIR of a study, each on its own grid.

    Raises:
        DataError: as raised by :func:`open_study` and :func:`data.dicom.series_choice.choose_series`; also if a series
            cannot be decoded.
    """
    with open_study(path) as study:
        return read_chosen(study, choose_series(study.series))


def read_chosen(study: Study, choices: dict[Contrast, Choice]) -> StudyImages:
    """Read the chosen series of an open study."""
    readings = {contrast: read_series(choice.series) for contrast, choice in choices.items()}
    return StudyImages(
        case_id=study.case_id,
        volumes={contrast: reading.volume for contrast, reading in readings.items()},
        choices=choices,
        notes={contrast: (*choices[contrast].series.notes, *reading.notes) for contrast, reading in readings.items()},
    )


def write_dicom_case(out: Path, images: StudyImages, *, case_id: str | None = None) -> Path:
    """Write the contrasts as ``<id>/<id>_{t1,t1ce,t2,flair}.nii.gz``, each on its own grid; either all or none.

    Whole numbers that fit are stored as int16, others as float32. Of the DICOM headers, only the geometry is kept.

    Args:
        out: folder of the data set, created if missing.
        images: the result of :func:`read_study`.
        case_id: name of the case; defaults to that of ``images``.

    Returns:
        the case's folder.

    Raises:
        DataError: the id is not usable as a file name, or the case already exists.
    """
    name = images.case_id if case_id is None else case_id
    Case(id=name, folder=out).require()
    if out.exists() and not out.is_dir():
        raise DataError(f"{out}: is a file, but cases are written to a folder. Choose another place.")
    folder = out / name
    if folder.exists():
        raise DataError(f"{folder}: already exists and is not overwritten. Remove it, or give another --id.")
    with folder_when_complete(folder) as partial:
        for contrast in CONTRASTS:
            volume = images.volumes[contrast]
            image = scanner_image(in_16_bits(volume.voxels), volume.affine)
            nib.save(image, partial / f"{name}_{SUFFIXES_2021[contrast]}.nii.gz")
    return folder


def _require_one_patient(path: Path, files: tuple[DicomFile, ...]) -> None:
    """Reject files of several people: different patient IDs or dates of birth, or names if no file has an ID.

    The message does not repeat the values that differ.
    """
    fields: tuple[str, ...] = ("PatientID", "PatientBirthDate")
    if not any(text(file.header, "PatientID") for file in files):
        fields = ("PatientName", *fields)
    for field in fields:
        first: dict[str, str] = {}
        for file in files:
            value = " ".join(text(file.header, field).replace("^", " ").upper().split())
            if value:
                first.setdefault(value, file.name)
        if len(first) > 1:
            one, other = list(first.values())[:2]
            raise DataError(
                f"{path}: files of {len(first)} patients ({field} differs, for instance between {one} and {other}). "
                "Give the folder of one patient."
            )


def _of_study(path: Path, files: tuple[DicomFile, ...], wanted: str | None) -> tuple[DicomFile, ...]:
    """The files of the requested study, or of the only one."""
    counts = Counter(text(file.header, "StudyInstanceUID") for file in files)
    if wanted is None and len(counts) > 1:
        listed = ", ".join(f"{uid} ({count} files)" for uid, count in sorted(counts.items()))
        raise DataError(f"{path}: {len(counts)} studies: {listed}. Choose one with --study UID.")
    if wanted is not None and wanted not in counts:
        raise DataError(f"{path}: no study {wanted}. There are {', '.join(sorted(counts))}.")
    return tuple(file for file in files if wanted is None or text(file.header, "StudyInstanceUID") == wanted)
