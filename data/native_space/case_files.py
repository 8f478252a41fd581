"""Write a converted case: a BraTS 2021 case folder with its transforms and a record of the conversion.

<id>/<id>_t1.nii.gz, _t1ce, _t2, _flair, and _seg if there is a label map
<id>/transforms/<contrast>.tfm     text in ITK's format
<id>/prepare.json                  inputs, parameters, measures, versions, warnings
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy.typing as npt

from data.errors import DataError
from data.files import naming_the_place, partial_name
from data.labels import BRATS2021, CONTRASTS, Contrast, encode
from data.native_space.itk import ImageGrid
from data.native_space.to_brats import BroughtIn

_ENDINGS: Final[dict[Contrast, str]] = {"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair"}


def require_empty(out: Path) -> None:
    """Check that cases can be written to a folder.

    Raises:
        DataError: it is a file, or a folder that is not empty.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give a folder for the cases")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is not empty, and nothing in it is overwritten. Give another folder.")


def write_brats_case(brought: BroughtIn, out: Path) -> Path:
    """Write a case; its folder appears only once it is complete.

    Args:
        brought: the converted case.
        out: folder of the data set, created if missing.

    Returns:
        the case's folder.

    Raises:
        DataError: the case already exists.
        OSError: the disk is full or the folder is not writable.
    """
    with _folder_when_complete(out / brought.id) as partial:
        for contrast in CONTRASTS:
            _save(brought.images[contrast], brought.grid, partial / f"{brought.id}_{_ENDINGS[contrast]}.nii.gz")
        if brought.codes is not None:
            _save(encode(brought.codes, BRATS2021), brought.grid, partial / f"{brought.id}_seg.nii.gz")
        (partial / "transforms").mkdir()
        for contrast in CONTRASTS:
            _save_transform(brought, contrast, partial / "transforms" / f"{contrast}.tfm")
        (partial / "prepare.json").write_text(json.dumps(brought.record, indent=1) + "\n", encoding="utf-8")
    return out / brought.id


def _save(voxels: npt.NDArray[Any], grid: ImageGrid, path: Path) -> None:
    image = nib.Nifti1Image(voxels, grid.affine)
    image.set_qform(grid.affine, code=1)
    image.set_sform(grid.affine, code=1)
    image.header.set_xyzt_units("mm")
    nib.save(image, path)


def _save_transform(brought: BroughtIn, contrast: Contrast, path: Path) -> None:
    import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

    try:
        sitk.WriteTransform(brought.transform(contrast), str(path))
    except RuntimeError as error:  # the only exception type ITK raises
        raise OSError(f"{path}: the transform could not be written ({error})") from error


@contextmanager
def _folder_when_complete(place: Path) -> Iterator[Path]:
    """Yield a hidden folder to write to; it is renamed to ``place`` on success and removed on failure."""
    if place.exists():
        raise DataError(f"{place} already exists and is not overwritten. Remove it, or give another folder.")
    partial = place.with_name(partial_name(f".partial-{os.getpid()}-", place.name))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming_the_place(place):
            partial.mkdir(parents=True)
            yield partial
            partial.replace(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
