"""Find duplicate DICOM images by content, because anonymisers may give one SOPInstanceUID to different images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from data.dicom.files import DicomFile, quiet, text
from data.dicom.pixels import stored_digest
from data.dicom.series import frames_of


def without_copies(files: Sequence[DicomFile]) -> tuple[DicomFile, ...]:
    """The files without duplicates, in their order.

    A duplicate has the SOPInstanceUID, series, position, timing and stored values of an earlier file; compression may
    differ. Voxels are decoded only if everything else is the same.
    """
    with quiet():
        times = Counter(_uid(file) for file in files)
        alike: dict[object, list[DicomFile]] = defaultdict(list)
        for file in files:
            is_single = times[_uid(file)] == 1 or not _uid(file)
            alike[file if is_single else _all_but_voxels(file)].append(file)
        copies: set[DicomFile] = set()
        for candidates in alike.values():
            if len(candidates) > 1:
                digests = [stored_digest(file) for file in candidates]
                copies.update(file for place, file in enumerate(candidates) if digests[place] in digests[:place])
    return tuple(file for file in files if file not in copies)


def _uid(file: DicomFile) -> str:
    return text(file.header, "SOPInstanceUID")


def _all_but_voxels(file: DicomFile) -> tuple[object, ...]:
    """Key of everything that two copies of an image share besides their voxels."""
    words = (text(file.header, keyword) for keyword in ("SeriesInstanceUID", "SeriesNumber", "SeriesDescription"))
    frames = (
        (
            *(frame.rows, frame.columns, frame.position_mm, frame.directions, frame.spacing_mm),
            *(str(frame.slope), str(frame.intercept), frame.padding, frame.parts),  # as text, NaN equals itself
        )
        for frame in frames_of(file)
    )
    return (_uid(file), *words, *frames)
