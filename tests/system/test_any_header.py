"""Headers that no scanner ever wrote: a file is either read or refused by name."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from data.errors import DataError
from data.nifti import grid_difference, read_grid, read_label_map, read_volume, reorient, write_label_map

a_thousand = settings(
    max_examples=500,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SHAPE = (3, 4, 5)


@cache
def whole_file(kind: str, endian: str) -> bytes:
    """A good file of 60 voxels: NIfTI-1 or -2, of either byte order."""
    image_class: Any = nib.Nifti1Image if kind == "1" else nib.Nifti2Image
    voxels = np.arange(60, dtype=f"{endian}f4").reshape(SHAPE)
    header = image_class.header_class(endianness=endian)
    header.set_data_dtype(np.float32)
    image = image_class(voxels, np.diag([-1.0, -1.0, 2.0, 1.0]), header)
    content: bytes = image.to_bytes()
    return content


kinds = st.tuples(st.sampled_from("12"), st.sampled_from("<>"))
damages = st.lists(st.tuples(st.integers(0, 560), st.integers(0, 255)), min_size=1, max_size=12)


def read_or_refused(path: Path, read: Callable[[Path], Any]) -> Any:
    """What was read, or None where the file was refused by its name."""
    try:
        return read(path)
    except DataError as error:
        reason = str(error)
    assert reason.startswith(f"{path}: ")
    return None


def use(path: Path, folder: Path) -> None:
    """Do with a file all that the program does."""
    read_or_refused(path, read_grid)
    read_or_refused(path, read_label_map)
    volume = read_or_refused(path, lambda p: read_volume(p, nan_to_zero=True))
    if volume is not None:
        assert np.isfinite(volume.voxels).all()
        assert grid_difference(volume, volume) is None
        reorient(volume)
        write_label_map(folder / "out.nii.gz", np.zeros(volume.voxels.shape, dtype=np.uint8), path)
        assert read_label_map(folder / "out.nii.gz").voxels.shape == volume.voxels.shape


@a_thousand
@example(kind=("2", "<"), damage=[(439, 96)], length=None, ending=".nii")  # an affine of 1e200
@example(kind=("2", ">"), damage=[(168, 1)], length=None, ending=".nii.gz")  # voxels 72 petabytes into the file
@given(kind=kinds, damage=damages, length=st.none() | st.integers(0, 900), ending=st.sampled_from([".nii", ".nii.gz"]))
def test_any_header_bytes_are_read_or_refused_naming_the_file(
    tmp_path: Path, kind: tuple[str, str], damage: list[tuple[int, int]], length: int | None, ending: str
) -> None:
    content = bytearray(whole_file(*kind))
    for place, value in damage:
        content[place] = value
    path = tmp_path / f"any{ending}"
    path.write_bytes(gzip.compress(content[:length]) if ending.endswith("gz") else content[:length])
    use(path, tmp_path)


NUMBERS = st.sampled_from(
    [0.0, -0.0, 1.0, -1.0, 1e-45, 1e30, 3.4e38, -3.4e38, float("inf"), float("-inf"), float("nan")]
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "dim": st.lists(st.sampled_from([-32768, -1, 0, 1, 2, 3, 4, 5, 7, 8, 32767]), min_size=8, max_size=8),
    "datatype": st.sampled_from(
        [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, 9999]
    ),
    "bitpix": st.sampled_from([-1, 0, 1, 8, 16, 32, 64, 128]),
    "pixdim": st.lists(NUMBERS, min_size=8, max_size=8),
    "vox_offset": st.sampled_from([0, 1, 351, 352, 353, 544, 560, 1000, 1e9]),
    "scl_slope": NUMBERS,
    "scl_inter": NUMBERS,
    "xyzt_units": st.integers(0, 255),
    "qform_code": st.integers(-1, 6),
    "sform_code": st.integers(-1, 6),
    "quatern_b": NUMBERS,
    "quatern_c": NUMBERS,
    "quatern_d": NUMBERS,
    "qoffset_x": NUMBERS,
    "srow_x": st.lists(NUMBERS, min_size=4, max_size=4),
    "srow_y": st.lists(NUMBERS, min_size=4, max_size=4),
    "intent_code": st.sampled_from([0, 1, 1007, 1011, 2001, 3001, 3006, 9999]),
    "sizeof_hdr": st.sampled_from([0, 348, 540, -1]),
}
changes = st.dictionaries(st.sampled_from(list(FIELDS)), st.none(), min_size=1, max_size=5).flatmap(
    lambda chosen: st.fixed_dictionaries({name: FIELDS[name] for name in chosen})
)


@a_thousand
@given(kind=kinds, change=changes, ending=st.sampled_from([".nii", ".nii.gz"]))
@example(kind=("1", "<"), change={"dim": [3, 30000, 30000, 30000, 1, 1, 1, 1]}, ending=".nii.gz")
@example(kind=("2", ">"), change={"qform_code": 1, "sform_code": 0, "quatern_b": 1e30}, ending=".nii")
def test_any_header_field_values_are_read_or_refused_naming_the_file(
    tmp_path: Path, kind: tuple[str, str], change: dict[str, Any], ending: str
) -> None:
    header_class: Any = nib.Nifti1Header if kind[0] == "1" else nib.Nifti2Header
    content = whole_file(*kind)
    size = header_class.sizeof_hdr if hasattr(header_class, "sizeof_hdr") else {"1": 348, "2": 540}[kind[0]]
    header = header_class(content[:size], endianness=kind[1], check=False)
    for name, value in change.items():
        with np.errstate(all="ignore"):
            header[name] = value
    path = tmp_path / f"any{ending}"
    content = header.binaryblock + content[size:]
    path.write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
    use(path, tmp_path)


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_the_valid_file_that_the_others_are_derived_from_is_read(tmp_path: Path, ending: str) -> None:
    for kind in ("1", "2"):
        for endian in "<>":
            content = whole_file(kind, endian)
            (tmp_path / f"a{ending}").write_bytes(gzip.compress(content) if ending.endswith("gz") else content)
            assert read_volume(tmp_path / f"a{ending}").voxels.ravel(order="C").tolist() == list(range(60))
