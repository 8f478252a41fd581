"""Write a prepared case: a BraTS 2021 case folder with its transforms and a record of the preparation.

<id>/<id>_t1.nii.gz, _t1ce, _t2, _flair, and _seg if there is a label map
<id>/transforms/<contrast>.tfm     text in ITK's format
<id>/prepare.json                  inputs, parameters, measures, versions, warnings
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813 - SimpleITK's usual alias

from data.datasets.naming import SUFFIXES_2021
from data.errors import DataError
from data.files import folder_when_complete
from data.labels import BRATS2021, CONTRASTS, encode
from data.native_space.to_brats import BratsCase
from data.nifti import scanner_image


def require_empty(out: Path) -> None:
    """Check that cases can be written to a folder.

    Raises:
        DataError: it is a file, or a folder that is not empty.
    """
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; give a folder for the cases")
    if out.is_dir() and any(out.iterdir()):
        raise DataError(f"{out} is not empty, and nothing in it is overwritten. Give another folder.")


def write_brats_case(case: BratsCase, out: Path) -> Path:
    """Write a case; its folder appears only once it is complete.

    Args:
        case: the prepared case.
        out: folder of the data set, created if missing.

    Returns:
        the case's folder.

    Raises:
        DataError: the case already exists.
        OSError: the disk is full or the folder is not writable.
    """
    folder = out / case.id
    if folder.exists():
        raise DataError(f"{folder} already exists and is not overwritten. Remove it, or give another folder.")
    images: dict[str, npt.NDArray[Any]] = {SUFFIXES_2021[contrast]: case.images[contrast] for contrast in CONTRASTS}
    if case.codes is not None:
        images["seg"] = encode(case.codes, BRATS2021)
    with folder_when_complete(folder) as partial:
        for suffix, voxels in images.items():
            nib.save(scanner_image(voxels, case.grid.affine), partial / f"{case.id}_{suffix}.nii.gz")
        (partial / "transforms").mkdir()
        for contrast in CONTRASTS:
            path = partial / "transforms" / f"{contrast}.tfm"
            try:
                sitk.WriteTransform(case.transform(contrast), str(path))
            except RuntimeError as error:  # the only exception type ITK raises
                raise OSError(f"{path}: the transform could not be written ({error})") from error
        (partial / "prepare.json").write_text(json.dumps(case.record, indent=1) + "\n", encoding="utf-8")
    return folder
