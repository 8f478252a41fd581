"""NIfTI geometry: label maps on exactly the reference's grid, every voxel order, every kind of bad file."""

from __future__ import annotations

import doctest
import gzip
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import nifti
from data.errors import DataError
from data.files import partial_name, partial_prefix, replacing
from data.nifti import (
    Volume,
    canonical_spacing,
    grid_difference,
    read_grid,
    read_label_map,
    read_volume,
    reorient,
    spacing_of,
    to_native_order,
    write_image,
    write_label_map,
)

properties = settings(derandomize=True, deadline=None, max_examples=40)
Affine = npt.NDArray[np.float64]
SHAPE = (4, 5, 6)
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
#: All signed permutations of the axes: every way to store a volume without rotating it.
AXIS_ORDERS = [
    tuple(zip(order, signs, strict=True))
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
#: Header fields that determine where a voxel is and how large.
GRID_FIELDS = [
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
]


def rotation(degrees: float, axis: int) -> Affine:
    turn, (i, j) = np.eye(4), [k for k in range(3) if k != axis]
    turn[i, i] = turn[j, j] = np.cos(np.deg2rad(degrees))
    turn[i, j], turn[j, i] = -np.sin(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return turn


def axis_affine(order: tuple[tuple[int, int], ...], spacing_mm: tuple[float, ...] = (0.8, 1.0, 3.0)) -> Affine:
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (row, sign) in enumerate(order):
        affine[row, column] = sign * spacing_mm[column]
    affine[:3, 3] = (10, -20, 30)
    return affine


OBLIQUE = rotation(20, 2) @ rotation(10, 0) @ axis_affine(((0, -1), (1, -1), (2, 1)))


def volume(voxels: npt.NDArray[Any], affine: Affine = LPS) -> Volume:
    return Volume(voxels=voxels, affine=affine, path=Path("none"))


def numbered(shape: tuple[int, ...] = SHAPE) -> npt.NDArray[np.uint8]:
    return np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)


def save(path: Path, voxels: npt.NDArray[Any], affine: Affine = LPS) -> Path:
    nib.save(nib.Nifti1Image(voxels, affine), path)
    return path


def reference(path: Path, codes: tuple[int, int], affine: Affine, form: str = "NIfTI-1 <") -> Path:
    """A scaled int16 image with every field set that might be lost."""
    kind: Any = nib.Nifti2Image if "2" in form else nib.Nifti1Image
    order: Any = form[-1]
    header = kind.header_class(endianness=order)
    header.set_data_dtype(np.dtype(np.int16).newbyteorder(order))
    header.set_data_shape(SHAPE)
    header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
    header.set_qform(affine, int(codes[0]))
    header.set_sform(affine, int(codes[1]))
    header.set_xyzt_units("mm", "sec")
    header["pixdim"][4:] = (2.5, 0.0, 3.0, 0.0)
    header["descrip"], header["cal_max"] = b"name of the patient", 900
    image = kind(numbered().astype(header.get_data_dtype()), None, header)
    image.header.set_slope_inter(2.0, 5.0)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name of the patient"))
    nib.save(image, path)
    return path


def raw_header(path: Path) -> Any:
    """The header as stored on disk, before nibabel interprets it."""
    content = gzip.decompress(path.read_bytes()) if path.name.endswith("gz") else path.read_bytes()
    order = "<" if content[0] in (348 % 256, 540 % 256) else ">"
    kind: Any = (
        nib.Nifti1Header if 348 in (int.from_bytes(content[:4], b) for b in ("little", "big")) else nib.Nifti2Header
    )
    return kind(content[: kind.template_dtype.itemsize], endianness=order, check=False)


@pytest.mark.parametrize("codes", [(1, 1), (0, 1), (1, 0), (2, 1), (0, 0), (4, 3)])
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("form", ["NIfTI-1 <", "NIfTI-1 >", "NIfTI-2 <", "NIfTI-2 >"])
@pytest.mark.parametrize("affine", [LPS, OBLIQUE, axis_affine(((2, 1), (0, -1), (1, 1)))], ids=["LPS", "tilted", "SLA"])
def test_a_label_map_is_written_on_the_grid_of_its_reference(
    tmp_path: Path, codes: tuple[int, int], ending: str, form: str, affine: Affine
) -> None:
    source = reference(tmp_path / f"reference{ending}", codes, affine, form)
    target = tmp_path / f"labels{ending}"
    write_label_map(target, numbered(), source)
    before, after = raw_header(source), raw_header(target)
    assert type(after) is type(before)
    for field in GRID_FIELDS:
        np.testing.assert_array_equal(after[field], before[field], err_msg=field)
    written, given = (cast(nib.Nifti1Pair, nib.load(path)) for path in (target, source))
    np.testing.assert_array_equal(written.affine, given.affine)


def test_a_label_map_is_uint8_and_reads_back_the_same(tmp_path: Path) -> None:
    source = reference(tmp_path / "reference.nii.gz", (1, 1), OBLIQUE)
    write_label_map(tmp_path / "labels.nii.gz", numbered(), source)
    assert nib.Nifti1Image.from_filename(tmp_path / "labels.nii.gz").get_data_dtype() == np.uint8
    np.testing.assert_array_equal(read_label_map(tmp_path / "labels.nii.gz").voxels, numbered())


def test_free_text_of_the_reference_is_not_copied_into_a_label_map(tmp_path: Path) -> None:
    source = reference(tmp_path / "reference.nii", (1, 1), LPS)
    write_label_map(tmp_path / "labels.nii", numbered(), source)
    assert b"patient" in source.read_bytes()
    assert b"patient" not in (tmp_path / "labels.nii").read_bytes()
    assert raw_header(tmp_path / "labels.nii")["cal_max"] == 0


def test_a_reference_with_a_trailing_axis_of_length_one_gives_a_3d_label_map(tmp_path: Path) -> None:
    source = save(tmp_path / "reference.nii", np.ones((*SHAPE, 1), dtype=np.float32), OBLIQUE)
    write_label_map(tmp_path / "labels.nii", numbered(), source)
    assert nib.Nifti1Image.from_filename(tmp_path / "labels.nii").shape == SHAPE


def test_labels_of_another_shape_are_refused_without_writing(tmp_path: Path) -> None:
    source = save(tmp_path / "reference.nii", np.ones(SHAPE, dtype=np.float32))
    with pytest.raises(DataError, match=r"reference\.nii: its grid has 4x5x6 voxels, the array to be written 6x5x4"):
        write_label_map(tmp_path / "labels.nii", numbered(SHAPE[::-1]), source)
    assert [path.name for path in tmp_path.iterdir()] == ["reference.nii"]


@pytest.mark.parametrize("order", AXIS_ORDERS, ids=str)
def test_to_native_order_undoes_reorient_for_every_axis_order(order: tuple[tuple[int, int], ...]) -> None:
    native = volume(numbered(), rotation(8, 1) @ axis_affine(order))
    canonical = reorient(native)
    assert nib.aff2axcodes(canonical.affine) == ("L", "P", "S")
    np.testing.assert_array_equal(to_native_order(canonical.voxels, native.affine), native.voxels)


@properties
@given(st.sampled_from(AXIS_ORDERS), st.integers(-40, 40), st.integers(0, 2), st.integers(0, 4 * 5 * 6 - 1))
def test_reorient_keeps_the_world_position_of_a_voxel(order: Any, degrees: int, axis: int, marked: int) -> None:
    native = volume(numbered(), rotation(degrees, axis) @ axis_affine(order))
    canonical = reorient(native)
    places = [v.affine @ [*np.argwhere(v.voxels == marked)[0], 1] for v in (native, canonical)]
    np.testing.assert_allclose(places[0], places[1], atol=1e-9)


def test_reorient_does_not_interpolate_and_leaves_lps_unchanged() -> None:
    np.testing.assert_array_equal(reorient(volume(numbered())).voxels, numbered())
    turned = reorient(volume(numbered(), axis_affine(AXIS_ORDERS[21])))
    assert sorted(turned.voxels.ravel()) == sorted(numbered().ravel())


@pytest.mark.parametrize("order", AXIS_ORDERS[::5], ids=str)
def test_canonical_spacing_equals_the_spacing_after_reorient(order: tuple[tuple[int, int], ...]) -> None:
    native = volume(numbered(), rotation(10, 0) @ axis_affine(order))
    assert canonical_spacing(native.affine) == pytest.approx(reorient(native).spacing_mm)
    assert spacing_of(native.affine) == pytest.approx((0.8, 1.0, 3.0))


def moved(affine: Affine, *offset_mm: float) -> Affine:
    result = affine.copy()
    result[:3, 3] += offset_mm
    return result


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (moved(LPS, -1.5, 0, 0), "the origin differs by 1.50 mm on axis x (right-left)"),
        (moved(LPS, 0.1, 2, 0), "the origin differs by 2.00 mm on axis y (anterior-posterior)"),
        (moved(LPS, 0, 0, 0.02), "the origin differs by 0.02 mm on axis z (inferior-superior)"),
        (LPS @ np.diag([1, 1, 1.5, 1]), "the grids differ by 3.00 mm on axis z (inferior-superior)"),
        (np.diag([1.0, -1, 1, 1]), "the grids differ by 8.00 mm on axis x (right-left)"),
    ],
    ids=["x", "y", "z", "spacing", "flip"],
)
def test_the_difference_between_two_grids_is_described_in_words(other: Affine, words: str) -> None:
    assert grid_difference(volume(np.zeros(SHAPE)), volume(np.zeros(SHAPE), other)) == words


def test_a_difference_in_shape_is_reported_in_voxels() -> None:
    words = grid_difference(volume(np.zeros(SHAPE)), volume(np.zeros((4, 5, 7))))
    assert words == "shape 4x5x6 against 4x5x7 voxels"


def test_a_rotation_is_not_reported_as_a_difference_of_origin() -> None:
    words = grid_difference(volume(np.zeros(SHAPE)), volume(np.zeros(SHAPE), rotation(5, 2) @ LPS))
    assert words is not None
    assert words.startswith("the grids differ by 0.")


@pytest.mark.parametrize("other", [LPS, moved(LPS, 0.009, -0.009, 0.0), rotation(0.05, 2) @ LPS])
def test_grids_that_agree_within_a_hundredth_of_a_millimetre_are_the_same(other: Affine) -> None:
    assert grid_difference(volume(np.zeros(SHAPE)), volume(np.zeros(SHAPE), other)) is None


def test_a_small_rotation_matters_on_a_large_grid() -> None:
    large = np.zeros((240, 240, 1))
    assert grid_difference(volume(large), volume(large, rotation(0.05, 2) @ LPS)) is not None


def test_a_volume_is_scaled_by_slope_and_intercept(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.full(SHAPE, 7, dtype=np.int16), LPS)
    image.header.set_slope_inter(0.5, -1)
    nib.save(image, tmp_path / "scaled.nii.gz")
    voxels = read_volume(tmp_path / "scaled.nii.gz").voxels
    assert voxels.dtype == np.float32
    assert np.unique(voxels).tolist() == [np.unique(np.asanyarray(image.dataobj))[0] * 0.5 - 1]


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64, ">i2", ">f4"])
def test_volumes_of_every_real_type_are_read(tmp_path: Path, dtype: Any) -> None:
    path = save(tmp_path / "image.nii.gz", numbered().astype(dtype), OBLIQUE)
    read = read_volume(path)
    np.testing.assert_array_equal(read.voxels, numbered())
    np.testing.assert_allclose(read.affine, OBLIQUE, atol=1e-5)


@pytest.mark.parametrize("sides", [(64, 64, 31), (64, 64, 32), (127, 63, 33)])
@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i2", "<u4", ">i8", "<f4", ">f8"])
@pytest.mark.parametrize("scaling", [(1, 0), (0.37, -5.5)])
def test_a_compressed_volume_reads_bit_for_bit_as_in_nibabel(
    tmp_path: Path, sides: tuple[int, ...], dtype: str, scaling: tuple[float, float]
) -> None:
    stored = np.random.default_rng(0).integers(0, 120, sides).astype(dtype)
    image = nib.Nifti1Image(stored, LPS, dtype=stored.dtype)
    image.header.set_slope_inter(*scaling)
    nib.save(image, tmp_path / "image.nii.gz")
    expected = np.asanyarray(nib.Nifti1Image.from_filename(tmp_path / "image.nii.gz").dataobj, dtype=np.float32)
    np.testing.assert_array_equal(read_volume(tmp_path / "image.nii.gz").voxels, expected)


@properties
@given(cut=st.floats(0, 1, exclude_max=True), seed=st.integers(0, 9))
def test_a_compressed_volume_truncated_anywhere_is_refused(
    tmp_path_factory: pytest.TempPathFactory, cut: float, seed: int
) -> None:
    path = save(tmp_path_factory.mktemp("cut") / "a.nii.gz", np.random.default_rng(seed).random((20, 20, 20)))
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(DataError, match=r"a\.nii\.gz: (damaged or cut short|the file is empty|cannot be read)"):
        read_volume(path)


@properties
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_compressed_voxels_is_refused(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    path = save(tmp_path_factory.mktemp("bit") / "a.nii.gz", np.random.default_rng(0).random((20, 20, 20)))
    packed = bytearray(path.read_bytes())
    packed[1000 + int(place * (len(packed) - 1000))] ^= 1 << bit
    path.write_bytes(packed)
    with pytest.raises(DataError, match=r"a\.nii\.gz: (damaged or cut short|cannot be read)"):
        read_volume(path)


def test_a_volume_compressed_in_several_gzip_members_is_read_completely(tmp_path: Path) -> None:
    content = nib.Nifti1Image(np.tile(numbered((4, 4, 4)), (9, 9, 9)), LPS).to_bytes()
    (tmp_path / "a.nii.gz").write_bytes(b"".join(gzip.compress(content[k : k + 7000]) for k in range(0, 99999, 7000)))
    np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").voxels, np.tile(numbered((4, 4, 4)), (9, 9, 9)))


def test_a_label_map_is_no_larger_than_with_zlib_and_reproducible(tmp_path: Path) -> None:
    ball = (np.indices((60, 60, 60)) - 30) ** 2
    labels = np.digitize(-ball.sum(axis=0), (-600, -300, -100)).astype(np.uint8)
    source = save(tmp_path / "reference.nii.gz", np.ones(labels.shape, dtype=np.float32))
    for name in ("one", "other"):
        write_label_map(tmp_path / f"{name}.nii.gz", labels, source)
    packed = (tmp_path / "one.nii.gz").read_bytes()
    assert packed == (tmp_path / "other.nii.gz").read_bytes()
    assert len(packed) <= len(gzip.compress(gzip.decompress(packed), 6))


def test_a_trailing_axis_of_length_one_is_dropped(tmp_path: Path) -> None:
    assert read_volume(save(tmp_path / "a.nii", np.ones((*SHAPE, 1, 1), dtype=np.float32))).voxels.shape == SHAPE


def test_the_grid_is_read_without_the_voxels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.ones(SHAPE, dtype=np.float32), OBLIQUE)
    path.write_bytes(path.read_bytes()[:352])
    shape, affine = read_grid(path)
    assert shape == SHAPE
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-5)


def write_nothing(path: Path) -> None:
    """Leave the path without a file."""


def write_cut_short(path: Path) -> None:
    save(path, np.random.default_rng(0).random((20, 20, 20)))
    path.write_bytes(path.read_bytes()[:-2000])


def write_flipped_bit(path: Path) -> None:
    """Change one voxel so that only gzip's checksum can reveal it."""
    content = nib.Nifti1Image(np.full((20, 20, 20), 7, dtype=np.uint8), LPS).to_bytes()
    packed = bytearray(gzip.compress(content, compresslevel=0))
    packed[5000] ^= 1
    path.write_bytes(packed)


def write_header(path: Path, **fields: Any) -> None:
    """Write a header only, compressed or not, as nibabel never would."""
    image = nib.Nifti1Image(np.zeros(SHAPE, dtype=np.float32), LPS)
    image.header.set_qform(LPS, 0)
    for name, value in fields.items():
        image.header[name] = value
    image.header["vox_offset"] = 352
    content = image.header.binaryblock + bytes(4) + bytes(4 * 120)
    path.write_bytes(gzip.compress(content) if path.name.endswith("gz") else content)


def write_with_nan(path: Path, value: float = np.nan) -> None:
    voxels = np.ones(SHAPE, dtype=np.float32)
    voxels[0, 0, :2] = value
    save(path, voxels)


SHEARED = LPS.copy()
SHEARED[0, 1] = 0.1
RGB = np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])
BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (write_nothing, "no such file"),
    "a folder": (Path.mkdir, "a folder, not a NIfTI file"),
    "empty": (Path.touch, "the file is empty"),
    "cut short": (write_cut_short, "damaged or cut short"),
    "a flipped bit": (write_flipped_bit, "damaged or cut short"),
    "text": (lambda path: path.write_text("patient 7"), "damaged or cut short|cannot be read as NIfTI"),
    "text in gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 500)), "cannot be read as NIfTI"),
    "2D": (lambda path: save(path, np.ones((4, 5), dtype=np.float32)), "2D with shape 4x5; a single 3D volume"),
    "4D": (lambda path: save(path, np.ones((*SHAPE, 2), dtype=np.float32)), "4D with shape 4x5x6x2; a single 3D"),
    "colour": (lambda path: save(path, np.zeros(SHAPE, dtype=RGB)), "a real-valued grey-scale volume is needed"),
    "complex": (lambda path: save(path, np.ones(SHAPE, dtype=np.complex64)), "voxels of type complex64"),
    "huge": (lambda path: write_header(path, dim=[3, *[30000] * 3, 1, 1, 1, 1]), "claims 30000x30000x30000 voxels"),
    "no voxels": (lambda path: write_header(path, dim=[3, 4, 0, 6, 1, 1, 1, 1]), "3D with shape 4x0x6"),
    "negative size": (lambda path: write_header(path, dim=[3, 4, -5, 6, 1, 1, 1, 1]), "4x-5x6|cannot be read"),
    "unknown type": (lambda path: write_header(path, datatype=12345), "cannot be read as NIfTI"),
    "NaN": (write_with_nan, "2 voxels are NaN or infinite"),
    "infinity": (lambda path: write_with_nan(path, -np.inf), "2 voxels are NaN or infinite"),
    "beyond float32": (lambda path: save(path, np.full(SHAPE, 1e300)), "120 voxels are NaN or infinite"),
    "no place": (lambda path: write_header(path, sform_code=1, srow_x=[0, 0, 0, 0]), "the affine is not invertible"),
    "NaN affine": (lambda path: write_header(path, sform_code=1, srow_x=[np.nan] * 4), "the affine is not invertible"),
    "sheared": (lambda path: save(path, np.ones(SHAPE, dtype=np.float32), SHEARED), r"sheared \(cosine 0\.1"),
}
bad_files = pytest.mark.parametrize(("make", "words"), list(BAD_FILES.values()), ids=list(BAD_FILES))


@bad_files
@pytest.mark.parametrize("read", [read_volume, read_label_map])
def test_a_bad_file_is_refused_with_its_name_and_the_reason(tmp_path: Path, make: Any, words: str, read: Any) -> None:
    path = tmp_path / "sub-1_t1.nii.gz"
    make(path)
    with pytest.raises(DataError, match=rf"^{tmp_path}/sub-1_t1\.nii\.gz: .*({words})"):
        read(path)


def test_the_checksum_of_a_4d_file_is_verified_for_any_volume(tmp_path: Path) -> None:
    path = tmp_path / "four.nii.gz"
    voxels = np.random.default_rng(0).standard_normal((64, 64, 64, 4)).astype(np.float32)
    save(path, voxels)
    assert np.array_equal(read_volume(path, 0).voxels, voxels[..., 0])
    content = bytearray(path.read_bytes())
    content[-8] ^= 1  # in the checksum, after the voxels of all four volumes
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"four\.nii\.gz"):
        read_volume(path, 0)


@pytest.mark.parametrize("name", ["missing", "empty", "4D", "colour", "huge", "no voxels", "no place", "sheared"])
def test_a_bad_grid_is_detected_from_the_header_alone(tmp_path: Path, name: str) -> None:
    make, words = BAD_FILES[name]
    make(tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=rf"a\.nii\.gz: .*({words})"):
        read_grid(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("name", ["missing", "empty", "text", "2D", "huge"])
def test_a_bad_reference_is_refused_before_anything_is_written(tmp_path: Path, name: str) -> None:
    make, words = BAD_FILES[name]
    make(tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match=rf"a\.nii\.gz: .*({words})"):
        write_label_map(tmp_path / "labels.nii.gz", numbered(), tmp_path / "a.nii.gz")
    assert not (tmp_path / "labels.nii.gz").exists()


def test_a_truncated_uncompressed_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.ones((20, 20, 20), dtype=np.float32))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.nii: "):
        read_volume(path)


def test_another_format_is_refused_with_its_name(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(np.ones(SHAPE, dtype=np.float32), LPS), tmp_path / "a.mgz")
    with pytest.raises(DataError, match=r"a\.mgz: a MGHImage, not a NIfTI volume"):
        read_volume(tmp_path / "a.mgz")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.nii", np.ones(SHAPE, dtype=np.float32)).chmod(0)
    with pytest.raises(DataError, match=r"a\.nii: no permission to read it"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("value", [0.5, -1.0, 256.0, 1e9])
def test_a_label_map_may_only_contain_small_whole_numbers(tmp_path: Path, value: float) -> None:
    path = save(tmp_path / "seg.nii.gz", np.array([0, 1, value], dtype=np.float32).reshape(3, 1, 1))
    with pytest.raises(DataError, match=r"seg\.nii\.gz: label values must be whole numbers from 0 to 255"):
        read_label_map(path)


def test_whole_numbers_stored_as_floats_are_a_valid_label_map(tmp_path: Path) -> None:
    labels = read_label_map(save(tmp_path / "seg.nii", numbered().astype(np.float64))).voxels
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, numbered())


SCALED = {
    "an editor's slope": [1.004, 1.992, 4.0],
    "an editor's slope on its own": [1.003922, 1.992157, 4.0000002],
    "an intercept": [-0.004, 1.004, 3.996],
    "a float16 on its way": [0.0, 0.9995, 3.998],
}


@pytest.mark.parametrize("values", SCALED.values(), ids=SCALED)
def test_label_values_within_a_hundredth_of_whole_numbers_are_rounded(
    tmp_path: Path, values: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path / "seg.nii.gz", np.array(values, dtype=np.float32).reshape(3, 1, 1))
    found = read_label_map(path)
    assert found.voxels.ravel().tolist() == np.rint(values).tolist()
    assert found.rounded is not None
    assert read_label_map(path).rounded == found.rounded
    assert [record.message for record in caplog.records] == [f"{path}: {found.rounded}"]


def test_invalid_label_values_are_named_with_the_remedy(tmp_path: Path) -> None:
    path = save(tmp_path / "seg.nii", np.array([0, 1.004, 1.02, 2.5], dtype=np.float32).reshape(4, 1, 1))
    with pytest.raises(DataError, match=r"this file has 1\.02, 2\.5\. .*save it again as whole numbers"):
        read_label_map(path)


@given(st.lists(st.tuples(st.integers(0, 255), st.floats(-0.009, 0.009)), min_size=1, max_size=20))
def test_rounding_gives_the_nearest_label(pairs: list[tuple[int, float]]) -> None:
    voxels = np.array([whole + off for whole, off in pairs], dtype=np.float32).reshape(-1, 1, 1)
    with TemporaryDirectory() as folder:
        found = read_label_map(save(Path(folder) / "seg.nii", voxels), log=False)
    assert found.voxels.ravel().tolist() == [whole for whole, _ in pairs]


@pytest.mark.parametrize("name", ["seg.nii", "seg.nii.gz"])
def test_a_label_map_of_bytes_equals_the_same_numbers_as_floats(tmp_path: Path, name: str) -> None:
    stored = np.random.default_rng(0).integers(0, 256, (31, 20, 17)).astype(np.uint8)
    found = read_label_map(save(tmp_path / name, stored))
    np.testing.assert_array_equal(found.voxels, stored)
    as_floats = read_label_map(save(tmp_path / f"float-{name}", stored.astype(np.float32)))
    np.testing.assert_array_equal(found.voxels, as_floats.voxels)
    np.testing.assert_array_equal(found.affine, as_floats.affine)


def test_slope_and_intercept_apply_to_a_label_map_of_bytes(tmp_path: Path) -> None:
    image = nib.Nifti1Image(numbered().astype(np.uint8) // 2, LPS)
    image.header.set_slope_inter(2, 0)
    nib.save(image, tmp_path / "seg.nii.gz")
    np.testing.assert_array_equal(read_label_map(tmp_path / "seg.nii.gz").voxels, numbered() // 2 * 2)


@properties
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_truncated_or_corrupted_label_map_of_bytes_is_refused(
    tmp_path_factory: pytest.TempPathFactory, place: float, bit: int
) -> None:
    labels = np.random.default_rng(0).integers(0, 4, (20, 20, 20)).astype(np.uint8)
    path = save(tmp_path_factory.mktemp("bytes") / "a.nii.gz", labels)
    packed = path.read_bytes()
    at = 400 + int(place * (len(packed) - 400))
    for content in (packed[:at], packed[:at] + bytes([packed[at] ^ 1 << bit]) + packed[at + 1 :]):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.nii\.gz: (damaged or cut short|cannot be read)"):
            read_label_map(path)


def test_replacing_swaps_the_new_file_for_the_old(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def fail_half_way(path: Path) -> None:
    with replacing(path) as beside:
        beside.write_text("half")
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_write_leaves_everything_unchanged(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(KeyboardInterrupt):
        fail_half_way(path)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == ({} if before is None else {"a.txt": before})


def test_a_symlink_stays_a_symlink_and_its_target_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    target = tmp_path / "elsewhere" / "a.csv"
    target.write_text("old")
    (tmp_path / "a.csv").symlink_to(target)
    with replacing(tmp_path / "a.csv") as beside:
        beside.write_text("new")
    assert (tmp_path / "a.csv").is_symlink()
    assert target.read_text() == "new"


def test_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with replacing(tmp_path / "pipe") as place:
        place.write_text("scores")
    assert (os.read(reader, 100), (tmp_path / "pipe").is_fifo()) == (b"scores", True)
    os.close(reader)


def test_the_temporary_path_keeps_the_extension_and_the_folder(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.nii.gz") as beside:
        beside.touch()
    assert beside.parent == tmp_path
    assert beside.name.endswith("a.nii.gz")


# Files with misleading names


@pytest.mark.parametrize(("name", "packed"), [("a.nii", True), ("a.nii.gz", False)])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_a_file_is_read_by_its_content_and_not_by_its_name(tmp_path: Path, kind: Any, name: str, packed: bool) -> None:
    content = kind(numbered(), LPS).to_bytes()
    path = tmp_path / name
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_grid(path)[0] == SHAPE
    np.testing.assert_array_equal(read_volume(path).voxels, numbered())
    np.testing.assert_array_equal(read_label_map(path).voxels, numbered())
    assert nifti.name_misleads(path) is not None


@pytest.mark.parametrize(("name", "packed"), [("a.nii", False), ("a.nii.gz", True)])
def test_a_correct_file_name_is_not_reported_as_misleading(tmp_path: Path, name: str, packed: bool) -> None:
    content = nib.Nifti1Image(numbered(), LPS).to_bytes()
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    assert nifti.name_misleads(tmp_path / name) is None


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(gzip.compress(b"x" * 400, mtime=0), mtime=0), "compressed twice"),
        (b"PK\x03\x04" + bytes(400), "a ZIP archive"),
        (b"\n<!DOCTYPE html>" + bytes(400), "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS"),
        (bytes(128) + b"DICM" + bytes(400), "a DICOM file"),
    ],
)
def test_the_format_of_a_non_nifti_file_is_reported(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.nii.*: {words}"):
        read_volume(tmp_path / name)


def test_a_truncated_compressed_file_named_nii_is_refused(tmp_path: Path) -> None:
    content = gzip.compress(nib.Nifti1Image(numbered(), LPS).to_bytes())
    (tmp_path / "a.nii").write_bytes(content[:-12])
    with pytest.raises(DataError, match="damaged or cut short"):
        read_volume(tmp_path / "a.nii")


# Names of partial files


@pytest.mark.parametrize("stem", ["x" * 248, "\u00e4" * 124, "a"])
def test_a_file_with_the_longest_possible_name_is_written(tmp_path: Path, stem: str) -> None:
    path = tmp_path / f"{stem}.nii.gz"
    write_label_map(path, numbered(), save(tmp_path / "reference.nii.gz", numbered()))
    np.testing.assert_array_equal(read_label_map(path).voxels, numbered())


@pytest.mark.parametrize("name", ["x" * 143, "x" * 100 + ".nii.gz", "\u00e4" * 60 + ".json", "x." + "y" * 200])
def test_a_temporary_name_is_no_longer_than_the_name_and_keeps_its_extension(name: str) -> None:
    beside = partial_name(partial_prefix(4_194_303), name)
    assert len(os.fsencode(beside)) <= len(os.fsencode(name))
    assert beside.endswith(".nii.gz") == name.endswith(".nii.gz")
    assert partial_name("a-", name) != partial_name("a-", f"{name}x")


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(nifti).failed == 0


def test_a_single_volume_of_a_4d_file_can_be_read(tmp_path: Path) -> None:
    voxels = np.stack([numbered(), 7 * numbered()], axis=3).astype(np.float32)
    for name in ("a.nii", "a.nii.gz"):
        path = save(tmp_path / name, voxels)
        np.testing.assert_array_equal(read_volume(path, 1).voxels, voxels[..., 1])
        assert read_grid(path, 1)[0] == SHAPE


@pytest.mark.parametrize(("shape", "volume"), [((*SHAPE, 2), 2), (SHAPE, 0), ((*SHAPE, 2, 1), 0)])
def test_a_volume_index_out_of_range_is_refused_with_the_shape_of_the_file(
    tmp_path: Path, shape: tuple[int, ...], volume: int
) -> None:
    path = save(tmp_path / "a.nii.gz", np.ones(shape, dtype=np.float32))
    with pytest.raises(DataError, match=rf"shape {'x'.join(map(str, shape))}; volume {volume} \(from 0\)"):
        read_volume(path, volume)


def test_a_label_map_on_the_grid_of_a_4d_file_is_3d(tmp_path: Path) -> None:
    source = save(tmp_path / "reference.nii.gz", np.ones((*SHAPE, 4), dtype=np.float32))
    labels = (numbered() % 4).astype(np.uint8)
    write_label_map(tmp_path / "labels.nii.gz", labels, source)
    written = nib.Nifti1Image.from_filename(tmp_path / "labels.nii.gz")
    np.testing.assert_array_equal(written.dataobj, labels)
    np.testing.assert_array_equal(written.affine, nib.Nifti1Image.from_filename(source).affine)


@pytest.mark.parametrize("values", [[0.0, 1.0, 32767.0], [0.0, 0.5, -3.25], [0.0, 1.0, 40000.0], [0.0, 1e30, 1.0]])
def test_a_written_image_contains_the_given_values(tmp_path: Path, values: list[float]) -> None:
    source = save(tmp_path / "reference.nii.gz", np.ones((3, 1, 1), dtype=np.uint8))
    voxels = np.array(values, dtype=np.float32).reshape(3, 1, 1)
    write_image(tmp_path / "image.nii.gz", voxels, source)
    np.testing.assert_array_equal(read_volume(tmp_path / "image.nii.gz").voxels, voxels)
