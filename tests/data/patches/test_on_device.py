"""Patches made on a device, here a CPU, equal those of the patch source, for any number of resident cases."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from data.labels import to_regions
from data.patches import device_augmentation, intensity, on_device
from data.patches.augmentation import AugmentConfig, apply_augmentation, draw_augmentation
from data.patches.cache import ARRAYS
from data.patches.device_augmentation import augment_on_device
from data.patches.on_device import DevicePatches, case_bytes, device_batches, region_masks
from data.patches.sampler import CachedCase, PatchSource, _centres

CPU = torch.device("cpu")
#: Everything at once.
ALL = AugmentConfig(
    affine_probability=0.5,
    noise_probability=0.5,
    contrast_dropout=0.3,
    rotation_probability=0.5,
    scaling_probability=0.5,
    stretch_probability=0.7,
    range_gamma_probability=0.7,
    inverted_gamma_probability=0.7,
    bias_field_probability=0.7,
    blur_probability=0.7,
    low_resolution_probability=0.7,
)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> list[CachedCase]:
    """Three prepared cases: a ball of noise with a smaller ball of each tissue inside."""
    cases = []
    for number in range(3):
        folder = tmp_path_factory.mktemp(f"case{number}")
        random = np.random.default_rng(number)
        x, y, z = np.ogrid[-1:1:26j, -1:1:24j, -1:1:22j]
        distance = x**2 + y**2 + z**2
        codes = np.select([distance < 0.05, distance < 0.15, distance < 0.3], [1, 3, 2], 0).astype(np.uint8)
        image = (random.standard_normal((4, *codes.shape)) * (distance < 0.9)).astype(np.float16)
        for name, array in zip(ARRAYS, (image, codes, _centres(codes)), strict=True):
            np.save(folder / name, array)
        cases.append(CachedCase(id=f"case{number}", folder=folder, shape=codes.shape))
    return cases


def source_of(cases: list[CachedCase], patch: tuple[int, int, int] = (16, 24, 20), **more: Any) -> PatchSource:
    return PatchSource(
        cases, **{"patch_voxels": patch, "tumour_probability": 0.5, "augmentation": ALL, "seed": 0, **more}
    )


def assert_same_batches(source: PatchSource, patches: DevicePatches, count: int = 6) -> None:
    for number in range(count):
        expected = source.batch(number, 2)
        found = patches.batch([patches.draft(one) for one in range(2 * number, 2 * number + 2)])
        torch.testing.assert_close(found.image, expected.image, rtol=1e-4, atol=1e-4)
        assert (found.masks != expected.masks).float().mean() < 1e-4
        assert torch.equal(found.present, expected.present)
        assert found.cases == expected.cases


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_batches_equal_those_of_the_source_for_any_number_of_resident_cases(
    cached: list[CachedCase], kept: int
) -> None:
    source = source_of(cached)
    patches = DevicePatches(source, CPU)
    assert patches.keep(sum(map(case_bytes, cached[:kept])))[0] == kept
    assert_same_batches(source, patches)
    assert len(patches._held) == kept


def test_patches_larger_than_the_volume_are_padded(cached: list[CachedCase]) -> None:
    source = source_of(cached, (64, 16, 64))
    patches = DevicePatches(source, CPU)
    patches.keep(10**12)
    assert_same_batches(source, patches, 3)


def test_synthetic_patches_equal_those_of_the_source(cached: list[CachedCase]) -> None:
    source = source_of([replace(case, synthetic=True) for case in cached])
    patches = DevicePatches(source, CPU)
    assert patches.keep(10**12) == (0, 0)
    assert_same_batches(source, patches, 3)


def test_a_case_that_does_not_fit_in_device_memory_is_cropped_on_the_host(
    cached: list[CachedCase], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = source_of(cached)
    patches = DevicePatches(source, CPU)
    patches.keep(10**12)
    sent: list[int] = []

    def send(array: Any, device: torch.device) -> Tensor:
        if array.shape[-3:] != source.patch_voxels and array.ndim > 2:
            sent.append(array.nbytes)
            raise torch.OutOfMemoryError
        return torch.from_numpy(array)

    monkeypatch.setattr(on_device, "send", send)
    assert_same_batches(source, patches, 4)
    assert len(sent) <= 2  # both drafts of the first batch were made before its upload failed


@pytest.mark.parametrize("every", [1, 2])
def test_the_iterator_yields_the_numbered_batches_one_ahead(cached: list[CachedCase], every: int) -> None:
    source = source_of(cached)
    asked: list[int] = []
    made = device_batches(
        DevicePatches(source, CPU), CPU, first=3, size=2, threads=2, every=every, on_batch=asked.append
    )
    with closing(made):
        found = [next(made) for _ in range(4)]
    for position, batch in enumerate(found):
        expected = source.batch(3 + every * position, 2)
        torch.testing.assert_close(batch.image, expected.image, rtol=1e-4, atol=1e-4)
    assert asked == [0, 1, 2, 3]


def test_an_error_in_a_thread_is_raised_where_the_batch_is_requested(cached: list[CachedCase]) -> None:
    source = source_of(cached)
    source.mapped = lambda index: (_ for _ in ()).throw(OSError("gone"))  # type: ignore[method-assign]
    made = device_batches(DevicePatches(source, CPU), CPU, first=0, size=1, threads=1)
    with closing(made), pytest.raises(OSError, match="gone"):
        next(made)


def test_the_masks_match_the_label_map() -> None:
    codes = torch.randint(0, 4, (2, 5, 6, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = np.stack([to_regions(one.numpy()) for one in codes]).astype(np.float32)
    assert np.array_equal(region_masks(codes).numpy(), expected)


class NoReading(TorchDispatchMode):
    """Fails where a GPU would have to be waited for."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(func).startswith(tuple(f"aten.{name}." for name in self.WAITS)), func
        assert not (str(func) == "aten.index.Tensor" and any(i is not None and i.dtype == torch.bool for i in args[1]))
        return func(*args, **(kwargs or {}))


def variations() -> Iterator[Any]:
    for seed in range(8):
        yield draw_augmentation(ALL, 4, np.random.default_rng(seed))


def test_augmenting_a_patch_copies_nothing_back_to_the_host() -> None:
    image = torch.randn(4, 12, 14, 10).clamp_min(-1) * (torch.rand(12, 14, 10) > 0.4)
    codes = torch.zeros(12, 14, 10, dtype=torch.uint8)
    with NoReading():  # type: ignore[no-untyped-call]  # torch does not annotate it
        for variation in variations():
            augment_on_device(variation, image, codes)


@pytest.mark.parametrize("content", ["empty", "constant"])
def test_a_patch_without_brain_or_spread_gives_the_same_as_on_the_host(content: str) -> None:
    image = np.full((4, 8, 8, 8), 0 if content == "empty" else 0.5, dtype=np.float32)
    codes = np.zeros((8, 8, 8), dtype=np.uint8)
    for variation in variations():
        still = replace(variation, matrix=None)  # a moved constant differs at the border by rounding
        expected, _ = apply_augmentation(still, image, codes)
        found, _ = augment_on_device(still, torch.from_numpy(image), torch.from_numpy(codes))
        torch.testing.assert_close(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("stretch", {"factor": 1.3}),
        ("range_gamma", {"exponent": 0.7}),
        ("range_gamma", {"exponent": 1.4, "inverted": True}),
        ("bias_field", {"waves": torch.arange(27.0).reshape(3, 3, 3), "strength": 0.3}),
    ],
)
def test_each_function_equals_the_reference_that_indexes_the_brain(name: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    brain = torch.rand(20, 18, 16, generator=generator) > 0.5
    values = torch.randn(20, 18, 16, generator=generator) * brain
    expected = getattr(intensity, name)(values, brain, **options)
    found = getattr(device_augmentation, f"dense_{name}")(values, brain, **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
