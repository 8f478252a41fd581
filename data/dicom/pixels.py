"""Decode and rescale the voxels of DICOM series (PS3.3, C.11.1), as a volume with its affine.

Padding (PS3.3, C.7.5.1.1.2) is detected in stored values, before slope and intercept are applied, and is then set to 0,
which the rest of the program takes for background.
"""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK
from pydicom.pixels.decoders.base import get_decoder

from data.dicom.files import DicomFile, quiet, text, value
from data.dicom.series import Series
from data.errors import DataError
from data.nifti import Volume

#: Attributes that make ITK rescale what it reads, in the header and in functional groups.
_RESCALING: Final = (
    "RescaleSlope",
    "RescaleIntercept",
    "RealWorldValueMappingSequence",
    "PixelValueTransformationSequence",
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """A series' voxels, with remarks about reading them."""

    volume: Volume
    notes: tuple[str, ...] = ()
    """Remarks about padding, one sentence each."""


def read_series(series: Series) -> Reading:
    """Read a series as float32, shape (columns, rows, slices), with its affine to RAS millimetres; padding becomes 0.

    Raises:
        DataError: the series is not a volume (:attr:`data.dicom.series.Series.problems`), consists of padding only, or
            cannot be decoded.
    """
    if series.problems:
        raise DataError(f"series {series.key}: {series.problems[0]}. Export it again, or choose another series.")
    voxels = np.empty(series.shape, dtype=np.float32)
    padded = np.zeros(series.shape, dtype=np.bool_)
    decoded: tuple[DicomFile, npt.NDArray[Any]] | None = None
    for place, frame in enumerate(series.frames):
        if decoded is None or decoded[0] is not frame.file:
            several = len({frame.number for frame in series.frames}) > 1
            decoded = (frame.file, _decoded(frame.file, f"series {series.key}, ", several=several))
        frames = decoded[1]
        if frame.number >= len(frames) or frames[frame.number].shape != (frame.rows, frame.columns):
            raise DataError(
                f"series {series.key}, file {frame.file.name}: its header and its voxels disagree on the number of "
                "voxels. It is damaged; export it again."
            )
        raw = frames[frame.number]
        stored = _used_bits(raw, frame.file)
        if frame.padding is not None:
            low, high = frame.padding
            marked = ((raw >= low) & (raw <= high)) | ((stored >= low) & (stored <= high))
            padded[:, :, place] = marked.T
        slope = 1.0 if frame.slope is None else frame.slope
        voxels[:, :, place] = (stored * np.float64(slope) + (frame.intercept or 0.0)).T
    if not np.isfinite(voxels).all():
        raise DataError(f"series {series.key}: holds voxels that are NaN or infinite. Export it again.")
    notes = tuple(_padding_notes(series, voxels, padded))
    voxels[padded] = 0
    return Reading(
        volume=Volume(voxels=voxels, affine=series.affine, path=Path(f"series {series.key}")),
        notes=notes,
    )


def _padding_notes(series: Series, voxels: npt.NDArray[np.float32], padded: npt.NDArray[np.bool_]) -> Iterator[str]:
    """Remarks about the padding before it is set to 0; none if it is 0 already and compression was not lossy.

    Raises:
        DataError: every voxel is padding.
    """
    ranges = sorted({frame.padding for frame in series.frames if frame.padding is not None})
    said = ", ".join(f"{low}" if low == high else f"{low} to {high}" for low, high in ranges)
    is_lossy = any(text(frame.file.header, "LossyImageCompression") == "01" for frame in series.frames)
    if is_lossy and any(limits != (0, 0) for limits in ranges):
        yield (
            f"its images were compressed with loss, which may also have changed the padding (stored values {said}): "
            "check that none of it is left"
        )
    if not np.any(voxels[padded]):
        return
    if padded.all():
        raise DataError(
            f"series {series.key}: its headers declare every voxel to be padding (stored values {said}). "
            "Choose another series, or export it again with the right Pixel Padding Value."
        )
    share = 100 * float(padded.mean())
    yield f"{share:.2g} % of its voxels are padding (stored values {said}); they were set to 0, as background"
    inside = voxels[~padded]
    zeros = int(np.count_nonzero(inside == 0))
    if zeros and inside.min() < 0 < inside.max():
        yield (
            f"its values run from {inside.min():g} to {inside.max():g}, and {zeros} voxels that are not padding are 0: "
            "they count as background too"
        )


def stored_digest(file: DicomFile) -> str:
    """Hash of a file's stored values, the same for any lossless compression; of its bytes if they cannot be decoded."""
    try:
        frames = _decoded(file, "", several=False) if file.has_voxels else None
    except DataError:
        frames = None
    if frames is not None:
        content = str(frames.shape).encode() + np.ascontiguousarray(_used_bits(frames, file)).astype("<i8").tobytes()
    else:
        with file.open() as stream:
            content = stream.read()
    return hashlib.sha256(content).hexdigest()


def _decoded(file: DicomFile, series: str, *, several: bool) -> npt.NDArray[Any]:
    """The stored values of all frames of a file, including unused bits, shape (frames, rows, columns).

    pydicom decodes everything its plugins support; ITK, which includes GDCM, is the fallback (mainly lossless JPEG).

    Args:
        file: the file to decode.
        series: prefix of the file's name in messages.
        several: whether more than one of its frames is needed; ITK is not used then.

    Raises:
        DataError: neither can decode it; the message names the transfer syntax.
    """
    where = f"{series}file {file.name}"
    syntax = file.transfer_syntax
    is_compressed = _is_compressed(syntax)
    with file.open() as stream:
        content = stream.read()
    reason = "no decoder for it is installed"
    if not is_compressed or _has_decoder(syntax):
        try:
            with quiet():
                dataset = pydicom.dcmread(io.BytesIO(content), force=True)
                if "TransferSyntaxUID" not in dataset.file_meta:
                    dataset.file_meta.TransferSyntaxUID = syntax
                dataset.pixel_array_options(correct_unused_bits=False)  # padding may use the unused bits
                pixels = np.asarray(dataset.pixel_array)
        except MemoryError:
            raise
        except Exception as error:  # decoders may raise any exception
            reason = f"{type(error).__name__}: {error}"
        else:
            return pixels if pixels.ndim == 3 else pixels[None]
    if is_compressed and not several:
        pixels_of_itk = _decoded_by_itk(content)
        if pixels_of_itk is not None:
            return pixels_of_itk
    if not is_compressed:
        raise DataError(f"{where}: its voxels cannot be read ({reason}). It is damaged; export it again.")
    raise DataError(
        f"{where}: its voxels are compressed as {syntax.name} ({syntax}) and cannot be decoded ({reason}). "
        "Install pylibjpeg with pylibjpeg-libjpeg and pylibjpeg-openjpeg, or export the study uncompressed."
    )


def _used_bits(pixels: npt.NDArray[Any], file: DicomFile) -> npt.NDArray[Any]:
    """Clear the bits above BitsStored, which may hold overlays or lack the sign extension."""
    used, size = value(file.header, "BitsStored"), 8 * pixels.dtype.itemsize
    if not isinstance(used, int) or not 0 < used < size or pixels.dtype.kind not in "iu":
        return pixels
    unused = size - used
    return np.asarray((pixels << unused) >> unused)


def _is_compressed(syntax: pydicom.uid.UID) -> bool:
    """Whether pydicom lists a transfer syntax as compressed."""
    try:
        return syntax.is_compressed
    except ValueError:  # not a transfer syntax
        return False


def _has_decoder(syntax: pydicom.uid.UID) -> bool:
    """Whether pydicom knows the transfer syntax and has a decoder plugin for it."""
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _decoded_by_itk(content: bytes) -> npt.NDArray[Any] | None:
    """Stored values as ITK reads them from a temporary copy; None if it cannot.

    Slope and intercept are removed from the copy: ITK would apply them, but padding is defined in stored values.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.dcm")
        try:
            with quiet():
                dataset = pydicom.dcmread(io.BytesIO(content), force=True)
                shared, own = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"
                for place in (dataset, *dataset.get(shared, ()), *dataset.get(own, ())):
                    for keyword in set(_RESCALING).intersection(place.dir()):
                        delattr(place, keyword)
                dataset.save_as(path)
        except MemoryError:
            raise
        except Exception:  # pydicom may raise any exception on a damaged header
            return None
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        try:
            return np.asarray(SimpleITK.GetArrayFromImage(reader.Execute()))
        except RuntimeError:
            return None
