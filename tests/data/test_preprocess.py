"""Preprocessing: a head gives the same array however it is stored, and masks return to the grid of its files."""

from __future__ import annotations

import dataclasses
import doctest
import itertools
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from nibabel import orientations

from data import preprocess
from data.datasets.layouts import Case
from data.errors import DataError
from data.labels import BRATS2021, BRATS2023, CONTRASTS, Contrast, decode, to_regions
from data.preprocess import (
    Prepared,
    prepare,
    resample,
    resample_codes,
    resampled_shape,
    smallest_box,
    to_native_grid,
    zscore_nonzero,
)

properties = settings(derandomize=True, deadline=None, max_examples=40)
LPS = np.array([[-0.9, 0, 0, 12], [0, -1.1, 0, 7], [0, 0, 2.0, -5], [0, 0, 0, 1]])
SHAPE = (14, 12, 10)
#: Bounds of the brain in :func:`head`.
BOX = (slice(2, 12), slice(1, 9), slice(3, 8))
SIDES = (10, 8, 5)
ORDERS = ["".join(order) for axes in ("LAS", "RPI", "RAS", "LPI") for order in itertools.permutations(axes)]
small = hnp.array_shapes(min_dims=3, max_dims=3, min_side=2, max_side=9)
sides = st.tuples(*[st.integers(1, 12)] * 3)


def head(seed: int = 0) -> tuple[dict[Contrast, npt.NDArray[np.float32]], npt.NDArray[np.uint8]]:
    """Four contrasts of whole numbers in a box, each at a different level, with BraTS 2021 labels inside."""
    random = np.random.default_rng(seed)
    images: dict[Contrast, npt.NDArray[np.float32]] = {c: np.zeros(SHAPE, dtype=np.float32) for c in CONTRASTS}
    for level, image in enumerate(images.values(), start=1):
        image[BOX] = random.integers(100 * level, 100 * level + 90, SIDES)
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[4:9, 3:8, 4:7] = random.choice([0, 1, 2, 4], (5, 5, 3))
    return images, labels


def store(path: Path, voxels: npt.NDArray[Any], affine: Any = LPS, order: str = "LPS") -> Path:
    image = nib.Nifti1Image(voxels, affine)
    change = orientations.ornt_transform(
        orientations.axcodes2ornt(("L", "P", "S")), orientations.axcodes2ornt(tuple(order))
    )
    nib.save(image.as_reoriented(change), path)
    return path


def write_case(folder: Path, order: str = "LPS", affine: Any = LPS) -> Case:
    images, labels = head()
    return Case(
        id="a",
        folder=folder,
        contrasts={c: store(folder / f"a_{c}_{order}.nii", images[c], affine, order) for c in CONTRASTS},
        label=store(folder / f"a_seg_{order}.nii", labels, affine, order),
    )


def replace_contrast(case: Case, contrast: Contrast, path: Path) -> Case:
    return dataclasses.replace(case, contrasts={**case.contrasts, contrast: path})


def assert_same(one: Prepared, other: Prepared) -> None:
    np.testing.assert_array_equal(one.image, other.image)
    np.testing.assert_array_equal(one.brain, other.brain)
    np.testing.assert_array_equal(one.codes, other.codes)
    assert (one.box, one.canonical_shape) == (other.box, other.canonical_shape)
    assert one.spacing_mm == pytest.approx(other.spacing_mm)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("spacing_mm", [None, (2.0, 2.0, 2.0)])
def test_the_axis_order_of_the_files_does_not_change_a_prepared_case(
    tmp_path: Path, order: str, spacing_mm: Any
) -> None:
    canonical, stored = (
        prepare(write_case(tmp_path, o), spacing_mm=spacing_mm, convention=BRATS2021) for o in ("LPS", order)
    )
    assert_same(stored, canonical)


@pytest.mark.parametrize("order", ORDERS)
def test_a_label_map_is_mapped_back_to_the_grid_of_its_files(tmp_path: Path, order: str) -> None:
    case = write_case(tmp_path, order)
    prepared = prepare(case, convention=BRATS2021)
    assert prepared.codes is not None
    assert case.label is not None
    stored = np.asanyarray(nib.Nifti1Image.from_filename(case.label).dataobj)
    np.testing.assert_array_equal(to_native_grid(prepared.codes, prepared), decode(stored, BRATS2021))


def test_channels_follow_the_contrast_order_and_are_cropped_to_the_brain(tmp_path: Path) -> None:
    prepared = prepare(write_case(tmp_path))
    assert CONTRASTS == ("t1", "t1c", "t2", "flair")
    images: Any = head()[0]
    for channel, contrast in zip(prepared.image, CONTRASTS, strict=True):
        np.testing.assert_array_equal(channel, zscore_nonzero(images[contrast][BOX]))


def test_a_prepared_case_records_its_crop(tmp_path: Path) -> None:
    prepared = prepare(write_case(tmp_path))
    assert (prepared.box, prepared.box_shape, prepared.canonical_shape) == (BOX, SIDES, SHAPE)
    assert prepared.spacing_mm == pytest.approx((0.9, 1.1, 2.0))
    assert prepared.brain.shape == SIDES
    assert prepared.codes is None


def test_the_brain_contains_every_nonzero_voxel_of_the_files(tmp_path: Path) -> None:
    case, brain = write_case(tmp_path), np.zeros(SHAPE, dtype=bool)
    for number, contrast in enumerate(CONTRASTS):
        voxels = np.zeros(SHAPE, dtype=np.float32)
        voxels[4:7, 4:7, 4:7] = np.array([100, 200, 300]).reshape(3, 1, 1)  # the second plane is the average
        voxels[2:4, 2, 2 + number] = (150, 250)
        brain |= voxels != 0
        store(case.contrasts[contrast], voxels)
    prepared = prepare(case)
    np.testing.assert_array_equal(prepared.brain, brain[prepared.box])


def test_another_spacing_changes_image_and_codes_but_not_the_box(tmp_path: Path) -> None:
    prepared = prepare(write_case(tmp_path), spacing_mm=(1.8, 2.2, 1.0), convention=BRATS2021)
    assert prepared.codes is not None
    assert prepared.image.shape == (4, 5, 4, 10)
    assert prepared.codes.shape == (5, 4, 10)
    assert (prepared.box_shape, prepared.brain.shape, prepared.spacing_mm) == (SIDES, SIDES, (1.8, 2.2, 1.0))


def test_a_spacing_within_two_percent_causes_no_resampling(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    prepared = prepare(case, spacing_mm=(0.91, 1.09, 2.03), convention=BRATS2021)
    assert_same(prepared, prepare(case, convention=BRATS2021))


def test_the_intensity_scale_of_a_contrast_does_not_affect_the_result(tmp_path: Path) -> None:
    case = write_case(tmp_path)
    scaled = replace_contrast(case, "t2", store(tmp_path / "scaled.nii", 8 * head()[0]["t2"]))
    np.testing.assert_allclose(prepare(scaled).image, prepare(case).image, atol=1e-6)


@pytest.mark.parametrize("contrast", ["t1", "t2", "flair"])
@pytest.mark.parametrize(("axis", "name"), [(0, "right-left"), (1, "anterior-posterior"), (2, "inferior-superior")])
def test_a_contrast_on_another_grid_is_refused_with_the_distance(
    tmp_path: Path, contrast: Contrast, axis: int, name: str
) -> None:
    case, affine = write_case(tmp_path), LPS.copy()
    affine[axis, 3] += 2.5
    moved = replace_contrast(case, contrast, store(tmp_path / "moved.nii", head()[0][contrast], affine))
    with pytest.raises(DataError, match=rf"case a: {contrast} is not on the grid of t1c: .* 2\.50 mm .*{name}.*moved"):
        prepare(moved)


def test_a_contrast_of_another_shape_is_refused(tmp_path: Path) -> None:
    case = replace_contrast(write_case(tmp_path), "flair", store(tmp_path / "b.nii", head()[0]["flair"][:-1]))
    with pytest.raises(DataError, match="flair is not on the grid of t1c: shape 14x12x10 against 13x12x10"):
        prepare(case)


def test_a_label_map_on_another_grid_is_refused(tmp_path: Path) -> None:
    label = store(tmp_path / "moved.nii", head()[1], LPS @ np.diag([1, 1, 1.5, 1]))
    with pytest.raises(DataError, match=r"case a: the label map is not on the grid of t1c: .* mm on axis z"):
        prepare(dataclasses.replace(write_case(tmp_path), label=label), convention=BRATS2021)


@pytest.mark.parametrize("contrast", CONTRASTS)
def test_a_contrast_of_zeros_is_refused_and_named(tmp_path: Path, contrast: Contrast) -> None:
    empty = store(tmp_path / "empty.nii", np.zeros(SHAPE, dtype=np.float32))
    with pytest.raises(DataError, match=rf"case a, contrast {contrast}: \S+empty\.nii: every voxel is 0"):
        prepare(replace_contrast(write_case(tmp_path), contrast, empty))


def test_a_missing_label_map_is_refused_only_if_labels_are_needed(tmp_path: Path) -> None:
    case = dataclasses.replace(write_case(tmp_path), label=None)
    assert prepare(case).codes is None
    with pytest.raises(DataError, match="case a: no label map"):
        prepare(case, convention=BRATS2021)


def test_labels_of_the_other_convention_are_refused_with_case_and_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"case a, label map .*a_seg_LPS\.nii: label values 4 are not in .* brats2023"):
        prepare(write_case(tmp_path), convention=BRATS2023)


def test_a_case_with_problems_is_refused(tmp_path: Path) -> None:
    case = dataclasses.replace(write_case(tmp_path), problems=("contrast t2 is missing",))
    with pytest.raises(DataError, match="case a: contrast t2 is missing"):
        prepare(case)


@properties
@given(st.integers(0, 1000), st.integers(-5, 5), st.integers(0, 3))
def test_nonzero_voxels_get_mean_0_and_standard_deviation_1(seed: int, exponent: int, offset: int) -> None:
    random = np.random.default_rng(seed)
    voxels = (random.random((6, 5, 4)) + offset).astype(np.float32) * np.float32(10.0**exponent)
    voxels[random.random(voxels.shape) < 0.5] = 0
    scaled = zscore_nonzero(voxels)
    brain = scaled[voxels != 0].astype(np.float64)
    assert brain.mean() == pytest.approx(0, abs=1e-5)
    assert brain.std() == pytest.approx(1, abs=1e-5)
    assert not scaled[voxels == 0].any()
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_a_contrast_without_spread_becomes_0(value: float) -> None:
    assert not zscore_nonzero(np.full((2, 2, 2), value, dtype=np.float32)).any()


@properties
@given(hnp.arrays(np.bool_, small), st.permutations(range(3)), st.sampled_from([1, -1]))
def test_the_bounding_box_contains_the_whole_mask_and_touches_it_on_every_side(
    mask: Any, order: Any, step: int
) -> None:
    mask = mask.transpose(order)[::step]
    if mask.any():
        expected = tuple(slice(places.min(), places.max() + 1) for places in mask.nonzero())
        assert smallest_box(mask) == expected


@properties
@given(hnp.arrays(np.float32, (2, 5, 4, 6), elements=st.sampled_from([0, 0, 0, 0, 1, -1])))
def test_the_brain_box_is_the_smallest_one_around_all_contrasts(image: Any) -> None:
    if image.any():
        box = smallest_box((image != 0).any(axis=0))
        assert np.count_nonzero(image[:, *box]) == np.count_nonzero(image)
        for axis in (1, 2, 3):
            faces = np.take(image[:, *box], [0, -1], axis=axis)
            assert faces.any(axis=tuple(a for a in range(4) if a != axis)).all()


@properties
@given(small, sides, st.floats(-100, 100, width=32))
def test_resampling_keeps_a_constant(shape: Any, target: tuple[int, int, int], value: float) -> None:
    resampled = resample(np.full(shape, value, dtype=np.float32), target)
    assert resampled.shape == target
    np.testing.assert_allclose(resampled, value, rtol=1e-5, atol=1e-5)


@properties
@given(hnp.arrays(np.float32, small, elements=st.floats(-10, 10, width=32)))
def test_resampling_to_the_same_shape_changes_nothing(voxels: Any) -> None:
    np.testing.assert_array_equal(resample(voxels, voxels.shape), voxels)


@properties
@given(hnp.arrays(np.float32, small, elements=st.floats(-10, 10, width=32)), sides)
def test_resampling_stays_between_the_extremes(voxels: Any, target: tuple[int, int, int]) -> None:
    resampled = resample(voxels, target)
    assert voxels.min() - 1e-4 <= resampled.min()
    assert resampled.max() <= voxels.max() + 1e-4


@properties
@given(st.integers(0, 2), st.sampled_from([8, 12, 24, 36, 48, 60]))
def test_resampling_covers_the_same_box(axis: int, side: int) -> None:
    """A ball keeps its centre and its volume as a share of the box."""
    distance = ((np.indices((24, 24, 24)) - np.array([9, 13, 11]).reshape(3, 1, 1, 1)) ** 2).sum(axis=0)
    ball = np.exp(-distance / 20).astype(np.float32)
    shape = [24, 24, 24]
    shape[axis] = side
    resampled = resample(ball, (shape[0], shape[1], shape[2]))
    centre_voxels = (np.indices(shape) * resampled).sum(axis=(1, 2, 3)) / resampled.sum()
    np.testing.assert_allclose((centre_voxels + 0.5) / shape, np.array([9.5, 13.5, 11.5]) / 24, atol=0.01)
    assert float(resampled.mean()) == pytest.approx(float(ball.mean()), rel=0.02)


@properties
@given(small, st.tuples(*[st.floats(0.3, 5)] * 3), st.tuples(*[st.floats(0.3, 5)] * 3))
def test_the_resampled_extent_is_off_by_at_most_half_a_voxel(shape: Any, own: Any, target: Any) -> None:
    for before, after, a, b in zip(shape, resampled_shape(shape, own, target), own, target, strict=True):
        assert after == 1 or abs(after * b - before * a) <= b / 2 + 1e-9


@properties
@given(hnp.arrays(np.uint8, small, elements=st.integers(0, 3)))
def test_resampling_codes_to_the_same_shape_changes_nothing(codes: Any) -> None:
    np.testing.assert_array_equal(resample_codes(codes, codes.shape), codes)


@properties
@given(hnp.arrays(np.uint8, small, elements=st.integers(0, 3)), sides)
def test_resampled_codes_are_known_codes_with_nested_regions(codes: Any, target: tuple[int, int, int]) -> None:
    resampled = resample_codes(codes, target)
    whole, core, enhancing = to_regions(resampled)
    assert (resampled.shape, resampled.dtype) == (target, np.uint8)
    assert not (core & ~whole).any()
    assert not (enhancing & ~core).any()
    assert resampled.max() <= 3


def test_mixed_tissues_stay_tumour_when_voxels_get_larger() -> None:
    codes = np.indices((8, 8, 8)).sum(axis=0).astype(np.uint8) % 3 + 1
    assert resample_codes(codes, (4, 4, 4)).all()


def test_finer_voxels_get_the_code_of_the_voxel_they_are_in() -> None:
    codes = np.random.default_rng(0).integers(0, 4, (3, 3, 3)).astype(np.uint8)
    finer = resample_codes(codes.repeat(3, 0).repeat(3, 1).repeat(3, 2), (27, 27, 27))
    np.testing.assert_array_equal(finer[4::9, 4::9, 4::9], codes)


def test_everything_outside_the_box_is_background(tmp_path: Path) -> None:
    prepared = prepare(write_case(tmp_path))
    native = to_native_grid(np.full(SIDES, 3, dtype=np.uint8), prepared)
    assert (native.shape, native.sum()) == (SHAPE, 3 * np.prod(SIDES))
    assert (native[BOX] == 3).all()


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(preprocess).failed == 0


def test_a_very_large_volume_is_normalised_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    voxels = np.random.default_rng(0).normal(5, 3, (24, 10, 10)).astype(np.float32)
    voxels[:8] = 0
    whole = zscore_nonzero(voxels)
    monkeypatch.setattr("data.preprocess._AT_ONCE", 800)
    np.testing.assert_allclose(zscore_nonzero(voxels), whole, atol=1e-6)
