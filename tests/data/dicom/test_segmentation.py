"""DICOM segmentations: read by another library, the lesion lies where it was drawn, and references its images."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813

from data.dicom.pixels import read_series
from data.dicom.segmentation import CONTENT, on_grid_of, write_dicom_seg
from data.dicom.series import Series
from data.dicom.series_choice import series_of
from data.dicom.study import open_study
from data.errors import DataError
from data.labels import ENHANCING, NECROSIS, OEDEMA
from data.native_space.itk import to_itk
from data.nifti import Volume, reorient

Points = set[tuple[float, float, float]]


def lesion(shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """A lesion without any symmetry: a flat box, a spike, a voxel in a corner of the volume."""
    codes = np.zeros(shape, dtype=np.uint8)
    codes[1:5, 2:4, 1:3] = OEDEMA
    codes[2, 2, 1] = NECROSIS
    codes[3:5, 2, 2:4] = ENHANCING
    codes[0, 0, -1] = OEDEMA
    return codes


@pytest.fixture(scope="module", params=["oblique", "sagittal", "enhanced"])
def source(request: pytest.FixtureRequest, dicom_study: Path, enhanced: tuple[Path, Any, Any]) -> Iterator[Series]:
    folder, name = {"oblique": (dicom_study, "4/2"), "sagittal": (dicom_study, "7"), "enhanced": (enhanced[0], "11")}[
        request.param
    ]
    with open_study(folder) as study:
        yield series_of(study.series, name)


@pytest.fixture(scope="module")
def written(source: Series, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("seg") / "seg.dcm"
    write_dicom_seg(path, lesion(source.shape), source, version="1.2.3")
    return path


def rounded(points: Any) -> Points:
    return {(float(x), float(y), float(z)) for x, y, z in (np.round(point, 2) + 0.0 for point in points)}


def image_of(source: Series) -> sitk.Image:
    volume = read_series(source).volume
    return to_itk(volume.voxels, volume.affine)


def drawn(source: Series, code: int) -> Points:
    """Physical points (LPS) of a tissue, computed by ITK from the image it was drawn on."""
    image = image_of(source)
    return rounded(
        image.TransformIndexToPhysicalPoint(voxel.tolist()) for voxel in np.argwhere(lesion(source.shape) == code)
    )


def from_raw_attributes(path: Path) -> dict[str, Points]:
    """Physical points of each segment, computed from the attributes of the file (DICOM PS3.3, C.7.6.2.1.1)."""
    dataset = pydicom.dcmread(path)
    labels = {int(item.SegmentNumber): str(item.SegmentLabel) for item in dataset.SegmentSequence}
    shared = dataset.SharedFunctionalGroupsSequence[0]
    directions = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, dtype=float)
    rows, columns = map(float, shared.PixelMeasuresSequence[0].PixelSpacing)
    found: dict[str, list[Any]] = {label: [] for label in labels.values()}
    for pixels, frame in zip(
        dataset.pixel_array.reshape(-1, dataset.Rows, dataset.Columns),
        dataset.PerFrameFunctionalGroupsSequence,
        strict=True,
    ):
        position = np.array(frame.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        segment = frame if "SegmentIdentificationSequence" in frame else shared  # shared if there is only one segment
        label = labels[int(segment.SegmentIdentificationSequence[0].ReferencedSegmentNumber)]
        for row, column in np.argwhere(pixels):
            found[label].append(position + directions[:3] * columns * column + directions[3:] * rows * row)
    return {label: rounded(points) for label, points in found.items()}


def test_each_tissue_is_where_it_was_drawn(source: Series, written: Path) -> None:
    found = from_raw_attributes(written)
    assert found["Necrotic and non-enhancing tumour core"] == drawn(source, NECROSIS)
    assert found["Oedema or invaded tissue"] == drawn(source, OEDEMA)
    assert found["Enhancing tumour"] == drawn(source, ENHANCING)


def test_a_mirrored_map_would_be_noticed(source: Series) -> None:
    image, codes = image_of(source), lesion(source.shape)
    for axis in range(3):
        mirrored = np.flip(codes, axis)
        points = rounded(image.TransformIndexToPhysicalPoint(v.tolist()) for v in np.argwhere(mirrored == OEDEMA))
        assert points != drawn(source, OEDEMA)


def test_itk_reads_the_frames_at_the_right_position(source: Series, tmp_path: Path) -> None:
    codes = np.where(lesion(source.shape) == ENHANCING, np.uint8(ENHANCING), np.uint8(0))
    write_dicom_seg(tmp_path / "seg.dcm", codes, source, version="1")
    image = sitk.ReadImage(str(tmp_path / "seg.dcm"))
    voxels = np.argwhere(sitk.GetArrayFromImage(image))[:, ::-1]
    assert rounded(image.TransformIndexToPhysicalPoint(v.tolist()) for v in voxels) == drawn(source, ENHANCING)


def test_a_segmentation_refers_to_its_images_study_and_frame_of_reference(source: Series, written: Path) -> None:
    dataset, first = pydicom.dcmread(written), source.frames[0].file.header
    series = dataset.ReferencedSeriesSequence[0]
    assert series.SeriesInstanceUID == source.uid
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == {
        frame.file.header.SOPInstanceUID for frame in source.frames
    }
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert dataset[keyword].value == first[keyword].value
    assert dataset.SeriesInstanceUID != source.uid


def test_each_frame_refers_to_its_slice(source: Series, written: Path) -> None:
    positions = {
        (str(frame.file.header.SOPInstanceUID), frame.number + 1): np.array(frame.position_mm)
        for frame in source.frames
    }
    for frame in pydicom.dcmread(written).PerFrameFunctionalGroupsSequence:
        image = frame.DerivationImageSequence[0].SourceImageSequence[0]
        key = (str(image.ReferencedSOPInstanceUID), int(image.get("ReferencedFrameNumber", 1)))
        assert np.allclose(positions[key], np.array(frame.PlanePositionSequence[0].ImagePositionPatient), atol=1e-4)


def test_the_right_one_of_two_echoes_in_an_enhanced_object_is_referenced(
    enhanced: tuple[Path, Any, Any], tmp_path: Path
) -> None:
    image = pydicom.dcmread(enhanced[0] / "IM_0001")
    directions = image.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
    del image.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence  # some scanners store it in each frame
    del image.SharedFunctionalGroupsSequence[0].MREchoSequence
    frames = []
    for echo, frame in itertools.product((10, 100), image.PerFrameFunctionalGroupsSequence):
        frames.append(copy.deepcopy(frame))
        frames[-1].PlaneOrientationSequence = copy.deepcopy(directions)
        frames[-1].MREchoSequence = [pydicom.Dataset()]
        frames[-1].MREchoSequence[0].EffectiveEchoTime = echo
    image.PerFrameFunctionalGroupsSequence, image.NumberOfFrames = frames, len(frames)
    image.PixelData *= 2
    (tmp_path / "in").mkdir()
    image.save_as(tmp_path / "in" / "a")
    with open_study(tmp_path / "in") as study:
        second = series_of(study.series, "11/2")
        write_dicom_seg(tmp_path / "seg.dcm", lesion(second.shape), second, version="1")
    for frame in pydicom.dcmread(tmp_path / "seg.dcm").PerFrameFunctionalGroupsSequence:
        images = frame.DerivationImageSequence[0].SourceImageSequence
        assert [int(one.ReferencedFrameNumber) > len(frames) // 2 for one in images] == [True]


def test_segments_are_coded_and_name_their_creator(written: Path) -> None:
    dataset = pydicom.dcmread(written)
    kinds = [item.SegmentedPropertyTypeCodeSequence[0] for item in dataset.SegmentSequence]
    assert [(kind.CodeValue, kind.CodingSchemeDesignator) for kind in kinds] == [
        ("6574001", "SCT"),
        ("79654002", "SCT"),
        ("C113842", "NCIt"),
    ]
    for item in dataset.SegmentSequence:
        algorithm = item.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("znormseg", "1.2.3")
        assert item.SegmentAlgorithmType == "AUTOMATIC"
    assert dataset.ContentDescription == CONTENT
    assert "Research use only" in CONTENT
    assert dataset.SegmentsOverlap == "NO"
    assert dataset.SegmentationType == "BINARY"


def test_spacing_is_measured_from_the_stack_and_not_read_from_the_header(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    codes = lesion((6, 7, 8))
    write_series(tmp_path / "in", codes, np.diag([-1.0, -1.0, 2.5, 1.0]), SpacingBetweenSlices=9)
    with open_study(tmp_path / "in") as study:
        write_dicom_seg(tmp_path / "seg.dcm", codes, study.series[0], version="1")
    shared = pydicom.dcmread(tmp_path / "seg.dcm").SharedFunctionalGroupsSequence[0]
    assert shared.PixelMeasuresSequence[0].SpacingBetweenSlices == 2.5


def change_all(folder: Path, change: Callable[[pydicom.Dataset], None]) -> None:
    for path in folder.iterdir():
        image = pydicom.dcmread(path)
        change(image)
        image.save_as(path)


@pytest.mark.parametrize(
    "field", ["PatientName", "PatientID", "PatientSex", "StudyDate", "StudyID", "AccessionNumber", "SliceThickness"]
)
def test_fields_removed_by_de_identification_are_written_empty(
    field: str, tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    codes = lesion((6, 7, 8))
    write_series(tmp_path / "in", codes, np.diag([-1.0, -1.0, 2.5, 1.0]))
    change_all(tmp_path / "in", lambda image: image.__delattr__(field))
    with open_study(tmp_path / "in") as study:
        write_dicom_seg(tmp_path / "seg.dcm", codes, study.series[0], version="1")
    assert pydicom.dcmread(tmp_path / "seg.dcm").get(field, "") == ""


@pytest.mark.parametrize(
    ("characters", "name"),
    [
        ("ISO_IR 100", "M\u00fcller^J\u00fcrgen"),
        ("ISO_IR 192", "\u042f\u043c\u0430\u0434\u0430^\u592a\u90ce"),
        (["", "ISO 2022 IR 87"], "Yamada^Tarou=\u5c71\u7530^\u592a\u90ce"),
    ],
)
def test_a_name_in_any_script_is_kept(
    characters: Any, name: str, tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    codes = lesion((6, 7, 8))
    more = {"SpecificCharacterSet": characters, "PatientName": name}
    write_series(tmp_path / "in", codes, np.diag([-1.0, -1.0, 2.5, 1.0]), **more)
    with open_study(tmp_path / "in") as study:
        write_dicom_seg(tmp_path / "seg.dcm", codes, study.series[0], version="1")
    assert pydicom.dcmread(tmp_path / "seg.dcm").PatientName == name


def test_images_without_a_frame_of_reference_cannot_be_referenced(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    codes = lesion((6, 7, 8))
    write_series(tmp_path / "in", codes, np.diag([-1.0, -1.0, 2.5, 1.0]))
    change_all(tmp_path / "in", lambda image: image.__delattr__("FrameOfReferenceUID"))
    with (
        open_study(tmp_path / "in") as study,
        pytest.raises(DataError, match=r"do not allow a segmentation .*Frame Of Reference"),
    ):
        write_dicom_seg(tmp_path / "seg.dcm", codes, study.series[0], version="1")
    assert not (tmp_path / "seg.dcm").exists()


def test_slice_orientations_may_differ_in_the_last_digit(
    tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    codes = lesion((6, 7, 8))
    paths = write_series(tmp_path / "in", codes, np.diag([-1.0, -1.0, 2.5, 1.0]))
    image = pydicom.dcmread(paths[0])
    image.ImageOrientationPatient = [1, 0.000001, 0, 0, 1, 0]
    image.save_as(paths[0])
    with open_study(tmp_path / "in") as study:
        write_dicom_seg(tmp_path / "seg.dcm", codes, study.series[0], version="1")
    assert (tmp_path / "seg.dcm").exists()


def test_an_absent_tissue_has_no_segment(source: Series, tmp_path: Path) -> None:
    codes = np.where(lesion(source.shape) == OEDEMA, np.uint8(OEDEMA), np.uint8(0))
    write_dicom_seg(tmp_path / "seg.dcm", codes, source, version="1")
    assert from_raw_attributes(tmp_path / "seg.dcm") == {"Oedema or invaded tissue": drawn(source, OEDEMA)}


def test_a_label_map_that_is_empty_or_of_another_shape_is_refused(source: Series, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the label map marks no tumour"):
        write_dicom_seg(tmp_path / "seg.dcm", np.zeros(source.shape, np.uint8), source, version="1")
    with pytest.raises(DataError, match="the label map has"):
        write_dicom_seg(tmp_path / "seg.dcm", np.ones((2, 2, 2), np.uint8), source, version="1")
    assert list(tmp_path.iterdir()) == []


def test_a_label_map_in_any_voxel_order_is_reoriented_to_the_series(source: Series) -> None:
    codes = lesion(source.shape)
    native = Volume(voxels=codes, affine=source.affine, path=Path("a"))
    flips = [np.s_[:: 1 - 2 * x, :: 1 - 2 * y, :: 1 - 2 * z] for x, y, z in itertools.product((0, 1), repeat=3)]
    for flip in flips:
        affine = source.affine.copy()
        for axis, part in enumerate(flip):
            if part.step == -1:
                affine[:3, 3] += affine[:3, axis] * (codes.shape[axis] - 1)
                affine[:3, axis] *= -1
        turned = Volume(voxels=codes[flip].transpose(2, 0, 1), affine=affine[:, [2, 0, 1, 3]], path=Path("a"))
        assert np.array_equal(on_grid_of(source, turned), codes)
    assert np.array_equal(on_grid_of(source, reorient(native)), codes)


def test_a_label_map_on_another_grid_is_refused(source: Series) -> None:
    affine = source.affine.copy()
    affine[0, 3] += 1
    with pytest.raises(DataError, match=r"not on the grid of series .*: the origin differs by 1\.00 mm on axis x"):
        on_grid_of(source, Volume(voxels=lesion(source.shape), affine=affine, path=Path("a")))


@pytest.mark.slow
def test_a_real_label_map_survives_the_round_trip_through_a_study(
    real_cases: Path, tmp_path: Path, write_series: Callable[..., list[Path]]
) -> None:
    case = sorted(path for path in real_cases.iterdir() if path.is_dir())[0]
    image = nib.Nifti1Image.from_filename(case / f"{case.name}_t1ce.nii.gz")
    labels = nib.Nifti1Image.from_filename(case / f"{case.name}_seg.nii.gz")
    write_series(tmp_path / "in", np.asanyarray(image.dataobj), image.affine, SeriesNumber=1)
    codes = np.asanyarray(labels.dataobj).astype(np.uint8)
    codes[codes == 4] = ENHANCING
    with open_study(tmp_path / "in") as study:
        series = study.series[0]
        assert np.array_equal(read_series(series).volume.voxels, np.asanyarray(image.dataobj))
        ordered = on_grid_of(series, Volume(voxels=codes, affine=labels.affine, path=Path("seg")))
        write_dicom_seg(tmp_path / "seg.dcm", ordered, series, version="1")
    found = from_raw_attributes(tmp_path / "seg.dcm")
    ras = nib.affines.apply_affine(labels.affine, np.argwhere(codes == ENHANCING))
    assert found["Enhancing tumour"] == rounded(ras * [-1, -1, 1])
