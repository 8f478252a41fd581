"""Write phantoms as files: case names, and folders that appear only once complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy.typing as npt

from data.errors import DataError
from data.files import folder_when_complete
from data.labels import BRATS2021, BRATS2023, Contrast, LabelConvention, encode
from data.phantoms.make import Phantom, check_arguments, make_phantom


@dataclass(frozen=True, kw_only=True)
class _Naming:
    """The file names and label numbers of one year of BraTS."""

    case: str
    """Name of a case, to be formatted with its index."""
    file: str
    """Name of a file, to be formatted with the case and the ending."""
    endings: dict[Contrast, str]
    convention: LabelConvention


_NAMINGS: Final = {
    2021: _Naming(
        case="BraTS2021_{:05d}",
        file="{}_{}.nii.gz",
        endings={"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair"},
        convention=BRATS2021,
    ),
    2023: _Naming(
        case="BraTS-GLI-{:05d}-000",
        file="{}-{}.nii.gz",
        endings={"t1": "t1n", "t1c": "t1c", "t2": "t2w", "flair": "t2f"},
        convention=BRATS2023,
    ),
}


def case_name(index: int, year: int) -> str:
    """Name of a case in the style of BraTS of that year.

    Args:
        index: number of the case, 0 to 99999.
        year: 2021 or 2023.

    Returns:
        the name, which is also the name of the case's folder.

    Raises:
        DataError: an argument is out of range.

    Example:
        >>> case_name(7, 2021), case_name(7, 2023)
        ('BraTS2021_00007', 'BraTS-GLI-00007-000')
    """
    check_arguments(index=index)
    return _naming(year).case.format(index)


def _naming(year: int) -> _Naming:
    if year not in _NAMINGS:
        raise DataError(f"year is {year}; allowed are 2021 and 2023. Choose one of these naming schemes.")
    return _NAMINGS[year]


def write_phantom(folder: Path, index: int, *, seed: int = 0, spacing_mm: float = 2.0, year: int = 2021) -> Path:
    """Make one case and write it as compressed NIfTI; its folder appears only once it is complete.

    Args:
        folder: folder of the data set, created if missing.
        index: number of the case, 0 to 99999.
        seed: number of the series, 0 or more (default 0).
        spacing_mm: edge of a voxel, 0.5 to 8 mm (default 2).
        year: 2021 or 2023 (default 2021); determines names and label numbers, not voxels.

    Returns:
        the case's folder, with five files.

    Raises:
        DataError: an argument is out of range, or the case already exists.
    """
    check_arguments(index=index, seed=seed, spacing_mm=spacing_mm)
    case = case_name(index, year)
    _refuse_overwriting(folder, case)
    phantom = make_phantom(index, seed=seed, spacing_mm=spacing_mm)
    with folder_when_complete(folder / case) as partial:
        _write_files(phantom, partial, case, _naming(year))
        _refuse_overwriting(folder, case)
    return folder / case


def write_phantoms(
    folder: Path,
    count: int,
    *,
    seed: int = 0,
    spacing_mm: float = 2.0,
    year: int = 2021,
    on_case: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Make the cases 0 to ``count`` - 1 and write them; a case does not depend on ``count``.

    Args:
        folder: folder of the data set, created if missing.
        count: number of cases, 1 or more.
        seed: number of the series, 0 or more (default 0).
        spacing_mm: edge of a voxel, 0.5 to 8 mm (default 2).
        year: 2021 or 2023 (default 2021).
        on_case: called with each case's folder once it is written (default None).

    Returns:
        the folders of the cases, in order.

    Raises:
        DataError: an argument is out of range, or one of the cases already exists; nothing is written then.
    """
    if count < 1:
        raise DataError(f"count is {count}; allowed is 1 or more. Ask for at least one case.")
    check_arguments(index=count - 1, seed=seed, spacing_mm=spacing_mm)
    for index in range(count):
        _refuse_overwriting(folder, case_name(index, year))
    written = []
    for index in range(count):
        written.append(write_phantom(folder, index, seed=seed, spacing_mm=spacing_mm, year=year))
        if on_case is not None:
            on_case(written[-1])
    return written


def _refuse_overwriting(folder: Path, case: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder} is a file, but phantoms are written to a folder. Choose another place.")
    if (folder / case).exists():
        raise DataError(f"{folder / case} already exists and is not overwritten. Remove it or choose another folder.")


def _write_files(phantom: Phantom, folder: Path, case: str, naming: _Naming) -> None:
    volumes: dict[str, npt.NDArray[Any]] = {
        **{ending: phantom.images[contrast] for contrast, ending in naming.endings.items()},
        "seg": encode(phantom.codes, naming.convention),
    }
    for ending, volume in volumes.items():
        image = nib.Nifti1Image(volume, phantom.affine)
        # qform codes as in the released BraTS files: 2 for images, 1 for label maps; their sform code is 1.
        image.set_qform(phantom.affine, code=1 if ending == "seg" else 2)
        image.set_sform(phantom.affine, code=1)
        image.header.set_xyzt_units("mm")
        nib.save(image, folder / naming.file.format(case, ending))
