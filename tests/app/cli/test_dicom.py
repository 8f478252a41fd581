"""``znormseg data dicom`` and ``data dicom-seg``: a study from end to end, and the messages when a step fails."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file

Call = Callable[..., Any]
NAMES = ("Mustermann", "Erika", "4711", "19640812")


@pytest.fixture
def ambiguous(dicom_study: Path, tmp_path: Path) -> Path:
    """The study with its T2 acquired twice."""
    shutil.copytree(dicom_study, tmp_path / "study")
    for path in (tmp_path / "study" / "A" / "S4").iterdir():
        image = pydicom.dcmread(path)
        image.SeriesInstanceUID, image.SeriesNumber = "1.2.3", 12
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
        image.save_as(path.with_name(f"{path.name}-again"))
    return tmp_path / "study"


def test_a_study_becomes_a_case_that_the_other_commands_recognise(
    dicom_study: Path, znormseg: Call, tmp_path: Path
) -> None:
    from data.datasets.layouts import find_cases

    ended = znormseg("data", "dicom", dicom_study, tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    assert "4/2                pd+t2_tse_tra      12        2x2x3   96  3500     -        t2\n" in ended.out
    assert "8: reformatted (ImageType DERIVED/SECONDARY/MPR)" in ended.out
    case = find_cases(tmp_path / "out")[0]
    assert case.id.startswith("study-")
    assert set(case.require().contrasts) == {"t1", "t1c", "t2", "flair"}


def test_json_contains_the_same_information(dicom_study: Path, znormseg: Call, tmp_path: Path) -> None:
    ended = znormseg("data", "dicom", dicom_study, tmp_path, "--id", "one", "--json")
    content = json.loads(ended.out)
    assert {contrast: taken["series"] for contrast, taken in content["taken"].items()} == {
        "t1": "2",
        "t1c": "7",
        "t2": "4/2",
        "flair": "3",
    }
    assert (content["case"], content["folder"], content["problem"]) == ("one", str(tmp_path / "one"), None)
    assert content["series"][0]["reason"] == "a localizer (name 'localizer')"


def test_no_patient_data_is_printed_or_written(dicom_study: Path, znormseg: Call, tmp_path: Path) -> None:
    plain = znormseg("data", "dicom", dicom_study, tmp_path)
    as_json = znormseg("data", "dicom", dicom_study, "--json")
    names = " ".join(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    shown = plain.out + plain.err + as_json.out + as_json.err + names
    assert [name for name in NAMES if name in shown] == []


def test_without_an_output_the_series_are_listed(dicom_study: Path, znormseg: Call) -> None:
    ended = znormseg("data", "dicom", dicom_study)
    assert ended.code == 0
    assert "contrasts in" not in ended.out


def test_the_time_points_of_a_series_take_one_line(znormseg: Call, write_series: Call, tmp_path: Path) -> None:
    for time in range(5):
        more = {"SeriesInstanceUID": "1.2.3", "SeriesNumber": 20, "TemporalPositionIdentifier": time}
        write_series(tmp_path / "in", np.full((8, 8, 6), time), np.diag([-2.0, -2, 2, 1]), **more)
    ended = znormseg("data", "dicom", tmp_path / "in")
    assert [line.split()[0] for line in ended.out.splitlines() if line.startswith("20")] == ["20/1-5", "20/1:"]
    assert "20/1: one of 5 volumes of its series: dynamic, or many echoes" in ended.out


def test_two_candidates_are_listed_with_the_option_that_chooses_one(
    ambiguous: Path, znormseg: Call, tmp_path: Path
) -> None:
    ended = znormseg("data", "dicom", ambiguous, tmp_path / "out")
    assert ended.code == 3
    assert "znormseg: 2 series may be the t2: 4/2 (" in ended.err
    assert "12/2 ('pd+t2_tse_tra', TE 96 ms, TR 3500 ms); choose with --t2 SERIES" in ended.err
    assert "t2?" in ended.out
    assert not (tmp_path / "out").exists()
    assert znormseg("data", "dicom", ambiguous, tmp_path / "out", "--t2", "12/2").code == 0


def test_json_of_an_undecided_study_has_the_series_and_the_problem(ambiguous: Path, znormseg: Call) -> None:
    ended = znormseg("data", "dicom", ambiguous, "--json")
    content = json.loads(ended.out)
    assert ended.code == 3
    assert "2 series may be the t2" in content["problem"]
    assert len(content["series"]) == 10


def changed(study: Path, place: Path, series: str, change: Callable[[pydicom.Dataset], Any]) -> Path:
    """A copy of the study with the headers of one series changed."""
    shutil.copytree(study, place)
    for path in sorted((place / "A" / series).iterdir()):
        image = pydicom.dcmread(path)
        change(image)
        image.save_as(path)
    return place


def test_corrections_are_printed_and_in_the_json(dicom_study: Path, znormseg: Call, tmp_path: Path) -> None:
    def change(image: pydicom.Dataset) -> None:
        image.add_new(0x00280120, "US", 0)
        image.add_new(0x00280121, "US", 99)
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID("1.2.3")

    study = changed(dicom_study, tmp_path / "study", "S3", change)
    shown = znormseg("data", "dicom", study, tmp_path / "out", "--id", "one")
    told = json.loads(znormseg("data", "dicom", study, tmp_path / "out", "--id", "two", "--json").out)["taken"]["flair"]
    uids, padding = told["notes"]
    assert uids.startswith("12 of its files share their SOPInstanceUID")
    assert padding.endswith("% of its voxels are padding (stored values 0 to 99); they were set to 0, as background")
    assert f"\n3: {uids}\n" in shown.out
    assert f"\nnote: flair, series 3: {padding}\n4 contrasts in" in shown.out
    voxels = np.asanyarray(nib.Nifti1Image.from_filename(tmp_path / "out" / "one" / "one_flair.nii.gz").dataobj)
    assert voxels[voxels > 0].min() == 100


def test_a_partly_rescaled_series_is_refused_with_its_files_without_writing(
    dicom_study: Path, znormseg: Call, tmp_path: Path
) -> None:
    study = changed(dicom_study, tmp_path / "study", "S3", lambda image: setattr(image, "RescaleSlope", "3"))
    path = max((study / "A" / "S3").iterdir())
    image = pydicom.dcmread(path)
    del image.RescaleSlope
    image.save_as(path)
    ended = znormseg("data", "dicom", study, tmp_path / "out")
    assert ended.code == 3
    assert "flair: series 3" in ended.err
    assert "1 of its 12 slices lacks the RescaleSlope that the others have" in ended.err
    assert f"another scale: A/S3/{path.name}. Export it again, or choose another with --flair SERIES." in ended.err
    assert not (tmp_path / "out").exists()


def test_a_label_map_becomes_a_segmentation_on_its_series(dicom_study: Path, znormseg: Call, tmp_path: Path) -> None:
    znormseg("data", "dicom", dicom_study, tmp_path, "--id", "one")
    image = nib.Nifti1Image.from_filename(tmp_path / "one" / "one_flair.nii.gz")
    labels = np.zeros(image.shape, dtype=np.uint8)
    labels[3:6, 4, 2], labels[7, 8, 9] = 2, 4
    nib.save(nib.Nifti1Image(labels, image.affine), tmp_path / "labels.nii.gz")
    arguments = ("data", "dicom-seg", tmp_path / "labels.nii.gz", dicom_study, tmp_path / "seg.dcm")
    ended = znormseg(*arguments, "--reference", "flair", "--json")
    assert (ended.code, json.loads(ended.out)["series"]) == (0, "3")
    dataset = pydicom.dcmread(tmp_path / "seg.dcm")
    assert [item.SegmentLabel for item in dataset.SegmentSequence] == ["Oedema or invaded tissue", "Enhancing tumour"]
    again = znormseg(*arguments, "--reference", "flair")
    assert (again.code, "already exists and is not overwritten" in again.err) == (3, True)


def test_a_label_map_on_the_grid_of_another_series_is_refused(
    dicom_study: Path, znormseg: Call, tmp_path: Path
) -> None:
    nib.save(nib.Nifti1Image(np.ones((18, 20, 12), np.uint8), np.eye(4)), tmp_path / "labels.nii.gz")
    ended = znormseg("data", "dicom-seg", tmp_path / "labels.nii.gz", dicom_study, tmp_path / "seg.dcm")
    assert ended.code == 3
    assert "not on the grid of series 7" in ended.err
    assert "--reference" in ended.err
    assert not (tmp_path / "seg.dcm").exists()


def test_a_study_without_read_permission_is_reported_as_such(znormseg: Call, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    shutil.copy(str(get_testdata_file("MR_small.dcm")), tmp_path / "a")
    (tmp_path / "a").chmod(0)
    ended = znormseg("data", "dicom", tmp_path)
    assert (ended.code, "Permission denied" in ended.err) == (7, True)


@pytest.mark.parametrize("name", ["MR_truncated.dcm", "rtplan_truncated.dcm", "CT_small.dcm", "DICOMDIR-empty.dcm"])
def test_unusable_input_gives_one_message(name: str, znormseg: Call, tmp_path: Path) -> None:
    shutil.copy(next(Path(str(get_testdata_file("MR_small.dcm"))).parent.rglob(name)), tmp_path)
    ended = znormseg("data", "dicom", tmp_path, tmp_path / "out")
    assert ended.code == 3
    assert ended.err.count("\n") == 1
    assert "Traceback" not in ended.err
