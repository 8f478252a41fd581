"""The z-score of gradients: equality with the slow reference, and invariants for any gradient."""

from __future__ import annotations

import doctest
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from znorm import EPS, zscore, zscore_
from znorm.self_check import zscore_reference
from znorm.zscore import Mode, Scope

properties = settings(derandomize=True, deadline=None, max_examples=60)
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
exponents = st.integers(-30, 30)
seeds = st.integers(0, 10_000)


#: The path for a CPU, and the one for other devices, which runs on a CPU as well.
PATHS = ["cpu", "device"]


@contextmanager
def through(path: str) -> Iterator[None]:
    """Send CPU tensors the way of other devices."""
    with pytest.MonkeyPatch.context() as patch:
        if path == "device":
            patch.setattr(zscore, "_on_cpu", by_device)
        yield


def by_device(groups: list[list[Tensor]], eps: float, mode: Mode) -> bool:
    together = len(groups) == 1
    return bool(zscore._on_device([g for group in groups for g in group], eps, mode, together=together))


def normal(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scored(gradient: Tensor, eps: float = EPS) -> Tensor:
    result = gradient.clone()
    zscore_([result], eps)
    return result


@properties
@given(shapes, exponents, st.floats(-50, 50), st.sampled_from([EPS, 1e-3, 1.0]), seeds)
def test_the_fast_zscore_equals_the_slow_reference(
    shape: tuple[int, ...], exponent: int, offset: float, eps: float, seed: int
) -> None:
    gradient = (normal(shape, seed) + offset) * 10.0**exponent
    expected = zscore_reference(gradient, eps)
    torch.testing.assert_close(scored(gradient, eps).double(), expected, rtol=1e-3, atol=2e-3)


def test_a_mean_thousands_of_times_the_spread_is_removed_exactly() -> None:
    gradient = 1000 + 0.25 * normal((50, 50))
    torch.testing.assert_close(scored(gradient).double(), zscore_reference(gradient, EPS), rtol=0, atol=2e-3)


@properties
@given(st.sampled_from([(7,), (3, 4), (2, 3, 2)]), st.integers(-100, 100), seeds)
def test_scaling_by_a_power_of_two_changes_no_bit(shape: tuple[int, ...], exponent: int, seed: int) -> None:
    gradient = normal(shape, seed)
    assert torch.equal(scored(gradient * 2.0**exponent), scored(gradient))


@properties
@given(exponents, seeds)
def test_the_result_does_not_depend_on_the_scale(exponent: int, seed: int) -> None:
    gradient = normal((4, 5), seed)
    torch.testing.assert_close(scored(gradient * 10.0**exponent), scored(gradient), rtol=1e-5, atol=1e-5)


@properties
@given(exponents, seeds)
def test_the_negated_gradient_gives_the_negated_result(exponent: int, seed: int) -> None:
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


def test_a_result_does_not_depend_on_the_other_tensors_in_the_list() -> None:
    gradients = [normal((5, 3), 1), 1e20 * normal((4,), 2), torch.zeros(6), torch.tensor([7.0])]
    together = [gradient.clone() for gradient in gradients]
    zscore_(together)
    assert all(torch.equal(t, scored(g)) for t, g in zip(together, gradients, strict=True))


@pytest.mark.parametrize("value", [0.0, -0.0, 3.7e-41, 1.1, -3e38])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)])
def test_a_single_element_passes_through_bit_for_bit(value: float, shape: tuple[int, ...]) -> None:
    gradient = torch.full(shape, value)
    assert torch.equal(scored(gradient).view(torch.int32), gradient.view(torch.int32))


@pytest.mark.parametrize("eps", [0.0, EPS])
@pytest.mark.parametrize("value", [0.0, 1.0, -2.5, 0.1, 1e-30, 3e38, 1e-45])
@pytest.mark.parametrize("count", [12, 10_007, 1_000_003])
def test_a_constant_tensor_becomes_0(count: int, value: float, eps: float) -> None:
    assert torch.equal(scored(torch.full((count,), value), eps), torch.zeros(count))


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


def test_mixed_dtypes_are_kept_and_each_tensor_gets_its_own_result() -> None:
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


def test_an_empty_list_or_an_empty_tensor_is_accepted() -> None:
    zscore_([])
    zscore_([torch.empty(0, 3)])


def test_a_gradient_that_requires_grad_is_changed_without_a_graph() -> None:
    gradient = normal((4,)).requires_grad_()
    zscore_([gradient])
    assert gradient.grad_fn is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scope", ["layer", "channel", "global"])
@pytest.mark.parametrize("path", PATHS)
def test_one_non_finite_element_leaves_every_tensor_unchanged(value: float, scope: Scope, path: str) -> None:
    well, sick = torch.tensor([[1.0, 2.0], [4.0, 1.0]]), torch.tensor([[1.0, value], [2.0, 3.0]])
    together = [well.clone(), sick.clone()]
    with through(path):
        assert not zscore_(together, scope=scope)
    torch.testing.assert_close(together, [well, sick], rtol=0, atol=0, equal_nan=True)


def test_eps_is_relative_to_the_root_of_the_mean_square() -> None:
    gradient = torch.tensor([-10.0, 10.0, 0.0, 0.0])
    expected = gradient / (2 * math.sqrt(50))
    torch.testing.assert_close(scored(gradient, eps=1.0), expected)


# Modes, scopes and the path for devices that must not be asked for scalars


@properties
@given(shapes, exponents, st.floats(-50, 50), st.sampled_from(["centre", "scale", "zscore"]))
@pytest.mark.parametrize("path", PATHS)
def test_every_mode_equals_the_slow_reference(
    path: str, shape: tuple[int, ...], exponent: int, offset: float, mode: Mode
) -> None:
    gradient = (normal(shape) + offset) * 10.0**exponent
    result = gradient.clone()
    with through(path):
        assert zscore_([result], mode=mode)
    expected = zscore_reference(gradient, EPS, mode)
    size = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(result.double() / size, expected / size, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("path", PATHS)
def test_a_mean_far_beyond_the_spread_keeps_the_remaining_precision(mean: float, path: str) -> None:
    gradient = mean + normal((200, 300))
    result = gradient.clone()
    with through(path):
        zscore_([result])
    torch.testing.assert_close(result.double(), zscore_reference(gradient, EPS), rtol=0, atol=5e-5)


@pytest.mark.parametrize("mode", ["centre", "scale", "zscore"])
@pytest.mark.parametrize("path", PATHS)
def test_the_global_scope_treats_all_tensors_as_one(mode: Mode, path: str) -> None:
    gradients = [normal((5, 3), 1), 3 + 2 * normal((40,), 2), torch.tensor([7.0])]
    joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
    with through(path):
        zscore_(gradients, scope="global", mode=mode)
    found = torch.cat([gradient.reshape(-1) for gradient in gradients])
    torch.testing.assert_close(found.double(), zscore_reference(joined, EPS, mode), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["centre", "scale", "zscore"])
@pytest.mark.parametrize("dim", [0, 1])
def test_the_channel_scope_treats_each_output_channel_separately(mode: Mode, dim: int) -> None:
    gradient = normal((4, 6, 3, 3)) * torch.arange(1, 7).view(1, 6, 1, 1)
    result = gradient.clone()
    zscore_([result], scope="channel", mode=mode, channel_dims=[dim])
    for found, channel in zip(result.unbind(dim), gradient.unbind(dim), strict=True):
        torch.testing.assert_close(found.double(), zscore_reference(channel, EPS, mode), rtol=1e-5, atol=1e-5)


def test_single_element_channels_pass_through() -> None:
    gradient = normal((7,))
    result = gradient.clone()
    zscore_([result], scope="channel")
    assert torch.equal(result, gradient)


@pytest.mark.parametrize("exponent", [-45, -38, -30, 0, 30, 38])
@pytest.mark.parametrize("path", PATHS)
def test_values_of_any_magnitude_are_zscored(exponent: int, path: str) -> None:
    gradient = normal((3000,)).clamp(-3, 3) * 10.0**exponent
    gradient = gradient if exponent > -45 else torch.tensor([1e-45, -1e-45, 0.0, 3e-45] * 50)
    result = gradient.clone()
    with through(path):
        zscore_([result])
    torch.testing.assert_close(result.double(), zscore_reference(gradient, EPS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["channels last", "transposed", "every other", "expanded in part"])
def test_any_memory_layout_gives_the_same_result(kind: str) -> None:
    gradient = normal((4, 6, 3, 2, 2))
    layouts: dict[str, Callable[[Tensor], Tensor]] = {
        "channels last": lambda g: g.contiguous(memory_format=torch.channels_last_3d),
        "transposed": lambda g: g.transpose(0, 1).contiguous().transpose(0, 1),
        "every other": lambda g: torch.stack([g, g], dim=-1)[..., 0],
        "expanded in part": lambda g: g.clone().unsqueeze(0).squeeze(0),
    }
    stored = layouts[kind](gradient)
    zscore_([stored])
    torch.testing.assert_close(stored, scored(gradient))


def test_a_large_tensor_is_summed_without_losing_digits() -> None:
    gradient = 1e-4 + 3e-4 * normal((3_000_000,))
    torch.testing.assert_close(scored(gradient).double(), zscore_reference(gradient, EPS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("eps", [-1e-9, math.nan, math.inf])
def test_a_negative_or_non_finite_eps_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0"):
        zscore_([torch.ones(2)], eps)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(zscore).failed == 0
