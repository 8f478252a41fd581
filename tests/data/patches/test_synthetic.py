"""Synthetic images: random contrasts of the same tissues, 0 outside the brain, the same for the same number."""

from __future__ import annotations

import doctest
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.patches import synthetic
from data.patches.synthetic import CLASSES, synthetic_image, tissue_classes


def patch(seed: int = 0, shape: tuple[int, int, int] = (14, 12, 10)) -> tuple[Any, Any]:
    """A patch: noise in the brain, which leaves out two sides, and three tissues of a tumour."""
    image = np.random.default_rng(seed).standard_normal((4, *shape)).astype(np.float32)
    image[:, :3] = image[:, :, -2:] = 0
    codes = np.zeros(shape, dtype=np.uint8)
    codes[5:11, 3:8, 2:8] = 2
    codes[6:9, 4:7, 3:6] = 1
    codes[8, 5, 5] = 3
    return image, codes


def made(seed: int, image: Any, codes: Any) -> Any:
    return synthetic_image(image, codes, np.random.default_rng(seed))


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(synthetic).failed == 0


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 1000))
def test_the_background_stays_0_and_each_contrast_is_z_scored_over_the_brain(seed: int) -> None:
    image, codes = patch()
    brain, found = image.any(axis=0), made(seed, image, codes)
    assert found.dtype == np.float32
    assert found.shape == image.shape
    assert not found[:, ~brain].any()
    np.testing.assert_allclose(found[:, brain].mean(axis=1), 0, atol=1e-3)
    np.testing.assert_allclose(found[:, brain].std(axis=1), 1, atol=1e-3)


def test_the_same_generator_state_gives_the_same_image_and_another_state_another() -> None:
    image, codes = patch()
    assert np.array_equal(made(1, image, codes), made(1, image, codes))
    assert len({made(seed, image, codes).tobytes() for seed in range(8)}) == 8


def test_the_input_image_and_codes_are_not_modified() -> None:
    (image, codes), before = patch(), patch()
    made(0, image, codes)
    assert np.array_equal(image, before[0])
    assert np.array_equal(codes, before[1])


def test_a_patch_without_brain_stays_empty() -> None:
    image, codes = patch()
    assert not made(0, np.zeros_like(image), codes).any()


def test_a_missing_contrast_stays_0() -> None:
    image, codes = patch()
    image[2] = 0
    assert [bool(found.any()) for found in made(0, image, codes)] == [True, True, False, True]


def test_the_tumour_may_fill_the_patch() -> None:
    image, codes = patch()
    codes[:] = 2
    assert np.isfinite(made(0, image, codes)).all()


@pytest.mark.parametrize("count", range(CLASSES[0], CLASSES[1] + 1))
def test_the_brain_is_split_into_equal_parts_and_each_tumour_tissue_is_a_class(count: int) -> None:
    image, codes = patch()
    brain = image.any(axis=0)
    classes = tissue_classes(image[0], codes, brain, count)
    sizes = np.bincount(classes[brain & (codes == 0)])
    assert len(sizes) == count
    assert np.ptp(sizes) <= 1
    for code in (1, 2, 3):
        assert set(classes[codes == code].tolist()) == {count - 1 + code}


def test_tissues_differ_in_most_images() -> None:
    image, codes = patch(shape=(24, 24, 24))
    found = np.stack([made(seed, image, codes) for seed in range(20)])
    brain = image.any(axis=0)
    apart = abs(found[:, :, codes == 2].mean(axis=2) - found[:, :, brain & (codes == 0)].mean(axis=2))
    assert np.median(apart) > 0.3
