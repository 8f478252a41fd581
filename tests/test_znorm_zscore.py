"""The z-score of gradients: the slow twin, and what must hold for any gradient."""

from __future__ import annotations

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from znorm import EPS, zscore, zscore_
from znorm.reference import zscore_reference

properties = settings(derandomize=True, deadline=None, max_examples=60)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
exponents = st.integers(-30, 30)
seeds = st.integers(0, 10_000)


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scored(gradient: Tensor, eps: float = EPS) -> Tensor:
    result = gradient.clone()
    zscore_([result], eps)
    return result


@properties
@given(shapes, exponents, st.floats(-50, 50), st.sampled_from([EPS, 1e-3, 1.0]), seeds)
def test_the_fast_zscore_equals_the_slow_one(
    shape: tuple[int, ...], exponent: int, offset: float, eps: float, seed: int
) -> None:
    gradient = (normal(shape, seed) + offset) * 10.0**exponent
    expected = zscore_reference(gradient, eps)
    torch.testing.assert_close(scored(gradient, eps).double(), expected, rtol=1e-3, atol=2e-3)


def test_a_mean_thousands_of_times_the_spread_is_taken_off_exactly() -> None:
    gradient = 1000 + 0.25 * normal((50, 50))
    torch.testing.assert_close(scored(gradient).double(), zscore_reference(gradient, EPS), rtol=0, atol=2e-3)


@properties
@given(st.sampled_from([(7,), (3, 4), (2, 3, 2)]), st.integers(-100, 100), seeds)
def test_a_power_of_two_as_factor_changes_no_bit(shape: tuple[int, ...], exponent: int, seed: int) -> None:
    gradient = normal(shape, seed)
    assert torch.equal(scored(gradient * 2.0**exponent), scored(gradient))


@properties
@given(exponents, seeds)
def test_the_result_does_not_depend_on_the_scale(exponent: int, seed: int) -> None:
    gradient = normal((4, 5), seed)
    torch.testing.assert_close(scored(gradient * 10.0**exponent), scored(gradient), rtol=1e-5, atol=1e-5)


@properties
@given(exponents, seeds)
def test_the_opposite_gradient_gives_the_opposite_result(exponent: int, seed: int) -> None:
    gradient = normal((4, 5), seed) * 10.0**exponent
    torch.testing.assert_close(scored(-gradient), -scored(gradient), rtol=0, atol=0)


@properties
@given(st.integers(2, 400), st.floats(-10, 10), exponents, seeds)
def test_the_result_has_mean_0_and_standard_deviation_1(count: int, offset: float, exponent: int, seed: int) -> None:
    result = scored((normal((count,), seed) + offset) * 10.0**exponent).double()
    assert float(result.mean()) == pytest.approx(0, abs=1e-3)
    assert float(result.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_a_second_zscore_changes_nothing() -> None:
    once = scored(3 + 5 * normal((6, 7)))
    torch.testing.assert_close(scored(once), once, rtol=1e-5, atol=1e-6)


def test_the_same_gradients_give_the_same_bits() -> None:
    gradient = normal((33, 17, 3))
    assert torch.equal(scored(gradient), scored(gradient))


def test_a_tensor_does_not_depend_on_its_neighbours_in_the_list() -> None:
    gradients = [normal((5, 3), 1), 1e20 * normal((4,), 2), torch.zeros(6), torch.tensor([7.0])]
    together = [gradient.clone() for gradient in gradients]
    zscore_(together)
    assert all(torch.equal(t, scored(g)) for t, g in zip(together, gradients, strict=True))


@pytest.mark.parametrize("value", [0.0, -0.0, 3.7e-41, 1.1, -3e38])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_one_element_passes_through_bit_for_bit(value: float, shape: tuple[int, ...]) -> None:
    gradient = torch.full(shape, value)
    assert torch.equal(scored(gradient).view(torch.int32), gradient.view(torch.int32))


@pytest.mark.parametrize("eps", [0.0, EPS])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 1e-30, 3e38, 1e-45])
def test_a_constant_tensor_becomes_0(value: float, eps: float) -> None:
    assert torch.equal(scored(torch.full((3, 4), value), eps), torch.zeros(3, 4))


@pytest.mark.parametrize("scale", [1e-40, 1e-44, 1e-38])
def test_subnormal_gradients_give_finite_results_of_spread_1_at_most(scale: float) -> None:
    result = scored(normal((50,)) * scale)
    assert torch.isfinite(result).all()
    assert 0.9 < float(result.std(correction=0)) < 1.001


def test_the_largest_numbers_do_not_overflow() -> None:
    largest = torch.finfo(torch.float32).max
    gradient = torch.tensor([largest, -largest, largest, 0.0])
    torch.testing.assert_close(scored(gradient).double(), zscore_reference(gradient, EPS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, offset: float) -> None:
    gradient = (normal((500,)) + offset).to(dtype)
    assert torch.equal(scored(gradient), scored(gradient.float()).to(dtype))


def test_the_sum_of_many_half_precision_numbers_does_not_overflow() -> None:
    gradient = (60_000 * torch.sign(normal((1000,)))).half()
    assert torch.isfinite(scored(gradient)).all()


def test_tensors_of_several_dtypes_keep_theirs_and_get_their_own_result() -> None:
    dtypes = [torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32]
    gradients = [normal((9,), seed).to(dtype) for seed, dtype in enumerate(dtypes)]
    together = [gradient.clone() for gradient in gradients]
    zscore_(together)
    assert [result.dtype for result in together] == dtypes
    assert all(torch.equal(t, scored(g)) for t, g in zip(together, gradients, strict=True))


def test_a_transposed_tensor_is_changed_in_place() -> None:
    gradient = normal((4, 6))
    turned = gradient.clone().t()
    zscore_([turned])
    torch.testing.assert_close(turned.t(), scored(gradient))


def test_a_list_without_tensors_or_with_an_empty_one_is_no_error() -> None:
    zscore_([])
    zscore_([torch.empty(0, 3)])


def test_a_gradient_that_tracks_gradients_itself_is_changed_without_a_graph() -> None:
    gradient = normal((4,)).requires_grad_()
    zscore_([gradient])
    assert gradient.grad_fn is None


def test_one_nan_spoils_its_own_tensor_and_no_other() -> None:
    sick, well = torch.tensor([1.0, math.nan, 2.0]), torch.tensor([1.0, 2.0, 4.0])
    zscore_([sick, well])
    assert torch.isnan(sick).all()
    assert torch.isfinite(well).all()


def test_eps_is_relative_to_the_largest_magnitude() -> None:
    gradient = torch.tensor([-10.0, 10.0])
    torch.testing.assert_close(scored(gradient, eps=1.0), torch.tensor([-0.5, 0.5]))


@pytest.mark.parametrize("eps", [-1e-9, math.nan, math.inf])
def test_an_eps_that_is_negative_or_not_finite_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0"):
        zscore_([torch.ones(2)], eps)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(zscore).failed == 0
