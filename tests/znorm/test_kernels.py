"""The Triton kernels of the z-score, run by Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib
import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from znorm import EPS, kernels, zscore_
from znorm.kernels import zscore_kernels_
from znorm.self_check import zscore_reference
from znorm.zscore import Mode, _on_device

properties = settings(derandomize=True, deadline=None, max_examples=15)
#: For every test but that of a machine without Triton.
interpreted = pytest.mark.usefixtures("interpreter")
CPU = torch.device("cpu")
MODES: list[Mode] = ["zscore", "centre", "scale"]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Triton's interpreter, only for this module, with chunks so small that tensors have several."""
    # First Triton itself, as the interpreter would stay with its own functions for the rest of the process.
    pytest.importorskip("triton")
    importlib.import_module("triton.language")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setattr(kernels, "_CHUNK", 32)
        patch.setattr(kernels, "_LANES", 4)
        patch.setattr(kernels, "_passed", {})
        forget_the_kernels()
        yield
    forget_the_kernels()


def forget_the_kernels() -> None:
    sys.modules.pop("znorm.kernels_triton", None)
    kernels._kernels.cache_clear()


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernels had not been used before."""
    monkeypatch.setattr(kernels, "_passed", {})


def normal(shape: Sequence[int], seed: int = 0) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def scored(gradient: Tensor, eps: float = EPS, mode: Mode = "zscore") -> Tensor:
    result = gradient.clone()
    finite = zscore_kernels_([result], eps, mode, together=False)
    assert finite is not None
    assert bool(finite)
    return result


def assert_reference(found: Tensor, gradient: Tensor, mode: Mode = "zscore", tolerance: float = 1e-5) -> None:
    expected = zscore_reference(gradient, EPS, mode)
    size = float(expected.abs().max()) or 1.0
    torch.testing.assert_close(found.double() / size, expected / size, rtol=0, atol=tolerance)


@interpreted
@properties
@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=3),
    st.integers(-30, 30),
    st.floats(-50, 50),
    st.sampled_from([0.0, EPS, 1e-3, 1.0]),
    st.integers(0, 10_000),
)
def test_the_kernels_equal_the_slow_reference(
    shape: list[int], exponent: int, offset: float, eps: float, seed: int
) -> None:
    gradient = (normal(shape, seed) + offset) * 10.0**exponent
    expected = zscore_reference(gradient, eps)
    torch.testing.assert_close(scored(gradient, eps).double(), expected, rtol=1e-4, atol=1e-4)


@interpreted
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("offset", [0.0, 40.0])
@pytest.mark.parametrize("count", [2, 31, 32, 33, 300])
def test_every_mode_equals_the_slow_reference(mode: Mode, offset: float, count: int) -> None:
    gradient = normal((count,)) + offset
    assert_reference(scored(gradient, mode=mode), gradient, mode)


@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_the_global_scope_treats_all_tensors_as_one(mode: Mode) -> None:
    gradients = [normal((5, 3), 1), 3 + 2 * normal((140,), 2), torch.tensor([7.0]), 1e-20 * normal((9,))]
    joined = torch.cat([gradient.reshape(-1) for gradient in gradients])
    zscore_kernels_(gradients, EPS, mode, together=True)
    assert_reference(torch.cat([gradient.reshape(-1) for gradient in gradients]), joined, mode)


@interpreted
def test_a_result_does_not_depend_on_the_other_tensors_in_the_list() -> None:
    gradients = [normal((50, 3), 1), 1e20 * normal((4,), 2), torch.zeros(6), 5 + normal((64,), 3)]
    found = [gradient.clone() for gradient in gradients]
    zscore_kernels_(found, EPS, "zscore", together=False)
    assert all(torch.equal(f, scored(g)) for f, g in zip(found, gradients, strict=True))


@interpreted
def test_float16_is_computed_in_float32() -> None:
    gradient = (normal((150,)) + 20).half()
    assert torch.equal(scored(gradient), scored(gradient.float()).half())


@interpreted
def test_bfloat16_equals_the_slow_reference_up_to_rounding() -> None:
    gradient = (normal((150,)) + 20).bfloat16()
    # The interpreter cuts digits off, where a GPU rounds.
    torch.testing.assert_close(scored(gradient).double(), zscore_reference(gradient, EPS), rtol=2**-7, atol=1e-6)


@interpreted
def test_float64_is_left_to_the_eager_path() -> None:
    assert zscore_kernels_([normal((9,)).double()], EPS, "zscore", together=False) is None


@interpreted
@pytest.mark.parametrize("layout", ["channels last", "transposed"])
def test_dense_memory_in_any_order_is_changed_in_place(layout: str) -> None:
    gradient = normal((4, 6, 3, 2, 2))
    stored = gradient.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "channels last":
        stored = gradient.contiguous(memory_format=torch.channels_last_3d)
    zscore_kernels_([stored], EPS, "zscore", together=False)
    assert not stored.is_contiguous()
    assert_reference(stored, gradient)


@interpreted
@pytest.mark.parametrize("kind", ["with gaps", "expanded", "twice", "a subclass", "of two dtypes"])
def test_unsupported_tensors_are_left_unchanged(kind: str) -> None:
    whole = normal((6, 4))
    gradients = {
        "with gaps": [whole[:, ::2]],
        "expanded": [whole[:1].expand(3, 4)],
        "twice": [whole, whole],
        "a subclass": [whole.as_subclass(type("Subclass", (Tensor,), {}))],
        "of two dtypes": [whole, whole.half()],
    }[kind]
    assert zscore_kernels_(gradients, EPS, "zscore", together=False) is None
    assert torch.equal(whole, normal((6, 4)))


@interpreted
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("place", [0, 40, 99])
def test_one_non_finite_element_leaves_every_tensor_unchanged(value: float, together: bool, place: int) -> None:
    gradients = [normal((70,)), normal((100,)), normal((5,))]
    gradients[1][place] = value
    found = [gradient.clone() for gradient in gradients]
    finite = zscore_kernels_(found, EPS, "zscore", together=together)
    assert finite is not None
    assert finite.tolist() == [False]
    torch.testing.assert_close(found, gradients, rtol=0, atol=0, equal_nan=True)


@interpreted
@pytest.mark.parametrize("eps", [0.0, EPS])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e-30, 3e38, 1e-45])
@pytest.mark.parametrize("count", [12, 333])
def test_a_constant_tensor_becomes_0(count: int, value: float, eps: float) -> None:
    assert torch.equal(scored(torch.full((count,), value), eps), torch.zeros(count))


@interpreted
@pytest.mark.parametrize("mean", [1e2, 1e4, 1e6])
def test_a_mean_far_beyond_the_spread_keeps_the_remaining_precision(mean: float) -> None:
    gradient = mean + normal((20, 30))
    assert_reference(scored(gradient), gradient)


@interpreted
@pytest.mark.parametrize("exponent", [-45, -41, -38, -30, 30, 38])
@pytest.mark.parametrize("mode", MODES)
def test_values_of_any_magnitude_are_zscored(exponent: int, mode: Mode) -> None:
    gradient = normal((150,)).clamp(-3, 3) * 10.0**exponent
    gradient = gradient if exponent > -45 else torch.tensor([1e-45, -1e-45, 0.0, 3e-45] * 50)
    # Where subnormal numbers are the result, they have few digits.
    tolerance = 2e-45 / float(gradient.abs().max()) if mode == "centre" and exponent < -38 else 1e-5
    assert_reference(scored(gradient, mode=mode), gradient, mode, tolerance)


@interpreted
def test_scaling_by_a_power_of_two_changes_no_bit() -> None:
    gradient = normal((100,)) + 3
    assert torch.equal(scored(gradient * 2.0**90), scored(gradient))


@interpreted
def test_the_negated_gradient_gives_the_negated_bits() -> None:
    gradient = normal((100,)) + 3
    assert torch.equal(scored(-gradient), -scored(gradient))


@interpreted
def test_the_same_gradients_give_the_same_bits() -> None:
    gradient = normal((33, 17))
    assert torch.equal(scored(gradient), scored(gradient))


@interpreted
def test_new_addresses_with_the_same_sizes_are_noticed() -> None:
    gradients = [normal((40,), seed) for seed in range(3)]
    kept = [scored(gradient) for gradient in gradients]
    for gradient, found in zip(gradients, kept, strict=True):
        assert_reference(found, gradient)


@interpreted
def test_autograd_detects_the_in_place_change() -> None:
    gradient = normal((40,))
    before = gradient._version
    zscore_kernels_([gradient], EPS, "zscore", together=False)
    assert gradient._version > before


@interpreted
def test_the_number_of_launches_does_not_depend_on_the_number_of_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    scored(normal((3,)))  # the check at the first use
    launched: list[str] = []
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda kernel, *a, **k: (launched.append(kernel), launch(kernel, *a, **k)))
    counts = []
    for tensors in (1, 20):
        launched.clear()
        zscore_kernels_([normal((40,), seed) for seed in range(tensors)], EPS, "zscore", together=False)
        counts.append(len(launched))
    assert counts == [3, 3]


class Bytes(TorchDispatchMode):
    """Adds up the sizes of all tensors that operations return."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.total += sum(leaf.nbytes for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_temporaries_take_less_than_a_twentieth_of_large_gradients(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored(normal((3,)).to(dtype))  # the check at the first use
    monkeypatch.setattr(kernels, "_CHUNK", 8192)
    monkeypatch.setattr(kernels, "_launch", lambda *a, **k: None)
    gradients = [torch.zeros(count, dtype=dtype) for count in (2**20, 3 * 2**18, 2**14)]
    with Bytes() as allocated:  # type: ignore[no-untyped-call]  # torch does not annotate it
        zscore_kernels_(gradients, EPS, "zscore", together=False)
    assert 0 < allocated.total < sum(gradient.nbytes for gradient in gradients) / 20


@interpreted
def test_the_kernels_pass_their_self_check(unchecked: None) -> None:
    assert [kernels._self_check(CPU, dtype) for dtype in kernels._DTYPES] == [None, None, None]


@interpreted
def test_a_wrong_kernel_result_gives_one_warning_and_the_eager_path(
    unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "zscore_reference", lambda *a: 1 + zscore_reference(*a))
    gradient = normal((40,))
    with pytest.warns(RuntimeWarning, match=r"torch\.float32 on cpu.*differs from the reference"):
        assert zscore_kernels_([gradient], EPS, "zscore", together=False) is None
    assert zscore_kernels_([gradient], EPS, "zscore", together=False) is None  # warnings are errors here
    assert torch.equal(gradient, normal((40,)))


@interpreted
@pytest.mark.parametrize("passed", [False, True])
def test_a_failing_launch_gives_one_warning_and_the_eager_path(
    passed: bool, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*a: Any, **k: Any) -> None:
        raise OSError("no compiler\nmore lines")

    if passed:
        scored(normal((3,)))
    monkeypatch.setattr(kernels, "_launch", refuse)
    with pytest.warns(RuntimeWarning, match="OSError: no compiler$"):
        assert zscore_kernels_([normal((40,))], EPS, "zscore", together=False) is None
    assert zscore_kernels_([normal((40,))], EPS, "zscore", together=False) is None


@interpreted
@pytest.mark.parametrize("passed", [False, True])
def test_a_transient_out_of_memory_disables_the_kernels_for_one_step(
    passed: bool, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*a: Any, **k: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if passed:
        scored(normal((3,)))
    with monkeypatch.context() as short:
        short.setattr(kernels, "_launch", run_out)
        assert zscore_kernels_([normal((40,))], EPS, "zscore", together=False) is None
    assert_reference(scored(normal((40,))), normal((40,)))


@interpreted
def test_an_unaligned_address_only_affects_how_its_own_tensor_is_read() -> None:
    whole = normal((201,))
    views = [whole[:64], whole[65:129], whole[131:200]]  # as DDP cuts gradients out of a bucket
    expected = [scored(view.clone()) for view in views]
    zscore_kernels_(views, EPS, "zscore", together=False)
    assert all(torch.equal(view, one) for view, one in zip(views, expected, strict=True))


@interpreted
@pytest.mark.parametrize("mode", MODES)
def test_the_device_path_uses_the_kernels_if_possible(mode: Mode) -> None:
    gradient = normal((40,))
    through_the_path = gradient.clone()
    assert _on_device([through_the_path], EPS, mode, together=False)
    assert torch.equal(through_the_path, scored(gradient, mode=mode))


@interpreted
def test_the_device_path_changes_nothing_if_one_of_several_dtypes_is_not_finite() -> None:
    gradients = [normal((40,)), torch.tensor([1.0, math.nan]).half()]
    assert not _on_device(gradients, EPS, "zscore", together=False)
    assert torch.equal(gradients[0], normal((40,)))


def test_without_triton_the_device_path_is_skipped_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert zscore_kernels_([normal((40,))], EPS, "zscore", together=False) is None


def test_cpu_tensors_only_use_the_kernels_in_the_interpreter(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert zscore_kernels_([normal((40,))], EPS, "zscore", together=False) is None
    assert zscore_([normal((40,))])
