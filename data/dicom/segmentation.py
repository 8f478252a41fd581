"""Write label maps as DICOM segmentations (DICOM PS3.3, A.51) on the slices of the series they were drawn on.

The three tissues are non-overlapping segments; WT, TC and ET are unions of them. Codes: necrosis and oedema from
SNOMED CT, enhancing lesion from the NCI Thesaurus, all in context group 7159 (Lesion Segmentation Types, DICOM PS3.16);
category 49755003 "Morphologically Abnormal Structure" from group 7150. Colours match those of the HTML reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import highdicom as hd
import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.sr.codedict import codes

from data.dicom.files import quiet, text
from data.dicom.series import Series
from data.errors import DataError
from data.files import replacing
from data.labels import ENHANCING, NECROSIS, OEDEMA
from data.nifti import Volume, grid_difference, in_order_of

_ALGORITHM: Final = "znormseg"
MANUFACTURER: Final = "znormseg"
#: The attribute holds at most 64 characters.
CONTENT: Final = "Brain tumour tissues. Research use only, not for diagnosis."
_SERIES_NUMBER: Final = 9000
#: Type 2 attributes: a segmentation must contain them, but they may be empty (DICOM PS3.3, C.7.1.1, C.7.2.1).
_MAY_BE_EMPTY: Final = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex"),
    *("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName"),
)

#: The program's code, label, type and CIELab colour of each segment; those present are numbered from 1 in this order.
_SEGMENTS: Final = (
    (NECROSIS, "Necrotic and non-enhancing tumour core", codes.SCT.Necrosis, (44.0, 60.0, 45.0)),
    (OEDEMA, "Oedema or invaded tissue", codes.SCT.Edema, (50.0, -5.0, -45.0)),
    (ENHANCING, "Enhancing tumour", codes.NCIt.EnhancingLesion, (90.0, -5.0, 75.0)),
)


def on_grid_of(series: Series, labels: Volume) -> npt.NDArray[np.uint8]:
    """Reorder a label map to the voxel order of a series; nothing is interpolated.

    Args:
        series: a series without problems.
        labels: a label map on the grid of the series, in any voxel order.

    Returns:
        array of shape (columns, rows, slices).

    Raises:
        DataError: the series has problems, or the label map is on another grid.
    """
    if series.problems:
        raise DataError(f"series {series.key}: {series.problems[0]}. Choose another series.")
    grid = Volume(
        voxels=np.broadcast_to(np.zeros((), dtype=np.uint8), series.shape),
        affine=series.affine,
        path=Path(f"series {series.key}"),
    )
    ordered = in_order_of(grid, labels)
    difference = grid_difference(grid, ordered)
    if difference is not None:
        raise DataError(
            f"{labels.path}: not on the grid of series {series.key}: {difference}. Use --reference to name the series "
            "it was drawn on, or resample the label map to the grid of this series."
        )
    return np.ascontiguousarray(ordered.voxels)


def write_dicom_seg(
    path: Path,
    label_codes: npt.NDArray[np.uint8],
    source: Series,
    *,
    version: str,
) -> None:
    """Write a label map as a DICOM segmentation that references its source series; the write is atomic.

    It keeps the source's study, patient and frame of reference, so that an archive files it with the images.

    Args:
        path: where to write; an existing file is replaced.
        label_codes: the program's codes (0 to 3), shape (columns, rows, slices) in the voxel order of the series.
        source: the series, without problems.
        version: version of this program.

    Raises:
        DataError: no voxel is labelled, the shape differs from that of the series, its headers lack attributes that a
            segmentation must repeat, or its images share their SOPInstanceUID with others.
    """
    if source.shared_instances:
        raise DataError(
            f"series {source.key}: {source.shared_instances} of its files share their SOPInstanceUID with another "
            "image of the study, so a segmentation cannot refer to its images. Export the study with a "
            "different SOPInstanceUID for each image, or keep the label map as NIfTI."
        )
    if label_codes.shape != source.shape:
        raise DataError(
            f"series {source.key}: its grid has {source.shape} voxels, the label map has {label_codes.shape}."
        )
    present = [segment for segment in _SEGMENTS if (label_codes == segment[0]).any()]
    if not present:
        raise DataError("the label map marks no tumour, so a segmentation would be empty.")
    numbers = np.zeros(max(NECROSIS, OEDEMA, ENHANCING) + 1, dtype=np.uint8)
    for number, (code, *_) in enumerate(present, start=1):
        numbers[code] = number
    family = codes.DCM.ArtificialIntelligence
    identification = hd.AlgorithmIdentificationSequence(name=_ALGORITHM, family=family, version=version)
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=label,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=kind,
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=identification,
            tracking_uid=hd.UID(),
            tracking_id=label,
            anatomic_regions=[codes.SCT.Brain],
            display_color=hd.color.CIELabColor(*colour),
        )
        for number, (_, label, kind, colour) in enumerate(present, start=1)
    ]
    planes = numbers[label_codes].transpose(2, 1, 0)
    try:
        with quiet():
            segmentation = hd.seg.Segmentation(
                source_images=_headers(source),
                pixel_array=np.ascontiguousarray(planes),
                segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=descriptions,
                series_instance_uid=hd.UID(),
                series_number=_SERIES_NUMBER + (source.number or 0) % 1000,
                sop_instance_uid=hd.UID(),
                instance_number=1,
                manufacturer=MANUFACTURER,
                manufacturer_model_name=_ALGORITHM,
                software_versions=version,
                device_serial_number="none",
                content_description=CONTENT,
                content_label="TUMOUR",
                series_description=f"{_ALGORITHM} {version}: tumour (research use only)",
                pixel_measures=_measures(source),
                plane_orientation=_orientation(source),
                plane_positions=[
                    hd.PlanePositionSequence(
                        coordinate_system=hd.CoordinateSystemNames.PATIENT, image_position=frame.geometry[0]
                    )
                    for frame in source.frames
                ],
            )
    except (AttributeError, KeyError, ValueError, TypeError) as error:
        raise DataError(
            f"series {source.key}: its headers do not allow a segmentation to refer to them ({error})."
        ) from error
    shared = segmentation.SharedFunctionalGroupsSequence[0]
    shared.PixelMeasuresSequence = _measures(source)  # highdicom may have copied the headers' claims
    _refer_to_frames_of_(segmentation, source)
    _refer_to_series_of_(segmentation, source)
    with replacing(path) as partial, quiet():
        segmentation.save_as(partial)


def _refer_to_frames_of_(segmentation: pydicom.Dataset, source: Series) -> None:
    """If an enhanced object holds other volumes at the same positions, keep only references to this volume's frames."""
    numbers = {frame.number + 1 for frame in source.frames}
    for frame in segmentation.PerFrameFunctionalGroupsSequence:
        for derivation in frame.get("DerivationImageSequence", []):
            derivation.SourceImageSequence = [
                image
                for image in derivation.SourceImageSequence
                if "ReferencedFrameNumber" not in image or int(image.ReferencedFrameNumber) in numbers
            ]


def _refer_to_series_of_(segmentation: pydicom.Dataset, source: Series) -> None:
    """If the source was joined from several series, list each image under its original series."""
    homes = {
        text(frame.file.header, "SOPInstanceUID"): text(frame.file.header, "SeriesInstanceUID")
        for frame in source.frames
    }
    series: dict[str, pydicom.Dataset] = {}
    for image in segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence:
        uid = homes[str(image.ReferencedSOPInstanceUID)]
        if uid not in series:
            series[uid] = pydicom.Dataset()
            series[uid].SeriesInstanceUID, series[uid].ReferencedInstanceSequence = uid, []
        series[uid].ReferencedInstanceSequence.append(image)
    segmentation.ReferencedSeriesSequence = list(series.values())


def _headers(source: Series) -> list[pydicom.Dataset]:
    """The headers to reference: one per slice, or that of the single file that holds all slices.

    Slices of a stack may differ in the last digit of their orientation, and frames of an enhanced object may each
    repeat attributes that are the same for all; here all get the first slice's values.
    """
    first = source.frames[0].file.header
    if "SharedFunctionalGroupsSequence" in first:
        shared, whole = pydicom.Dataset(), pydicom.Dataset()
        shared.update(first.SharedFunctionalGroupsSequence[0])
        shared.PlaneOrientationSequence, shared.PixelMeasuresSequence = _orientation(source), _measures(source)
        whole.update(first)
        whole.SharedFunctionalGroupsSequence = [shared]
        return [_filled_(whole)]
    headers = []
    for frame in source.frames:
        header = pydicom.Dataset()
        header.update(frame.file.header)
        header.add_new("SeriesInstanceUID", "UI", first.SeriesInstanceUID)  # highdicom requires one series
        header.ImageOrientationPatient = first.ImageOrientationPatient
        header.SliceThickness = source.slice_thickness_mm
        headers.append(_filled_(header))
    return headers


def _filled_(header: pydicom.Dataset) -> pydicom.Dataset:
    """Add the attributes that a segmentation must have, empty if de-identification removed them; re-encode as UTF-8."""
    if "SpecificCharacterSet" in header:
        header.decode()
        header.SpecificCharacterSet = "ISO_IR 192"
    for keyword in _MAY_BE_EMPTY:
        if keyword not in header:
            setattr(header, keyword, "")
    return header


def _measures(source: Series) -> hd.PixelMeasuresSequence:
    """Spacing of the slices as measured from their positions, not as stated in their headers."""
    return hd.PixelMeasuresSequence(
        pixel_spacing=source.frames[0].geometry[2],
        slice_thickness=source.slice_thickness_mm,
        spacing_between_slices=source.slice_spacing_mm,
    )


def _orientation(source: Series) -> hd.PlaneOrientationSequence:
    return hd.PlaneOrientationSequence(
        coordinate_system=hd.CoordinateSystemNames.PATIENT, image_orientation=source.frames[0].geometry[1]
    )
