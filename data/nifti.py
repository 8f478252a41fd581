"""Read NIfTI volumes and write label maps, with strict checks of their geometry.

A volume is read with its affine and checked before its voxels are loaded; a label map is written on exactly the grid
of a reference file: same shape, affine, qform and sform with their codes, units and zooms.
"""

from __future__ import annotations

import gzip
import logging
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, TypeVar

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel import orientations
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.volumeutils import apply_read_scaling
from nibabel.wrapstruct import WrapStructError
from zlib_ng import gzip_ng, zlib_ng

from data.background import clean_background
from data.errors import DataError
from data.files import replacing
from data.filesystem import has_no_mapping, in_words

#: The program's logger.
LOG: Final = logging.getLogger("znormseg")
Spacing = tuple[float, float, float]
_Number = TypeVar("_Number", bound=np.generic)

NIFTI_ENDINGS: Final = (".nii.gz", ".nii")
#: Voxel order inside the program: x increases to the patient's left, y to posterior, z to superior, as in BraTS files.
CANONICAL_AXES: Final = ("L", "P", "S")
#: Larger volumes (1024 voxels along each axis) are rejected before memory is allocated.
MAX_VOXELS: Final = 1024**3
#: Grids whose corners all agree within this many millimetres are the same grid.
GRID_TOLERANCE_MM: Final = 0.01
#: The sform and qform of a header contradict each other if they place a corner further apart than this.
FORM_TOLERANCE_MM: Final = 1.0
#: Maximum number of bytes that one compressed byte can expand to (zlib's documentation: a factor of 1032).
_MOST_BYTES_PER_BYTE: Final = 1032
#: Voxels are decompressed and converted in pieces of this size, so that a piece stays in the CPU cache for both steps.
_PIECE_BYTES: Final = 1 << 18
#: zlib-ng level for label maps: files no larger than zlib's at its own level 6, in a fraction of the time.
_COMPRESSION_LEVEL: Final = 6
_ZLIB_NG_ERROR: Final[type[Exception]] = zlib_ng.error  # type: ignore[assignment]  # its stub calls it an instance
#: Voxel sizes in mm outside this range indicate a wrong unit, not a scan.
VOXEL_SIZE_MM: Final = (0.05, 50.0)
#: The integer that represents a share of 1 in :func:`write_shares`.
SHARE_STEPS: Final = 65535
#: Label values this close to a whole number are rounded to it.
LABEL_TOLERANCE: Final = 0.01
#: Maximum number of values listed in a message.
_MOST_SHOWN: Final = 6
#: Written to the description field of every header, which holds 79 characters.
_RESEARCH_ONLY: Final = b"Research use only; not a medical device."
#: Relative difference allowed between pixdim and the affine's voxel size, because both are stored in single precision.
_PIXDIM_TOLERANCE: Final = 1e-4
#: An affine counts as sheared if the cosine between two of its axes exceeds this.
SHEAR_TOLERANCE: Final = 0.01


@dataclass(frozen=True, kw_only=True)
class Volume:
    """Voxels and the affine that places them in space.

    ``voxels`` has shape (X, Y, Z); ``affine`` is the 4x4 matrix from voxel index to RAS millimetres.
    """

    voxels: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    path: Path
    zeroed: int = 0
    """Number of voxels that were NaN or infinite in the file and have been set to 0."""
    doubt: str | None = None
    """Describes an ambiguity of the header's geometry; None if there is none."""
    pixdim_mm: Spacing | None = None
    """The header's own voxel size (pixdim) if it differs from the affine's, which is the one in use; else None. Set
    only for label maps, because other programs measure with it."""
    background: str | None = None
    """Describes the background of an image if it was not 0 in the file; else None."""
    rounded: str | None = None
    """Describes the values of a label map that were not whole numbers in the file; None if all were."""

    @property
    def spacing_mm(self) -> Spacing:
        """Voxel size along each array axis in mm."""
        return spacing_of(self.affine)


def spacing_of(affine: npt.NDArray[np.float64]) -> Spacing:
    """Voxel size in mm along each array axis: the length of the affine's columns.

    Example:
        >>> spacing_of(np.diag([-2.0, -1.0, 3.0, 1.0]))
        (2.0, 1.0, 3.0)
    """
    x, y, z = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return (float(x), float(y), float(z))


def voxel_order(affine: npt.NDArray[np.float64]) -> str:
    """Axis codes of a grid: the direction in which each array axis points.

    Example:
        >>> voxel_order(np.diag([-2.0, -1.0, 3.0, 1.0]))
        'LPS'
    """
    return "".join(str(letter) for letter in nib.aff2axcodes(affine))


def canonical_spacing(affine: npt.NDArray[np.float64]) -> Spacing:
    """Voxel size in mm along the program's axes (left, posterior, superior) of a grid in any voxel order."""
    spacing = [0.0, 0.0, 0.0]
    for own_axis, (axis, _) in zip(spacing_of(affine), orientations.io_orientation(affine), strict=True):
        spacing[int(axis)] = own_axis
    return (spacing[0], spacing[1], spacing[2])


def strip_nifti_ending(name: str) -> str | None:
    """File name without ``.nii`` or ``.nii.gz`` (case-insensitive), or None if it ends in neither.

    Example:
        >>> strip_nifti_ending("a_t1.NII.gz")
        'a_t1'
    """
    for ending in NIFTI_ENDINGS:
        if name.lower().endswith(ending):
            return name[: -len(ending)]
    return None


def nifti_files(folder: Path) -> list[Path]:
    """NIfTI files of one folder, sorted; hidden files, including the ``._`` files of macOS, are left out.

    Broken symlinks are included so that they can be reported.
    """
    return sorted(
        p
        for p in folder.iterdir()
        if not p.name.startswith(".") and strip_nifti_ending(p.name) and (p.is_file() or not p.exists())
    )


def voxel_count(path: Path) -> int:
    """Number of voxels in one volume of a file, from its header only.

    Raises:
        DataError: the header cannot be read.
    """
    with _reading(path):
        return math.prod(int(n) for n in _open(path).shape[:3])


def read_volume(path: Path, volume: int | None = None, *, nan_to_zero: bool = False) -> Volume:
    """Read one image as float32, scaled by the header's slope and intercept.

    Args:
        path: a 3D NIfTI file (``.nii`` or ``.nii.gz``); a trailing axis of length one is dropped.
        volume: index from 0 of the volume in a 4D file; None for a 3D file.
        nan_to_zero: set voxels that are NaN or infinite to 0 instead of rejecting the file.

    Returns:
        the volume in the file's own voxel order.

    Raises:
        DataError: the file is missing, damaged, not NIfTI, not 3D, not real-valued, too large, sheared, or contains
            NaN or infinity.
    """
    with _reading(path):
        image, shape = _checked(path, volume)
        voxels = _voxels(image, path, volume, np.float32).reshape(shape)
    zeroed = 0
    if not _always_finite(image) and not np.isfinite(voxels).all():
        bad = ~np.isfinite(voxels)
        zeroed = int(np.count_nonzero(bad))
        if not nan_to_zero:
            raise DataError(
                f"{path}: {zeroed} voxels are NaN or infinite. Repair the file, leave the case out, or take them as 0 "
                "with --nan-to-zero."
            )
        voxels = np.where(bad, np.float32(0), voxels)
    affine = _affine(image, path)
    return Volume(voxels=voxels, affine=affine, path=path, zeroed=zeroed, doubt=_geometry_doubt(image, affine, shape))


def read_image(path: Path, volume: int | None = None, *, nan_to_zero: bool = False) -> Volume:
    """Read one contrast like :func:`read_volume` and set its background to 0 (see :mod:`data.background`).

    Args:
        path: as for :func:`read_volume`.
        volume: as for :func:`read_volume`.
        nan_to_zero: as for :func:`read_volume`.

    Returns:
        the volume; its ``background`` describes what was set to 0.

    Raises:
        DataError: see :func:`read_volume`.
    """
    return with_clean_background(read_volume(path, volume, nan_to_zero=nan_to_zero))


def with_clean_background(image: Volume) -> Volume:
    """The image with its background set to 0 (see :mod:`data.background`)."""
    cleaned = clean_background(image.voxels)
    return image if cleaned is None else replace(image, voxels=cleaned.voxels, background=cleaned.sentence)


def read_label_map(path: Path, *, log: bool = True) -> Volume:
    """Read a label map with the file's own numbers, as uint8; whole numbers stored as floats are accepted.

    Numbers within :data:`LABEL_TOLERANCE` of a whole number are rounded, since some editors store bytes with a slope.

    Args:
        path: a 3D NIfTI file.
        log: warn about rounded values, once per file; pass False if the caller reports them.

    Raises:
        DataError: as raised by :func:`read_volume`; also if values are not whole numbers from 0 to 255.
    """
    with _reading(path):
        image, shape = _checked(path)
        bytes_only = image.get_data_dtype() == np.uint8 and _is_unscaled(image)
        stored = _voxels(image, path, None, np.uint8).reshape(shape) if bytes_only else None
    affine = _affine(image, path)
    pixdim_mm = _other_pixdim(image, affine)
    if stored is not None:  # without a detour through float32
        return Volume(voxels=stored, affine=affine, path=path, pixdim_mm=pixdim_mm)
    volume = read_volume(path, nan_to_zero=True)
    if volume.zeroed:
        raise DataError(f"{path}: {volume.zeroed} voxels are NaN or infinite. Repair the label map.")
    with np.errstate(invalid="ignore"):  # out-of-range values wrap around, so the comparison below finds them
        labels = volume.voxels.astype(np.uint8)
    if np.array_equal(labels, volume.voxels):
        return Volume(voxels=labels, affine=volume.affine, path=path, pixdim_mm=pixdim_mm)
    labels, rounded = _rounded(volume.voxels, path)
    if log:
        _warn_once(f"{path}: {rounded}")
    return Volume(voxels=labels, affine=volume.affine, path=path, pixdim_mm=pixdim_mm, rounded=rounded)


def _rounded(voxels: npt.NDArray[np.float32], path: Path) -> tuple[npt.NDArray[np.uint8], str]:
    """Round to the nearest whole numbers and describe the change; reject values that are not close to one."""
    values = np.unique(voxels)
    whole = np.clip(np.rint(values), 0, 255)
    off = np.abs(values - whole) > LABEL_TOLERANCE
    if off.any():
        raise DataError(
            f"{path}: label values must be whole numbers from 0 to 255; this file has {_some(values[off])}. Is it an "
            "image? If a label map was interpolated or saved with a scale, save it again as whole numbers (UINT8, "
            f"slope 1; nearest neighbour). Values are rounded only within {LABEL_TOLERANCE:g} of a whole number."
        )
    near = values != whole
    labels: npt.NDArray[np.uint8] = np.clip(np.rint(voxels), 0, 255).astype(np.uint8)
    return labels, f"label values {_some(values[near])} were rounded to {_some(np.unique(whole[near]))}"


def _some(values: npt.NDArray[np.float32]) -> str:
    """Lists the first few values, comma-separated, with the number of the others."""
    shown = [f"{value:.7g}" for value in values[:_MOST_SHOWN]]
    return ", ".join(shown) + (f" and {values.size - _MOST_SHOWN} more" if values.size > _MOST_SHOWN else "")


@cache
def _warn_once(sentence: str) -> None:
    LOG.warning("%s", sentence)


def read_grid(path: Path, volume: int | None = None) -> tuple[tuple[int, int, int], npt.NDArray[np.float64]]:
    """Shape and affine from the header only, of a 3D file or of one volume of a 4D file.

    Raises:
        DataError: as raised by :func:`read_volume`, except for faults that only the voxels reveal.
    """
    with _reading(path):
        image = _open(path)
        return _shape_3d(image, path, volume), _affine(image, path)


def reorient(volume: Volume) -> Volume:
    """Return the volume in the program's voxel order (LPS): axes are swapped and flipped, nothing is interpolated."""
    own, canonical = orientations.io_orientation(volume.affine), orientations.axcodes2ornt(CANONICAL_AXES)
    to_canonical = orientations.ornt_transform(own, canonical)
    affine = volume.affine @ orientations.inv_ornt_aff(to_canonical, volume.voxels.shape)
    voxels = orientations.apply_orientation(volume.voxels, to_canonical)
    return replace(volume, voxels=np.ascontiguousarray(voxels), affine=affine, doubt=None)


def axial_positions_mm(
    native_affine: npt.NDArray[np.float64], canonical_shape: tuple[int, int, int], part: slice, count: int
) -> tuple[float, ...]:
    """Return the position along the superior axis, in mm of the file's world space, of the borders of axial slices.

    Args:
        native_affine: affine of the file.
        canonical_shape: shape of the volume in the program's voxel order.
        part: slices of that volume.
        count: number of slices into which ``part`` is divided.

    Returns:
        ``count`` + 1 positions, at the middle of the volume, from the feet to the head.

    Example:
        >>> axial_positions_mm(np.diag([-1.0, -1.0, 2.0, 1.0]), (9, 9, 8), slice(2, 6), 2)
        (3.0, 7.0, 11.0)
    """
    own, canonical = orientations.io_orientation(native_affine), orientations.axcodes2ornt(CANONICAL_AXES)
    to_canonical = orientations.ornt_transform(own, canonical)
    native_shape = tuple(canonical_shape[int(axis)] for axis in to_canonical[:, 0])
    affine = native_affine @ orientations.inv_ornt_aff(to_canonical, native_shape)
    x, y = ((side - 1) / 2 for side in canonical_shape[:2])
    borders = np.linspace(part.start - 0.5, part.stop - 0.5, count + 1)
    return tuple(float((affine @ [x, y, border, 1.0])[2]) for border in borders)


def in_order_of(reference: Volume, volume: Volume) -> Volume:
    """Return the volume with its axes in the reference's order; nothing is interpolated.

    Reorienting both to canonical order is not enough: on a grid rotated by 45 degrees, rounding decides which axis is
    which.
    """
    frame = reference.affine @ np.diag([-1.0, -1.0, 1.0, 1.0])  # here the reference's own axes point to L, P and S
    seen = reorient(replace(volume, affine=np.linalg.inv(frame) @ volume.affine))
    return replace(seen, affine=frame @ seen.affine)


def to_native_order(canonical: npt.NDArray[_Number], native_affine: npt.NDArray[np.float64]) -> npt.NDArray[_Number]:
    """Undo :func:`reorient` for an array: convert it from the program's voxel order to that of ``native_affine``."""
    back = orientations.ornt_transform(
        orientations.axcodes2ornt(CANONICAL_AXES), orientations.io_orientation(native_affine)
    )
    return np.ascontiguousarray(orientations.apply_orientation(canonical, back))


def grid_difference(first: Volume, second: Volume) -> str | None:
    """Describe how two grids differ, or return None if they agree.

    Grids agree if their shapes are equal and every corner agrees within :data:`GRID_TOLERANCE_MM`.
    """
    if first.voxels.shape != second.voxels.shape:
        return f"shape {_times(first.voxels.shape)} against {_times(second.voxels.shape)} voxels"
    shape = first.voxels.shape
    corners = _corners(shape)
    gaps = ((first.affine - second.affine) @ corners)[:3]
    if np.abs(gaps).max() <= GRID_TOLERANCE_MM:
        return None
    axis, corner = np.unravel_index(np.abs(gaps).argmax(), gaps.shape)
    origin_mm = first.affine[:3, 3] - second.affine[:3, 3]
    kind = "the origin differs" if np.allclose(gaps, origin_mm[:, None], atol=GRID_TOLERANCE_MM) else "the grids differ"
    name = ("x (right-left)", "y (anterior-posterior)", "z (inferior-superior)")[axis]
    return f"{kind} by {abs(gaps[axis, corner]):.2f} mm on axis {name}"


def write_label_map(path: Path, labels: npt.NDArray[np.uint8], reference: Path) -> None:
    """Write a label map on the grid of a reference file, atomically.

    Args:
        path: where to write (``.nii`` or ``.nii.gz``); an existing file is replaced.
        labels: uint8, shape (X, Y, Z) in the reference's own voxel order.
        reference: the NIfTI file whose affine, qform, sform, their codes, units and zooms are copied; for a 4D
            file, those of its spatial axes.

    Raises:
        DataError: the reference cannot be read, or its shape differs from that of ``labels``.
        OSError: the disk is full or the folder cannot be written to.
    """
    _write_like(path, np.ascontiguousarray(labels, dtype=np.uint8), reference, b"znormseg label map. " + _RESEARCH_ONLY)


def write_shares(path: Path, shares: npt.NDArray[np.uint16], reference: Path, *, what: str) -> None:
    """Write numbers from 0 to 1 on the grid of a reference file, atomically.

    They are stored as 16-bit integers, which readers multiply by the header's slope, 1/65535. NIfTI has no 16-bit
    floats; float32 takes twice the space, and far more when compressed, for digits without meaning.

    Args:
        path: where to write (``.nii`` or ``.nii.gz``); an existing file is replaced.
        shares: 65535ths, shape (X, Y, Z, volumes), in the reference's own voxel order.
        reference: the NIfTI file whose affine, qform, sform, their codes, units and zooms are copied.
        what: description of the content for the header; ASCII only.

    Raises:
        DataError, OSError: see :func:`write_label_map`.
    """
    description = f"znormseg {what}. ".encode() + _RESEARCH_ONLY
    _write_like(path, np.ascontiguousarray(shares), reference, description, slope=1 / SHARE_STEPS)


def write_image(path: Path, voxels: npt.NDArray[np.float32], reference: Path) -> None:
    """Write one volume, or several in one 4D file, on the grid of a reference file, atomically.

    Voxels are stored as 16-bit integers if all values fit, else as float32; reading them returns ``voxels`` exactly.

    Args:
        path: where to write (``.nii`` or ``.nii.gz``); an existing file is replaced.
        voxels: shape (X, Y, Z) or (X, Y, Z, volumes), in the reference's own voxel order.
        reference: the NIfTI file whose affine, qform, sform, their codes, units and zooms are copied.

    Raises:
        DataError, OSError: see :func:`write_label_map`.
    """
    _write_like(path, in_16_bits(voxels), reference, b"")


def in_16_bits(voxels: npt.NDArray[np.float32]) -> npt.NDArray[np.int16] | npt.NDArray[np.float32]:
    """The same values as 16-bit integers if all fit, else the array itself."""
    with np.errstate(invalid="ignore"):
        whole = voxels.astype(np.int16)
    return whole if np.array_equal(whole, voxels) else voxels


def scanner_image(voxels: npt.NDArray[Any], affine: npt.NDArray[np.float64]) -> nib.Nifti1Image:
    """An image in scanner coordinates: qform and sform with code 1, millimetres."""
    image = nib.Nifti1Image(voxels, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    image.header.set_xyzt_units("mm")
    return image


def _write_like(
    path: Path, voxels: npt.NDArray[Any], reference: Path, description: bytes, *, slope: float | None = None
) -> None:
    """Write voxels in their own dtype on the grid of a reference file, with an optional slope in the header."""
    with _reading(reference):
        image = _open(reference)
        shape = _shape_3d(image, reference, 0 if len(image.shape) == 4 else None)
    if shape != voxels.shape[:3]:
        raise DataError(
            f"{reference}: its grid has {_times(shape)} voxels, the array to be written {_times(voxels.shape)}"
        )
    header = image.header.copy()
    header.extensions.clear()  # they may contain patient data, and they describe the reference image
    header.set_data_dtype(voxels.dtype)
    header.set_data_shape(voxels.shape)
    header.set_intent("none")
    header["cal_min"], header["cal_max"] = 0, 0
    header["descrip"] = description
    header["aux_file"] = b""
    kind: Any = nib.Nifti2Image if isinstance(image.header, nib.Nifti2Header) else nib.Nifti1Image
    result = kind(voxels, image.affine, header)
    if slope is not None:
        result.header.set_slope_inter(slope, 0)  # with an explicit slope, nibabel writes the voxels unscaled
    result.header["pixdim"] = image.header["pixdim"]  # nibabel sets the unused entries to 1
    if voxels.ndim > 3:
        result.header["pixdim"][4] = 1.0  # ITK rejects a spacing of 0 between volumes
    with replacing(path) as partial:
        if path.name.lower().endswith(".nii.gz"):
            partial.write_bytes(gzip_ng.compress(result.to_bytes(), _COMPRESSION_LEVEL, mtime=0))
        else:
            nib.save(result, partial)


def _open(path: Path) -> Any:
    """Open a file with nibabel and check its header; the voxels are not read yet."""
    if path.is_dir():
        raise DataError(f"{path}: a folder, not a NIfTI file. Give the file.")
    if not path.exists():
        raise DataError(f"{path}: no such file. Check the name.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty. Copy or convert it again.")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: no permission to read it. Grant it to this user, or leave the case out.")
    try:
        image = nib.load(path) if name_misleads(path) is None else _by_content(path)
    except (ImageFileError, HeaderDataError, EOFError, zlib.error, _ZLIB_NG_ERROR, OSError) as error:
        _reject_other_type(path)
        if isinstance(error, ImageFileError):
            with path.open("rb"):  # raises the system's error if nibabel hid it
                raise
        raise
    if isinstance(image, nib.Cifti2Image) or _claims_cifti(image):
        raise DataError(f"{path}: a CIFTI file (surfaces and greyordinates), not a volume. Export the volume as NIfTI.")
    if not isinstance(image, nib.Nifti1Pair):
        raise DataError(f"{path}: a {type(image).__name__}, not a NIfTI volume. Convert it to .nii.gz first.")
    return image


#: First bytes of other file types that occur under the names .nii and .nii.gz.
_FOREIGN: Final = (
    (b"PK\x03\x04", "a ZIP archive", "Unpack it"),
    (b"BZh", "a bzip2 file", "Unpack it, or compress it with gzip"),
    (b"\xfd7zXZ", "an xz file", "Unpack it, or compress it with gzip"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "Unpack it, or compress it with gzip"),
    (b"\x1f\x9d", "a file of Unix compress (.Z)", "Unpack it, or compress it with gzip"),
    (b"version https://git-lfs", "a pointer of Git LFS", "Fetch the image with git lfs pull"),
    (b"/annex/objects/", "a pointer of git-annex", "Fetch the image with git annex get, or datalad get"),
    (b"<", "a web page or XML", "Download the image again; the server may have required a login"),
    (b"NRRD", "an NRRD file", "Convert it to .nii.gz"),
    (b"\x89HDF", "an HDF5 (MINC) file", "Convert it to .nii.gz"),
)


def name_misleads(path: Path) -> str | None:
    """Describe the format of a NIfTI file whose name contradicts its content; such a file is read by its content.

    Raises:
        OSError: the file cannot be opened.
    """
    if strip_nifti_ending(path.name) is None or is_compressed(path) == path.name.lower().endswith(".gz"):
        return None
    if is_compressed(path):
        return "compressed by gzip, though its name does not end in .gz"
    with path.open("rb") as file:
        return "not compressed, though its name ends in .gz" if _header_size(file.read(4)) is not None else None


def is_compressed(path: Path) -> bool:
    """Whether the content is compressed with gzip, whatever the file's name."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def _header_size(start: bytes) -> int | None:
    """The header size in the first four bytes: 348 (NIfTI-1) or 540 (NIfTI-2) in either byte order; else None."""
    sizes = (int.from_bytes(start, order) for order in ("little", "big"))
    return next((size for size in sizes if size in (348, 540)), None)


def _by_content(path: Path) -> Any:
    """Open a file whose name misleads nibabel; its voxels are read through :func:`_opened`."""
    with _opened(path) as stream:
        size = _header_size(stream.read(4))
        if size is None:
            raise ImageFileError("no NIfTI header at its beginning")
        stream.seek(0)
        kind: Any = nib.Nifti2Image if size == 540 else nib.Nifti1Image
        try:
            return kind.from_stream(stream)
        except WrapStructError as error:
            raise EOFError("the header is cut short") from error


def _opened(path: Path) -> Any:
    """A stream of the file's content, decompressed if necessary."""
    return gzip_ng.open(path) if is_compressed(path) else path.open("rb")


def _reject_other_type(path: Path) -> None:
    """Reject a file of another type and name the type; return if the file is damaged or of unknown type."""
    try:
        with _opened(path) as stream:
            start = stream.read(132)
    except (EOFError, zlib.error, _ZLIB_NG_ERROR, OSError):
        return
    if start[:2] == b"\x1f\x8b":
        raise DataError(f"{path}: compressed twice. Unpack it once (gunzip).")
    for sign, what, remedy in _FOREIGN:
        if start.lstrip().startswith(sign):
            raise DataError(f"{path}: {what}, not NIfTI. {remedy}.")
    if start[128:132] == b"DICM":
        raise DataError(f"{path}: a DICOM file, not NIfTI. Convert it, for instance with znormseg data dicom.")


def _checked(path: Path, volume: int | None = None) -> tuple[Any, tuple[int, int, int]]:
    """Open a file, check that it is large enough for the voxels its header claims, and return it with its shape."""
    image = _open(path)
    shape = _shape_3d(image, path, volume)
    _require_bytes(path, math.prod(image.shape) * image.get_data_dtype().itemsize)
    return image, shape


def _claims_cifti(image: Any) -> bool:
    """Whether the header's intent is a CIFTI one; nibabel does not check this in compressed files."""
    return isinstance(image, nib.Nifti1Pair) and 3000 <= int(image.header["intent_code"]) < 3100


def _always_finite(image: Any) -> bool:
    """Whether no voxel can be NaN or infinite: true of unscaled integers, all of which fit into float32."""
    return image.get_data_dtype().kind in "iu" and _is_unscaled(image)


def _is_unscaled(image: Any) -> bool:
    return (image.dataobj.slope, image.dataobj.inter) == (1, 0)


def _voxels(image: Any, path: Path, volume: int | None, dtype: type[_Number]) -> npt.NDArray[_Number]:
    """The scaled voxels of a 3D file or of one volume; for a compressed file, the checksum is verified too."""
    part = ... if volume is None else (..., volume)
    if not is_compressed(path) or not isinstance(image, nib.Nifti1Image):
        if name_misleads(path) is None:
            return _scaled(image.dataobj, part, dtype)
        with path.open("rb") as plain:
            return _scaled(type(image).from_stream(plain).dataobj, part, dtype)
    with gzip_ng.open(path) as stream:
        if volume is None:
            voxels = _unpacked(stream, image.dataobj, dtype)
        else:
            voxels = _scaled(type(image).from_stream(stream).dataobj, part, dtype)
        _read_to_end(stream)
    return voxels


def _scaled(stored: Any, part: Any, dtype: type[_Number]) -> npt.NDArray[_Number]:
    """Voxels in a dtype; the other volumes of a 4D file are not loaded."""
    voxels = _mapped_or_read(stored) if part is ... else np.asanyarray(stored[part])
    return voxels.astype(dtype, copy=dtype is np.uint8)  # an image may stay a memory map, a label map must not


def _mapped_or_read(stored: Any) -> npt.NDArray[Any]:
    """Scaled voxels of an uncompressed file: memory-mapped by nibabel, or read if the file system cannot map files."""
    try:
        return np.asanyarray(stored)
    except OSError as error:
        if not has_no_mapping(error):
            raise
    described = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
    return np.asanyarray(type(stored)(stored.file_like, described, mmap=False))


def _unpacked(stream: gzip_ng.GzipNGFile, stored: Any, dtype: type[_Number]) -> npt.NDArray[_Number]:
    """Read and scale voxels piece by piece, with the result nibabel would give for the whole array.

    No more than one piece is held in the file's own dtype.

    Args:
        stream: positioned at the start of a NIfTI file.
        stored: nibabel's proxy of the voxels: offset, dtype, shape, slope and intercept.
        dtype: dtype of the result.
    """
    _skip(stream, stored.offset)
    slope, intercept = np.asanyarray(stored.slope), np.asanyarray(stored.inter)
    voxels = np.empty(math.prod(stored.shape), dtype=dtype)
    piece = np.empty(max(1, _PIECE_BYTES // stored.dtype.itemsize), dtype=stored.dtype)
    buffer = memoryview(piece.view(np.uint8).data)
    for start in range(0, voxels.size, piece.size):
        count = min(piece.size, voxels.size - start)
        read = _fill(stream, buffer[: count * piece.itemsize])
        if read < count * piece.itemsize:
            raise EOFError(f"{voxels.size} voxels expected, but the file ends after {start + read // piece.itemsize}")
        scaled = apply_read_scaling(piece[:count], slope, intercept)
        wide = dtype if scaled.dtype == dtype else np.promote_types(scaled.dtype, np.float32)
        voxels[start : start + count] = scaled.astype(wide, copy=False)
    return voxels.reshape(stored.shape, order="F")


def _skip(stream: gzip_ng.GzipNGFile, count: int) -> None:
    """Skip bytes in pieces: a damaged header may claim an offset larger than memory."""
    while count > 0:
        skipped = len(stream.read(min(count, _PIECE_BYTES)))
        if not skipped:
            raise EOFError("the file ends before the voxels")
        count -= skipped


def _fill(stream: gzip_ng.GzipNGFile, buffer: memoryview) -> int:
    """Read until the buffer is full or the stream ends; return the number of bytes read."""
    read = 0
    while read < len(buffer):
        got = stream.readinto(buffer[read:])
        if not got:
            break
        read += got
    return read


def _read_to_end(stream: gzip_ng.GzipNGFile) -> None:
    """Read the rest of a stream: gzip verifies its checksum only at the end, which may be after the voxels."""
    while stream.read(1 << 20):
        pass


def _shape_3d(image: Any, path: Path, volume: int | None = None) -> tuple[int, int, int]:
    """The three spatial sizes; a DataError if the file is not a real-valued 3D volume of allowed size."""
    shape = tuple(int(n) for n in image.shape)
    if volume is not None:
        if len(shape) != 4 or volume >= shape[3]:
            raise DataError(
                f"{path}: {len(shape)}D with shape {_times(shape)}; volume {volume} (from 0) of a 4D file is needed. "
                "Does the data set's description match its files?"
            )
        shape = shape[:3]
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3 or min(shape) < 1:
        raise DataError(
            f"{path}: {len(shape)}D with shape {_times(shape)}; a single 3D volume is needed. Split it first."
        )
    dtype = image.get_data_dtype()
    if dtype.kind not in "iuf":
        raise DataError(f"{path}: voxels of type {dtype}; a real-valued grey-scale volume is needed. Convert it first.")
    if np.prod(np.array(shape, dtype=np.float64)) > MAX_VOXELS:
        raise DataError(
            f"{path}: the header claims {_times(shape)} voxels, more than the {MAX_VOXELS} allowed. It is damaged, or "
            "the volume must be resampled to fewer voxels."
        )
    return (shape[0], shape[1], shape[2])


def _require_bytes(path: Path, claimed: int) -> None:
    """Reject a file too small for the bytes its header claims, before memory is allocated for them."""
    size = path.stat().st_size
    most = size * _MOST_BYTES_PER_BYTE if is_compressed(path) else size
    if claimed > most:
        raise DataError(
            f"{path}: damaged or cut short: the header claims {claimed} bytes of voxels, but the file can hold {most} "
            "at most. Copy or download it again."
        )


def _affine(image: Any, path: Path) -> npt.NDArray[np.float64]:
    """The affine in use (sform, else qform, else zooms); rejected if it is singular, out of range or sheared."""
    affine = np.asarray(image.affine, dtype=np.float64)
    linear = affine[:3, :3]
    # No head is larger than a kilometre, and larger numbers would overflow.
    if not (np.abs(affine) < 1e6).all() or abs(np.linalg.det(linear)) < 1e-12:
        raise DataError(f"{path}: the affine is not invertible, so voxels have no position. Convert the file again.")
    smallest, largest = min(spacing_of(affine)), max(spacing_of(affine))
    low, high = VOXEL_SIZE_MM
    if not low <= smallest <= largest <= high:
        raise DataError(
            f"{path}: voxels of {smallest:g} to {largest:g} mm; allowed are {low:g} to {high:g} mm. "
            "Is the affine in metres or micrometres? Convert it to mm."
        )
    unit = linear / np.linalg.norm(linear, axis=0)
    shear = np.abs(unit.T @ unit - np.eye(3)).max()
    if shear > SHEAR_TOLERANCE:
        raise DataError(
            f"{path}: the affine is sheared (cosine {shear:.3f} between axes). Resample to a right-angled grid."
        )
    return affine


def _geometry_doubt(image: Any, affine: npt.NDArray[np.float64], shape: tuple[int, ...]) -> str | None:
    """Describe an ambiguity in where the header places the voxels, or return None."""
    if not int(image.header["sform_code"]):
        if int(image.header["qform_code"]):
            return None
        return "its header has neither sform nor qform; nibabel had to assume which side is left"
    if not int(image.header["qform_code"]):
        return None
    with np.errstate(all="ignore"):
        try:
            gaps = ((image.header.get_qform() - affine) @ _corners(shape))[:3]
        except (ValueError, ArithmeticError, HeaderDataError):
            return "its qform is invalid; the sform was used"
        gap = np.sqrt((gaps**2).sum(axis=0)).max()
    if gap <= FORM_TOLERANCE_MM:
        return None
    return f"its sform and qform are up to {gap:.3g} mm apart; the sform was used"


def _other_pixdim(image: Any, affine: npt.NDArray[np.float64]) -> Spacing | None:
    """The header's voxel size (pixdim) if it is finite and differs from the affine's; else None."""
    x, y, z = (float(edge) for edge in image.header.get_zooms()[:3])
    own_mm, used_mm = np.array([x, y, z]), np.array(spacing_of(affine))
    if not np.isfinite(own_mm).all():
        return None
    same = bool((np.abs(own_mm - used_mm) <= _PIXDIM_TOLERANCE * used_mm).all())
    return None if same else (x, y, z)


def _corners(shape: tuple[int, ...]) -> npt.NDArray[np.int_]:
    """The corners of a grid as columns of homogeneous voxel indices."""
    return np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])]).T


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert exceptions of nibabel, gzip and the system about a bad file to a DataError that names the file."""
    try:
        # Impossible headers and values beyond float32 are rejected later; numpy's warnings would only be noise.
        with np.errstate(all="ignore"):
            yield
    except DataError:
        raise
    except (EOFError, zlib.error, _ZLIB_NG_ERROR, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: damaged or cut short ({error}). Copy or download it again.") from error
    except (ImageFileError, HeaderDataError, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # a system error; gzip's own have no number
            raise DataError(f"{path}: cannot be read: {in_words(error)}") from error
        raise DataError(
            f"{path}: cannot be read as NIfTI ({error}). Check that it is a .nii or .nii.gz file."
        ) from error


def _times(shape: tuple[int, ...]) -> str:
    """Formats a shape, such as 240x240x155."""
    return "x".join(str(n) for n in shape)
