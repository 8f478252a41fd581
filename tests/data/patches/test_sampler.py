"""Training patches: the cache is rebuilt if necessary, patch k is always the same, threads end with their iterator."""

from __future__ import annotations

import shutil
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.datasets.layouts import Case
from data.errors import DataError
from data.labels import BRATS2021, BRATS2023, CONTRASTS, ENHANCING, NECROSIS, OEDEMA, LabelConvention, to_regions
from data.nifti import Spacing
from data.patches import sampler
from data.patches.augmentation import AugmentConfig
from data.patches.sampler import CachedCase, PatchSource, batches, cache_cases, cut_image, cut_patch
from data.preprocess import prepare

properties = settings(derandomize=True, deadline=None, max_examples=60)
MM = (1.0, 1.0, 1.0)
SHAPE = (18, 16, 14)
PATCH = (8, 6, 4)
STILL = AugmentConfig(
    flip_probability=0, affine_probability=0, gamma_probability=0, noise_probability=0, gain=0, shift=0
)
sides = st.tuples(*[st.integers(1, 9)] * 3)


def write_case(root: Path, name: str, labels: tuple[int, ...] = (1, 2, 4)) -> Case:
    """A case with brain everywhere but in the outermost voxels, and one voxel of each tissue in separate corners."""
    folder = root / name
    folder.mkdir(parents=True)
    random = np.random.default_rng(list(name.encode()))
    contrasts = {}
    for contrast in CONTRASTS:
        contrasts[contrast] = folder / f"{name}_{contrast}.nii"
        voxels = np.pad(random.uniform(1, 100, SHAPE).astype(np.float32), 1)
        nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, -1, 1, 1])), contrasts[contrast])
    label_map = np.zeros(SHAPE, dtype=np.uint8)
    for number, voxel in zip(labels, ((4, 4, 4), (12, 11, 4), (8, 6, 10)), strict=False):
        label_map[voxel] = number
    nib.save(nib.Nifti1Image(np.pad(label_map, 1), np.diag([-1.0, -1, 1, 1])), folder / f"{name}_seg.nii")
    return Case(id=name, folder=folder, contrasts=contrasts, label=folder / f"{name}_seg.nii")


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    root = tmp_path_factory.mktemp("cases")
    return cache([write_case(root, name) for name in "abcde"], root / "cache")


def cache(
    cases: list[Case], folder: Path, *, spacing_mm: Spacing = MM, convention: LabelConvention = BRATS2021
) -> list[CachedCase]:
    return cache_cases(cases, folder, spacing_mm=spacing_mm, convention=convention)


def patches(cases: list[CachedCase], **changes: Any) -> PatchSource:
    arguments: dict[str, Any] = {
        "patch_voxels": PATCH,
        "tumour_probability": 0.5,
        "augmentation": AugmentConfig(),
        "seed": 0,
        **changes,
    }
    return PatchSource(cases, **arguments)


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file below a folder."""
    return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def same_patch(one: Any, other: Any) -> bool:
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1]) and one[2] == other[2]


def test_a_patch_inside_the_volume_is_centred_as_requested() -> None:
    volume = np.arange(10 * 10 * 10).reshape(10, 10, 10)
    np.testing.assert_array_equal(cut_patch(volume, (5, 4, 6), (4, 4, 2)), volume[3:7, 2:6, 5:7])


@pytest.mark.parametrize(("centre", "start"), [((0, 0, 0), 0), ((1, 1, 1), 0), ((9, 9, 9), 6), ((8, 8, 8), 6)])
def test_a_patch_near_the_border_is_moved_inside(centre: tuple[int, int, int], start: int) -> None:
    volume = np.arange(10 * 10 * 10).reshape(10, 10, 10)
    expected = volume[start : start + 4, start : start + 4, start : start + 4]
    np.testing.assert_array_equal(cut_patch(volume, centre, (4, 4, 4)), expected)


def test_a_patch_larger_than_the_volume_is_padded_with_0_on_both_sides() -> None:
    volume = np.ones((2, 3, 4, 5))
    expected = np.pad(volume, [(0, 0), (1, 2), (0, 0), (1, 1)])
    np.testing.assert_array_equal(cut_patch(volume, (1, 2, 2), (6, 4, 7)), expected)


@properties
@given(sides, sides, st.data())
def test_a_patch_has_the_requested_shape_and_contains_its_centre(
    shape: tuple[int, int, int], patch: tuple[int, int, int], data: st.DataObject
) -> None:
    volume = np.arange(1, np.prod(shape) + 1).reshape(shape)
    centre = tuple(data.draw(st.integers(0, side - 1)) for side in shape)
    piece = cut_patch(volume, centre, patch)
    assert piece.shape == patch
    assert volume[centre] in piece
    assert np.count_nonzero(piece) == np.prod(np.minimum(shape, patch))


@properties
@given(sides, sides, st.data())
def test_an_image_is_cropped_like_any_array_and_becomes_float32(
    shape: tuple[int, int, int], patch: tuple[int, int, int], data: st.DataObject
) -> None:
    image = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float16)
    centre = tuple(data.draw(st.integers(0, side - 1)) for side in shape)
    piece = cut_image(image, centre, patch)
    assert piece.dtype == np.float32
    np.testing.assert_array_equal(piece, cut_patch(image, centre, patch).astype(np.float32))


def test_a_patch_is_a_copy() -> None:
    volume = np.zeros((4, 4, 4))
    cut_patch(volume, (2, 2, 2), (4, 4, 4))[:] = 1
    assert not volume.any()


def test_the_cache_stores_the_output_of_prepare(tmp_path: Path) -> None:
    case = write_case(tmp_path, "a")
    (kept,) = cache([case], tmp_path / "cache")
    prepared = prepare(case, spacing_mm=MM, convention=BRATS2021)
    assert (kept.id, kept.shape) == ("a", SHAPE)
    np.testing.assert_array_equal(kept.image(), prepared.image.astype(np.float16))
    np.testing.assert_array_equal(kept.codes(), prepared.codes)


def test_candidate_centres_are_the_tumour_voxels_by_tissue(cached: list[CachedCase]) -> None:
    assert cached[0].centres().tolist() == [
        [NECROSIS, 4, 4, 4],
        [OEDEMA, 12, 11, 4],
        [ENHANCING, 8, 6, 10],
    ]


@pytest.mark.parametrize("count", [1999, 2001, 3500])
def test_a_case_stores_at_most_2000_centres_spread_over_each_tissue(tmp_path: Path, count: int) -> None:
    case = write_case(tmp_path, "a")
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels.ravel()[:count] = 2
    assert case.label is not None
    nib.save(nib.Nifti1Image(np.pad(labels, 1), np.diag([-1.0, -1, 1, 1])), case.label)
    centres = cache([case], tmp_path / "cache")[0].centres()
    assert 1000 <= len(centres) <= 2000
    assert centres[:, 1].max() >= np.argwhere(labels)[:, 0].max() - 1


def test_a_matching_cache_is_kept(tmp_path: Path) -> None:
    cases = [write_case(tmp_path, name) for name in "ab"]
    first = cache(cases, tmp_path / "cache")
    before = stamps(tmp_path / "cache")
    assert cache(cases, tmp_path / "cache") == first
    assert stamps(tmp_path / "cache") == before
    assert before


def test_another_spacing_rebuilds_the_cache(tmp_path: Path) -> None:
    case = write_case(tmp_path, "a")
    cache([case], tmp_path / "cache")
    (coarse,) = cache([case], tmp_path / "cache", spacing_mm=(2.0, 2.0, 2.0))
    assert coarse.shape == coarse.codes().shape == (9, 8, 7)


def test_another_label_convention_rebuilds_the_cache(tmp_path: Path) -> None:
    case = write_case(tmp_path, "a", labels=(1, 2))
    cache([case], tmp_path / "cache")
    before = stamps(tmp_path / "cache")
    cache([case], tmp_path / "cache", convention=BRATS2023)
    assert stamps(tmp_path / "cache") != before


@pytest.mark.parametrize("what", ["t2", "label"])
def test_a_changed_file_rebuilds_only_its_own_case(tmp_path: Path, what: str) -> None:
    cases = [write_case(tmp_path, name) for name in "ab"]
    first = cache(cases, tmp_path / "cache")
    changed = cases[0].label if what == "label" else cases[0].contrasts["t2"]
    assert changed is not None
    stored = nib.Nifti1Image.from_filename(changed)
    nib.save(nib.Nifti1Image(np.roll(np.asarray(stored.dataobj), 1, axis=0), stored.affine), changed)
    second = cache(cases, tmp_path / "cache")
    assert second[0].folder != first[0].folder
    assert second[1] == first[1]


@pytest.mark.parametrize("file", ["source.json", "codes.npy", "image.npy", "centres.npy"])
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, file: str) -> None:
    case = write_case(tmp_path, "a")
    (kept,) = cache([case], tmp_path / "cache")
    whole = patches([kept]).patch(0)
    (kept.folder / file).write_bytes(b"")
    (again,) = cache([case], tmp_path / "cache")
    assert same_patch(patches([again]).patch(0), whole)


def test_an_unusable_case_leaves_nothing_in_the_cache(tmp_path: Path) -> None:
    case = write_case(tmp_path, "a")
    assert case.label is not None
    case.label.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a_seg\.nii"):
        cache([case], tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_each_case_is_reported_when_it_is_ready(tmp_path: Path) -> None:
    seen: list[str] = []
    cases = [write_case(tmp_path, name) for name in "abc"]
    for _ in range(2):
        cache_cases(cases, tmp_path / "cache", spacing_mm=MM, convention=BRATS2021, on_case=seen.append)
    assert (sorted(seen[:3]), sorted(seen[3:])) == (list("abc"), list("abc"))


def test_a_patch_does_not_depend_on_earlier_requests(cached: list[CachedCase]) -> None:
    forwards, backwards = patches(cached), patches(cached)
    first = {number: forwards.patch(number) for number in range(12)}
    second = {number: backwards.patch(number) for number in reversed(range(12))}
    assert all(same_patch(first[number], second[number]) for number in first)


def test_patches_and_seeds_differ_from_each_other(cached: list[CachedCase]) -> None:
    seen = [patches(cached, seed=seed).patch(number)[0].tobytes() for seed in (0, 1) for number in range(10)]
    assert len(set(seen)) == 20


def test_patches_of_one_case_in_the_same_epoch_differ(cached: list[CachedCase]) -> None:
    source = patches([cached[0]] * 5)
    assert len({source.patch(number)[0].tobytes() for number in range(5)}) == 5


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_case_is_used_once_per_epoch(cached: list[CachedCase], epoch: int) -> None:
    source = patches(cached)
    assert sorted(source.patch(number)[2] for number in range(5 * epoch, 5 * epoch + 5)) == list("abcde")


def test_the_order_of_cases_differs_from_epoch_to_epoch(cached: list[CachedCase]) -> None:
    source = patches(cached)
    assert len({tuple(source.patch(5 * epoch + n)[2] for n in range(5)) for epoch in range(6)}) > 1


def test_with_tumour_probability_1_the_centre_of_every_patch_is_tumour(cached: list[CachedCase]) -> None:
    source = patches(cached, tumour_probability=1.0, augmentation=STILL)
    seen = [int(source.patch(number)[1][4, 3, 2]) for number in range(40)]
    assert set(seen) == {NECROSIS, OEDEMA, ENHANCING}


@pytest.mark.parametrize(
    ("probability", "tissues"), [(1.0, {ENHANCING}), (0.0, {NECROSIS, OEDEMA}), (0.5, {NECROSIS, OEDEMA, ENHANCING})]
)
def test_enhancing_probability_sets_the_share_of_enhancing_centres(
    cached: list[CachedCase], probability: float, tissues: set[int]
) -> None:
    source = patches(cached, tumour_probability=1.0, enhancing_probability=probability, augmentation=STILL)
    assert {int(source.patch(number)[1][4, 3, 2]) for number in range(40)} == tissues


@pytest.mark.parametrize(("labels", "tissues"), [((1, 2), {NECROSIS, OEDEMA}), ((4,), {ENHANCING})])
def test_enhancing_probability_only_uses_tissues_that_the_case_has(
    labels: tuple[int, ...], tissues: set[int], tmp_path: Path
) -> None:
    cases = cache([write_case(tmp_path, "some", labels)], tmp_path / "cache")
    for probability in (0.0, 1.0):
        source = patches(cases, tumour_probability=1.0, enhancing_probability=probability, augmentation=STILL)
        assert {int(source.patch(number)[1][4, 3, 2]) for number in range(20)} == tissues


def test_with_tumour_probability_0_centres_are_anywhere(cached: list[CachedCase]) -> None:
    source = patches(cached, tumour_probability=0.0, augmentation=STILL)
    assert sum(int(source.patch(number)[1][4, 3, 2]) > 0 for number in range(40)) < 4


def test_a_case_without_tumour_still_gives_patches(tmp_path: Path) -> None:
    (healthy,) = cache([write_case(tmp_path, "a", labels=())], tmp_path / "cache")
    assert healthy.centres().shape == (0, 4)
    assert patches([healthy], tumour_probability=1.0).patch(0)[0].shape == (4, *PATCH)


def test_without_augmentation_a_patch_is_a_piece_of_its_case(cached: list[CachedCase]) -> None:
    image, codes, name, _ = patches(cached, augmentation=STILL, patch_voxels=SHAPE).patch(3)
    case = next(case for case in cached if case.id == name)
    np.testing.assert_array_equal(image, case.image().astype(np.float32))
    np.testing.assert_array_equal(codes, case.codes())


def test_a_batch_has_the_shapes_and_types_a_step_needs(cached: list[CachedCase]) -> None:
    batch = patches(cached).batch(1, 3)
    assert (batch.image.shape, batch.masks.shape) == ((3, 4, *PATCH), (3, 3, *PATCH))
    assert batch.image.dtype is batch.masks.dtype is torch.float32
    assert set(batch.masks.unique().tolist()) <= {0.0, 1.0}


def test_a_batch_contains_its_patches_in_order(cached: list[CachedCase]) -> None:
    source = patches(cached, tumour_probability=1.0)
    batch = source.batch(2, 3)
    for row, number in enumerate((6, 7, 8)):
        image, codes, name, _ = source.patch(number)
        assert batch.cases[row] == name
        np.testing.assert_array_equal(batch.image[row].numpy(), image)
        np.testing.assert_array_equal(batch.masks[row].numpy(), to_regions(codes))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("first", [0, 4])
def test_batches_are_in_order_with_any_number_of_threads(cached: list[CachedCase], threads: int, first: int) -> None:
    source = patches(cached)
    with closing(batches(source, first=first, size=2, threads=threads)) as made:
        for step in range(first, first + 7):
            batch = next(made)
            assert torch.equal(batch.image, source.batch(step, 2).image)
            assert torch.equal(batch.masks, source.batch(step, 2).masks)


def test_several_processes_see_the_patches_of_one_with_the_combined_batch(cached: list[CachedCase]) -> None:
    with (
        closing(batches(patches(cached), first=2, size=4, threads=1)) as joined,
        closing(batches(patches(cached), first=4, size=2, threads=2, every=2)) as one,
        closing(batches(patches(cached), first=5, size=2, threads=1, every=2)) as other,
    ):
        for _ in range(5):
            assert torch.equal(torch.cat([next(one).image, next(other).image]), next(joined).image)


def test_a_resumed_run_sees_the_same_patches_as_an_uninterrupted_one(cached: list[CachedCase]) -> None:
    with closing(batches(patches(cached), first=0, size=2, threads=2)) as whole:
        seen = [next(whole) for _ in range(8)]
    with closing(batches(patches(cached), first=5, size=2, threads=1, ahead=1)) as resumed:
        for batch in seen[5:]:
            other = next(resumed)
            assert torch.equal(other.image, batch.image)
            assert other.cases == batch.cases


# Several data sets


def of_sets(cached: list[CachedCase], numbers: tuple[int, ...]) -> list[CachedCase]:
    return [replace(case, data_set=number) for case, number in zip(cached, numbers, strict=True)]


@properties
@given(st.lists(st.integers(1, 5), min_size=2, max_size=2), st.integers(0, 100), st.integers(0, 1000))
def test_every_cycle_has_as_many_patches_of_a_data_set_as_its_weight(
    cached: list[CachedCase], weights: list[int], seed: int, cycle: int
) -> None:
    source = patches(of_sets(cached, (0, 1, 0, 1, 1)), weights=weights, seed=seed)
    indices = [source._index(cycle * sum(weights) + place) for place in range(sum(weights))]
    assert [sum(index in pool for index in indices) for pool in ((0, 2), (1, 3, 4))] == weights


def test_the_order_of_data_sets_differs_from_cycle_to_cycle(cached: list[CachedCase]) -> None:
    source = patches(of_sets(cached, (0, 1, 0, 1, 1)), weights=[3, 2])
    assert len({tuple(source._index(5 * cycle + place) in (0, 2) for place in range(5)) for cycle in range(8)}) > 1


def test_with_weights_every_case_is_used_once_per_epoch_of_its_data_set(cached: list[CachedCase]) -> None:
    source = patches(of_sets(cached, (0, 1, 0, 1, 1)), weights=[2, 1])
    seen = [source._index(number) for number in range(90)]
    of_second = [index for index in seen if index in (1, 3, 4)]
    assert len(of_second) == 30
    assert all(sorted(of_second[at : at + 3]) == [1, 3, 4] for at in range(0, 30, 3))


def test_data_sets_of_equal_length_are_not_drawn_in_lockstep(cached: list[CachedCase]) -> None:
    source = patches(of_sets([*cached[:4], *cached[:4]], (0,) * 4 + (1,) * 4), weights=[1, 1])
    seen = [source._index(number) for number in range(80)]
    first, second = ([index % 4 for index in seen if index // 4 == data_set] for data_set in (0, 1))
    assert sum(one == other for one, other in zip(first, second, strict=True)) < 25


@pytest.mark.parametrize("weights", [None, [1], [4]])
def test_the_weight_of_a_single_data_set_does_not_change_its_order(
    cached: list[CachedCase], weights: list[int] | None
) -> None:
    source = patches(cached, weights=weights, seed=3)
    epochs = np.concatenate([np.random.default_rng([3, 0, epoch]).permutation(5) for epoch in range(4)])
    assert [source._index(number) for number in range(20)] == epochs.tolist()


def test_without_weights_several_data_sets_are_one_pool(cached: list[CachedCase]) -> None:
    together, one = patches(of_sets(cached, (0, 1, 0, 1, 1))), patches(cached)
    assert all(same_patch(together.patch(number), one.patch(number)) for number in range(10))


# Synthetic cases


def test_a_synthetic_patch_has_the_codes_of_the_real_one_but_other_images(cached: list[CachedCase]) -> None:
    real = patches(cached, augmentation=STILL)
    made = patches([replace(case, synthetic=True) for case in cached], augmentation=STILL)
    for number in range(5):
        image, codes, name, _ = made.patch(number)
        assert name == real.patch(number)[2]
        assert np.array_equal(codes, real.patch(number)[1])
        assert not np.array_equal(image, real.patch(number)[0])
        assert not image[:, ~real.patch(number)[0].any(axis=0)].any()


def test_the_same_number_gives_the_same_synthetic_patch(cached: list[CachedCase]) -> None:
    cases = [replace(case, synthetic=True) for case in cached]
    assert all(same_patch(patches(cases).patch(number), patches(cases).patch(number)) for number in range(5))
    assert len({patches(cases).patch(number)[0].tobytes() for number in range(10)}) == 10


def test_contrast_dropout_also_applies_to_synthetic_patches(cached: list[CachedCase]) -> None:
    dropping = AugmentConfig(contrast_dropout=1.0)
    made = patches([replace(case, synthetic=True) for case in cached], augmentation=dropping)
    for number in range(5):
        image, _, _, present = made.patch(number)
        assert 0 < sum(present) < 4
        assert [bool(contrast.any()) for contrast in image] == list(present)


def test_a_synthetic_case_reuses_the_arrays_of_the_real_case(tmp_path: Path) -> None:
    case = write_case(tmp_path, "a")
    made = replace(case, id="synthetic-a", synthetic=True, data_set=1)
    real, other = cache([case], tmp_path / "cache")[0], cache([made], tmp_path / "cache")[0]
    assert other == replace(real, id="synthetic-a", synthetic=True, data_set=1)


def patch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("patches")]


def test_closing_stops_the_threads(cached: list[CachedCase]) -> None:
    with closing(batches(patches(cached), first=0, size=1, threads=3)) as made:
        next(made)
        assert patch_threads()
    deadline = time.monotonic() + 5
    while patch_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not patch_threads()


def test_an_error_in_a_thread_is_raised_where_the_batch_is_requested(tmp_path: Path) -> None:
    (case,) = cache([write_case(tmp_path, "a")], tmp_path / "cache")
    source = patches([case])
    (case.folder / "image.npy").unlink()
    with closing(batches(source, first=0, size=1, threads=1)) as made, pytest.raises(DataError) as raised:
        next(made)
    assert f"case a: its prepared arrays in {case.folder} were removed or damaged" in str(raised.value)
    assert "No such file" in str(raised.value)
    assert not patch_threads()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("file", ["image.npy", "codes.npy"])
def test_a_file_truncated_while_in_use_is_reported_with_its_case_without_hanging(
    tmp_path: Path, file: str, threads: int
) -> None:
    (case,) = cache([write_case(tmp_path, "a")], tmp_path / "cache")
    source = patches([case])
    source.patch(0)
    with (case.folder / file).open("r+b") as stored:
        stored.truncate(200)
    with closing(batches(source, first=0, size=1, threads=threads)) as made, pytest.raises(DataError, match="case a: "):
        next(made)
    assert not patch_threads()


def test_a_file_that_is_not_an_array_is_reported_with_its_case(tmp_path: Path) -> None:
    (case,) = cache([write_case(tmp_path, "a")], tmp_path / "cache")
    (case.folder / "image.npy").write_bytes(b"nothing like an array")
    for ask in (case.image, lambda: patches([case]).patch(0)):
        with pytest.raises(DataError, match=r"case a: its prepared arrays in .* were removed or damaged"):
            ask()


def test_open_cases_can_be_read_after_their_files_are_deleted(cached: list[CachedCase], tmp_path: Path) -> None:
    (case,) = cache([write_case(tmp_path, "a")], tmp_path / "cache")
    source = patches([case])
    before = source.patch(5)
    shutil.rmtree(case.folder)
    assert same_patch(source.patch(5), before)


def test_patches_are_the_same_with_more_cases_than_open_memory_maps(
    cached: list[CachedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [patches(cached).patch(number) for number in range(15)]
    monkeypatch.setattr(sampler, "MOST_OPEN", 2)
    source = patches(cached)
    assert all(same_patch(source.patch(number), patch) for number, patch in enumerate(whole))
    assert len(source._open) == 2
