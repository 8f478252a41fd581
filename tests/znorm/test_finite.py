"""Steps whose gradients the host does not check: answers stay tensors, and fused optimisers skip by themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from znorm import ZNormConfig, attach, attach_baseline, finite, transforms, zscore


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers about gradients stay tensors, as on a GPU."""
    for module in (finite, transforms, zscore):
        monkeypatch.setattr(module, "stays_on_gpu", bool)


def fused(model: nn.Module, kind: str) -> torch.optim.Optimizer:
    if kind == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    return torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True)


def steps_of(kind: str, rule: str, bad_steps: Sequence[int] = ()) -> tuple[list[Tensor], int, torch.optim.Optimizer]:
    """Weights and skipped steps after five steps of random gradients, some of them with an infinite element."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, 2))
    optimizer = fused(model, kind)
    numbers: dict[str, Any] = {"clip": {"limit": 1.0}, "scale": {"eps": 1e-7}, "clip-value": {"limit": 0.1}}.get(
        rule, {}
    )
    handle = (
        attach(optimizer, model)
        if rule == "znorm"
        else attach(optimizer, model, ZNormConfig(scope=rule.removeprefix("znorm "), clip_norm=1.0))  # type: ignore[arg-type]
        if rule.startswith("znorm ")
        else attach_baseline(optimizer, model, rule, **numbers)
    )
    for number in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        if number in bad_steps:
            next(model.parameters()).grad.view(-1)[3] = math.inf  # type: ignore[union-attr]
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()], handle.skipped_steps, optimizer


RULES = ["znorm", "znorm layer", "znorm channel", "znorm global", "none", "clip", "clip-value", "centralize", "scale"]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_without_a_finite_check_on_the_host_equals_a_checked_one(
    rule: str, kind: str, request: pytest.FixtureRequest
) -> None:
    expected, _, _ = steps_of(kind, rule)
    request.getfixturevalue("unread")
    found, skipped, _ = steps_of(kind, rule)
    torch.testing.assert_close(found, expected)
    assert skipped == 0


@pytest.mark.parametrize("bad", [[0], [2], [0, 1, 4]])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("rule", RULES)
def test_a_step_that_a_fused_optimizer_skips_changes_nothing_and_is_counted(
    rule: str, kind: str, bad: list[int], request: pytest.FixtureRequest
) -> None:
    expected, _, reference = steps_of(kind, rule, bad)
    request.getfixturevalue("unread")
    found, skipped, optimizer = steps_of(kind, rule, bad)
    torch.testing.assert_close(found, expected)
    assert skipped == len(bad)
    for mine, other in zip(optimizer.state.values(), reference.state.values(), strict=True):
        torch.testing.assert_close(mine.get("step"), other.get("step"))


def test_a_skipped_step_leaves_nothing_on_the_optimizer(unread: None) -> None:
    _, _, optimizer = steps_of("adamw", "znorm", [4])
    assert not hasattr(optimizer, "found_inf")


def test_a_non_fused_optimizer_waits_for_the_finite_check(unread: None) -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    handle = attach_baseline(optimizer, model, "none")
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, math.nan)
    optimizer.step()
    assert handle.skipped == 1
    assert isinstance(handle.skipped, int)


@pytest.mark.parametrize("infinite", [False, True])
def test_the_found_inf_flag_of_a_grad_scaler_is_kept(infinite: bool, unread: None) -> None:
    model = nn.Linear(3, 2)
    optimizer = fused(model, "adamw")
    handle = attach(optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    before = model.weight.detach().clone()
    loss = model(torch.full((1, 3), math.inf if infinite else 1.0)).sum()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(before, model.weight) == infinite
    assert handle.skipped_steps == int(infinite)
    assert scaler.get_scale() == (1.0 if infinite else 2.0)
