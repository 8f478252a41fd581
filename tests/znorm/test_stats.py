"""Statistics of a step's gradients: the right numbers, and nothing changed or left behind."""

from __future__ import annotations

import doctest
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from znorm import attach, attach_baseline, stats
from znorm.stats import LayerGradient, observe_step


def small_model() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def backward(model: nn.Module, factor: float = 1.0) -> None:
    inputs = torch.randn((6, 4), generator=torch.Generator().manual_seed(1))
    (factor * model(inputs).square().sum()).backward()


def observed(gradient: Tensor) -> LayerGradient:
    """What is measured of one gradient under plain SGD."""
    model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros_like(gradient))})
    model["weight"].grad = gradient
    optimizer = SGD(model.parameters(), lr=0.1)
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    return seen.layers()["weight"]


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40), st.sampled_from([1e-30, 1.0, 1e30]))
def test_mean_std_and_norm_equal_those_of_numpy_at_any_scale(values: list[float], scale: float) -> None:
    gradient = torch.tensor(values) * scale
    exact = gradient.numpy().astype(np.float64)
    measured = observed(gradient).before
    largest = np.abs(exact).max()
    assert measured.mean == pytest.approx(exact.mean(), rel=1e-9, abs=1e-12 * largest)
    assert measured.std == pytest.approx(exact.std(), rel=1e-9, abs=1e-12 * largest)
    assert measured.norm == pytest.approx(np.linalg.norm(exact), rel=1e-9)


def test_statistics_before_are_of_the_raw_gradient_and_after_of_the_changed_one() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    backward(model)
    raw = model[2].weight.grad.double().clone()
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    layer, changed = seen.layers()["2.weight"], model[2].weight.grad.double()
    assert layer.before.norm == pytest.approx(float(raw.norm()))
    assert layer.before.std == pytest.approx(float(raw.std(correction=0)))
    assert layer.after is not None
    assert layer.after.norm == pytest.approx(float(changed.norm()))
    assert layer.after.std == pytest.approx(1, rel=1e-5)
    assert abs(layer.before.norm - layer.after.norm) > 1e-3


def test_the_gradient_is_measured_before_the_optimizer_modifies_it() -> None:
    class Spoiler(SGD):
        def step(self, closure: Any = None) -> Any:
            for parameter in self.param_groups[0]["params"]:
                parameter.grad.zero_()

    model = nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[3.0, 4.0]])
    optimizer = Spoiler(model.parameters(), lr=0.1)
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    assert seen.layers()["weight"].after == seen.layers()["weight"].before


def test_a_parameter_the_rule_does_not_change_has_equal_statistics_before_and_after() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    backward(model)
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    assert seen.layers()["0.bias"].before == seen.layers()["0.bias"].after


def test_a_skipped_step_is_reported() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    backward(model)
    model[2].weight.grad[0, 0] = math.inf
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    assert {layer.after for layer in seen.layers().values()} == {None}
    assert not math.isfinite(seen.layers()["2.weight"].before.norm)


def test_a_step_that_was_taken_is_not_reported_as_skipped() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model)
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    assert all(layer.after is not None for layer in seen.layers().values())


def test_parameters_without_a_gradient_are_left_out_and_the_rest_stay_in_model_order() -> None:
    model = small_model()
    model[2].requires_grad_(False)
    optimizer = SGD(model.parameters(), lr=0.1)
    backward(model)
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    assert list(seen.layers()) == ["0.weight", "0.bias", "1.weight", "3.weight", "3.bias"]


def test_without_any_gradient_the_statistics_are_empty() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    assert seen.layers() == {}


def test_a_tensor_without_elements_is_left_out() -> None:
    model = nn.ParameterDict({"none": nn.Parameter(torch.zeros(0)), "one": nn.Parameter(torch.zeros(1))})
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer = SGD(model.parameters(), lr=0.1)
    with observe_step(optimizer, model) as seen:
        optimizer.step()
    assert list(seen.layers()) == ["one"]


def test_no_hook_is_left_when_the_block_ends_even_with_an_error() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)

    def fail() -> None:
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), observe_step(optimizer, model):
        fail()
    assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("rule", ["none", "clip"])
def test_observed_and_plain_training_give_bit_for_bit_the_same_weights(rule: str) -> None:
    models = [small_model(), small_model()]
    numbers: dict[str, Any] = {"limit": 0.1} if rule == "clip" else {}
    for model, watched in zip(models, (True, False), strict=True):
        optimizer = AdamW(model.parameters(), lr=0.1, fused=True)
        attach_baseline(optimizer, model, rule, **numbers)
        for _ in range(3):
            backward(model)
            if watched:
                with observe_step(optimizer, model):
                    optimizer.step()
            else:
                optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(stats).failed == 0
    assert doctest.testmod(stats).attempted > 0
