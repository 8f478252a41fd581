"""The baselines for ZNorm: each changes gradients as its paper says, and none lets a non-finite number through."""

from __future__ import annotations

import copy
import doctest
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from znorm import BASELINES, ZNormConfig, attach, attach_baseline, transforms, zscore_
from znorm.transforms import Gradients

NUMBERS: dict[str, dict[str, Any]] = {
    "none": {},
    "clip": {"limit": 0.5},
    "clip-value": {"limit": 0.01},
    "centralize": {},
    "adaptive-clip": {"ratio": 0.01},
    "scale": {"eps": 1e-7},
}
rivals = pytest.mark.parametrize("name", list(BASELINES))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def work(*gradients: Tensor, dims: list[int] | None = None, parameters: list[Tensor] | None = None) -> Gradients:
    return Gradients(
        gradients=list(gradients),
        parameters=parameters or [torch.ones_like(g) for g in gradients],
        channel_dims=dims or [0] * len(gradients),
    )


def small_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def with_gradients(model: nn.Module, factor: float = 1.0) -> nn.Module:
    (factor * model(normal(6, 4)).square().sum()).backward()
    return model


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6])
def test_clip_by_norm_equals_that_of_torch(limit: float) -> None:
    model = with_gradients(small_model())
    twin = copy.deepcopy(model)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        other.grad = None if one.grad is None else one.grad.clone()
    BASELINES["clip"](work(*[p.grad for p in model.parameters() if p.grad is not None]), limit=limit)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), limit)
    torch.testing.assert_close(gradients_of(model), gradients_of(twin))


def test_a_norm_that_overflows_is_still_clipped() -> None:
    gradient = torch.tensor([3e38, -3e38, 0.0])
    assert BASELINES["clip"](work(gradient), limit=1.0)
    torch.testing.assert_close(gradient, torch.tensor([math.sqrt(0.5), -math.sqrt(0.5), 0.0]))


def test_a_huge_limit_changes_no_bit() -> None:
    for name, number in (("clip", "limit"), ("clip-value", "limit"), ("adaptive-clip", "ratio")):
        gradient = normal(5, 3)
        BASELINES[name](work(gradient), **{number: 1e9})
        assert torch.equal(gradient, normal(5, 3)), name


@pytest.mark.parametrize("dim", [0, 1])
def test_centralized_channels_have_mean_0_and_keep_their_differences(dim: int) -> None:
    before = 5 + normal(4, 6, 3)
    gradient = before.clone()
    BASELINES["centralize"](work(gradient, dims=[dim]))
    others = [d for d in range(3) if d != dim]
    torch.testing.assert_close(gradient.mean(others), torch.zeros(before.shape[dim]), rtol=0, atol=1e-6)
    assert float((before - gradient).std(others).max()) < 1e-5


def test_centralization_leaves_one_dimensional_tensors_unchanged() -> None:
    gradient = normal(7)
    BASELINES["centralize"](work(gradient))
    assert torch.equal(gradient, normal(7))


def test_adaptive_clipping_treats_each_channel_separately() -> None:
    gradient, weight = normal(3, 10), normal(3, 10, seed=1)
    before = gradient.clone()
    before[0] *= 1e-6
    gradient[0] *= 1e-6
    BASELINES["adaptive-clip"](work(gradient, parameters=[weight]), ratio=0.1)
    assert torch.equal(gradient[0], before[0])
    torch.testing.assert_close(gradient[1:].norm(dim=1), 0.1 * weight[1:].norm(dim=1))


def test_zero_weights_are_clipped_relative_to_the_floor() -> None:
    gradient = normal(2, 10)
    BASELINES["adaptive-clip"](work(gradient, parameters=[torch.zeros(2, 10)]), ratio=0.5, floor=0.02)
    torch.testing.assert_close(gradient.norm(dim=1), torch.full((2,), 0.01))


def test_scale_is_zscore_without_removing_the_mean() -> None:
    gradient, twin = 3 + normal(5, 5), 3 + normal(5, 5)
    BASELINES["scale"](work(gradient), eps=0.0)
    zscore_([twin], 0.0)
    torch.testing.assert_close(gradient - gradient.mean(), twin)
    assert float(gradient.mean()) > 1


@rivals
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["0.weight", "0.bias", "1.weight", "3.weight"])
def test_a_non_finite_step_is_skipped_and_counted(name: str, value: float, place: str) -> None:
    model = with_gradients(small_model())
    optimizer = AdamW(model.parameters(), lr=0.1)
    handle = attach_baseline(optimizer, model, name, **NUMBERS[name])
    model.get_parameter(place).grad.view(-1)[0] = value  # type: ignore[union-attr]  # backward made it
    optimizer.step()
    assert handle.skipped_steps == 1
    torch.testing.assert_close(list(model.parameters()), list(small_model().parameters()), rtol=0, atol=0)


@rivals
def test_an_attached_rule_equals_the_rule_applied_by_hand_and_a_plain_step(name: str) -> None:
    model, twin = with_gradients(small_model()), with_gradients(small_model())
    optimizer = SGD(model.parameters(), lr=0.1)
    handle = attach_baseline(optimizer, model, name, **NUMBERS[name])
    optimizer.step()
    chosen = [(n, p) for n, p in twin.named_parameters() if n in handle.selection.normalised]
    grads = [p.grad for _, p in chosen if p.grad is not None]
    BASELINES[name](work(*grads, parameters=[p.detach() for _, p in chosen]), **NUMBERS[name])
    SGD(twin.parameters(), lr=0.1).step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("clip", []),
        ("centralize", []),
        ("adaptive-clip", ["3.bias", "3.weight"]),
        ("scale", ["0.bias", "1.weight", "2.bias", "3.bias", "3.weight"]),
    ],
)
def test_each_rule_takes_the_parameters_of_its_paper(name: str, left_out: list[str]) -> None:
    model = small_model()
    selection = attach_baseline(SGD(model.parameters(), lr=1), model, name, **NUMBERS[name]).selection
    assert sorted(choice.name for choice in selection.choices if not choice.normalised) == left_out


def test_an_unknown_rule_is_refused_with_the_valid_names() -> None:
    model = small_model()
    with pytest.raises(ValueError, match=r"unknown gradient rule 'clop'; available: none, clip, "):
        attach_baseline(SGD(model.parameters(), lr=1), model, "clop")


def test_an_optimizer_takes_only_one_rule() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=1)
    attach(optimizer, model)
    with pytest.raises(ValueError, match="has a gradient rule already"):
        attach_baseline(optimizer, model, "clip", limit=1.0)


def test_parameters_added_after_attaching_are_refused_at_the_step() -> None:
    model = with_gradients(small_model())
    optimizer = SGD(list(model.parameters())[:2], lr=1)
    attach(optimizer, model)
    optimizer.add_param_group({"params": list(model.parameters())[2:]})
    with pytest.raises(RuntimeError, match="attach again"):
        optimizer.step()


# ZNorm settings


def names(config: ZNormConfig, model: nn.Module | None = None) -> list[str]:
    model = model if model is not None else small_model()
    return sorted(attach(SGD(model.parameters(), lr=1), model, config).selection.normalised)


def convolutions() -> nn.Sequential:
    return nn.Sequential(nn.Conv3d(1, 2, 3), nn.ConvTranspose3d(2, 3, 3), nn.Conv3d(3, 1, 1), nn.Conv3d(1, 2, 1))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"modules": ("Conv3d",)}, ["0.weight", "2.weight"]),
        ({"modules": ("ConvTranspose3d",)}, ["1.weight"]),
        ({"only": ("0.*", "2.*")}, ["0.weight", "2.weight"]),
        ({"leave_out": ("0.*",)}, ["1.weight", "2.weight"]),
        ({"only": ("*.weight",), "leave_out": ("1.*",), "output_block": "none"}, ["0.weight", "2.weight", "3.weight"]),
    ],
)
def test_parameters_are_chosen_by_module_type_and_by_name(config: dict[str, Any], expected: list[str]) -> None:
    assert names(ZNormConfig(**config), convolutions()) == expected


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"only=\['nowhere\.\*'\]"):
        names(ZNormConfig(only=("nowhere.*",)))


def test_output_channels_of_a_transposed_convolution_are_its_second_dimension() -> None:
    model = convolutions()
    selection = attach(SGD(model.parameters(), lr=1), model).selection
    assert {choice.name: choice.channel_dim for choice in selection.choices if choice.normalised} == {
        "0.weight": 0,
        "1.weight": 1,
        "2.weight": 0,
    }


@pytest.mark.parametrize("scope", ["channel", "global"])
@pytest.mark.parametrize("mode", ["zscore", "centre", "scale"])
def test_scope_and_mode_of_the_config_reach_the_gradients(scope: Any, mode: Any) -> None:
    model, twin = with_gradients(small_model()), with_gradients(small_model())
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, ZNormConfig(scope=scope, mode=mode))
    optimizer.step()
    zscore_([twin.get_parameter(n).grad for n in ("0.weight", "2.weight")], scope=scope, mode=mode)  # type: ignore[misc]
    SGD(twin.parameters(), lr=0.1).step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=0, atol=0)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(transforms).failed == 0


# ZNorm at the size of clipping


def sized(model: nn.Module, limit: float) -> list[Tensor]:
    twin = copy.deepcopy(model)
    for one, other in zip(twin.parameters(), model.parameters(), strict=True):
        one.grad = None if other.grad is None else other.grad.clone()
    optimizer = SGD(twin.parameters(), lr=0.0)
    attach(optimizer, twin, ZNormConfig(clip_norm=limit))
    optimizer.step()
    return gradients_of(twin)


def norm(gradients: list[Tensor]) -> float:
    return float(torch.cat([g.flatten().double() for g in gradients]).norm())


@pytest.mark.parametrize("limit", [1e-3, 1.0, 1e6])
@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e12])
def test_znorm_with_a_clip_norm_gives_the_same_norm_as_clipping(limit: float, factor: float) -> None:
    model = with_gradients(small_model(), factor)
    expected = min(norm(gradients_of(model)), limit)
    assert norm(sized(model, limit)) == pytest.approx(expected, rel=1e-5)


def test_znorm_with_a_clip_norm_has_the_direction_of_znorm() -> None:
    model = with_gradients(small_model())
    found = next(g for g in sized(model, 1.0) if g.dim() > 1)
    expected = next(p.grad.clone() for p in model.parameters() if p.grad is not None)
    zscore_([expected])
    torch.testing.assert_close(found / found.std(), expected / expected.std())


def test_znorm_with_a_clip_norm_clips_the_parameters_it_does_not_normalise() -> None:
    model = with_gradients(small_model(), 1e3)
    twin = with_gradients(small_model(), 1e3)
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    biases = [(s, c) for s, c in zip(sized(model, 1.0), gradients_of(twin), strict=True) if s.dim() == 1]
    assert len(biases) > 2
    assert all(torch.allclose(one, other, rtol=1e-4) for one, other in biases)


def test_znorm_with_a_clip_norm_handles_gradients_whose_squares_overflow() -> None:
    g = torch.tensor([1e30, 3e30, 2e30])
    chosen = Gradients(gradients=[g], parameters=[g], channel_dims=[0])
    assert transforms.rescale_to_clipped_norm_(chosen, lambda: zscore_([g]), limit=1.0)
    assert float(g.norm()) == pytest.approx(1.0)


def test_znorm_with_a_clip_norm_leaves_a_non_finite_gradient_unchanged() -> None:
    g, other = torch.tensor([1.0, math.nan]), torch.tensor([2.0])
    chosen = Gradients(gradients=[g], parameters=[g], channel_dims=[0], others=[other])
    assert not transforms.rescale_to_clipped_norm_(chosen, lambda: zscore_([g]), limit=0.1)
    assert (float(g[0]), float(other)) == (1.0, 2.0)
