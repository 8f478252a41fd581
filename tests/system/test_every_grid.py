"""Every grid, however stored: label maps on exactly the input's grid, the same tissue, and transfer to other grids.

One call of the command line predicts a phantom that is stored in every way and in all 48 axis orders; each test looks
at one of the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel import orientations
from nibabel.openers import ImageOpener
from scipy import ndimage

from data.errors import DataError
from data.labels import from_regions, to_regions
from data.preprocess import resample_codes, resample_codes_onto

Call = Callable[..., Any]
Affine = npt.NDArray[np.float64]
Codes = npt.NDArray[np.uint8]

properties = settings(derandomize=True, deadline=None, max_examples=60)
CASE = "BraTS2021_00000"
CONTRASTS = ("t1", "t1ce", "t2", "flair")
#: All ways to store three axes, each forwards or backwards; the first leaves them as they are.
ORDERS = [np.column_stack([axes, signs]) for axes in permutations(range(3)) for signs in product((1, -1), repeat=3)]
#: Header fields that say where a voxel is, and how long a side.
GRID_FIELDS = [
    *("pixdim", "xyzt_units", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d"),
    *("qoffset_x", "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z"),
]


def rotation(degrees: float, axis: int) -> Affine:
    """Of the world about one of its axes."""
    turn, (i, j) = np.eye(4), [k for k in range(3) if k != axis]
    turn[i, i] = turn[j, j] = np.cos(np.deg2rad(degrees))
    turn[i, j], turn[j, i] = -np.sin(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    return turn


TILTED = rotation(25, 0) @ rotation(10, 1) @ rotation(15, 2)
MOVED = np.array([[1.0, 0, 0, 30], [0, 1, 0, -12], [0, 0, 1, 7.5], [0, 0, 0, 1]])


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How a file holds a volume; the volume's values and its place in the world are the same in all of them."""

    kind: Literal["NIfTI-1", "NIfTI-2"] = "NIfTI-1"
    endian: Literal["<", ">"] = "<"
    dtype: str = "i2"
    gain: float = 1.0
    """The values are this many times as large."""
    slope: float = 1.0
    inter: float = 0.0
    qform: Affine | None = None
    """In front of the volume's affine; None leaves the affine as it is."""
    codes: tuple[int, int] = (1, 1)
    """Of qform and sform."""
    turn: Affine | None = None
    """Of the head in the world, in front of its affine."""
    units: tuple[str, str] = ("mm", "sec")
    comment: bytes = b""
    """Of the header's extension, where not empty."""
    ending: str = ".nii"

    def header(self) -> Any:
        """An empty header of this kind."""
        kind: Any = nib.Nifti2Header if self.kind == "NIfTI-2" else nib.Nifti1Header
        return kind(endianness=self.endian)

    def write(self, path: Path, values: npt.NDArray[Any], affine: Affine) -> None:
        """Write values, whole numbers, so that a reader gets exactly ``gain`` times these after scaling."""
        affine = affine if self.turn is None else self.turn @ affine
        header = self.header()
        header.set_data_dtype(np.dtype(self.dtype).newbyteorder(self.endian))
        header.set_data_shape(values.shape)
        header.set_zooms(np.linalg.norm(affine[:3, :3], axis=0))
        header.set_qform(affine if self.qform is None else self.qform @ affine, self.codes[0])
        header.set_sform(affine, self.codes[1])
        header.set_xyzt_units(*self.units)
        scaled = np.isfinite(self.slope) and self.slope != 0
        raw = (self.gain * values - self.inter) / self.slope if scaled else values
        stored = raw.astype(header.get_data_dtype())
        assert np.array_equal(stored, raw)
        kind: Any = nib.Nifti2Image if self.kind == "NIfTI-2" else nib.Nifti1Image
        image = kind(stored, None, header)
        image.header["scl_slope"], image.header["scl_inter"] = self.slope, self.inter
        if self.comment:
            image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", self.comment))
        nib.save(image, path)
        if np.isnan([self.slope, self.inter]).all():  # nibabel takes these for its own to choose
            content = bytearray(path.read_bytes())
            content[112:120] = np.array([np.nan, np.nan], f"{self.endian}f4").tobytes()
            path.write_bytes(content)


KINDS: tuple[Literal["NIfTI-1", "NIfTI-2"], ...] = ("NIfTI-1", "NIfTI-2")
BYTE_ORDERS: Mapping[str, Literal["<", ">"]] = {"little": "<", "big": ">"}
STORAGES: Mapping[str, Storage] = {
    **{
        f"{kind} {name} {dtype} {ending}": Storage(kind=kind, endian=endian, dtype=dtype, ending=ending)
        for kind in KINDS
        for name, endian in BYTE_ORDERS.items()
        for dtype in ("i2", "u2", "f4", "f8")
        for ending in (".nii", ".nii.gz")
    },
    "slope": Storage(slope=0.5),
    "slope and intercept": Storage(slope=2.0, inter=-3000.0, dtype="f4"),
    "intercept": Storage(inter=-1024.0),
    "unsigned with intercept": Storage(dtype="u2", inter=-32768.0),
    "big-endian with slope": Storage(slope=0.25, inter=16.0, dtype="i4", endian=">", kind="NIfTI-2"),
    "negative slope": Storage(slope=-1.0),
    "negative slope and intercept": Storage(slope=-0.5, inter=5000.0),
    "four times the values": Storage(gain=4.0, slope=4.0),
    "thrice the values": Storage(gain=3.0, dtype="f4"),
    "slope 0": Storage(slope=0.0),
    "slope 0 with intercept": Storage(slope=0.0, inter=50.0),
    "slope NaN": Storage(slope=np.nan, inter=np.nan),
    "slope NaN with intercept": Storage(slope=np.nan, inter=50.0),
    "slope infinite": Storage(slope=np.inf, inter=50.0),
    "qform alone": Storage(codes=(1, 0)),
    "sform alone": Storage(codes=(0, 2)),
    "qform alone, big-endian": Storage(codes=(2, 0), endian=">"),
    "sform alone, big-endian NIfTI-2": Storage(codes=(0, 4), endian=">", kind="NIfTI-2"),
    "no form": Storage(codes=(0, 0)),
    "no form, big-endian": Storage(codes=(0, 0), endian=">"),
    "two forms that differ": Storage(codes=(1, 4), qform=MOVED @ rotation(30, 2)),
    "two forms that differ, tilted": Storage(codes=(3, 2), qform=MOVED @ rotation(-20, 0), turn=TILTED),
    "two forms that differ, NIfTI-2": Storage(codes=(1, 4), qform=MOVED @ rotation(30, 2), kind="NIfTI-2", endian=">"),
    "two forms half a turn apart": Storage(codes=(1, 1), qform=rotation(180, 2)),
    "another qform of code 0": Storage(codes=(0, 1), qform=rotation(180, 0)),
    "tilted": Storage(turn=TILTED),
    "tilted, qform alone": Storage(turn=TILTED, codes=(1, 0)),
    "tilted, sform alone": Storage(turn=MOVED @ rotation(40, 2), codes=(0, 1)),
    "tilted, big-endian NIfTI-2": Storage(turn=rotation(-35, 1), endian=">", kind="NIfTI-2"),
    "no units": Storage(units=("unknown", "unknown")),
    "an extension": Storage(comment=b"name of the patient", ending=".nii.gz"),
    "a long extension": Storage(comment=b"name of the patient" * 5000),
}
#: Those whose header says where the head is; without a form the order of axes is anyone's guess.
PLACED = [name for name, storage in STORAGES.items() if storage.codes != (0, 0)]
ORDER_NAMES = [f"{how}{number}" for how in ("order", "turned") for number in range(len(ORDERS))]


def file_name(storage: str) -> str:
    return storage.replace(" ", "_").replace(",", "").replace(".", "-")


def load(path: Path) -> Any:
    return nib.load(path)


def voxels(path: Path) -> Codes:
    return np.asarray(load(path).dataobj)


def t1c_of(folder: Path) -> Path:
    (path,) = folder.glob("*_t1ce.nii*")
    return path


def images_of(case: Path) -> dict[str, tuple[npt.NDArray[np.int16], Affine]]:
    """Values and affine of each contrast."""
    images = {contrast: load(case / f"{case.name}_{contrast}.nii.gz") for contrast in CONTRASTS}
    return {contrast: (np.asarray(image.dataobj), image.affine) for contrast, image in images.items()}


def dice(one: npt.NDArray[np.bool_], other: npt.NDArray[np.bool_]) -> float:
    return float(2 * (one & other).sum() / (one.sum() + other.sum()))


def in_order(stored: Codes, order: npt.NDArray[np.int_]) -> Codes:
    """Undo ``as_reoriented(order)``."""
    back = orientations.ornt_transform(ORDERS[0], order)
    return np.asarray(orientations.apply_orientation(stored, back))


def assert_same_grid(label_map: Path, image: Path) -> None:
    """Shape, affine, qform, sform, codes, zooms and units: as nibabel understands them and as the header has them."""
    one, other = load(label_map), load(image)
    assert type(one) is type(other)
    assert one.shape == other.shape
    assert np.array_equal(one.affine, other.affine)
    for form in ("get_qform", "get_sform"):
        (affine, code), (expected, expected_code) = (getattr(each, form)(coded=True) for each in (one, other))
        assert code == expected_code
        assert (affine is None) == (expected is None)
        assert affine is None or np.array_equal(affine, expected)
    assert one.header.get_zooms() == other.header.get_zooms()
    assert one.header.get_xyzt_units() == other.header.get_xyzt_units()
    for field in GRID_FIELDS:
        np.testing.assert_array_equal(one.header[field], other.header[field], err_msg=field)


def assert_no_symmetry(codes: Codes) -> None:
    """Of the label map that others are compared with: every region is there, and no flip of axes leaves it alike."""
    for order in ORDERS:
        turned = orientations.apply_orientation(codes, order)
        for one, other in zip(to_regions(codes), to_regions(turned), strict=True):
            assert one.any()
            assert np.array_equal(order, ORDERS[0]) or turned.shape != codes.shape or dice(one, other) < 0.9


# Every way to store a case


def write_case(folder: Path, storage: Storage, images: Mapping[str, tuple[npt.NDArray[Any], Affine]]) -> None:
    folder.mkdir(parents=True)
    for contrast, (values, affine) in images.items():
        storage.write(folder / f"{folder.name}_{contrast}{storage.ending}", values, affine)


def reordered(values: npt.NDArray[Any], affine: Affine, order: npt.NDArray[np.int_]) -> tuple[npt.NDArray[Any], Affine]:
    image = nib.Nifti1Image(values, affine).as_reoriented(order)
    return np.asarray(image.dataobj), image.affine


@pytest.fixture(scope="module")
def stored(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One phantom in every way to store it, and in all orders, straight and turned; ``plain`` is LPS, without scaling.

    The orders' forms take turns; the head is turned by 10 to 40 degrees either way about one axis after the other.
    """
    folder, images = tmp_path_factory.mktemp("stored"), images_of(phantoms / CASE)
    for name, storage in {"plain": Storage(), **STORAGES}.items():
        write_case(folder / file_name(name), storage, images)
    for number, order in enumerate(ORDERS):
        codes = [(1, 1), (1, 0), (0, 1), (3, 4)][number % 4]
        turn = rotation((-1) ** number * (10 + 30 * number / len(ORDERS)), number % 3)
        for name, world in (("order", np.eye(4)), ("turned", turn)):
            again = {key: reordered(values, world @ affine, order) for key, (values, affine) in images.items()}
            write_case(folder / f"{name}{number}", Storage(codes=codes), again)
    return folder


@pytest.fixture(scope="module")
def label_maps(stored: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory, shell: Call) -> Path:
    """What the command line predicts for all of them; a case that fails leaves its own tests without a label map."""
    folder = tmp_path_factory.mktemp("label_maps")
    ended = shell(["znormseg", "predict", tiny_run, stored, folder, "--device", "cpu"])
    assert ended.code in (0, 6), ended.err
    return folder


@pytest.mark.parametrize("storage", STORAGES)
def test_stored_files_read_back_as_the_values_of_the_phantom(storage: str, stored: Path, phantoms: Path) -> None:
    values = voxels(phantoms / CASE / f"{CASE}_t1ce.nii.gz")
    read = load(t1c_of(stored / file_name(storage))).get_fdata()
    np.testing.assert_array_equal(read, STORAGES[storage].gain * values)


@pytest.mark.parametrize("name", STORAGES)
def test_the_bytes_on_disk_match_the_file_name(name: str, stored: Path) -> None:
    storage = STORAGES[name]
    path = t1c_of(stored / file_name(name))
    with ImageOpener(str(path)) as stream:
        header = storage.header().from_fileobj(stream)
    assert (header.endianness, header["sizeof_hdr"]) == (storage.endian, {"NIfTI-1": 348, "NIfTI-2": 540}[storage.kind])
    np.testing.assert_array_equal([header["scl_slope"], header["scl_inter"]], [storage.slope, storage.inter])
    assert (header["qform_code"], header["sform_code"]) == storage.codes
    assert header.get_data_dtype() == np.dtype(storage.dtype).newbyteorder(storage.endian)
    assert path.name.endswith(storage.ending)


def test_where_sform_and_qform_differ_the_sform_is_used(stored: Path) -> None:
    image = load(t1c_of(stored / file_name("two forms that differ")))
    assert np.array_equal(image.affine, image.get_sform())
    assert np.abs(image.get_qform()[:3, :3] - image.get_sform()[:3, :3]).max() > 1


def test_the_list_of_voxel_orders_is_complete(stored: Path) -> None:
    codes = {nib.aff2axcodes(load(t1c_of(stored / name)).affine) for name in ORDER_NAMES}
    assert len(codes) == len(ORDERS) == 48


@pytest.mark.parametrize("storage", [*STORAGES, *ORDER_NAMES])
def test_the_label_map_is_on_the_grid_of_its_case_in_any_storage(storage: str, stored: Path, label_maps: Path) -> None:
    case = file_name(storage)
    assert_same_grid(label_maps / f"{case}.nii.gz", t1c_of(stored / case))


@pytest.mark.parametrize("storage", PLACED)
def test_the_segmentation_is_the_same_in_any_storage(storage: str, label_maps: Path) -> None:
    codes = voxels(label_maps / f"{file_name(storage)}.nii.gz")
    np.testing.assert_array_equal(codes, voxels(label_maps / "plain.nii.gz"))


@pytest.mark.parametrize("name", ORDER_NAMES)
def test_the_segmentation_is_the_same_in_every_voxel_order(name: str, label_maps: Path) -> None:
    order = ORDERS[int(name.removeprefix("order").removeprefix("turned"))]
    codes = in_order(voxels(label_maps / f"{name}.nii.gz"), order)
    np.testing.assert_array_equal(codes, voxels(label_maps / "plain.nii.gz"))


def test_the_reference_segmentation_has_no_symmetry(label_maps: Path) -> None:
    codes = voxels(label_maps / "plain.nii.gz")
    assert_no_symmetry(np.where(codes == 4, 3, codes).astype(np.uint8))


@pytest.mark.parametrize("storage", ["an extension", "a long extension"])
def test_header_extensions_are_not_copied(storage: str, stored: Path, label_maps: Path) -> None:
    case = file_name(storage)
    assert b"patient" in bytes(load(t1c_of(stored / case)).header.extensions[0].get_content())
    assert not load(label_maps / f"{case}.nii.gz").header.extensions


@pytest.mark.parametrize(
    "storage",
    [
        *("NIfTI-1 big i2 .nii", "NIfTI-1 little f8 .nii.gz", "qform alone", "sform alone", "no form"),
        *("two forms that differ", "two forms that differ, tilted", "tilted", "tilted, qform alone"),
        *("negative slope and intercept", "a long extension", "order17", "turned33"),
    ],
)
def test_another_library_sees_every_label_map_where_its_case_is(storage: str, stored: Path, label_maps: Path) -> None:
    import SimpleITK as sitk  # noqa: N813

    path = label_maps / f"{file_name(storage)}.nii.gz"
    image, label_map = sitk.ReadImage(str(t1c_of(stored / file_name(storage)))), sitk.ReadImage(str(path))
    for place in ("GetSize", "GetOrigin", "GetDirection", "GetSpacing"):
        assert getattr(label_map, place)() == getattr(image, place)()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(label_map).T, voxels(path))


@pytest.mark.slow
def test_a_real_case_gives_the_same_segmentation_in_every_voxel_order(
    tiny_run: Path, real_cases: Path, tmp_path: Path
) -> None:
    from app.inference.batch.predict import predict
    from app.inference.model import load_model
    from app.system.device import RuntimeConfig, choose_runtime
    from data.datasets.layouts import find_cases

    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    model, case, expected = load_model(tiny_run, runtime), find_cases(real_cases)[0], None
    for number, order in enumerate(ORDERS):
        folder = tmp_path / f"order{number}"
        folder.mkdir()
        for contrast, path in zip(CONTRASTS, case.contrasts.values(), strict=True):
            nib.save(load(path).as_reoriented(order), folder / f"order{number}_{contrast}.nii")
        predicted = predict(model, find_cases(folder), tmp_path / "out", runtime=runtime)
        assert not predicted.failures
        assert_same_grid(Path(predicted.cases[0]["label_map"]), t1c_of(folder))
        codes = in_order(voxels(Path(predicted.cases[0]["label_map"])), order)
        codes[codes == 4] = 3
        if expected is None:
            assert_no_symmetry(codes)
            expected = to_regions(codes)
        assert min(dice(one, other) for one, other in zip(to_regions(codes), expected, strict=True)) >= 0.99
        shutil.rmtree(folder)


# Sheared affines


def sheared(image: Any) -> Any:
    affine = image.affine.copy()
    affine[0, 1] += 0.2 * affine[0, 0]
    return nib.Nifti1Image(np.asarray(image.dataobj), affine)


@pytest.fixture
def two_cases(phantoms: Path, tmp_path: Path) -> Path:
    """A data set of two cases, the first one sheared."""
    for case in sorted(phantoms.iterdir())[:2]:
        shutil.copytree(case, tmp_path / "two" / case.name)
    for path in (tmp_path / "two" / CASE).iterdir():
        nib.save(sheared(nib.Nifti1Image.from_bytes(nib.Nifti1Image.from_filename(path).to_bytes())), path)
    return tmp_path / "two"


def test_a_sheared_case_is_refused_with_the_remedy(
    two_cases: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, two_cases / CASE, tmp_path / "out")
    assert ended.code == 3
    assert CASE in ended.err
    assert "the affine is sheared (cosine 0.196 between axes). Resample to a right-angled grid." in ended.err
    assert not (tmp_path / "out" / f"{CASE}.nii.gz").exists()


def test_a_sheared_case_does_not_stop_the_others(
    two_cases: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, two_cases, tmp_path / "out")
    assert ended.code == 6
    assert "Resample to a right-angled grid." in ended.err
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["BraTS2021_00001.nii.gz"]


@pytest.mark.parametrize("flags", [[], ["--resample"]])
def test_a_sheared_label_map_is_not_scored(flags: list[str], two_cases: Path, phantoms: Path, znormseg: Call) -> None:
    ended = znormseg("evaluate", two_cases, phantoms, *flags)
    assert ended.code == 6
    assert f"{CASE}_seg.nii.gz: the affine is sheared" in ended.err
    assert "Resample to a right-angled grid." in ended.err


# A label map on another grid


SHAPE, OTHER_SHAPE = (7, 6, 5), (9, 5, 7)


def placed(
    order: npt.NDArray[np.int_], spacing_mm: Sequence[float], centre_mm: Sequence[float], shape: Sequence[int] = SHAPE
) -> Affine:
    """A grid of right angles around a place in the world."""
    affine = np.eye(4)
    affine[:3, :3] = (np.eye(3)[order[:, 0]] * order[:, 1:]).T * spacing_mm
    affine[:3, 3] = np.array(centre_mm) - affine[:3, :3] @ (np.array(shape) - 1) / 2
    return affine


def affines(shape: tuple[int, int, int]) -> st.SearchStrategy[Affine]:
    """Grids of any order, tilt and spacing, all of which meet."""
    return st.builds(
        lambda order, spacing_mm, centre_mm, degrees, axis: (
            rotation(degrees, axis) @ placed(order, spacing_mm, centre_mm, shape)
        ),
        st.sampled_from(ORDERS),
        st.tuples(*[st.floats(0.5, 2)] * 3),
        st.tuples(*[st.floats(-0.3, 0.3)] * 3),
        st.floats(-45, 45),
        st.integers(0, 2),
    )


def some_codes(shape: tuple[int, int, int] = SHAPE) -> st.SearchStrategy[Codes]:
    return hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 0, 1, 2, 3]))


def ball(affine: Affine, shape: tuple[int, int, int]) -> Codes:
    """Shells of 20, 14 and 8 mm around the world's origin."""
    places = np.tensordot(affine[:3, :3], np.indices(shape), 1) + affine[:3, 3].reshape(3, 1, 1, 1)
    return np.select([np.linalg.norm(places, axis=0) < mm for mm in (8, 14, 20)], [3, 1, 2]).astype(np.uint8)


def resampled_slowly(codes: Codes, affine: Affine, shape: tuple[int, int, int], target: Affine) -> Codes:
    """As in the docstring of :func:`resample_codes_onto`, for every voxel of the target from the whole source."""
    to_source = np.linalg.inv(affine) @ target
    smoothing = np.maximum(0, (np.linalg.norm(to_source[:3, :3], axis=1) - 1) / 2)
    places = np.tensordot(to_source[:3, :3], np.indices(shape), 1) + to_source[:3, 3].reshape(3, 1, 1, 1)
    masks = np.pad(to_regions(codes).astype(np.float64), [(0, 0), (9, 9), (9, 9), (9, 9)])
    smooth = [ndimage.gaussian_filter(mask, smoothing) for mask in masks]
    shares = [ndimage.map_coordinates(share, places + 9, order=1) for share in smooth]
    return from_regions(np.stack(shares) >= 0.499)


@properties
@given(some_codes(), affines(SHAPE), affines(OTHER_SHAPE))
def test_codes_on_another_grid_equal_the_slow_reference(codes: Codes, own: Affine, target: Affine) -> None:
    fast = resample_codes_onto(codes, own, OTHER_SHAPE, target)
    np.testing.assert_array_equal(fast, resampled_slowly(codes, own, OTHER_SHAPE, target))


@properties
@given(some_codes(), affines(SHAPE))
def test_codes_on_their_own_grid_are_the_same(codes: Codes, affine: Affine) -> None:
    rounded = affine.astype(np.float32).astype(np.float64)
    np.testing.assert_array_equal(resample_codes_onto(codes, affine, SHAPE, rounded), codes)


@properties
@given(some_codes(), affines(SHAPE), st.sampled_from(ORDERS))
def test_codes_on_their_own_grid_in_another_order_are_only_reordered(codes: Codes, affine: Affine, order: Any) -> None:
    expected, target = reordered(codes, affine, order)
    x, y, z = expected.shape
    np.testing.assert_array_equal(resample_codes_onto(codes, affine, (x, y, z), target), expected)


@properties
@given(some_codes(), affines(SHAPE), st.tuples(*[st.integers(-4, 4)] * 3))
def test_codes_whole_voxels_away_are_moved(codes: Codes, affine: Affine, step: tuple[int, int, int]) -> None:
    target = affine @ np.block([[np.eye(3), np.array(step).reshape(3, 1)], [np.zeros(3), 1]])
    around = np.pad(codes, 4)
    expected = around[tuple(slice(4 + k, 4 + k + side) for k, side in zip(step, SHAPE, strict=True))]
    np.testing.assert_array_equal(resample_codes_onto(codes, affine, SHAPE, target), expected)


@properties
@given(some_codes(), affines(SHAPE), affines(OTHER_SHAPE))
def test_nesting_removes_nothing_from_any_region(codes: Codes, own: Affine, target: Affine) -> None:
    """Each region is resampled as if it were the only one, so the regions are nested."""
    together = to_regions(resample_codes_onto(codes, own, OTHER_SHAPE, target))
    for region, mask in zip(together, to_regions(codes), strict=True):
        alone = resample_codes_onto(mask.astype(np.uint8), own, OTHER_SHAPE, target)
        np.testing.assert_array_equal(region, alone != 0)


@pytest.mark.parametrize("shape", [(20, 18, 13), (14, 30, 11), (60, 50, 40)], ids=str)
def test_if_only_the_spacing_differs_codes_equal_those_of_resample_codes(shape: tuple[int, int, int]) -> None:
    """Of a tumour full of holes, so that the smoothing shows; but for ties."""
    codes = np.pad(np.random.default_rng(0).choice([0, 1, 2, 3], (22, 20, 18), p=[0.4, 0.2, 0.2, 0.2]), 10)
    codes = codes.astype(np.uint8)
    steps = np.array(codes.shape) / shape
    target = np.block([[np.diag(steps), (steps.reshape(3, 1) - 1) / 2], [np.zeros(3), 1]])
    onto = resample_codes_onto(codes, np.eye(4), shape, target)
    assert np.mean(onto != resample_codes(codes, shape)) < 0.001


def test_a_voxel_extends_half_its_size_and_everything_beyond_is_background() -> None:
    codes = np.full((4, 4, 4), 3, dtype=np.uint8)
    finer = placed(ORDERS[0], (0.5, 1, 1), (1.5, 1.5, 1.5), (12, 6, 6))
    onto = resample_codes_onto(codes, np.eye(4), (12, 6, 6), finer)
    np.testing.assert_array_equal(onto, np.pad(np.full((8, 4, 4), 3), [(2, 2), (1, 1), (1, 1)]))


@pytest.mark.parametrize("degrees", [0, 15, 45])
@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (0.5, 0.5, 0.5), (1, 1, 3)], ids=str)
def test_a_resampled_ball_stays_a_ball(spacing_mm: Sequence[float], degrees: float) -> None:
    own, shape = placed(ORDERS[0], (1, 1, 1), (0, 0, 0), (50, 50, 50)), (64, 64, 64)
    target = rotation(degrees, 2) @ placed(ORDERS[7], spacing_mm, (3, -2, 1), shape)
    onto = resample_codes_onto(ball(own, (50, 50, 50)), own, shape, target)
    for region, expected in zip(to_regions(onto), to_regions(ball(target, shape)), strict=True):
        assert dice(region, expected) > 0.95


@pytest.mark.parametrize(
    "target",
    [
        placed(ORDERS[0], (1, 1, 1), (500, 0, 0)),
        placed(ORDERS[0], (1, 1, 1), (0, 0, -5)),
        placed(ORDERS[0], (1, 1, 1), (0, 0, 4.7)),
        rotation(45, 2) @ placed(ORDERS[0], (1, 1, 1), (8.2, 0, 0)),
    ],
    ids=["far away", "side by side", "less than half a voxel in common", "corner beside side"],
)
def test_grids_without_a_voxel_in_common_are_refused(target: Affine) -> None:
    """The extents of the last two along the world's axes do overlap."""
    own = placed(ORDERS[0], (1, 1, 1), (0, 0, 0))
    with pytest.raises(DataError, match="the grids do not overlap"):
        resample_codes_onto(np.zeros(SHAPE, dtype=np.uint8), own, SHAPE, target)


def test_a_tumour_outside_the_other_grid_leaves_background() -> None:
    codes = np.zeros(SHAPE, dtype=np.uint8)
    codes[:2] = 1
    away = placed(ORDERS[0], (1, 1, 1), (5, 0, 0))
    assert not resample_codes_onto(codes, placed(ORDERS[0], (1, 1, 1), (0, 0, 0)), SHAPE, away).any()


def test_an_empty_label_map_stays_empty_on_any_grid() -> None:
    assert not resample_codes_onto(np.zeros(SHAPE, dtype=np.uint8), np.eye(4), OTHER_SHAPE, np.eye(4)).any()


def test_contrasts_on_one_grid_may_be_stored_in_different_orders(
    phantoms: Path, tiny_run: Path, label_maps: Path, tmp_path: Path, znormseg: Call
) -> None:
    (tmp_path / "mixed").mkdir()
    for number, (contrast, (values, affine)) in enumerate(images_of(phantoms / CASE).items()):
        stored_so = reordered(values, affine, ORDERS[11 * number])
        Storage().write(tmp_path / "mixed" / f"mixed_{contrast}.nii", *stored_so)
    assert znormseg("predict", tiny_run, tmp_path / "mixed", tmp_path / "out").code == 0
    assert_same_grid(tmp_path / "out" / "mixed.nii.gz", t1c_of(tmp_path / "mixed"))
    codes = in_order(voxels(tmp_path / "out" / "mixed.nii.gz"), ORDERS[11])
    np.testing.assert_array_equal(codes, voxels(label_maps / "plain.nii.gz"))


@pytest.mark.parametrize("axis", [pytest.param(0, marks=pytest.mark.slow), pytest.param(1, marks=pytest.mark.slow), 2])
def test_rounding_at_45_degrees_does_not_separate_the_contrasts(
    *, axis: int, phantoms: Path, tiny_run: Path, label_maps: Path, tmp_path: Path, znormseg: Call
) -> None:
    """A quaternion and a matrix round differently, and so may the choice of the nearest axis."""
    for number, order in enumerate(ORDERS):
        folder = tmp_path / "in" / f"case{number}"
        folder.mkdir(parents=True)
        for contrast, (values, affine) in images_of(phantoms / CASE).items():
            storage = Storage(codes=(1, 0) if contrast == "t2" else (0, 1))
            stored_so = reordered(values, rotation(45, axis) @ affine, order)
            storage.write(folder / f"{folder.name}_{contrast}.nii", *stored_so)
    assert znormseg("predict", tiny_run, tmp_path / "in", tmp_path / "out").code == 0
    expected = voxels(label_maps / "plain.nii.gz")
    found = [in_order(voxels(tmp_path / "out" / f"case{n}.nii.gz"), order) for n, order in enumerate(ORDERS)]
    # The network may see the head turned by 90 degrees, in which it finds other tissue, but never a mixture of both.
    assert len({codes.tobytes() for codes in found}) <= 8
    assert any(np.array_equal(codes, expected) for codes in found)
