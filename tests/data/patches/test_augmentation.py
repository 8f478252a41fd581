"""Augmentation: image and codes move together, the outside stays 0, the same draw gives the same patch."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.patches.augmentation import AugmentConfig, apply_augmentation, draw_augmentation

properties = settings(derandomize=True, deadline=None, max_examples=40)
seeds = st.integers(0, 10_000)
SHAPE = (20, 24, 16)
NOTHING = dict.fromkeys((field.name for field in fields(AugmentConfig)), 0.0)
IDENTITY = AugmentConfig(**NOTHING)
STRONG = AugmentConfig(
    affine_probability=1.0,
    gamma_probability=1.0,
    noise_probability=1.0,
    rotation_probability=1.0,
    scaling_probability=1.0,
    stretch_probability=1.0,
    range_gamma_probability=1.0,
    inverted_gamma_probability=1.0,
    bias_field_probability=1.0,
    blur_probability=1.0,
    low_resolution_probability=1.0,
)
#: Each augmentation that can be enabled separately: its probability, and its strength if that has another name.
INTENSITIES: dict[str, dict[str, Any]] = {
    "gain": {"gain": 0.3, "gain_probability": 1},
    "shift": {"shift": 0.3, "shift_probability": 1},
    "gamma": {"gamma": 0.5, "gamma_probability": 1},
    "noise": {"noise": 0.3, "noise_probability": 1},
    "stretch": {"stretch": 0.25, "stretch_probability": 1},
    "range_gamma": {"range_gamma": 0.5, "range_gamma_probability": 1},
    "inverted_gamma": {"range_gamma": 0.5, "inverted_gamma_probability": 1},
    "bias_field": {"bias_field": 0.3, "bias_field_probability": 1},
    "blur": {"blur_voxels": 1, "blur_probability": 1},
    "low_resolution": {"low_resolution": 0.5, "low_resolution_probability": 1},
}
GEOMETRY: dict[str, dict[str, Any]] = {
    "flip": {"flip_probability": 0.5},
    "affine": {"affine_probability": 1, "rotation_degrees": 20, "scale": 0.2},
    "rotation": {"rotation_probability": 1, "rotation_degrees": 30},
    "scaling": {"scaling_probability": 1, "scaling": 0.4},
}

Image = npt.NDArray[np.float32]
Codes = npt.NDArray[np.uint8]


def config(**settings: float) -> AugmentConfig:
    """A config with only the given settings enabled."""
    return AugmentConfig(**{**NOTHING, **settings})


def patch(seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> tuple[Image, Codes]:
    """Noise inside a box of half the side lengths, 0 outside; codes everywhere."""
    random = np.random.default_rng(seed)
    image = np.zeros((4, *shape), dtype=np.float32)
    inside = tuple(slice(side // 4, side - side // 4) for side in shape)
    image[:, *inside] = random.standard_normal(image[:, *inside].shape)
    return image, random.integers(0, 4, shape, dtype=np.uint8)


def blob(shape: tuple[int, int, int] = SHAPE) -> tuple[Image, Codes]:
    """An asymmetric ellipsoid; the codes mark where the image is above one half."""
    centre = np.array([n * share for n, share in zip(shape, (0.4, 0.55, 0.45), strict=True)]).reshape(3, 1, 1, 1)
    radii = np.array([n * share for n, share in zip(shape, (0.3, 0.2, 0.35), strict=True)]).reshape(3, 1, 1, 1)
    distance = (((np.indices(shape) - centre) / radii) ** 2).sum(axis=0)
    image = np.repeat(np.clip(2 - distance, 0, None)[None] / 2, 4, axis=0).astype(np.float32)
    return image, (image[0] > 0.5).astype(np.uint8)


def varied(settings: AugmentConfig, image: Image, codes: Codes, seed: int = 0) -> tuple[Image, Codes]:
    return apply_augmentation(draw_augmentation(settings, len(image), np.random.default_rng(seed)), image, codes)


@properties
@given(seeds)
def test_the_same_generator_state_gives_the_same_patch(seed: int) -> None:
    first, second = (varied(STRONG, *patch(), seed) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


def test_another_generator_state_gives_another_patch() -> None:
    assert not np.array_equal(varied(STRONG, *patch(), 1)[0], varied(STRONG, *patch(), 2)[0])


@properties
@given(seeds)
def test_a_config_of_zeros_leaves_the_patch_unchanged(seed: int) -> None:
    image, codes = patch(seed)
    same_image, same_codes = varied(IDENTITY, image, codes, seed)
    np.testing.assert_array_equal(same_image, image)
    np.testing.assert_array_equal(same_codes, codes)


@properties
@given(seeds)
def test_the_input_patch_is_not_modified(seed: int) -> None:
    image, codes = patch()
    varied(STRONG, image, codes, seed)
    np.testing.assert_array_equal(image, patch()[0])
    np.testing.assert_array_equal(codes, patch()[1])


@properties
@given(seeds)
def test_without_geometry_everything_outside_the_brain_stays_0(seed: int) -> None:
    image, codes = patch()
    still = {"flip": 0.0, "affine": 0.0, "rotation": 0.0, "scaling": 0.0}
    settings = replace(STRONG, **{f"{name}_probability": chance for name, chance in still.items()})
    changed, _ = varied(settings, image, codes, seed)
    assert not changed[image == 0].any()
    assert (changed[image != 0] != image[image != 0]).mean() > 0.99


@properties
@given(seeds)
def test_a_moved_patch_is_0_outside_the_moved_brain(seed: int) -> None:
    image, codes = blob()
    moved, _ = varied(config(affine_probability=1, rotation_degrees=180), image, codes, seed)
    changed, _ = varied(
        config(
            affine_probability=1, rotation_degrees=180, shift_probability=1, shift=10, noise_probability=1, noise=10
        ),
        image,
        codes,
        seed,
    )
    assert not changed[moved == 0].any()
    assert not np.array_equal(changed, moved)


@properties
@given(seeds)
def test_results_keep_shape_and_dtype_and_are_finite(seed: int) -> None:
    image, codes = varied(STRONG, *patch(), seed)
    assert (image.dtype, codes.dtype, image.shape, codes.shape) == (np.float32, np.uint8, (4, *SHAPE), SHAPE)
    assert np.isfinite(image).all()
    assert image.flags.c_contiguous
    assert codes.flags.c_contiguous


@properties
@given(seeds)
def test_no_new_code_appears(seed: int) -> None:
    image, codes = patch()
    codes[codes == 2] = 0
    assert set(np.unique(varied(STRONG, image, codes, seed)[1])) <= {0, 1, 3}


@properties
@given(seeds)
def test_flips_move_image_and_codes_together(seed: int) -> None:
    image, codes = patch(seed)
    flips = draw_augmentation(config(flip_probability=0.5), 4, np.random.default_rng(seed)).flips
    axes = [axis for axis in range(3) if flips[axis]]
    flipped_image, flipped_codes = varied(config(flip_probability=0.5), image, codes, seed)
    np.testing.assert_array_equal(flipped_codes, np.flip(codes, tuple(axes)))
    np.testing.assert_array_equal(flipped_image, np.flip(image, tuple(axis + 1 for axis in axes)))


def test_every_combination_of_flips_is_drawn() -> None:
    rng = np.random.default_rng(0)
    assert len({draw_augmentation(config(flip_probability=0.5), 4, rng).flips for _ in range(200)}) == 8


@properties
@given(seeds, st.sampled_from([(24, 28, 20), (24, 24, 24), (20, 36, 28)]))
def test_codes_of_a_moved_patch_stay_on_the_image(seed: int, shape: tuple[int, int, int]) -> None:
    settings = config(flip_probability=0.5, affine_probability=1, rotation_degrees=45, scale=0.2)
    image, codes = varied(settings, *blob(shape), seed)
    overlap, sizes = ((image[0] > 0.5) & (codes > 0)).sum(), (image[0] > 0.5).sum() + (codes > 0).sum()
    assert 2 * overlap / sizes > 0.9


@properties
@given(seeds)
def test_a_rotation_keeps_the_volume_of_a_ball_in_a_patch_of_any_shape(seed: int) -> None:
    distance = (np.indices((20, 28, 36)) - np.array([9.5, 13.5, 17.5]).reshape(3, 1, 1, 1)) ** 2
    codes = (distance.sum(axis=0) < 64).astype(np.uint8)
    image = np.repeat(codes[None].astype(np.float32), 4, axis=0)
    turned = varied(config(affine_probability=1, rotation_degrees=180), image, codes, seed)[1]
    assert 2 * (turned & codes).sum() / (turned.sum() + codes.sum()) > 0.9


@properties
@given(seeds)
def test_an_identity_affine_does_not_move_the_codes(seed: int) -> None:
    image, codes = patch(seed)
    same_image, same_codes = varied(config(affine_probability=1), image, codes, seed)
    np.testing.assert_array_equal(same_codes, codes)
    np.testing.assert_allclose(same_image, image, atol=1e-4)


@properties
@given(seeds)
def test_scaling_stays_within_its_bounds(seed: int) -> None:
    distance = ((np.indices((32, 32, 32)) - 15.5) ** 2).sum(axis=0)
    codes = (distance < 100).astype(np.uint8)
    image = np.repeat(codes[None].astype(np.float32), 4, axis=0)
    grown = varied(config(affine_probability=1, scale=0.2), image, codes, seed)[1].sum() / codes.sum()
    assert 0.75**3 < grown < 1.25**3


@pytest.mark.parametrize(
    ("settings", "low", "high"),
    [
        ({"gain_probability": 1, "gain": 0.3}, 0.7, 1.3),
        ({"shift_probability": 1, "shift": 0.4}, 0.6, 1.4),
    ],
    ids=["gain", "shift"],
)
def test_each_contrast_is_changed_by_its_own_amount_within_bounds(
    settings: dict[str, float], low: float, high: float
) -> None:
    ones = np.ones((4, 2, 2, 2), dtype=np.float32)
    values = [varied(config(**settings), ones, np.zeros((2, 2, 2), np.uint8), seed)[0] for seed in range(50)]
    contrasts = np.array(values)[:, :, 0, 0, 0]
    assert low <= contrasts.min() < low + 0.05
    assert high - 0.05 < contrasts.max() <= high
    assert all(len(set(row)) == 4 for row in contrasts)


@properties
@given(seeds)
def test_gamma_keeps_the_order_and_the_sign_of_intensities(seed: int) -> None:
    image, codes = patch()
    bent, _ = varied(config(gamma_probability=1, gamma=0.5), image, codes, seed)
    for before, after in zip(image, bent, strict=True):
        assert (np.diff(after.ravel()[before.ravel().argsort()]) >= 0).all()
    np.testing.assert_array_equal(np.sign(bent), np.sign(image))


def test_noise_has_the_standard_deviation_that_was_drawn() -> None:
    image, codes = np.ones((4, 32, 32, 32), dtype=np.float32), np.zeros((32, 32, 32), np.uint8)
    variation = draw_augmentation(config(noise_probability=1, noise=0.3), 4, np.random.default_rng(0))
    noise = apply_augmentation(variation, image, codes)[0] - image
    assert 0 < variation.noise < 0.3
    assert float(noise.std()) == pytest.approx(variation.noise, rel=0.02)


# One augmentation at a time


@pytest.mark.parametrize("name", INTENSITIES)
@properties
@given(seeds)
def test_an_intensity_transform_changes_the_brain_and_no_code(name: str, seed: int) -> None:
    image, codes = patch(seed)
    changed, same = varied(config(**INTENSITIES[name]), image, codes, seed)
    np.testing.assert_array_equal(same, codes)
    assert not changed[image == 0].any()
    assert not np.array_equal(changed, image)
    assert np.isfinite(changed).all()
    assert (changed.dtype, changed.shape) == (np.float32, image.shape)


@pytest.mark.parametrize("name", GEOMETRY)
@properties
@given(seeds)
def test_geometry_moves_codes_and_image_without_changing_intensities(name: str, seed: int) -> None:
    codes = patch(seed)[1]
    image = np.repeat((codes > 0)[None], 4, axis=0).astype(np.float32)
    moved, labels = varied(config(**GEOMETRY[name]), image, codes, seed)
    assert moved.min() >= 0
    assert moved.max() <= 1 + 1e-5
    # A code is that of the nearest voxel, which has a weight of at least one eighth in the interpolated image.
    assert (moved[0][labels > 0] >= 0.124).all()
    assert (moved[0][labels == 0] <= 0.876).all()


@pytest.mark.parametrize("name", [*INTENSITIES, *GEOMETRY])
def test_a_probability_of_0_leaves_the_patch_unchanged_at_any_strength(name: str) -> None:
    settings = {**INTENSITIES, **GEOMETRY}[name]
    off = {key: 0.0 if key.endswith("probability") else value for key, value in settings.items()}
    image, codes = patch()
    same_image, same_codes = varied(config(**off), image, codes)
    np.testing.assert_array_equal(same_image, image)
    np.testing.assert_array_equal(same_codes, codes)


@pytest.mark.parametrize("name", [*INTENSITIES, *GEOMETRY])
def test_the_same_seed_gives_the_same_change(name: str) -> None:
    settings = config(**{**INTENSITIES, **GEOMETRY}[name])
    for one, other in zip(varied(settings, *patch(), 3), varied(settings, *patch(), 3), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", [name for name in INTENSITIES if name != "noise"])
def test_a_probability_applies_to_each_contrast_independently(name: str) -> None:
    settings = {k: 0.3 if k.endswith("probability") else v for k, v in INTENSITIES[name].items()}
    image, codes = patch(shape=(8, 8, 8))
    changed = [
        (after != before).any()
        for seed in range(150)
        for after, before in zip(varied(config(**settings), image, codes, seed)[0], image, strict=True)
    ]
    assert np.mean(changed) == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize("name", [*INTENSITIES, *GEOMETRY])
def test_enabling_one_transform_does_not_change_the_draws_of_others(name: str) -> None:
    settings = {**INTENSITIES, **GEOMETRY}[name]
    plain = draw_augmentation(STRONG, 4, np.random.default_rng(5))
    other = draw_augmentation(replace(STRONG, **dict.fromkeys(settings, 0.0)), 4, np.random.default_rng(5))
    same = [np.array_equal(getattr(plain, f.name), getattr(other, f.name)) for f in fields(plain)]
    assert same.count(False) <= (2 if "range_gamma" in settings else 1)


@properties
@given(seeds, st.sampled_from([{"rotation_probability": 1.0}, {"scaling_probability": 1.0}]))
def test_rotation_and_scaling_have_separate_strengths(seed: int, on: dict[str, float]) -> None:
    settings = config(**on, rotation_degrees=30, scaling=0.4)
    matrix = draw_augmentation(settings, 4, np.random.default_rng(seed)).matrix
    assert matrix is not None
    size = np.linalg.det(matrix) ** (1 / 3)
    np.testing.assert_allclose(matrix @ matrix.T, size**2 * np.eye(3), atol=1e-5)
    if "rotation_probability" in on:
        assert size == pytest.approx(1, abs=1e-5)
    else:
        np.testing.assert_allclose(matrix, size * np.eye(3), atol=1e-6)
        assert 1 / 1.4 - 1e-5 <= size <= 1.4 + 1e-5


def test_augmentation_leaves_a_patch_without_brain_empty() -> None:
    image, codes = np.zeros((4, 8, 8, 8), np.float32), np.zeros((8, 8, 8), np.uint8)
    assert not varied(STRONG, image, codes)[0].any()


# Contrast dropout


@properties
@given(seeds)
def test_a_dropped_contrast_is_0_and_the_others_are_unaffected(seed: int) -> None:
    image, codes = patch(seed)
    whole, whole_codes = varied(STRONG, image, codes, seed)
    settings = replace(STRONG, contrast_dropout=1.0)
    present = draw_augmentation(settings, 4, np.random.default_rng(seed)).present
    lossy, lossy_codes = varied(settings, image, codes, seed)
    assert 0 < sum(present) < 4
    np.testing.assert_array_equal(lossy, whole * np.array(present, dtype=np.float32)[:, None, None, None])
    np.testing.assert_array_equal(lossy_codes, whole_codes)


def test_each_of_the_fourteen_proper_subsets_is_drawn_equally_often() -> None:
    rng = np.random.default_rng(0)
    counts = Counter(draw_augmentation(config(contrast_dropout=1.0), 4, rng).present for _ in range(2800))
    assert len(counts) == 14
    assert min(counts.values()) > 150
    assert max(counts.values()) < 250


def test_contrasts_are_dropped_as_often_as_configured() -> None:
    rng = np.random.default_rng(0)
    lossy = [not all(draw_augmentation(config(contrast_dropout=0.3), 4, rng).present) for _ in range(1000)]
    assert np.mean(lossy) == pytest.approx(0.3, abs=0.04)


def test_a_single_contrast_is_never_dropped() -> None:
    rng = np.random.default_rng(0)
    assert {draw_augmentation(config(contrast_dropout=1.0), 1, rng).present for _ in range(20)} == {(True,)}


def test_existing_draws_keep_their_order() -> None:
    variation = draw_augmentation(AugmentConfig(), 4, np.random.default_rng([0, 1, 2]))
    assert variation.noise_seed == 5716919709022709471
    assert variation.flips == (False, True, False)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(
            (name, bad)
            for name in NOTHING
            if name.endswith(("probability", "dropout"))
            for bad in (-0.1, 1.1, float("nan"))
        ),
        *((name, bad) for name in NOTHING if not name.endswith(("probability", "dropout")) for bad in (-1, 181)),
    ],
)
def test_a_bad_config_is_refused_naming_key_and_value(name: str, bad: Any) -> None:
    with pytest.raises(ValueError, match=rf"^augment\.{name}: .*got {bad}$"):
        AugmentConfig(**{name: bad})
