"""Voxels of DICOM series: decoded, rescaled (DICOM PS3.3, C.11.1), as a volume with its affine or as an ITK image."""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pydicom
import SimpleITK
from pydicom.pixels.decoders.base import get_decoder

from data.dicom_files import DicomFile, quiet
from data.dicom_series import Series
from data.errors import DataError
from data.nifti import Volume

_RAS_TO_LPS: Final = np.diag([-1.0, -1.0, 1.0])


def read_volume_of(series: Series) -> Volume:
    """Voxels of a series as float32, shape (columns, rows, slices), with the affine to RAS millimetres.

    Raises:
        DataError: the series is no volume (:attr:`data.dicom_series.Series.problems`), or its voxels cannot be decoded.
    """
    if series.problems:
        raise DataError(f"series {series.key}: {series.problems[0]}. Export it again, or choose another series.")
    voxels = np.empty(series.shape, dtype=np.float32)
    decoded: tuple[DicomFile, _Decoded] | None = None
    for place, frame in enumerate(series.frames):
        if decoded is None or decoded[0] is not frame.file:
            decoded = (frame.file, _decode(frame.file, series))
        stored = decoded[1].frames
        if frame.number >= len(stored) or stored[frame.number].shape != (frame.rows, frame.columns):
            raise DataError(
                f"series {series.key}, file {frame.file.name}: its header and its voxels disagree on how many there "
                "are. It is damaged; export it again."
            )
        slope, intercept = (1.0, 0.0) if decoded[1].is_rescaled else (frame.slope, frame.intercept)
        voxels[:, :, place] = (stored[frame.number] * np.float64(slope) + intercept).T
    if not np.isfinite(voxels).all():
        raise DataError(f"series {series.key}: holds voxels that are NaN or infinite. Export it again.")
    return Volume(voxels=voxels, affine=series.affine, path=Path(f"series {series.key}"))


def read_series(series: Series) -> SimpleITK.Image:
    """The same as an ITK image (LPS), float32.

    Raises:
        DataError: as :func:`read_volume_of`.
    """
    return to_image(read_volume_of(series))


def to_image(volume: Volume) -> SimpleITK.Image:
    """A volume as an ITK image: every voxel at the same physical point, LPS instead of RAS."""
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume.voxels.transpose(2, 1, 0)))
    spacing = np.array(volume.spacing_mm)
    image.SetSpacing([float(mm) for mm in spacing])
    image.SetOrigin([float(mm) for mm in _RAS_TO_LPS @ volume.affine[:3, 3]])
    image.SetDirection([float(c) for c in (_RAS_TO_LPS @ volume.affine[:3, :3] / spacing).ravel()])
    return image


class _Decoded:
    """Voxels of one file, shape (frames, rows, columns)."""

    def __init__(self, frames: npt.NDArray[Any], *, is_rescaled: bool = False) -> None:
        self.frames = frames
        self.is_rescaled = is_rescaled
        """Slope and intercept are in already."""


def _decode(file: DicomFile, series: Series) -> _Decoded:
    """The stored values of all frames of a file.

    pydicom decodes what its plugins can; ITK, whose build carries GDCM, the rest (JPEG lossless above all).

    Raises:
        DataError: neither can; the message names the transfer syntax.
    """
    where = f"series {series.key}, file {file.name}"
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
                pixels = np.asarray(dataset.pixel_array)
        except MemoryError:
            raise
        except Exception as error:  # decoders raise what they like
            reason = f"{type(error).__name__}: {error}"
        else:
            return _Decoded(pixels if pixels.ndim == 3 else pixels[None])
    if is_compressed and len({frame.number for frame in series.frames}) == 1:
        rescaled = _decoded_by_itk(content)
        if rescaled is not None:
            return _Decoded(rescaled, is_rescaled=True)
    if not is_compressed:
        raise DataError(f"{where}: its voxels cannot be read ({reason}). It is damaged; export it again.")
    raise DataError(
        f"{where}: its voxels are compressed as {syntax.name} ({syntax}) and cannot be decoded ({reason}). "
        "Install pylibjpeg with pylibjpeg-libjpeg and pylibjpeg-openjpeg, or export the study uncompressed."
    )


def _is_compressed(syntax: pydicom.uid.UID) -> bool:
    """Whether a transfer syntax is known to be a compressed one."""
    try:
        return syntax.is_compressed
    except ValueError:  # no transfer syntax at all
        return False


def _has_decoder(syntax: pydicom.uid.UID) -> bool:
    """Whether pydicom knows the transfer syntax and has a plugin for it."""
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:
        return False


def _decoded_by_itk(content: bytes) -> npt.NDArray[Any] | None:
    """Rescaled voxels as ITK reads them from a file of its own, which is removed at once; None where it cannot."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image.dcm")
        path.write_bytes(content)
        reader = SimpleITK.ImageFileReader()
        reader.SetImageIO("GDCMImageIO")
        reader.SetFileName(str(path))
        try:
            return np.asarray(SimpleITK.GetArrayFromImage(reader.Execute()))
        except RuntimeError:
            return None
