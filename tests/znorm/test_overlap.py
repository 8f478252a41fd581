"""Gradient overlap: both gradients equal autograd's, on toy and real networks, and measuring them changes nothing."""

from __future__ import annotations

import copy
import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.layers.simplelayers import SkipConnection
from torch import Tensor, nn

from models import NetworkConfig, build_network
from models.networks import Architecture
from znorm import overlap
from znorm.overlap import Junction, Overlap, find_junctions, watch_overlap

architectures = pytest.mark.parametrize("architecture", ["unet", "resunet", "segresnet"])


def network(architecture: Architecture, dtype: torch.dtype = torch.float64, **kind: Any) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = NetworkConfig(**{"architecture": architecture, "channels": (8, 16, 24), **kind})
        return build_network(config, in_channels=4, out_channels=3).to(dtype)


def image(dtype: torch.dtype = torch.float64, count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn((count, 4, 16, 16, 16), dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(logits: Tensor) -> Tensor:
    weights = torch.randn(logits.shape, dtype=logits.dtype, generator=torch.Generator().manual_seed(7))
    return (logits * weights).sum() + logits.square().sum()


def by_hand(a: Tensor, b: Tensor) -> Overlap:
    norm_a, norm_b = float(a.norm()), float(b.norm())
    return Overlap(
        cosine=float((a * b).sum()) / (norm_a * norm_b),
        ratio=float((a + b).norm()) / (norm_a + norm_b),
        norm_skip=norm_a,
        norm_transformation=norm_b,
    )


def assert_equal(measured: Overlap, expected: Overlap, rel: float = 1e-9) -> None:
    assert vars(measured) == pytest.approx(vars(expected), rel=rel, abs=1e-9)


class Residual(nn.Module):
    """x + f(x) as a separate module."""

    def __init__(self, f: nn.Module) -> None:
        super().__init__()
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.f(x))


# Against vectors written down


@pytest.mark.parametrize(
    ("factor", "cosine", "ratio"), [(2.0, 1.0, 1.0), (-1.0, -1.0, 0.0), (-3.0, -1.0, 0.5), (0.0, math.nan, 1.0)]
)
def test_paths_in_one_direction_add_up_and_paths_against_each_other_cancel(
    factor: float, cosine: float, ratio: float
) -> None:
    f = nn.Linear(1, 1, bias=False)
    nn.init.constant_(f.weight, factor)
    module = Residual(f)
    with watch_overlap([Junction(name="sum", transformation=f, skip=module, side="output")]) as watch:
        module(torch.ones(4, 1, requires_grad=True)).sum().backward()
    measured = watch.read()["sum"]
    assert (measured.cosine, measured.ratio) == pytest.approx((cosine, ratio), nan_ok=True)
    assert (measured.norm_skip, measured.norm_transformation) == pytest.approx((2.0, 2 * abs(factor)))


@settings(deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(-1, 1, width=32)] * 2), min_size=1, max_size=30),
    st.sampled_from([1e-30, 1.0, 1e15]),
)
def test_cosine_and_ratio_stay_within_their_limits_at_any_scale(pairs: list[tuple[float, float]], scale: float) -> None:
    a, b = (torch.tensor(values) * scale for values in zip(*pairs, strict=True))
    measured = overlap._overlap(*overlap._sums(a, b).tolist())
    assert math.isnan(measured.cosine) or -1 <= measured.cosine <= 1
    assert math.isnan(measured.ratio) or 0 <= measured.ratio <= 1
    assert measured.norm_skip == pytest.approx(float(a.double().norm()))


def test_sums_computed_in_pieces_equal_the_sums_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = image(), image(seed=1)
    whole = overlap._sums(a, b)
    monkeypatch.setattr(overlap, "_ELEMENTS_AT_A_TIME", 1000)
    assert torch.allclose(overlap._sums(a, b), whole, rtol=1e-12)


# Against autograd, on the real networks


class Seen(dict[str, tuple[Tensor, Tensor]]):
    """Input of each named module and the gradient of its output, in one pass of a network."""

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        super().__init__()
        self.total: dict[str, Tensor] = {}
        outputs: dict[str, tuple[Tensor, Tensor]] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
                if args[0].requires_grad and not isinstance(module, nn.ReLU):
                    args[0].retain_grad()
                    output.retain_grad()
                    outputs[name] = args[0], output

            return hook

        handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
        loss_of(model(inputs)).backward()
        for handle in handles:
            handle.remove()
        for name, (x, y) in outputs.items():
            if x.grad is not None and y.grad is not None:
                self[name], self.total[name] = (x.detach(), y.grad), x.grad


def gradient_through(f: Callable[[Tensor], Tensor], x: Tensor, gradient: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(f(x), x, gradient)[0]


def expected_of(module: Any, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Both gradients at the input of a module, computed only from its parts."""
    kind = type(module).__name__
    if kind == "SkipConnection":
        channels = x.shape[1]
        return gradient[:, :channels], gradient_through(module.submodule, x, gradient[:, channels:])
    if kind == "ResidualUnit":
        return gradient_through(module.residual, x, gradient), gradient_through(module.conv, x, gradient)
    assert kind == "ResBlock"
    body = nn.Sequential(module.norm1, nn.ReLU(), module.conv1, module.norm2, nn.ReLU(), module.conv2)
    return gradient, gradient_through(body, x, gradient)


@architectures
def test_each_branch_has_its_own_gradient_and_both_add_up_to_the_whole(architecture: Architecture) -> None:
    model = network(architecture)
    with watch_overlap(model) as watch:
        loss_of(model(image())).backward()
    seen = Seen(copy.deepcopy(model), image())
    # What a skip takes as well has more than these two gradients.
    also_feeds_a_skip = {"model.1.submodule.0", "model.1.submodule.1.submodule"}
    checked = 0
    for name, measured in watch.read().items():
        module = model.get_submodule(name)
        if architecture == "segresnet" and "ResBlock" not in type(module).__name__:
            continue  # the long skips have their own test
        a, b = expected_of(module, *seen[name])
        assert_equal(measured, by_hand(a, b))
        if name not in also_feeds_a_skip:
            assert torch.allclose(a + b, seen.total[name], rtol=1e-9, atol=1e-12)
        checked += 1
    assert checked == {"unet": 2, "resunet": 6, "segresnet": 9}[architecture]


def test_the_long_skips_of_segresnet_are_measured_where_they_branch_off() -> None:
    model = network("segresnet")
    with watch_overlap(model) as watch:
        loss_of(model(image())).backward()
    seen = Seen(copy.deepcopy(model), image())
    for up, down in (("up_layers.0", "down_layers.2"), ("up_layers.1", "down_layers.1")):
        # The sum that goes into the stage hands its gradient on unchanged; the other part comes through the way down.
        a = seen.total[up]
        x, gradient = seen[down]
        b = gradient_through(model.get_submodule(down), x, gradient)
        assert_equal(watch.read()[up], by_hand(a, b))
        assert torch.allclose(a + b, seen.total[down], rtol=1e-9, atol=1e-12)


def test_a_junction_fed_by_the_image_is_left_out() -> None:
    model = network("resunet")
    assert "model.0" in [junction.name for junction in find_junctions(model)]
    with watch_overlap(model) as watch:
        model(image()).sum().backward()
    assert "model.0" not in watch.read()


@architectures
def test_junctions_are_in_model_order(architecture: Architecture) -> None:
    model = network(architecture)
    with watch_overlap(model) as watch:
        model(image()).sum().backward()
    names = [junction.name for junction in find_junctions(model)]
    assert list(watch.read()) == [name for name in names if name in watch.read()]
    assert len(set(names)) == len(names)


def test_a_wrapped_network_has_the_same_junctions_with_the_prefix_of_its_wrapper() -> None:
    model = network("segresnet")
    wrapped = nn.ModuleDict({"net": model})
    assert [j.name for j in find_junctions(wrapped)] == [f"net.{j.name}" for j in find_junctions(model)]


def test_a_multiplicative_skip_is_not_a_junction() -> None:
    assert find_junctions(SkipConnection(nn.Identity(), mode="mul")) == ()


def test_an_additive_skip_is_measured() -> None:
    f = nn.Conv3d(4, 4, 1).double()
    module, gradient = SkipConnection(f, mode="add"), image(seed=3)
    with watch_overlap(module) as watch:
        module(image().requires_grad_()).backward(gradient)
    assert_equal(watch.read()[""], by_hand(gradient, gradient_through(f, image(), gradient)))


def test_a_transformation_that_uses_its_input_twice_counts_both_uses() -> None:
    class Square(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x + 3 * x

    f, x = Square(), torch.tensor([1.0, -2.0, 5.0], dtype=torch.float64, requires_grad=True)
    module = Residual(f)
    with watch_overlap([Junction(name="sum", transformation=f, skip=module, side="output")]) as watch:
        module(x).sum().backward()
    assert_equal(watch.read()["sum"], by_hand(torch.ones_like(x).detach(), (2 * x + 3).detach()))


def test_a_model_without_junctions_gives_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with watch_overlap(model) as watch:
        model(torch.ones(1, 2)).sum().backward()
    assert watch.read() == {}


# More than one pass


def test_two_passes_are_counted_separately() -> None:
    model = network("unet")
    with watch_overlap(model) as watch:
        loss_of(model(image(count=2))).backward()
    halves = image(count=2).split(1)
    with watch_overlap(model) as twice:
        for half in halves:
            model(half).square().sum().backward()
    with watch_overlap(model) as once:
        model(image(count=2)).square().sum().backward()
    for name, measured in once.read().items():
        assert_equal(twice.read()[name], measured)
    assert twice.read() != watch.read()


def test_a_module_called_twice_in_one_pass_pairs_each_call_with_its_own_gradient() -> None:
    f = nn.Linear(3, 3, bias=False).double()
    module = Residual(f)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    with watch_overlap([Junction(name="sum", transformation=f, skip=module, side="output")]) as watch:
        module(module(x)).sum().backward()
    last = torch.ones(5, 3, dtype=torch.float64)
    through_last = last @ f.weight.detach()
    first = last + through_last
    a, b = torch.cat([last, first]), torch.cat([through_last, first @ f.weight.detach()])
    assert_equal(watch.read()["sum"], by_hand(a, b))


def test_calls_whose_gradients_arrive_out_of_order_are_paired_by_number() -> None:
    f, skip = nn.Linear(3, 3, bias=False).double(), nn.Linear(3, 3, bias=False).double()
    inputs = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with watch_overlap([Junction(name="sum", transformation=f, skip=skip, side="path")]) as watch:
        through, over = [f(x) for x in inputs], [skip(x) for x in inputs]
        (through[0] + over[0] + 10 * (through[1] + over[1])).sum().backward()
    ones = torch.cat([torch.ones(5, 3), 10 * torch.ones(5, 3)]).double()
    assert_equal(watch.read()["sum"], by_hand(ones @ skip.weight.detach(), ones @ f.weight.detach()))


def test_what_a_transformation_sends_elsewhere_is_not_counted() -> None:
    x, other = torch.randn(2, 5, dtype=torch.float64, requires_grad=True).unbind()

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x + 7 * other

    f = Both()
    module = Residual(f)
    with watch_overlap([Junction(name="sum", transformation=f, skip=module, side="output")]) as watch:
        module(x).sum().backward()
    ones = torch.ones(5, dtype=torch.float64)
    assert_equal(watch.read()["sum"], by_hand(ones, 2 * ones))


def test_a_no_grad_pass_in_between_is_ignored() -> None:
    model = network("resunet")
    with watch_overlap(model) as plain:
        loss_of(model(image())).backward()
    with watch_overlap(model) as watch:
        with torch.no_grad():
            model(image(seed=5))
        loss_of(model(image())).backward()
    assert watch.read() == plain.read()


def test_a_no_grad_pass_accepts_an_input_that_requires_grad() -> None:
    f = nn.Linear(3, 3)
    module = Residual(f)
    with (
        watch_overlap([Junction(name="sum", transformation=f, skip=module, side="output")]) as watch,
        torch.no_grad(),
    ):
        module(torch.ones(1, 3, requires_grad=True))
    assert watch.read() == {}


def test_a_checkpointed_network_has_the_same_overlap() -> None:
    from monai.networks.nets.unet import CheckpointUNet, UNet

    settings: dict[str, Any] = {
        "spatial_dims": 3,
        "in_channels": 4,
        "out_channels": 3,
        "channels": (4, 8, 8),
        "strides": (2, 2),
    }
    plain = UNet(**settings, num_res_units=1).double()
    model = CheckpointUNet(**settings, num_res_units=1).double()
    model.load_state_dict(dict(zip(model.state_dict(), plain.state_dict().values(), strict=True)))
    found = []
    for each in (plain, model):
        with watch_overlap(each) as watch:
            loss_of(each(image())).backward()
        found.append(list(watch.read().values()))
    assert len(found[0]) > 3
    for one, other in zip(*found, strict=True):
        assert_equal(one, other)


# Nothing else changes


@architectures
@pytest.mark.parametrize("layout", [torch.channels_last_3d, torch.contiguous_format])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("count", [1, 2])
def test_measuring_leaves_every_gradient_bit_for_bit_the_same(
    architecture: Architecture, layout: torch.memory_format, *, autocast: bool, count: int
) -> None:
    watched = network(architecture, torch.float32, channels=(8, 16, 16))
    watched.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    plain = copy.deepcopy(watched)
    inputs = image(torch.float32, count).contiguous(memory_format=layout)
    for model in (watched, plain):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            if model is watched:
                with watch_overlap(model) as watch:
                    loss = loss_of(model(inputs).float())
                    loss.backward()
            else:
                loss_of(model(inputs).float()).backward()
    assert watch.read()
    for one, other in zip(watched.parameters(), plain.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)


@architectures
def test_the_overlap_under_autocast_is_close_to_full_precision(architecture: Architecture) -> None:
    model = network(architecture, torch.float32)
    found = []
    for enabled in (True, False):
        with watch_overlap(model) as watch:
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                logits = model(image(torch.float32))
            loss_of(logits.float()).backward()
        found.append(watch.read())
    assert found[0].keys() == found[1].keys()
    for name, half in found[0].items():
        assert half.cosine == pytest.approx(found[1][name].cosine, abs=0.1)
        assert half.norm_skip == pytest.approx(found[1][name].norm_skip, rel=0.1)


@architectures
def test_no_hook_is_left_when_the_block_ends_even_with_an_error(architecture: Architecture) -> None:
    model = network(architecture)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    def fail() -> None:
        assert hooks() == 2 * len(find_junctions(model))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), watch_overlap(model):
        fail()
    assert hooks() == 0


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(overlap).failed == 0
    assert doctest.testmod(overlap).attempted > 0
