"""Group DICOM images into volumes: one orientation, one echo, one time point, one image per position.

Geometry follows DICOM PS3.3, C.7.6.2.1.1: the centre of the voxel in column ``i``, row ``j`` of a slice is at
``position + i * row_direction * column_spacing + j * column_direction * row_spacing`` in LPS millimetres. Slices
are sorted along the normal ``row_direction x column_direction``, as in ITK. Enhanced (multi-frame) objects store the
same attributes in functional groups (C.7.6.16).
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pydicom

from data.dicom.files import DicomFile, quiet, text, value
from data.nifti import MAX_VOXELS, VOXEL_SIZE_MM

#: Direction cosines, and spacings in mm, that differ by no more than this count as equal.
_SAME_DIRECTION: Final = 1e-3
_SAME_SPACING_MM: Final = 1e-3
#: Maximum distance of a slice from its position in an evenly spaced stack: in mm, or as a share of the spacing.
SLICE_TOLERANCE_MM: Final = 0.1
_SLICE_TOLERANCE_SHARE: Final = 0.02
#: Maximum in-plane shift of any slice relative to the first.
_IN_PLANE_TOLERANCE_MM: Final = 0.3
#: Objects with more frames are rejected.
_MOST_FRAMES: Final = 20_000
#: Maximum number of files named in a message.
_MOST_NAMES: Final = 10
#: Values of an attribute that is present but empty.
_EMPTY: Final = (None, "", b"")
_LPS_TO_RAS: Final = np.diag([-1.0, -1.0, 1.0, 1.0])

#: Attributes whose values are words, and the attribute whose values are the components of a direction.
_TYPE: Final = ("FrameType", "ImageType")
_GRADIENT: Final = ("DiffusionGradientOrientation",)

Vector = tuple[float, ...]
Part = tuple[float, ...] | tuple[str, ...]
_Item = TypeVar("_Item")


@dataclass(frozen=True, kw_only=True, eq=False)
class Frame:
    """One slice: a classic DICOM image, or one frame of an enhanced object."""

    file: DicomFile
    number: int
    """Index among the frames of its file, from 0."""
    rows: int
    columns: int
    position_mm: Vector | None
    """Centre of the first voxel, LPS; None if the header does not state it."""
    directions: Vector | None
    """Direction cosines of a row, then of a column: six numbers, LPS."""
    spacing_mm: Vector | None
    """Distance between rows, then between columns."""
    thickness_mm: float | None
    slope: float | None
    """RescaleSlope; None if the header has none, NaN if it is not a finite number."""
    intercept: float | None
    """RescaleIntercept; None and NaN as for ``slope``."""
    padding: tuple[int, int] | None
    """Lowest and highest stored value that marks padding (DICOM PS3.3, C.7.5.1.1.2); None if padding is not defined."""
    parts: tuple[Part, ...]
    """Values that may distinguish the volumes within one series, in the order of :data:`_PARTING`."""

    @property
    def geometry(self) -> tuple[Vector, Vector, Vector]:
        """Position, directions and spacing; defined only if the header states all three."""
        assert self.position_mm is not None
        assert self.directions is not None
        assert self.spacing_mm is not None
        return self.position_mm, self.directions, self.spacing_mm

    @property
    def normal(self) -> npt.NDArray[np.float64]:
        """Unit normal of the slice, LPS."""
        assert self.directions is not None
        normal = np.cross(self.directions[:3], self.directions[3:])
        return np.asarray(normal / np.linalg.norm(normal), dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """How a volume was acquired, according to its header; fields that the header lacks are None or empty."""

    modality: str = ""
    description: str = ""
    protocol: str = ""
    repetition_ms: float | None = None
    echo_ms: float | None = None
    inversion_ms: float | None = None
    scanning: tuple[str, ...] = ()
    """ScanningSequence (SE, GR, IR, EP), or its equivalent in an enhanced object."""
    variant: tuple[str, ...] = ()
    dimensions: str = ""
    """MRAcquisitionType: 2D or 3D."""
    image_type: tuple[str, ...] = ()
    derivation: tuple[str, ...] = ()
    """Codes of DerivationCodeSequence (scheme DCM): how the image was derived from others."""
    agent: str | None = None
    """ContrastBolusAgent; None if the header lacks the attribute."""
    b_value: float | None = None
    body_part: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One volume of a study."""

    key: str
    """Name on the command line: the series number, or the UID if the number is missing or ambiguous; ``/1``, ``/2`` and
    so on are appended if the series holds several volumes."""
    uid: str
    """SeriesInstanceUID; if several series were joined, that of the first slice."""
    number: int | None
    volumes_in_series: int
    frames: tuple[Frame, ...]
    """Sorted along the normal if the header states positions."""
    acquisition: Acquisition
    problems: tuple[str, ...] = ()
    """Why the series cannot be read as a volume; empty if it can."""
    notes: tuple[str, ...] = ()
    """Errors in the headers and how they were worked around, one sentence each."""
    shared_instances: int = 0
    """Number of files that share their SOPInstanceUID with another image of the study."""

    @property
    def uids(self) -> tuple[str, ...]:
        """Every SeriesInstanceUID among the slices, in slice order."""
        return tuple(dict.fromkeys(text(frame.file.header, "SeriesInstanceUID") for frame in self.frames))

    @property
    def shape(self) -> tuple[int, int, int]:
        """Columns, rows, slices."""
        first = self.frames[0]
        return (first.columns, first.rows, len(self.frames))

    @property
    def affine(self) -> npt.NDArray[np.float64]:
        """4x4 matrix from (column, row, slice) to RAS millimetres; defined only for a series without problems."""
        position, directions, spacing = self.frames[0].geometry
        affine = np.eye(4)
        affine[:3, 0] = np.array(directions[:3]) * spacing[1]
        affine[:3, 1] = np.array(directions[3:]) * spacing[0]
        affine[:3, 2] = self.frames[0].normal * self.slice_spacing_mm
        affine[:3, 3] = position
        return np.asarray(_LPS_TO_RAS @ affine, dtype=np.float64)

    @property
    def spacing_mm(self) -> tuple[float, float, float] | None:
        """Distances between columns, rows and slices; None if the header does not state them."""
        first = self.frames[0]
        if first.directions is None or first.spacing_mm is None or first.position_mm is None:
            return None
        return (first.spacing_mm[1], first.spacing_mm[0], self.slice_spacing_mm)

    @property
    def slice_spacing_mm(self) -> float:
        """Mean distance between neighbouring slices along the normal; for a single slice, its thickness."""
        first, last = self.frames[0], self.frames[-1]
        if first is last:
            return first.thickness_mm or 1.0
        return float(first.normal @ np.subtract(last.geometry[0], first.geometry[0])) / (len(self.frames) - 1)

    @property
    def slice_thickness_mm(self) -> float:
        """Thickness of a slice or, if the header lacks it, the distance between slices."""
        return self.frames[0].thickness_mm or self.slice_spacing_mm


def group(files: Iterable[DicomFile]) -> tuple[Series, ...]:
    """Split the files of a study into volumes, sorted by series number.

    One SeriesInstanceUID may cover several volumes. They are separated by series number, matrix, orientation and voxel
    size; if images still share a position, also by echo time, image type, b-value, time point and so on, until no two
    images do. Series with a single position each are joined if number, orientation, description, timing and frame of
    reference agree: Canon's classic export gives every position its own SeriesInstanceUID.
    """
    with quiet():
        return tuple(_grouped(tuple(files)))


def _grouped(files: Sequence[DicomFile]) -> Iterator[Series]:
    instances = Counter(text(file.header, "SOPInstanceUID") for file in files)
    named = {
        (_whole(group[0].file.header, "SeriesNumber"), text(group[0].file.header, "SeriesInstanceUID")): group
        for group in _joined(_by_series(files))
    }
    used, homes = Counter(number for number, _ in named), Counter(uid for _, uid in named)
    for number, uid in sorted(named, key=lambda name: (name[0] is None, name[0] or 0, name[1])):
        name = uid if number is None or used[number] > 1 else str(number)
        volumes = _volumes(named[number, uid])
        for place, frames in enumerate(volumes, start=1):
            ordered = _in_order(frames)
            uids = [text(file.header, "SOPInstanceUID") for file in {frame.file: None for frame in ordered}]
            shared = sum(bool(one) and instances[one] > 1 for one in uids)
            yield Series(
                key=name if len(volumes) == 1 else f"{name}/{place}",
                uid=uid,
                number=number,
                volumes_in_series=len(volumes),
                frames=ordered,
                acquisition=_acquisition(ordered[0]),
                problems=tuple(_problems(ordered)),
                notes=tuple(_notes(ordered, shared_instances=shared, shares_uid=bool(uid) and homes[uid] > 1)),
                shared_instances=shared,
            )


def _notes(frames: Sequence[Frame], *, shared_instances: int, shares_uid: bool) -> Iterator[str]:
    """Errors in the UIDs of the headers, and how the frames were grouped despite them."""
    series = len({text(frame.file.header, "SeriesInstanceUID") for frame in frames})
    if series > 1:
        yield (
            f"its {len(frames)} slices have {series} SeriesInstanceUIDs: joined by series number, orientation, "
            "description, timing and frame of reference"
        )
    if shares_uid:
        yield "it shares its SeriesInstanceUID with other series; they were separated by series number"
    if shared_instances:
        yield (
            f"{shared_instances} of its files share their SOPInstanceUID with another image, which an anonymiser may "
            "cause: they differ in pixels or position, so all of them are kept"
        )


def _by_series(files: Iterable[DicomFile]) -> list[list[Frame]]:
    """Frames by SeriesInstanceUID and SeriesNumber, since anonymisation may leave the same UID in all series."""
    numbered: dict[str, dict[int | None, list[Frame]]] = defaultdict(lambda: defaultdict(list))
    for file in files:
        uid, number = text(file.header, "SeriesInstanceUID"), _whole(file.header, "SeriesNumber")
        numbered[uid][number].extend(frames_of(file))
    groups: list[list[Frame]] = []
    for by_number in numbered.values():
        if len(by_number) == 2 and None in by_number:  # some files of a series lack its number
            without = by_number.pop(None)
            groups.extend([*frames, *without] for frames in by_number.values())
        else:
            groups.extend(by_number.values())
    return groups


def _joined(groups: list[list[Frame]]) -> list[list[Frame]]:
    """The groups, with those of a single position joined if their headers describe one acquisition."""
    result: list[list[Frame]] = []
    slices: dict[tuple[object, ...], list[list[Frame]]] = defaultdict(list)
    for group in groups:
        if _hold_one_place(group):
            slices[_acquired_as(group[0])].append(group)
        else:
            result.append(group)
    for alike in slices.values():
        stacks = _alike(alike, lambda first, second: _same_grid(first[0], second[0]))
        result.extend([frame for group in stack for frame in group] for stack in stacks)
    return result


def _hold_one_place(frames: Sequence[Frame]) -> bool:
    places = {_place(frame) for frame in frames}
    return len(places) == 1 and None not in places and frames[0].file.has_voxels


def _acquired_as(frame: Frame) -> tuple[object, ...]:
    """Key that slices of one acquisition share, whatever their UIDs."""
    header, how = frame.file.header, _acquisition(frame)
    return (
        _whole(header, "SeriesNumber"),
        text(header, "FrameOfReferenceUID"),
        *(how.modality, how.description, how.protocol, how.agent),
        *(how.repetition_ms, how.inversion_ms, how.scanning),
    )


def _groups_of(file: DicomFile, number: int) -> list[pydicom.Dataset]:
    """The data sets that may hold attributes of one frame, most specific first.

    These are the frame's own functional groups, those shared by all frames, and the header itself.
    """
    shared = _items(file.header, "SharedFunctionalGroupsSequence")
    own = _items(file.header, "PerFrameFunctionalGroupsSequence")
    groups = [*own[number : number + 1], *shared[:1]]
    return [*(item for group in groups for keyword in group.dir() for item in _items(group, keyword)[:1]), file.header]


def _items(dataset: pydicom.Dataset, keyword: str) -> list[pydicom.Dataset]:
    """The items of a sequence; empty if the attribute is missing or not a sequence."""
    content = value(dataset, keyword)
    return list(content) if isinstance(content, pydicom.Sequence) else []


def _value(places: Sequence[pydicom.Dataset], *keywords: str) -> Any:
    """The first readable value of the first attribute present; None if there is none."""
    return next((found for word in keywords for place in places if (found := value(place, word)) is not None), None)


def _values(places: Sequence[pydicom.Dataset], *keywords: str) -> list[Any]:
    """The value that :func:`_value` finds, as a list; empty if there is none."""
    content = _value(places, *keywords)
    if content is None:
        return []
    return list(content) if isinstance(content, (list, tuple, pydicom.multival.MultiValue)) else [content]


def _numbers(places: Sequence[pydicom.Dataset], keyword: str, *, count: int | None = None) -> Vector | None:
    """The values of an attribute as numbers; None if one is not a finite number or their count is not as required."""
    try:
        numbers = tuple(float(one) for one in _values(places, keyword))
    except (TypeError, ValueError):
        return None
    if not numbers or count not in (None, len(numbers)) or not np.isfinite(numbers).all():
        return None
    return numbers


def _number(places: Sequence[pydicom.Dataset], *keywords: str) -> float | None:
    """The first number among several attributes, or None."""
    found = (_numbers(places, keyword) for keyword in keywords)
    return next((numbers[0] for numbers in found if numbers is not None), None)


def _whole(dataset: pydicom.Dataset, keyword: str) -> int | None:
    number = _number([dataset], keyword)
    return None if number is None else int(number)


def _words(places: Sequence[pydicom.Dataset], *keywords: str) -> tuple[str, ...]:
    """The words of the first attribute present, in upper case."""
    return tuple(str(word).strip().upper() for word in _values(places, *keywords))


def frames_of(file: DicomFile) -> Iterator[Frame]:
    """Every frame of a file; an object without voxels counts as one frame."""
    rows, columns = _whole(file.header, "Rows") or 0, _whole(file.header, "Columns") or 0
    count = 1 if not file.has_voxels or _claims_too_much(file.header) else _frame_count(file.header)
    for number in range(count):
        places = _groups_of(file, number)
        yield Frame(
            file=file,
            number=number,
            rows=rows,
            columns=columns,
            position_mm=_numbers(places, "ImagePositionPatient", count=3),
            directions=_directions(_numbers(places, "ImageOrientationPatient", count=6)),
            spacing_mm=_numbers(places, "PixelSpacing", count=2),
            thickness_mm=_number(places, "SliceThickness"),
            slope=_rescaling(places, "RescaleSlope"),
            intercept=_rescaling(places, "RescaleIntercept"),
            padding=_padding(places),
            parts=tuple(_part(places, keywords) for keywords in _PARTING),
        )


def _rescaling(places: Sequence[pydicom.Dataset], keyword: str) -> float | None:
    """A slope or an intercept; None if it is missing, NaN if it is not a finite number."""
    number = _number(places, keyword)
    if number is not None:
        return number
    elements = [place.get_item(keyword) for place in places]
    return math.nan if any(element is not None and element.value not in _EMPTY for element in elements) else None


def _padding(places: Sequence[pydicom.Dataset]) -> tuple[int, int] | None:
    """Range of stored values between Pixel Padding Value and Pixel Padding Range Limit; either may be the smaller."""
    value = _stored(places, "PixelPaddingValue")
    if value is None:
        return None
    limit = _stored(places, "PixelPaddingRangeLimit")
    return (value, value) if limit is None else (min(value, limit), max(value, limit))


def _stored(places: Sequence[pydicom.Dataset], keyword: str) -> int | None:
    """A stored voxel value given in the header, with the signedness of the voxels.

    Its VR should be US or SS according to PixelRepresentation; files that mix them up (-2000 written as 63536) are
    common.
    """
    content = _value(places, keyword)
    number = float(int.from_bytes(content[:2], "little")) if isinstance(content, bytes) else _number(places, keyword)
    if number is None:
        return None
    header = places[-1]
    allocated = max(_whole(header, "BitsAllocated") or 16, 1)
    bits = min(allocated, 16) if -(2**15) <= number < 2**16 else allocated
    span = 1 << bits
    stored = int(number) % span
    return stored - span if _whole(header, "PixelRepresentation") == 1 and 2 * stored >= span else stored


def _frame_count(header: pydicom.Dataset) -> int:
    return max(_whole(header, "NumberOfFrames") or 1, 1)


def _claims_too_much(header: pydicom.Dataset) -> bool:
    """Whether a header claims more frames or voxels than are ever decoded, whatever the file's size."""
    frames = _frame_count(header)
    size = frames * (_whole(header, "Rows") or 0) * (_whole(header, "Columns") or 0)
    return frames > _MOST_FRAMES or size > MAX_VOXELS


def _directions(cosines: Vector | None) -> Vector | None:
    """Normalise the directions of rows and columns to unit length; None if they are not perpendicular."""
    if cosines is None:
        return None
    row, column = np.array(cosines[:3]), np.array(cosines[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if min(lengths) < 0.5 or abs(row @ column) > 0.01:
        return None
    return (*map(float, row / lengths[0]), *map(float, column / lengths[1]))


#: Attributes that may distinguish images at the same position, in the order in which they are tried.
_PARTING: Final = (
    ("EffectiveEchoTime", "EchoTime"),
    _TYPE,
    ("DiffusionBValue",),
    _GRADIENT,
    ("TemporalPositionIndex", "TemporalPositionIdentifier"),
    ("AcquisitionNumber",),
    ("InversionTimes", "InversionTime"),
    ("FlipAngle",),
    ("TriggerTime", "NominalCardiacTriggerDelayTime"),
    ("AcquisitionTime",),
    ("ContentTime",),
)


def _part(places: Sequence[pydicom.Dataset], keywords: tuple[str, ...]) -> Part:
    """The distinguishing value of attributes: words, a direction, or a rounded number, -1 if there is none."""
    if keywords == _TYPE:
        return _words(places, *keywords)
    if keywords == _GRADIENT:
        return _numbers(places, *keywords) or ()
    number = _number(places, *keywords)
    return (-1.0 if number is None else round(number, 2),)


def _volumes(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Split the frames of one series into volumes."""
    return [volume for kind in _alike(frames, _same_grid) for volume in _parted(kind)]


def _alike(items: Iterable[_Item], same: Callable[[_Item, _Item], bool]) -> list[list[_Item]]:
    """Group items so that ``same`` holds between the first item of a group and each of its others."""
    groups: list[list[_Item]] = []
    for item in items:
        home = next((group for group in groups if same(group[0], item)), None)
        if home is None:
            groups.append([item])
        else:
            home.append(item)
    return groups


def _same_grid(first: Frame, second: Frame) -> bool:
    """Whether two slices may belong to the same stack."""
    return (
        (first.rows, first.columns, first.file.has_voxels) == (second.rows, second.columns, second.file.has_voxels)
        and _close(first.directions, second.directions, _SAME_DIRECTION)
        and _close(first.spacing_mm, second.spacing_mm, _SAME_SPACING_MM)
        and (first.position_mm is None) == (second.position_mm is None)
    )


def _close(first: Vector | None, second: Vector | None, tolerance: float) -> bool:
    if first is None or second is None:
        return first is second
    return bool(np.abs(np.subtract(first, second)).max() <= tolerance)


def _parted(frames: list[Frame]) -> list[list[Frame]]:
    """Split frames on one grid until no two share a position, or until no attribute distinguishes them.

    An attribute can distinguish volumes only if it has no more values than there are images per position. Each slice's
    acquisition time, for example, has one value per slice, so it cannot.
    """
    most = _most_at_one_place(frames)
    if most < 2:
        return [frames]
    for part in range(len(_PARTING)):
        volumes: dict[Part, list[Frame]] = defaultdict(list)
        for frame in frames:
            volumes[frame.parts[part]].append(frame)
        if 1 < len(volumes) <= most and all(_most_at_one_place(volume) < most for volume in volumes.values()):
            return [smaller for key in sorted(volumes) for smaller in _parted(volumes[key])]
    return [frames]


def _most_at_one_place(frames: Sequence[Frame]) -> int:
    """The largest number of images that share a position."""
    places = Counter(place for frame in frames if (place := _place(frame)) is not None)
    return max(places.values(), default=0)


def _place(frame: Frame) -> Vector | None:
    """The position of a frame, rounded so that frames at the same position compare equal."""
    return None if frame.position_mm is None else tuple(round(mm, 2) for mm in frame.position_mm)


def _in_order(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """Sort frames along the normal of the first; keep their order if positions are not stated."""
    first = frames[0]
    if first.directions is None or first.position_mm is None:
        return tuple(frames)
    normal = first.normal
    return tuple(sorted(frames, key=lambda frame: float(normal @ np.array(frame.position_mm))))


def _problems(frames: Sequence[Frame]) -> Iterator[str]:
    """Reasons why the sorted frames do not form a volume."""
    if (fault := _fault_of_image(frames)) is not None:
        yield fault
        return
    yield from _rescaling_problems(frames)
    positions = np.array([frame.position_mm for frame in frames])
    if len(frames) > 1 and (fault := _fault_of_stack(positions, frames[0].normal)) is not None:
        yield fault


def _fault_of_image(frames: Sequence[Frame]) -> str | None:  # noqa: PLR0911 - one return per reason
    """Why the frames are not images with one value per voxel, known positions and a readable size; None if they are."""
    first = frames[0]
    if not first.file.has_voxels or first.rows < 1 or first.columns < 1:
        return "it holds no image"
    if first.directions is None or first.position_mm is None or first.spacing_mm is None:
        fields = "ImagePositionPatient, ImageOrientationPatient, PixelSpacing"
        return f"its header does not say where the voxels are ({fields})"
    if _whole(first.file.header, "SamplesPerPixel") not in (None, 1):
        return "it is in colour"
    if any(_claims_too_much(frame.file.header) for frame in frames if frame.number == 0):
        return f"its header announces more than {MAX_VOXELS} voxels or {_MOST_FRAMES} frames"
    if first.rows * first.columns * len(frames) > MAX_VOXELS:
        return f"{first.columns}x{first.rows}x{len(frames)} voxels, more than the {MAX_VOXELS} allowed"
    low, high = VOXEL_SIZE_MM
    if not low <= min(first.spacing_mm) <= max(first.spacing_mm) <= high:
        return f"voxels of {first.spacing_mm[1]:g}x{first.spacing_mm[0]:g} mm; allowed are {low:g} to {high:g} mm"
    return None


def _rescaling_problems(frames: Sequence[Frame]) -> Iterator[str]:
    """Reasons why the slices' values cannot be converted to one scale."""
    keywords = ("RescaleSlope", "RescaleIntercept")
    given = [(frame.slope, frame.intercept) for frame in frames]
    partly = [place for place in (0, 1) if 0 < sum(pair[place] is None for pair in given) < len(frames)]
    without = [frame for frame, pair in zip(frames, given, strict=True) if any(pair[place] is None for place in partly)]
    if without:
        lack = "lacks" if len(without) == 1 else "lack"
        yield (
            f"{len(without)} of its {len(frames)} slices {lack} the {' or '.join(keywords[place] for place in partly)} "
            f"that the others have, so their values may be on another scale: {_named(without)}"
        )
    broken = [
        frame
        for frame, pair in zip(frames, given, strict=True)
        if pair[0] == 0 or any(number is not None and math.isnan(number) for number in pair)
    ]
    if broken:
        yield (
            f"{len(broken)} of its {len(frames)} slices have a RescaleSlope or RescaleIntercept that is not a number, "
            f"or a slope of 0: {_named(broken)}"
        )


def _named(frames: Sequence[Frame]) -> str:
    """Names of the frames' files, with the frame number if a file holds several."""
    names = sorted(
        frame.file.name if _frame_count(frame.file.header) == 1 else f"frame {frame.number + 1} of {frame.file.name}"
        for frame in frames
    )
    more = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _fault_of_stack(positions: npt.NDArray[np.float64], normal: npt.NDArray[np.float64]) -> str | None:
    """Why slices at these sorted positions are not evenly spaced; None if they are."""
    along = positions @ normal
    gaps = np.diff(along)
    usual = float(np.median(gaps))
    tolerance = max(SLICE_TOLERANCE_MM, _SLICE_TOLERANCE_SHARE * usual)
    same = int(np.count_nonzero(gaps <= min(tolerance, 0.5 * usual) if usual > 0.01 else gaps <= 0.01))
    if same:
        return f"{same} of its {len(positions)} slices are at the same position as another one"
    shift = positions - positions[0] - np.outer(along - along[0], normal)
    most = float(np.linalg.norm(shift, axis=1).max())
    if most > _IN_PLANE_TOLERANCE_MM:
        return f"its slices are shifted in plane by up to {most:.1f} mm (a tilted gantry, or parts of several stacks)"
    times = gaps / usual
    holes = np.flatnonzero(np.rint(times) > 1)
    if len(holes) and np.abs(gaps - np.rint(times) * usual).max() <= 2 * tolerance:
        lost = int((np.rint(times[holes]) - 1).sum())
        return (
            f"{lost} {'slice is' if lost == 1 else 'slices are'} missing: after slice {int(holes[0]) + 1} of "
            f"{len(positions)} the next is {gaps[holes[0]]:.2f} mm away instead of {usual:.2f} mm"
        )
    even = along[0] + np.arange(len(along)) * (along[-1] - along[0]) / (len(along) - 1)
    if np.abs(along - even).max() > tolerance:
        return f"its slices are not evenly spaced: {gaps.min():.2f} to {gaps.max():.2f} mm apart"
    return None


def _acquisition(frame: Frame) -> Acquisition:
    """Read from the header how a frame was acquired."""
    header = frame.file.header
    places = _groups_of(frame.file, frame.number)
    agents = _items(header, "ContrastBolusAgentSequence")
    derivations = (item for place in places for item in _items(place, "DerivationCodeSequence"))
    agent = _value([header, *agents], "ContrastBolusAgent")
    agent = (_value(agents, "CodeMeaning") or "given") if agent is None and agents else agent
    return Acquisition(
        modality=text(header, "Modality"),
        description=_line(text(header, "SeriesDescription")),
        protocol=_line(text(header, "ProtocolName")),
        repetition_ms=_number(places, "RepetitionTime"),
        echo_ms=_number(places, "EffectiveEchoTime", "EchoTime"),
        inversion_ms=_number(places, "InversionTimes", "InversionTime"),
        scanning=_words(places, "ScanningSequence") or tuple(_scanning_of_enhanced(places)),
        variant=_words(places, "SequenceVariant"),
        dimensions=(_words(places, "MRAcquisitionType") or ("",))[0],
        image_type=_words(places, *_TYPE),
        derivation=tuple(text(one, "CodeValue") for one in derivations if text(one, "CodingSchemeDesignator") == "DCM"),
        agent=None if agent is None else str(agent).strip(),
        b_value=_number(places, "DiffusionBValue"),
        body_part=text(header, "BodyPartExamined").upper(),
    )


def _line(content: str) -> str:
    """Convert text to a single line without control characters, which a terminal might interpret."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in content).split())


def _scanning_of_enhanced(places: Sequence[pydicom.Dataset]) -> Iterator[str]:
    """The equivalent of ScanningSequence in enhanced objects."""
    pulse = _value(places, "EchoPulseSequence")
    if pulse in ("SPIN", "BOTH"):
        yield "SE"
    if pulse in ("GRADIENT", "BOTH"):
        yield "GR"
    if _value(places, "InversionRecovery") == "YES":
        yield "IR"
    if _value(places, "EchoPlanarPulseSequence") == "YES":
        yield "EP"
