"""Intensity augmentation: what each function preserves, on tensors of any type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.patches import intensity

properties = settings(derandomize=True, deadline=None, max_examples=25)
seeds = st.integers(0, 10_000)
SHAPE = (12, 14, 10)

Change = Callable[[Tensor, Tensor], Tensor]


def waves(seed: int = 0) -> Tensor:
    return torch.randn((3, 3, 3), generator=torch.Generator().manual_seed(seed))


CHANGES: dict[str, Change] = {
    "bias_field": lambda v, b: intensity.bias_field(v, b, waves(), 0.3),
    "stretch": lambda v, b: intensity.stretch(v, b, 1.2),
    "range_gamma": lambda v, b: intensity.range_gamma(v, b, 1.4),
    "inverted_gamma": lambda v, b: intensity.range_gamma(v, b, 1.4, inverted=True),
    "blur": lambda v, b: intensity.blur(v, b, 0.8),
    "low_resolution": lambda v, b: intensity.low_resolution(v, b, 0.6),
}
NEUTRAL: dict[str, Change] = {
    "bias_field": lambda v, b: intensity.bias_field(v, b, waves(), 0.0),
    "stretch": lambda v, b: intensity.stretch(v, b, 1.0),
    "range_gamma": lambda v, b: intensity.range_gamma(v, b, 1.0),
    "inverted_gamma": lambda v, b: intensity.range_gamma(v, b, 1.0, inverted=True),
    "blur": lambda v, b: intensity.blur(v, b, 0.0),
    "low_resolution": lambda v, b: intensity.low_resolution(v, b, 1.0),
}


def scan(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Standard normal values in a box, 0 outside; also the mask of the box."""
    brain = torch.zeros(SHAPE, dtype=torch.bool)
    brain[2:-2, 3:-3, 1:-1] = True
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) * brain, brain


@pytest.mark.parametrize("name", CHANGES)
@properties
@given(seeds)
def test_the_brain_changes_and_the_background_stays_0(name: str, seed: int) -> None:
    values, brain = scan(seed)
    changed = CHANGES[name](values.clone(), brain)
    assert changed.shape == values.shape
    assert not changed[~brain].any()
    assert not torch.equal(changed, values)
    assert changed.isfinite().all()


@pytest.mark.parametrize("name", CHANGES)
def test_the_input_is_not_modified(name: str) -> None:
    values, brain = scan()
    CHANGES[name](values, brain)
    assert torch.equal(values, scan()[0])


@pytest.mark.parametrize("name", CHANGES)
def test_the_dtype_is_kept(name: str) -> None:
    values, brain = scan()
    changed = CHANGES[name](values.double(), brain)
    assert changed.dtype == torch.float64
    torch.testing.assert_close(changed.float(), CHANGES[name](values, brain), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CHANGES)
def test_a_patch_without_brain_stays_0(name: str) -> None:
    nothing = torch.zeros(SHAPE)
    assert not CHANGES[name](nothing, nothing > 0).any()


@pytest.mark.parametrize("name", CHANGES)
def test_a_constant_brain_stays_finite(name: str) -> None:
    brain = scan()[1]
    assert CHANGES[name](2.0 * brain, brain).isfinite().all()


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_strength_changes_nothing(name: str) -> None:
    values, brain = scan()
    torch.testing.assert_close(NEUTRAL[name](values, brain), values, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["stretch", "range_gamma", "inverted_gamma"])
@properties
@given(seeds)
def test_a_histogram_change_keeps_the_order_of_intensities(name: str, seed: int) -> None:
    values, brain = scan(seed)
    changed = CHANGES[name](values, brain)[brain][values[brain].argsort()]
    assert (changed.diff() >= -1e-6).all()


@pytest.mark.parametrize("name", ["range_gamma", "inverted_gamma"])
@properties
@given(seeds)
def test_gamma_keeps_mean_and_standard_deviation(name: str, seed: int) -> None:
    values, brain = scan(seed)
    changed = CHANGES[name](values, brain)[brain]
    assert float(changed.mean()) == pytest.approx(float(values[brain].mean()), abs=1e-4)
    assert float(changed.std()) == pytest.approx(float(values[brain].std()), rel=1e-3)


def test_inverted_gamma_is_gamma_of_the_negated_image() -> None:
    values, brain = scan()
    torch.testing.assert_close(
        intensity.range_gamma(values, brain, 1.5, inverted=True), -intensity.range_gamma(-values, brain, 1.5)
    )


@properties
@given(seeds, st.floats(0.5, 2))
def test_a_stretched_image_stays_within_its_range(seed: int, factor: float) -> None:
    values, brain = scan(seed)
    changed = intensity.stretch(values, brain, factor)[brain]
    assert values[brain].min() - 1e-6 <= changed.min()
    assert changed.max() <= values[brain].max() + 1e-6


@properties
@given(seeds, st.floats(0.01, 1))
def test_a_bias_field_is_smooth_and_no_stronger_than_requested(seed: int, strength: float) -> None:
    values, brain = scan(seed)
    darkest = values[brain].min()
    field = (intensity.bias_field(values, brain, waves(seed), strength) - darkest) / (values - darkest)
    log_field = torch.where(brain & (values - darkest > 1e-3), field, 1.0).log()
    assert float(log_field.abs().max()) <= strength * 1.01 + 1e-3
    inside = log_field[2:-2, 3:-3, 1:-1].nan_to_num()
    assert float(inside.abs().max()) > 0.1 * strength


@pytest.mark.parametrize("name", ["blur", "low_resolution"])
def test_values_outside_the_brain_do_not_affect_the_result(name: str) -> None:
    brain = scan()[1]
    torch.testing.assert_close(CHANGES[name](2.0 * brain, brain), 2.0 * brain, atol=1e-5, rtol=1e-5)


@properties
@given(seeds, st.floats(0.3, 2))
def test_a_blur_keeps_a_constant_and_reduces_the_spread(seed: int, sigma: float) -> None:
    everywhere = torch.ones(SHAPE, dtype=torch.bool)
    torch.testing.assert_close(intensity.blur(torch.full(SHAPE, 2.5), everywhere, sigma), torch.full(SHAPE, 2.5))
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    assert intensity.blur(values, everywhere, sigma).std() < values.std()


def test_a_blur_equals_that_of_scipy_away_from_the_border() -> None:
    from scipy import ndimage

    values = torch.randn((24, 24, 24), generator=torch.Generator().manual_seed(0))
    blurred = intensity.blur(values, torch.ones_like(values, dtype=torch.bool), 0.9)
    expected = torch.from_numpy(ndimage.gaussian_filter(values.numpy(), 0.9, truncate=4.0))
    torch.testing.assert_close(blurred[5:-5, 5:-5, 5:-5], expected[5:-5, 5:-5, 5:-5], atol=1e-3, rtol=1e-3)


@properties
@given(st.floats(0.1, 1), st.tuples(*(st.integers(2, 20),) * 3))
def test_low_resolution_keeps_a_constant_and_the_shape(share: float, shape: tuple[int, int, int]) -> None:
    constant = torch.full(shape, 1.5)
    same = intensity.low_resolution(constant, torch.ones(shape, dtype=torch.bool), share)
    torch.testing.assert_close(same, constant)


def test_low_resolution_removes_detail_finer_than_its_voxels() -> None:
    checkers = (torch.stack(torch.meshgrid(*(torch.arange(16),) * 3, indexing="ij")).sum(0) % 2).float() - 0.5
    coarse = intensity.low_resolution(checkers, torch.ones_like(checkers, dtype=torch.bool), 0.5)
    assert float(coarse.abs().max()) < 1e-6
