"""Reading DICOM studies: positions of voxels, separation of volumes, rejection of bad files, no patient data kept."""

from __future__ import annotations

import doctest
import json
import logging
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.data import get_testdata_file
from scipy.spatial.transform import Rotation

from data.dicom import files as dicom_files
from data.dicom import series_choice
from data.dicom.pixels import read_series
from data.dicom.series import Series
from data.dicom.series_choice import identify
from data.dicom.study import StudyImages, open_study, read_study, write_dicom_case
from data.errors import DataError
from data.native_space.itk import to_itk

properties = settings(derandomize=True, deadline=None, max_examples=12)
Write = Callable[..., list[Path]]
STRAIGHT = np.array([[-2.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, -20], [0, 0, 0, 1]])
NAMES = ("Mustermann", "Erika", "PID-4711", "19640812")
PYDICOM_FILES = Path(str(get_testdata_file("MR_small.dcm"))).parent


def only_series(path: Path) -> Series:
    with open_study(path) as study:
        assert len(study.series) == 1
        return study.series[0]


def read_only(path: Path) -> Any:
    with open_study(path) as study:
        return read_series(study.series[0]).volume


def refusal(path: Path) -> str:
    try:
        with open_study(path) as study:
            for series in study.series:
                read_series(series)
    except DataError as error:
        return str(error)
    pytest.fail("nothing was refused")


@pytest.fixture
def voxels() -> npt.NDArray[np.int64]:
    return np.random.default_rng(1).integers(0, 1000, (6, 7, 8))


@pytest.fixture
def stack(tmp_path: Path, voxels: npt.NDArray[np.int64], write_series: Write) -> list[Path]:
    """One series of eight slices; ``stack[0].parent`` is its folder."""
    return write_series(tmp_path / "stack", voxels, STRAIGHT, SeriesNumber=1)


def change(path: Path, **fields: Any) -> None:
    image = pydicom.dcmread(path)
    for keyword, value in fields.items():
        if value is None:
            delattr(image, keyword)
        else:
            setattr(image, keyword, value)
    image.save_as(path)


def in_place_order(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(series_choice).failed == 0


@properties
@given(angles=st.tuples(*[st.floats(-180, 180)] * 3), spacing=st.tuples(*[st.floats(0.4, 6)] * 3), flip=st.booleans())
def test_every_voxel_is_where_itk_puts_it(
    angles: Any, spacing: Any, flip: bool, write_series: Write, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    shape = (4, 5, 6)
    stored = np.random.default_rng(0).integers(0, 1000, shape)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(spacing)
    affine[:3, 3] = (10, -20, 30)
    if flip:
        affine[:3, 2] *= -1  # the slices are then stored against the normal
    write_series(folder, stored, affine)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    theirs = reader.Execute()
    with open_study(folder) as study:
        volume = read_series(study.series[0]).volume
    ours = to_itk(volume.voxels, volume.affine)
    for index in np.ndindex(shape):
        point = ours.TransformIndexToPhysicalPoint(index)
        same = theirs.TransformPhysicalPointToIndex(point)
        assert theirs[same] == ours[index]
        assert np.allclose(theirs.TransformIndexToPhysicalPoint(same), point, atol=1e-3)


def test_the_affine_matches_the_written_voxels(stack: list[Path], voxels: Any) -> None:
    volume = read_only(stack[0].parent)
    assert np.array_equal(volume.voxels, voxels)
    assert np.allclose(volume.affine, STRAIGHT, atol=1e-6)


def test_each_slice_has_its_own_slope_and_intercept(stack: list[Path], voxels: Any) -> None:
    for place, path in enumerate(in_place_order(stack)):
        change(path, RescaleSlope=place + 0.5, RescaleIntercept=-place)
    expected = voxels * (np.arange(8) + 0.5) - np.arange(8)
    assert np.allclose(read_only(stack[0].parent).voxels, expected)


def test_frames_of_an_enhanced_object_are_sorted_and_rescaled(enhanced: tuple[Path, Any, Any]) -> None:
    folder, expected, affine = enhanced
    with open_study(folder) as study:
        volume = read_series(study.series[0]).volume
        assert identify(study.series[0]).contrast == "t1c"
    assert np.allclose(volume.voxels, expected)
    assert np.allclose(volume.affine, affine, atol=1e-5)


def test_two_echoes_in_one_series_are_two_volumes(dicom_study: Path) -> None:
    with open_study(dicom_study) as study:
        echoes = {series.key: series.acquisition.echo_ms for series in study.series if series.number == 4}
    assert echoes == {"4/1": 12.0, "4/2": 96.0}


@pytest.mark.parametrize(
    "field", ["TemporalPositionIdentifier", "AcquisitionNumber", "DiffusionBValue", "InversionTime", "ContentTime"]
)
def test_time_points_and_similar_groups_in_one_series_are_separate_volumes(
    field: str, tmp_path: Path, voxels: Any, write_series: Write
) -> None:
    for value in (1, 2, 3):
        more = {field: f"10000{value}" if field == "ContentTime" else value}
        write_series(tmp_path, voxels + value, STRAIGHT, SeriesInstanceUID="1.2.3", SeriesNumber=9, **more)
    with open_study(tmp_path) as study:
        assert [series.key for series in study.series] == ["9/1", "9/2", "9/3"]
        for value, series in enumerate(study.series, start=1):
            assert np.array_equal(read_series(series).volume.voxels, voxels + value)


def test_per_slice_times_do_not_split_a_volume(stack: list[Path]) -> None:
    for place, path in enumerate(stack):
        change(path, AcquisitionNumber=place, ContentTime=f"10000{place}", AcquisitionTime=f"10000{place}")
    assert len(only_series(stack[0].parent).frames) == 8


def test_orientations_in_one_series_are_separate_volumes(tmp_path: Path, voxels: Any, write_series: Write) -> None:
    turned = STRAIGHT[:, [0, 2, 1, 3]]
    for affine in (STRAIGHT, turned):
        write_series(tmp_path, voxels, affine, SeriesInstanceUID="1.2.3", SeriesNumber=1)
    with open_study(tmp_path) as study:
        assert [series.problems for series in study.series] == [(), ()]


def test_a_name_cannot_send_control_sequences_to_a_terminal(stack: list[Path]) -> None:
    for path in stack:
        change(path, SeriesDescription="t1\x1b[2J\tse")
    assert only_series(stack[0].parent).acquisition.description == "t1 [2J se"


def test_a_duplicate_image_is_skipped(stack: list[Path]) -> None:
    shutil.copy(stack[3], stack[3].with_name("copy.dcm"))
    assert only_series(stack[0].parent).problems == ()


def test_a_missing_slice_is_named(stack: list[Path]) -> None:
    in_place_order(stack)[4].unlink()
    assert only_series(stack[0].parent).problems == (
        "1 slice is missing: after slice 4 of 7 the next is 6.00 mm away instead of 3.00 mm",
    )
    assert "missing" in refusal(stack[0].parent)


@pytest.mark.parametrize(
    ("position", "problem"),
    [
        ((-30, -40, -20 + 3 * 4), "1 of its 8 slices are at the same position as another one"),
        ((-30, -40, -20 + 3 * 5.3), "not evenly spaced: 2.10 to 3.90 mm"),
        ((-30, -36, -20 + 3 * 5), "shifted in plane by up to 4.0 mm"),
    ],
)
def test_a_slice_out_of_line_is_named(stack: list[Path], position: Any, problem: str) -> None:
    change(in_place_order(stack)[5], ImagePositionPatient=list(position))
    assert problem in only_series(stack[0].parent).problems[0]


def test_a_tilted_stack_is_refused(tmp_path: Path, voxels: Any, write_series: Write) -> None:
    for path in write_series(tmp_path, voxels, STRAIGHT):
        image = pydicom.dcmread(path)
        x, y, z = image.ImagePositionPatient
        change(path, ImagePositionPatient=[x, y + 0.2 * z, z])
    assert "tilted gantry" in refusal(tmp_path)


@pytest.mark.parametrize("field", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_images_without_a_position_do_not_form_a_volume(stack: list[Path], field: str) -> None:
    for path in stack:
        change(path, **{field: None})
    assert "does not say where the voxels are" in refusal(stack[0].parent)


@pytest.mark.parametrize("kind", ["RLE", "jp2klossless", "jpeg_ls_lossless", "implicit", "bigendian", "expb", "padded"])
def test_an_example_image_of_pydicom_is_the_same_in_every_transfer_syntax(kind: str, tmp_path: Path) -> None:
    shutil.copy(PYDICOM_FILES / f"MR_small_{kind}.dcm", tmp_path)
    plain = pydicom.dcmread(PYDICOM_FILES / "MR_small.dcm").pixel_array
    assert np.array_equal(read_only(tmp_path).voxels[:, :, 0], plain.T)


def test_jpeg_lossless_is_decoded_by_itk_with_slope_and_intercept(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(0, 900, (1, 16, 12)).astype(np.uint16)
    image = sitk.GetImageFromArray(stored)
    for key, value in {"0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": "1.2.4"}.items():
        image.SetMetaData(key, value)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(tmp_path / "image.dcm"))
    writer.Execute(image)
    change(tmp_path / "image.dcm", ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0])
    change(tmp_path / "image.dcm", PixelSpacing=[1, 1], RescaleSlope=2, RescaleIntercept=-3)
    assert pydicom.dcmread(tmp_path / "image.dcm").file_meta.TransferSyntaxUID == pydicom.uid.JPEGLosslessSV1
    assert np.array_equal(read_only(tmp_path).voxels[:, :, 0], stored[0].T * 2.0 - 3)


def test_an_undecodable_transfer_syntax_is_named_with_what_to_install(tmp_path: Path) -> None:
    image = pydicom.dcmread(PYDICOM_FILES / "MR_small_jp2klossless.dcm")
    image.file_meta.TransferSyntaxUID = pydicom.uid.MPEG2MPML
    image.save_as(tmp_path / "image")
    assert "MPEG2 Main Profile" in refusal(tmp_path)
    assert "1.2.840.10008.1.2.4.100" in refusal(tmp_path)
    assert "pylibjpeg" in refusal(tmp_path)


def test_a_zip_is_read_like_the_folder_it_was_made_from(dicom_study: Path, tmp_path: Path) -> None:
    archive = Path(shutil.make_archive(str(tmp_path / "study"), "zip", dicom_study))
    packed, plain = read_study(archive), read_study(dicom_study)
    assert packed.case_id == plain.case_id
    for contrast, volume in plain.volumes.items():
        assert np.array_equal(packed.volumes[contrast].voxels, volume.voxels)
        assert np.array_equal(packed.volumes[contrast].affine, volume.affine)


def test_a_dicomdir_stands_for_its_folder() -> None:
    folder = PYDICOM_FILES / "dicomdirtests" / "TINY_ALPHA"
    with dicom_files.dicom_files(folder / "DICOMDIR") as files:
        assert len(files) == 50


def test_missing_files_that_a_dicomdir_lists_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(PYDICOM_FILES / "dicomdirtests" / "TINY_ALPHA", tmp_path / "disc")
    with dicom_files.dicom_files(tmp_path / "disc"):
        assert caplog.text == ""
    for path in sorted((tmp_path / "disc").rglob("IM*"))[:3]:
        path.unlink()
    with dicom_files.dicom_files(tmp_path / "disc"):
        assert "3 files that its DICOMDIR lists are missing" in caplog.text


def test_a_single_file_can_be_a_study() -> None:
    with open_study(PYDICOM_FILES / "dicomdirtests" / "98892003" / "MR1" / "4919") as study:
        assert identify(study.series[0]).reason == "a localizer (name 'FAST LOCALIZER')"


def test_a_disc_of_several_patients_is_refused() -> None:
    assert "patients" in refusal(PYDICOM_FILES / "dicomdirtests" / "DICOMDIR")


def test_files_of_several_patients_are_refused_without_naming_the_patients(stack: list[Path]) -> None:
    change(stack[0], PatientID="PID-0815")
    message = refusal(stack[0].parent)
    assert "files of 2 patients (PatientID differs" in message
    assert "0815" not in message
    assert "4711" not in message


def test_patients_without_an_id_are_distinguished_by_name(stack: list[Path]) -> None:
    for path in stack:
        change(path, PatientID="")
    change(stack[0], PatientName="MUSTERMANN^ERIKA ")
    assert only_series(stack[0].parent).problems == ()
    change(stack[0], PatientName="Other^Person")
    assert "files of 2 patients (PatientName differs" in refusal(stack[0].parent)


def test_with_two_studies_one_must_be_chosen(stack: list[Path], voxels: Any, write_series: Write) -> None:
    write_series(stack[0].parent / "later", voxels + 1, STRAIGHT, StudyInstanceUID="1.2.3.4")
    assert "2 studies: 1.2.3.4 (8 files)" in refusal(stack[0].parent)
    with open_study(stack[0].parent, study_uid="1.2.3.4") as study:
        assert np.array_equal(read_series(study.series[0]).volume.voxels, voxels + 1)
    with pytest.raises(DataError, match="no study 5"), open_study(stack[0].parent, study_uid="5"):
        pass


def test_an_empty_file_next_to_images_is_refused(stack: list[Path]) -> None:
    (stack[0].parent / "IM0099").touch()
    assert "damaged: IM0099: the file is empty" in refusal(stack[0].parent)


def test_other_files_and_symlinks_out_of_the_folder_are_skipped(stack: list[Path], tmp_path: Path) -> None:
    folder = stack[0].parent
    (folder / "notes.pdf").write_bytes(b"%PDF-1.4")
    (folder / "empty.log").touch()
    outside = tmp_path / "outside.dcm"
    shutil.copy(PYDICOM_FILES / "CT_small.dcm", outside)
    (folder / "link").symlink_to(outside)
    (folder / "dangling").symlink_to(tmp_path / "nowhere")
    assert only_series(folder).problems == ()


def test_a_truncated_image_is_named(tmp_path: Path) -> None:
    shutil.copy(PYDICOM_FILES / "MR_truncated.dcm", tmp_path)
    assert "MR_truncated.dcm: cut short: the header announces 8192 bytes of voxels" in refusal(tmp_path)


@properties
@given(share=st.floats(0, 0.98))  # the rest of the file is padding
def test_an_image_truncated_anywhere_is_refused_with_a_clear_message(
    share: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = (PYDICOM_FILES / "MR_small.dcm").read_bytes()
    folder = tmp_path_factory.mktemp("cut")
    (folder / "IM1").write_bytes(content[: int(share * len(content))])
    assert refusal(folder)


@settings(derandomize=True, deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), name=st.sampled_from(["MR_small", "MR_small_RLE", "MR_small_jp2klossless"]))
def test_an_image_with_flipped_bytes_is_read_or_refused_with_a_clear_message(
    seed: int, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random = np.random.default_rng(seed)
    content = np.frombuffer((PYDICOM_FILES / f"{name}.dcm").read_bytes(), np.uint8).copy()
    where = random.integers(132, min(len(content), 1800), 4)
    content[where] = random.integers(0, 256, 4)
    folder = tmp_path_factory.mktemp("flipped")
    (folder / "IM1").write_bytes(content.tobytes())
    try:
        with open_study(folder) as study:
            for series in study.series:
                identify(series)
                read_series(series)
    except DataError as error:
        assert str(error)  # noqa: PT017 - success is allowed too


def test_a_header_that_contradicts_the_voxel_data_is_refused(stack: list[Path]) -> None:
    change(stack[2], Rows=9, NumberOfFrames=2)
    assert refusal(stack[0].parent)


@pytest.mark.parametrize("fields", [{"NumberOfFrames": 10**9}, {"Rows": 60000, "Columns": 60000}])
def test_a_small_file_that_claims_a_large_image_is_not_decoded(fields: dict[str, int], tmp_path: Path) -> None:
    shutil.copy(PYDICOM_FILES / "MR_small_RLE.dcm", tmp_path / "a")
    change(tmp_path / "a", **fields)
    assert "announces more than 1073741824 voxels or 20000 frames" in refusal(tmp_path)


def test_an_object_without_voxels_is_listed_and_not_read(tmp_path: Path) -> None:
    shutil.copy(PYDICOM_FILES / "rtplan.dcm", tmp_path)
    series = only_series(tmp_path)
    assert identify(series).reason == "modality RTPLAN, not MR"
    assert series.problems == ("it holds no image",)


@pytest.mark.parametrize("name", ["SC_rgb_rle_2frame", "liver_1frame", "rtdose", "reportsi", "CT_small", "rtstruct"])
def test_other_kinds_of_objects_are_not_contrasts(name: str, tmp_path: Path) -> None:
    shutil.copy(PYDICOM_FILES / f"{name}.dcm", tmp_path)
    with open_study(tmp_path) as study:
        assert [identify(series).contrast for series in study.series] == [None]


def test_anything_that_is_not_a_study_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert "no DICOM file among 1 file" in refusal(tmp_path)
    assert "no DICOM file among 1 file" in refusal(tmp_path / "notes.txt")
    assert "does not exist" in refusal(tmp_path / "nowhere")


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("name", ["../evil.dcm", "a/../../evil.dcm", "/etc/evil.dcm", "..\\evil.dcm", "C:\\evil.dcm"])
def test_an_archive_with_paths_outside_itself_is_refused(name: str, tmp_path: Path) -> None:
    content = (PYDICOM_FILES / "MR_small.dcm").read_bytes()
    assert "leads out of the archive" in refusal(zipped(tmp_path / "a.zip", {name: content}))


def test_an_archive_with_a_password_is_refused(tmp_path: Path) -> None:
    archive = zipped(tmp_path / "a.zip", {"a.dcm": bytes(200)})
    content = bytearray(archive.read_bytes())
    content[6] |= 1  # the encryption flag, in the local header and in the central directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    assert "protected by a password" in refusal(archive)


def test_an_archive_that_would_exhaust_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = zipped(tmp_path / "a.zip", {"a": bytes(10**6), "b": bytes(10**6)})
    monkeypatch.setattr(dicom_files, "MAX_ARCHIVE_BYTES", 10**6)
    assert "would unpack to 2000000 bytes, more than the 1000000 allowed" in refusal(archive)


def test_a_large_non_dicom_file_in_an_archive_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = (PYDICOM_FILES / "MR_small.dcm").read_bytes()
    archive = zipped(tmp_path / "a.zip", {"a.dcm": content, "zeros": bytes(10**8)})
    opened: list[str] = []
    whole = zipfile.ZipFile.read

    def noted(self: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
        opened.append(member.filename)
        return whole(self, member)

    monkeypatch.setattr(zipfile.ZipFile, "read", noted)
    only_series(archive)
    assert opened == ["a.dcm"]


@properties
@given(seed=st.integers(0, 10**6))
def test_a_damaged_archive_is_read_or_refused_with_a_clear_message(
    seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("archive")
    archive = zipped(folder / "a.zip", {"a.dcm": (PYDICOM_FILES / "MR_small.dcm").read_bytes()})
    random = np.random.default_rng(seed)
    content = np.frombuffer(archive.read_bytes(), np.uint8).copy()
    content[random.integers(0, len(content), 5)] = random.integers(0, 256, 5)
    archive.write_bytes(content.tobytes())
    try:
        with open_study(archive) as study:
            read_series(study.series[0])
    except DataError as error:
        assert str(error)  # noqa: PT017 - success is allowed too


@pytest.fixture(scope="module")
def images(dicom_study: Path) -> StudyImages:
    return read_study(dicom_study)


def test_each_of_the_four_contrasts_is_read_on_its_own_grid(images: StudyImages) -> None:
    assert [(c, choice.series.key) for c, choice in images.choices.items()] == [
        *(("t1", "2"), ("t1c", "7"), ("t2", "4/2"), ("flair", "3"))
    ]
    assert {c: image.GetSize() for c, image in images.images.items()}["flair"] == (18, 20, 12)


def test_a_case_is_written_exactly_as_it_was_read(images: StudyImages, tmp_path: Path) -> None:
    folder = write_dicom_case(tmp_path, images, case_id="one")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"one_{name}.nii.gz" for name in ("flair", "t1", "t1ce", "t2")
    ]
    written = nib.Nifti1Image.from_filename(folder / "one_flair.nii.gz")
    assert np.array_equal(np.asanyarray(written.dataobj), images.volumes["flair"].voxels)
    assert np.allclose(written.affine, images.volumes["flair"].affine, atol=1e-4)
    assert written.get_data_dtype() == np.int16


def test_itk_sees_the_written_case_where_it_sees_the_study(images: StudyImages, tmp_path: Path) -> None:
    folder = write_dicom_case(tmp_path, images, case_id="one")
    written, read = sitk.ReadImage(str(folder / "one_flair.nii.gz")), images.images["flair"]
    for corner in [(0, 0, 0), (17, 0, 0), (0, 19, 0), (0, 0, 11), (17, 19, 11)]:
        assert np.allclose(
            written.TransformIndexToPhysicalPoint(corner), read.TransformIndexToPhysicalPoint(corner), atol=1e-3
        )


def test_an_existing_case_is_not_overwritten(images: StudyImages, tmp_path: Path) -> None:
    write_dicom_case(tmp_path, images)
    with pytest.raises(DataError, match="already exists and is not overwritten"):
        write_dicom_case(tmp_path, images)
    assert [path.name for path in tmp_path.iterdir()] == [images.case_id]


@pytest.mark.parametrize("case_id", ["../out", "a/b", ".hidden", ""])
def test_an_id_that_is_not_a_valid_file_name_is_refused(case_id: str, images: StudyImages, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        write_dicom_case(tmp_path, images, case_id=case_id)
    assert list(tmp_path.iterdir()) == []


def test_no_patient_data_leaves_the_study(
    dicom_study: Path, images: StudyImages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    with open_study(dicom_study) as study:
        shown = json.dumps([series_choice.to_json(s, identify(s)) for s in study.series]) + repr(study)
    folder = write_dicom_case(tmp_path, images)
    shown += caplog.text + repr(images) + " ".join(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        header = bytes(nib.Nifti1Image.from_filename(path).header.structarr.tobytes())
        shown += header.decode("latin-1")
    assert [name for name in NAMES if name.lower() in shown.lower()] == []
