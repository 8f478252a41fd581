"""DICOM as scanners and anonymisers write it: padding, partly rescaled series, repeated UIDs, scattered series."""

from __future__ import annotations

import itertools
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813
from pydicom.data import get_testdata_file
from pydicom.uid import (
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from data.dicom.pixels import Reading, read_series
from data.dicom.segmentation import write_dicom_seg
from data.dicom.series import Series
from data.dicom.series_choice import choose_series, find, identify
from data.dicom.study import open_study, read_study
from data.errors import DataError
from data.labels import OEDEMA

Write = Callable[..., list[Path]]
Change = Callable[[pydicom.Dataset], Any]
Voxels = npt.NDArray[Any]
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, 3.0, -20], [0, 0, 0, 1]])
SPIN_T1 = {"EchoTime": 12, "RepetitionTime": 500, "ScanningSequence": "SE", "SeriesDescription": "AX T1"}
MPRAGE = {"EchoTime": 3, "RepetitionTime": 2000, "InversionTime": 900, "ScanningSequence": ["GR", "IR"]}
PAD = -2000


def series_in(path: Path) -> tuple[Series, ...]:
    with open_study(path) as study:
        return study.series


def read_only(path: Path) -> Reading:
    with open_study(path) as study:
        (series,) = study.series
        return read_series(series)


def change_all(paths: list[Path], change: Change) -> None:
    for path in paths:
        image = pydicom.dcmread(path)
        change(image)
        image.save_as(path)


def by_place(paths: list[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: float(pydicom.dcmread(path).ImagePositionPatient[2]))


def set_fields(**fields: Any) -> Change:
    def change(image: pydicom.Dataset) -> None:
        for keyword, value in fields.items():
            setattr(image, keyword, value)

    return change


@pytest.fixture
def voxels() -> Voxels:
    return np.random.default_rng(1).integers(1, 1000, (8, 10, 6))


@pytest.fixture
def padded(tmp_path: Path, voxels: Voxels, write_series: Write) -> tuple[list[Path], Voxels]:
    """A signed series whose first two columns are padding, and the voxels expected from reading it."""
    stored = voxels.copy()
    stored[:2] = PAD
    expected = voxels.copy()
    expected[:2] = 0
    paths = write_series(tmp_path / "in", stored.astype(np.int16).view(np.uint16), AFFINE, SeriesNumber=1, **SPIN_T1)
    change_all(paths, lambda image: (set_fields(PixelRepresentation=1)(image), image.add_new(0x00280120, "SS", PAD)))
    return paths, expected


def test_padding_becomes_background_and_is_reported(padded: tuple[list[Path], Voxels]) -> None:
    reading = read_only(padded[0][0].parent)
    assert np.array_equal(reading.volume.voxels, padded[1])
    assert reading.notes == ("25 % of its voxels are padding (stored values -2000); they were set to 0, as background",)


def test_a_padded_study_is_read_as_the_same_study_without_padding(
    padded: tuple[list[Path], Voxels], tmp_path: Path, write_series: Write
) -> None:
    write_series(tmp_path / "plain", padded[1], AFFINE, SeriesNumber=1, **SPIN_T1)
    plain, with_padding = read_only(tmp_path / "plain").volume, read_only(padded[0][0].parent).volume
    assert np.array_equal(plain.voxels, with_padding.voxels)
    assert np.array_equal(plain.affine, with_padding.affine)


def test_padding_is_detected_before_slope_and_intercept_are_applied(padded: tuple[list[Path], Voxels]) -> None:
    paths, expected = padded
    change_all(paths, set_fields(RescaleSlope=3, RescaleIntercept=7))
    assert np.array_equal(read_only(paths[0].parent).volume.voxels, np.where(expected == 0, 0, expected * 3 + 7))


@pytest.mark.parametrize(("vr", "value"), [("US", 63536), ("SS", -2000), ("OW", b"\x30\xf8"), ("US", [63536, 0])])
def test_a_padding_value_in_the_wrong_representation_is_understood(
    vr: str, value: Any, padded: tuple[list[Path], Voxels]
) -> None:
    paths, expected = padded
    change_all(paths, lambda image: image.add_new(0x00280120, vr, value))
    assert np.array_equal(read_only(paths[0].parent).volume.voxels, expected)


def test_a_padding_value_of_unknown_representation_is_understood(padded: tuple[list[Path], Voxels]) -> None:
    for path in padded[0]:
        content = path.read_bytes()
        known, unknown = b"\x28\x00\x20\x01SS\x02\x00", b"\x28\x00\x20\x01UN\x00\x00\x02\x00\x00\x00"
        assert content.count(known) == 1
        path.write_bytes(content.replace(known, unknown))
    assert np.array_equal(read_only(padded[0][0].parent).volume.voxels, padded[1])


@pytest.mark.parametrize(("value", "limit"), [(-2100, -1900), (-1900, -2100), (-2000, -2000)])
def test_a_padding_range_may_have_its_ends_in_either_order(
    value: int, limit: int, padded: tuple[list[Path], Voxels]
) -> None:
    paths, expected = padded
    change_all(paths, lambda image: (image.add_new(0x00280120, "SS", value), image.add_new(0x00280121, "SS", limit)))
    assert np.array_equal(read_only(paths[0].parent).volume.voxels, expected)


def test_a_padding_range_leaves_values_outside_it_unchanged(padded: tuple[list[Path], Voxels]) -> None:
    paths, expected = padded
    change_all(paths, lambda image: (image.add_new(0x00280120, "SS", -9), image.add_new(0x00280121, "SS", 499)))
    kept = np.where((expected > 0) & (expected < 500), 0, expected)
    kept[:2] = PAD
    assert np.array_equal(read_only(paths[0].parent).volume.voxels, kept)


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, ImplicitVRLittleEndian])
def test_padding_is_recognised_in_every_transfer_syntax(syntax: Any, padded: tuple[list[Path], Voxels]) -> None:
    paths, expected = padded
    for path in paths:
        image = pydicom.dcmread(path)
        if syntax.is_compressed:
            image.compress(syntax, generate_instance_uid=False)
        else:
            image.file_meta.TransferSyntaxUID = syntax
        image.save_as(path)
    assert np.array_equal(read_only(paths[0].parent).volume.voxels, expected)


def test_padding_is_recognised_in_the_stored_values_that_itk_decodes(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).integers(1, 900, (1, 16, 12)).astype(np.int16)
    stored[0, :, :3] = PAD
    image = sitk.GetImageFromArray(stored)
    for key, value in {"0008|0060": "MR", "0020|000d": "1.2.3", "0020|000e": "1.2.4"}.items():
        image.SetMetaData(key, value)
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG")
    writer.SetFileName(str(tmp_path / "image.dcm"))
    writer.Execute(image)
    dataset = pydicom.dcmread(tmp_path / "image.dcm")
    assert dataset.file_meta.TransferSyntaxUID == JPEGLosslessSV1
    set_fields(ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0], PixelSpacing=[1, 1])(dataset)
    set_fields(RescaleSlope=2, RescaleIntercept=-3)(dataset)
    dataset.add_new(0x00280120, "SS", PAD)
    dataset.save_as(tmp_path / "image.dcm")
    expected = np.where(stored[0] == PAD, 0, stored[0] * 2.0 - 3)
    assert np.array_equal(read_only(tmp_path).volume.voxels[:, :, 0], expected.T)


def test_padding_of_an_enhanced_object_is_0_at_any_slope_of_its_frames(
    enhanced: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    shutil.copy(enhanced[0] / "IM_0001", tmp_path)
    image = pydicom.dcmread(tmp_path / "IM_0001")
    pixels = image.pixel_array.copy()
    pixels[:, :, :3] = 4095
    image.PixelData = pixels.astype("<u2").tobytes()
    image.add_new(0x00280120, "US", 4095)
    image.save_as(tmp_path / "IM_0001")
    expected = enhanced[1].copy()
    expected[:3] = 0
    assert np.allclose(read_only(tmp_path).volume.voxels, expected)


@pytest.mark.parametrize(("vr", "value"), [("US", 63536), ("SS", -2000)])
def test_padding_above_the_stored_bits_is_recognised(
    vr: str, value: int, tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    stored, expected = voxels.copy(), voxels.copy()
    stored[:2], expected[:2] = 63536, 0  # exceeds the 12 bits used; its lower 12 bits would be a likely intensity
    paths = write_series(tmp_path, stored, AFFINE)
    change_all(paths, set_fields(BitsStored=12, HighBit=11))
    change_all(paths, lambda image: image.add_new(0x00280120, vr, value))
    assert np.array_equal(read_only(tmp_path).volume.voxels, expected)


def test_padding_is_recognised_in_signed_values_without_sign_extension(
    padded: tuple[list[Path], Voxels],
) -> None:
    paths, expected = padded

    def cut(image: pydicom.Dataset) -> None:
        image.BitsStored, image.HighBit = 12, 11
        image.PixelData = (np.frombuffer(image.PixelData, "<u2") & 0xFFF).tobytes()

    change_all(paths, cut)
    assert np.array_equal(read_only(paths[0].parent).volume.voxels, expected)


def test_padding_declared_in_only_some_slices_applies_to_those(padded: tuple[list[Path], Voxels]) -> None:
    paths, expected = padded
    change_all(by_place(paths)[:1], lambda image: delattr(image, "PixelPaddingValue"))
    expected[:2, :, 0] = PAD
    assert np.array_equal(read_only(paths[0].parent).volume.voxels, expected)


def test_a_padding_of_0_is_background_even_with_an_intercept(
    tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    voxels[:2], voxels[5, :4, 3] = 0, 24
    write_series(tmp_path, voxels, AFFINE, RescaleSlope=1, RescaleIntercept=-24, PixelPaddingValue=0)
    reading = read_only(tmp_path)
    assert not reading.volume.voxels[:2].any()
    assert np.array_equal(reading.volume.voxels[2:], voxels[2:] - 24)
    zeros = np.count_nonzero(voxels == 24)
    assert f"and {zeros} voxels that are not padding are 0: they count as background too" in reading.notes[1]


@pytest.mark.parametrize("value", [0, 5000])
def test_padding_that_changes_nothing_is_not_mentioned(
    value: int, tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    voxels[:2] = 0
    write_series(tmp_path, voxels, AFFINE, PixelPaddingValue=value)
    reading = read_only(tmp_path)
    assert np.array_equal(reading.volume.voxels, voxels)
    assert reading.notes == ()


def test_padding_of_lossily_compressed_images_asks_for_a_check(padded: tuple[list[Path], Voxels]) -> None:
    change_all(padded[0], set_fields(LossyImageCompression="01"))
    assert "compressed with loss, which may also have changed the padding (stored values -2000)" in str(
        read_only(padded[0][0].parent).notes
    )


def test_a_series_of_only_padding_is_refused(tmp_path: Path, voxels: Voxels, write_series: Write) -> None:
    write_series(tmp_path, voxels, AFFINE, PixelPaddingValue=0, PixelPaddingRangeLimit=4095)
    with pytest.raises(DataError, match=r"its headers declare every voxel to be padding \(stored values 0 to 4095\)"):
        read_only(tmp_path)


@pytest.fixture
def rescaled(tmp_path: Path, voxels: Voxels, write_series: Write) -> list[Path]:
    """Six slices with slope and intercept, in order of position."""
    return by_place(
        write_series(tmp_path / "in", voxels, AFFINE, RescaleSlope="3", RescaleIntercept="0", SeriesNumber=1)
    )


def test_slices_that_lack_the_slope_of_the_others_are_named(rescaled: list[Path]) -> None:
    for path in rescaled[2:4]:
        change_all([path], lambda image: (delattr(image, "RescaleSlope"), delattr(image, "RescaleIntercept")))
    names = ", ".join(sorted(path.name for path in rescaled[2:4]))
    (series,) = series_in(rescaled[0].parent)
    assert series.problems == (
        "2 of its 6 slices lack the RescaleSlope or RescaleIntercept that the others have, so their values may be on "
        f"another scale: {names}",
    )


@pytest.mark.parametrize("value", [None, ""])
@pytest.mark.parametrize("keyword", ["RescaleSlope", "RescaleIntercept"])
def test_one_empty_slope_or_intercept_is_enough_to_refuse(keyword: str, value: Any, rescaled: list[Path]) -> None:
    change_all(rescaled[:1], set_fields(**{keyword: value}))
    with pytest.raises(DataError, match=f"1 of its 6 slices lacks the {keyword} that the others have"):
        read_only(rescaled[0].parent)


def test_one_slice_with_a_slope_among_slices_without_is_refused(rescaled: list[Path]) -> None:
    change_all(rescaled[1:], lambda image: (delattr(image, "RescaleSlope"), delattr(image, "RescaleIntercept")))
    with pytest.raises(DataError, match="5 of its 6 slices lack the RescaleSlope or RescaleIntercept"):
        read_only(rescaled[0].parent)


def test_a_series_without_any_intercept_is_read(rescaled: list[Path], voxels: Voxels) -> None:
    change_all(rescaled, lambda image: delattr(image, "RescaleIntercept"))
    assert np.array_equal(read_only(rescaled[0].parent).volume.voxels, voxels * 3)


@pytest.mark.parametrize("slope", [b"0 ", b"nan ", b"3,5 ", b"inf "])
def test_a_slope_of_0_or_not_a_number_is_refused_even_if_all_slices_have_it(slope: bytes, rescaled: list[Path]) -> None:
    for path in rescaled:
        content = path.read_bytes()
        old = b"\x28\x00\x53\x10DS\x02\x003 "
        assert content.count(old) == 1
        path.write_bytes(content.replace(old, old[:6] + len(slope).to_bytes(2, "little") + slope))
    with pytest.raises(DataError, match=r"6 of its 6 slices have a RescaleSlope or .* that is not a number"):
        read_only(rescaled[0].parent)


def test_frames_that_lack_the_transformation_of_the_others_are_named(
    enhanced: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    shutil.copy(enhanced[0] / "IM_0001", tmp_path)
    image = pydicom.dcmread(tmp_path / "IM_0001")
    for number in (1, 4):
        del image.PerFrameFunctionalGroupsSequence[number].PixelValueTransformationSequence
    image.save_as(tmp_path / "IM_0001")
    with pytest.raises(DataError, match=r"2 of its 6 slices lack .*: frame 2 of IM_0001, frame 5 of IM_0001\."):
        read_only(tmp_path)


def repeat_uids(paths: list[Path], each: int) -> None:
    """Give every ``each`` neighbouring slices the same SOPInstanceUID."""
    for place, path in enumerate(by_place(paths)):
        uid = f"1.2.3.{place // each}"
        image = pydicom.dcmread(path)
        image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.UID(uid)
        image.save_as(path)


@pytest.fixture
def stack(tmp_path: Path, voxels: Voxels, write_series: Write) -> list[Path]:
    return write_series(tmp_path / "in", voxels, AFFINE, SeriesNumber=1, **SPIN_T1)


@pytest.mark.parametrize("each", [2, 6])
@pytest.mark.parametrize("way", ["folder", "zip", "DICOMDIR"])
def test_images_that_share_a_uid_are_all_kept_and_reported(
    way: str, each: int, stack: list[Path], voxels: Voxels, tmp_path: Path
) -> None:
    repeat_uids(stack, each)
    study = stack[0].parent
    if way == "zip":
        study = Path(shutil.make_archive(str(tmp_path / "study"), "zip", study))
    elif way == "DICOMDIR":
        shutil.copy(next(Path(str(get_testdata_file("MR_small.dcm"))).parent.rglob("DICOMDIR-empty.dcm")), study)
        study = (study / "DICOMDIR-empty.dcm").rename(study / "DICOMDIR")
    (series,) = series_in(study)
    assert (series.shape, series.problems) == ((8, 10, 6), ())
    assert series.notes[0].startswith("6 of its files share their SOPInstanceUID with another image")
    assert np.array_equal(read_only(study).volume.voxels, voxels)


def test_blank_slices_of_several_contrasts_with_one_uid_are_not_duplicates(
    tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    voxels[:, :, 0] = 0
    for number, echo in ((1, 12), (2, 100)):
        more = {"SeriesNumber": number, "EchoTime": echo, "SeriesInstanceUID": "1.2.9"}
        repeat_uids(write_series(tmp_path / str(number), voxels, AFFINE, **more), each=6)
    found = series_in(tmp_path)
    assert [(series.key, len(series.frames), series.problems) for series in found] == [("1", 6, ()), ("2", 6, ())]
    assert "it shares its SeriesInstanceUID with other series; they were separated by series number" in found[0].notes


def test_duplicates_among_images_that_share_a_uid_are_skipped(stack: list[Path], voxels: Voxels) -> None:
    repeat_uids(stack, each=6)
    for path in stack[:3]:
        shutil.copy(path, path.with_name(f"{path.name}-copy"))
    assert np.array_equal(read_only(stack[0].parent).volume.voxels, voxels)


def test_a_losslessly_compressed_copy_counts_as_a_duplicate(stack: list[Path], voxels: Voxels) -> None:
    for path, syntax in zip(stack, itertools.cycle([RLELossless, JPEGLSLossless, ExplicitVRLittleEndian])):
        image = pydicom.dcmread(path)
        if syntax.is_compressed:
            image.compress(syntax, generate_instance_uid=False)
        image.save_as(path.with_name(f"{path.name}-archived"))
    reading = read_only(stack[0].parent)
    assert np.array_equal(reading.volume.voxels, voxels)
    assert series_in(stack[0].parent)[0].notes == ()


def test_two_images_at_one_position_with_one_uid_are_refused_and_none_is_dropped(stack: list[Path]) -> None:
    image = pydicom.dcmread(stack[2])
    image.PixelData = bytes(len(image.PixelData))
    image.save_as(stack[2].with_name("processed"))
    (series,) = series_in(stack[0].parent)
    assert series.problems == ("1 of its 7 slices are at the same position as another one",)
    assert series.notes[0].startswith("2 of its files share their SOPInstanceUID")


def test_a_segmentation_cannot_refer_to_images_that_share_a_uid(stack: list[Path], tmp_path: Path) -> None:
    repeat_uids(stack, each=2)
    codes = np.full((8, 10, 6), OEDEMA, np.uint8)
    with open_study(stack[0].parent) as study, pytest.raises(DataError, match="6 of its files share their SOPInstance"):
        write_dicom_seg(tmp_path / "seg.dcm", codes, study.series[0], version="1")
    assert not (tmp_path / "seg.dcm").exists()


def scatter(paths: list[Path]) -> None:
    """Give every file a different SeriesInstanceUID."""
    change_all(paths, lambda image: setattr(image, "SeriesInstanceUID", pydicom.uid.generate_uid()))


def test_slices_that_are_each_a_series_are_joined_and_reported(stack: list[Path], voxels: Voxels) -> None:
    scatter(stack)
    (series,) = series_in(stack[0].parent)
    assert (series.key, series.problems, identify(series).contrast) == ("1", (), "t1")
    assert series.notes == (
        "its 6 slices have 6 SeriesInstanceUIDs: joined by series number, orientation, description, timing and frame "
        "of reference",
    )
    assert np.array_equal(read_only(stack[0].parent).volume.voxels, voxels)
    for path in stack:
        assert find([series], pydicom.dcmread(path).SeriesInstanceUID, "--t1") is series


def test_two_scattered_contrasts_without_series_numbers_are_two_volumes(
    tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    scatter(write_series(tmp_path / "a", voxels, AFFINE, **SPIN_T1))
    scatter(write_series(tmp_path / "b", voxels, AFFINE, **{**SPIN_T1, "RepetitionTime": 4000, "EchoTime": 100}))
    assert [(len(series.frames), series.problems) for series in series_in(tmp_path)] == [(6, ()), (6, ())]


def test_one_uid_per_position_with_two_echoes_makes_two_volumes(
    tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    for echo in (12, 96):
        paths = write_series(tmp_path / str(echo), voxels + echo, AFFINE, SeriesNumber=4, EchoTime=echo)
        for place, path in enumerate(by_place(paths)):
            change_all([path], set_fields(SeriesInstanceUID=f"1.2.3.{place}"))
    with open_study(tmp_path) as study:
        assert [series.key for series in study.series] == ["4/1", "4/2"]
        for series, echo in zip(study.series, (12, 96), strict=True):
            assert np.array_equal(read_series(series).volume.voxels, voxels + echo)


@pytest.mark.parametrize(
    "other",
    [{"FrameOfReferenceUID": "1.2.99"}, {"RepetitionTime": 700}, {"SeriesDescription": "AX T1 b"}, {"SeriesNumber": 2}],
)
def test_slices_of_different_acquisitions_are_not_joined(other: dict[str, Any], stack: list[Path]) -> None:
    scatter(stack)
    change_all(by_place(stack)[3:], set_fields(**other))
    assert [len(series.frames) for series in series_in(stack[0].parent)] == [3, 3]


def test_scattered_orientations_are_separate_series(
    stack: list[Path], tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    scatter([*stack, *write_series(tmp_path / "in" / "b", voxels, AFFINE[:, [0, 2, 1, 3]], SeriesNumber=1, **SPIN_T1)])
    found = series_in(tmp_path / "in")
    assert [(len(series.frames), series.volumes_in_series, series.problems) for series in found] == [(6, 1, ())] * 2


def test_complete_series_that_share_a_number_are_not_joined(
    stack: list[Path], tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    higher = AFFINE.copy()
    higher[2, 3] += 18
    write_series(tmp_path / "in" / "b", voxels, higher, SeriesNumber=1, **SPIN_T1)
    assert [len(series.frames) for series in series_in(tmp_path / "in")] == [6, 6]


def test_a_slice_missing_from_scattered_slices_is_named(stack: list[Path]) -> None:
    scatter(stack)
    by_place(stack)[2].unlink()
    assert "1 slice is missing: after slice 2 of 5" in series_in(stack[0].parent)[0].problems[0]


def test_slices_that_cannot_be_joined_are_reported_with_a_remedy(stack: list[Path]) -> None:
    scatter(stack)
    for number, path in enumerate(stack, start=1):
        change_all([path], set_fields(SeriesNumber=number))
    with pytest.raises(
        DataError, match=r"6 series hold one slice each\..*one SeriesInstanceUID, or export the study as"
    ):
        choose_series(series_in(stack[0].parent))


def test_a_segmentation_lists_each_image_under_its_original_series(stack: list[Path], tmp_path: Path) -> None:
    scatter(stack)
    headers = [pydicom.dcmread(path) for path in stack]
    with open_study(stack[0].parent) as study:
        codes = np.full((8, 10, 6), OEDEMA, np.uint8)
        write_dicom_seg(tmp_path / "seg.dcm", codes, study.series[0], version="1")
    referred = pydicom.dcmread(tmp_path / "seg.dcm").ReferencedSeriesSequence
    pairs = {
        (item.SeriesInstanceUID, image.ReferencedSOPInstanceUID)
        for item in referred
        for image in item.ReferencedInstanceSequence
    }
    assert pairs == {(header.SeriesInstanceUID, header.SOPInstanceUID) for header in headers}


DERIVED = {"ImageType": ["DERIVED", "PRIMARY", "M", "NORM", "DIS3D"]}


@pytest.mark.parametrize(
    "name", ["t1_mprage_sag", "t1_mpr_sag_p2_iso", "T1 MPRAGE recon DL", "T1 MP-RAGE", "t1_mprage_tra_reko"]
)
@pytest.mark.parametrize("kind", [DERIVED, {"ImageType": None}])
def test_a_scanners_own_reconstruction_is_not_a_reformat(
    kind: dict[str, Any], name: str, tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    write_series(tmp_path, voxels, AFFINE, **{**MPRAGE, **kind, "SeriesDescription": name})
    assert identify(series_in(tmp_path)[0]).contrast == "t1"


def code(value: str) -> pydicom.Dataset:
    item = pydicom.Dataset()
    item.CodeValue, item.CodingSchemeDesignator, item.CodeMeaning = value, "DCM", "derived"
    return item


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"ImageType": ["DERIVED", "PRIMARY", "MPR", "NORM"]}, "reformatted (ImageType DERIVED/PRIMARY/MPR/NORM)"),
        ({**DERIVED, "DerivationCodeSequence": [code("113072")]}, "reformatted (DerivationCodeSequence 113072)"),
        ({**DERIVED, "DerivationCodeSequence": [code("113078")]}, "a projection (DerivationCodeSequence 113078)"),
        ({**DERIVED, "SeriesDescription": "T1 reformatted cor"}, "reformatted (name 'T1 reformatted cor')"),
        ({"ImageType": ["DERIVED", "PRIMARY", "T1", "T1", "MAP"]}, "a map (ImageType DERIVED/PRIMARY/T1/T1/MAP)"),
    ],
)
def test_a_reformat_is_recognised_by_the_derivation_in_its_header(
    fields: dict[str, Any], reason: str, tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    write_series(tmp_path, voxels, AFFINE, **{**MPRAGE, "SeriesDescription": "t1_mprage_sag", **fields})
    finding = identify(series_in(tmp_path)[0])
    assert (finding.contrast, finding.reason) == (None, reason)


def test_a_reconstruction_is_preferred_to_its_possible_reformat(
    tmp_path: Path, voxels: Voxels, write_series: Write
) -> None:
    for number, name in enumerate(("t1_mprage_sag MPR cor", "t1_mprage_sag"), start=1):
        fields = {**MPRAGE, **DERIVED, "SeriesDescription": name, "SeriesNumber": number}
        write_series(tmp_path / str(number), voxels, AFFINE, **fields)
    series = series_in(tmp_path)
    assert choose_series(series, wanted=("t1",))["t1"].series.key == "2"
    assert "'mpr' in its name may mean a reformat" in identify(series[0]).reason


def test_an_archived_study_has_the_same_notes_as_the_study(dicom_study: Path, tmp_path: Path) -> None:
    shutil.copytree(dicom_study, tmp_path / "in")
    repeat_uids(list((tmp_path / "in" / "A" / "S3").iterdir()), each=3)
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for path in (tmp_path / "in").rglob("*"):
            archive.write(path, path.relative_to(tmp_path))
    plain, packed = read_study(tmp_path / "in"), read_study(tmp_path / "in.zip")
    assert plain.notes == packed.notes
    assert plain.notes["flair"][0].startswith("12 of its files share")
    assert np.array_equal(plain.volumes["flair"].voxels, packed.volumes["flair"].voxels)
