"""ZNorm in a training loop: a step equals one computed by hand, and every misuse is refused."""

from __future__ import annotations

import copy
import doctest
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from znorm import ZNormConfig, attach, hook, zscore_
from znorm.finite import all_finite

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda p: AdamW(p, lr=0.1, weight_decay=0.1),
    "AdamW foreach": lambda p: AdamW(p, lr=0.1, foreach=True),
    "AdamW fused": lambda p: AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "SGD fused": lambda p: SGD(p, lr=0.1, momentum=0.9, fused=True),
}
optimizers = pytest.mark.parametrize("make", list(OPTIMIZERS.values()), ids=list(OPTIMIZERS))
#: What ZNorm normalises in :func:`small_model`; the last layer is its output block.
NORMALISED = ("0.weight", "2.weight")


def small_model(seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 8), nn.PReLU(), nn.Linear(8, 8), nn.Linear(8, 2))


def samples(seed: int, count: int = 6) -> Tensor:
    return torch.randn((count, 4), generator=torch.Generator().manual_seed(seed))


def backward(model: nn.Module, inputs: Tensor) -> None:
    model(inputs).square().sum().backward()


def sgd(model: nn.Module) -> Optimizer:
    return OPTIMIZERS["SGD"](model.parameters())


def zscore_by_hand(model: nn.Module) -> None:
    zscore_([p.grad for name, p in model.named_parameters() if name in NORMALISED and p.grad is not None])


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@optimizers
def test_steps_with_znorm_equal_plain_steps_after_zscore_by_hand(make: Callable[[Any], Optimizer]) -> None:
    hooked, by_hand = small_model(), small_model()
    first, second = make(hooked.parameters()), make(by_hand.parameters())
    attach(first, hooked)
    for step in range(3):
        backward(hooked, samples(step))
        backward(by_hand, samples(step))
        zscore_by_hand(by_hand)
        for optimizer in (first, second):
            optimizer.step()
            optimizer.zero_grad()
    assert same_weights(hooked, by_hand)
    assert not same_weights(hooked, small_model())


def test_gradients_accumulated_over_micro_batches_are_normalised_once() -> None:
    hooked, by_hand = small_model(), small_model()
    optimizer, plain = sgd(hooked), sgd(by_hand)
    attach(optimizer, hooked)
    for part in range(3):
        backward(hooked, samples(part) * 10.0**part)
        backward(by_hand, samples(part) * 10.0**part)
    zscore_by_hand(by_hand)
    optimizer.step()
    plain.step()
    assert same_weights(hooked, by_hand)


def test_the_scale_of_the_loss_does_not_change_the_normalised_weights() -> None:
    models = [small_model(), small_model()]
    for model, factor in zip(models, (1.0, 1024.0), strict=True):
        optimizer = SGD(model.parameters(), lr=0.1)
        attach(optimizer, model)
        (factor * model(samples(0)).square().sum()).backward()
        optimizer.step()
    assert all(torch.equal(models[0].get_parameter(name), models[1].get_parameter(name)) for name in NORMALISED)


@pytest.mark.parametrize("eps", [1e-7, 1.0])
def test_the_eps_of_the_config_is_used(eps: float) -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model, ZNormConfig(eps=eps))
    backward(model, samples(0))
    expected = model[0].weight.grad.clone()
    zscore_([expected], eps)
    optimizer.step()
    assert torch.equal(model[0].weight.grad, expected)


def test_the_output_block_of_the_config_is_left_out() -> None:
    model = small_model()
    handle = attach(sgd(model), model, ZNormConfig(output_block="0"))
    assert handle.selection.normalised == {"2.weight", "3.weight"}


def test_frozen_parameters_keep_their_values_and_the_others_step() -> None:
    model = small_model()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    attach(optimizer, model)
    backward(model, samples(0))
    optimizer.step()
    assert torch.equal(model[0].weight, small_model()[0].weight)
    assert not torch.equal(model[2].weight, small_model()[2].weight)


def test_a_step_without_any_gradient_changes_nothing_and_is_not_counted() -> None:
    model = small_model()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    optimizer.step()
    assert same_weights(model, small_model())
    assert handle.skipped_steps == 0


def test_a_parameter_without_elements_is_accepted() -> None:
    model = small_model()
    model.register_parameter("nothing", nn.Parameter(torch.empty(0, 3)))
    optimizer = sgd(model)
    attach(optimizer, model, ZNormConfig(output_block="3"))
    backward(model, samples(0))
    model.nothing.grad = torch.empty(0, 3)
    optimizer.step()
    assert not same_weights(model[0], small_model()[0])


def test_every_parameter_group_is_normalised() -> None:
    hooked, by_hand = small_model(), small_model()
    first, second = (
        AdamW([{"params": m[0].parameters(), "lr": 0.1}, {"params": m[1:].parameters(), "lr": 0.01}])
        for m in (hooked, by_hand)
    )
    attach(first, hooked)
    backward(hooked, samples(0))
    backward(by_hand, samples(0))
    zscore_by_hand(by_hand)
    first.step()
    second.step()
    assert same_weights(hooked, by_hand)


def test_an_optimizer_may_hold_only_some_of_the_models_parameters() -> None:
    model = small_model()
    optimizer = SGD(model[0].parameters(), lr=0.1)
    attach(optimizer, model)
    backward(model, samples(0))
    untouched = model[2].weight.grad.clone()
    optimizer.step()
    assert torch.equal(model[2].weight.grad, untouched)
    assert float(model[0].weight.grad.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_a_learning_rate_scheduler_works_with_a_hooked_optimizer() -> None:
    model = small_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    backward(model, samples(0))
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.05


def test_a_run_resumed_from_a_state_dict_continues_identically() -> None:
    model = small_model()
    optimizer = sgd(model)
    attach(optimizer, model)
    backward(model, samples(0))
    optimizer.step()
    resumed = copy.deepcopy(model)
    other = sgd(resumed)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    attach(other, resumed)
    for network, its in ((model, optimizer), (resumed, other)):
        its.zero_grad()
        backward(network, samples(1))
        its.step()
    assert same_weights(model, resumed)


def test_a_second_attach_is_refused() -> None:
    model = small_model()
    optimizer = sgd(model)
    attach(optimizer, model)
    with pytest.raises(ValueError, match="has a gradient rule already"):
        attach(optimizer, model)


def test_a_refused_attach_leaves_the_optimizer_free() -> None:
    model = small_model()
    optimizer = sgd(model)
    with pytest.raises(ValueError, match="no module named"):
        attach(optimizer, model, ZNormConfig(output_block="tail"))
    attach(optimizer, model)


def test_attaching_after_remove_normalises_only_once() -> None:
    hooked, by_hand = small_model(), small_model()
    optimizer, plain = SGD(hooked.parameters(), lr=0.1), SGD(by_hand.parameters(), lr=0.1)
    attach(optimizer, hooked, ZNormConfig(eps=1.0)).remove()
    attach(optimizer, hooked)
    backward(hooked, samples(0))
    backward(by_hand, samples(0))
    zscore_by_hand(by_hand)
    optimizer.step()
    plain.step()
    assert same_weights(hooked, by_hand)


def test_remove_restores_plain_steps() -> None:
    hooked, plain = small_model(), small_model()
    first, second = sgd(hooked), sgd(plain)
    attach(first, hooked).remove()
    for model, optimizer in ((hooked, first), (plain, second)):
        backward(model, samples(0))
        optimizer.step()
    assert same_weights(hooked, plain)


def test_a_second_remove_does_not_undo_a_later_attach() -> None:
    model = small_model()
    optimizer = sgd(model)
    handle = attach(optimizer, model)
    handle.remove()
    attach(optimizer, model)
    handle.remove()
    with pytest.raises(ValueError, match="has a gradient rule already"):
        attach(optimizer, model)


def test_a_deleted_optimizer_does_not_block_the_next_one() -> None:
    model = small_model()
    optimizer = sgd(model)
    attach(optimizer, model)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    attach(sgd(model), model)


@pytest.mark.parametrize("call", [((lambda: 0.0,), {}), ((), {"closure": lambda: 0.0})], ids=["positional", "keyword"])
def test_a_closure_is_refused_before_anything_changes(call: tuple[Any, Any]) -> None:
    model = small_model()
    optimizer = sgd(model)
    attach(optimizer, model)
    backward(model, samples(0))
    with pytest.raises(RuntimeError, match="does not work with a closure"):
        optimizer.step(*call[0], **call[1])
    assert same_weights(model, small_model())


def test_an_explicit_closure_of_none_is_a_plain_step() -> None:
    model = small_model()
    optimizer = sgd(model)
    attach(optimizer, model)
    backward(model, samples(0))
    optimizer.step(None)
    assert not same_weights(model, small_model())


def test_gradients_that_are_still_scaled_are_refused() -> None:
    model = small_model()
    optimizer = OPTIMIZERS["AdamW fused"](model.parameters())
    attach(optimizer, model)
    backward(model, samples(0))
    optimizer.grad_scale = torch.tensor(1024.0)  # type: ignore[attr-defined]  # as GradScaler.step sets it
    with pytest.raises(RuntimeError, match=r"call scaler\.unscale_"):
        optimizer.step()
    assert same_weights(model, small_model())


def test_gradients_unscaled_before_the_step_are_accepted() -> None:
    model = small_model()
    optimizer = OPTIMIZERS["AdamW fused"](model.parameters())
    attach(optimizer, model)
    backward(model, samples(0))
    optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(0.0)  # type: ignore[attr-defined]  # as above
    optimizer.step()
    assert not same_weights(model, small_model())


def scaled_steps(fused: bool, *, unscale: bool) -> Any:
    """One step under a GradScaler on the CPU."""
    model = small_model()
    optimizer = AdamW(model.parameters(), lr=0.1, fused=fused)
    attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(model(samples(0)).square().sum()).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    return model


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_with_a_grad_scaler_equals_the_step_without_one(fused: bool) -> None:
    plain = small_model()
    optimizer = AdamW(plain.parameters(), lr=0.1, fused=fused)
    attach(optimizer, plain)
    backward(plain, samples(0))
    optimizer.step()
    assert same_weights(scaled_steps(fused, unscale=True), plain)


def test_a_fused_step_that_a_grad_scaler_has_not_unscaled_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"call scaler\.unscale_"):
        scaled_steps(True, unscale=False)


def test_a_sparse_gradient_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"need dense gradients, got one with layout torch\.sparse_coo"):
        optimizer.step()


@optimizers
@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "3.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_non_finite_gradient_changes_nothing(
    make: Callable[[Any], Optimizer], name: str, value: float
) -> None:
    model = small_model()
    optimizer = make(model.parameters())
    handle = attach(optimizer, model)
    backward(model, samples(0))
    optimizer.step()
    weights, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    model.get_parameter(name).grad.view(-1)[-1] = value
    optimizer.step()
    assert same_weights(model, weights)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    assert handle.skipped_steps == 1


def test_a_skipped_step_does_not_affect_the_next_one() -> None:
    models = [small_model(), small_model()]
    for model, sick in zip(models, (False, True), strict=True):
        optimizer = sgd(model)
        attach(optimizer, model)
        if sick:
            backward(model, samples(9) * math.inf)
            optimizer.step()
        backward(model, samples(0))
        optimizer.step()
    assert same_weights(*models)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.float16, 65504.0), (torch.bfloat16, 3e38), (torch.float32, 3.4e38), (torch.float64, 1e300)],
)
def test_large_numbers_of_every_dtype_are_finite(dtype: torch.dtype, value: float) -> None:
    assert all_finite([torch.full((1000,), value, dtype=dtype)])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_non_finite_element_is_found_among_thousands(dtype: torch.dtype, value: float) -> None:
    gradients = [torch.ones(50), torch.ones(5000, dtype=dtype), torch.ones(3, dtype=torch.float64)]
    gradients[1][4321] = value
    assert not all_finite(gradients)


def test_parameters_from_outside_the_model_are_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="1 parameter that does not belong to the model"):
        attach(SGD([*model.parameters(), nn.Parameter(torch.ones(2, 2))], lr=0.1), model)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(hook).failed == 0
