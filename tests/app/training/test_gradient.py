"""Which gradient rule a run gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from app.config.gradient import GradientConfig
from app.config.load import load_config
from app.training.gradient import attach_backward, attach_transform, choose_transform
from models import NetworkConfig


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))


@pytest.mark.parametrize(("optimizer", "expected"), [(AdamW, "znorm"), (SGD, "clip")])
def test_the_automatic_rule_is_the_one_the_evidence_supports(optimizer: type[Optimizer], expected: str) -> None:
    name, reason = choose_transform(GradientConfig(), optimizer(network().parameters(), lr=0.1))  # type: ignore[call-arg]
    assert name == expected
    assert "docs/evidence.md" in reason


def test_a_named_rule_is_used_with_any_optimizer() -> None:
    chosen = choose_transform(GradientConfig(transform="znorm"), SGD(network().parameters(), lr=0.1))
    assert chosen == ("znorm", "")


def test_the_automatic_rule_is_applied_and_logged_with_its_reason() -> None:
    model = network()
    optimizer = SGD(model.parameters(), lr=0.1)
    report = attach_transform(GradientConfig(clip_norm=0.5), optimizer, model).report
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(norm) == pytest.approx(0.5, rel=1e-4)
    assert report.startswith("gradients clipped to norm 0.5 (auto: under SGD")


def test_the_laptop_config_uses_the_automatic_rule() -> None:
    assert load_config("laptop").gradient.transform == "auto"


def test_a_clip_norm_of_zero_for_znorm_is_refused_and_named() -> None:
    with pytest.raises(Exception, match=r"gradient\.znorm\.clip_norm: above 0"):
        load_config("laptop", ["gradient.znorm.clip_norm=0"])


@pytest.mark.parametrize("setting", ["only=['nothing*']", "leave_out=['*']", "modules=[Conv9d]", "output_block=head"])
def test_a_choice_that_matches_no_tensor_of_the_network_is_a_config_error(
    setting: str, phantoms: Path, tiny_settings: list[str], tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    options = [word for override in [*tiny_settings, f"gradient.znorm.{setting}"] for word in ("--set", override)]
    ended = znormseg("train", phantoms, tmp_path / "run", *options)
    assert (ended.code, (tmp_path / "run").exists()) == (4, False)
    assert "znormseg: gradient.znorm: " in ended.err


# Backward normalization


def test_no_network_is_normalised_in_the_backward_pass_by_default() -> None:
    assert attach_backward(NetworkConfig(), network()) is None


def test_the_named_modules_are_normalised_in_the_backward_pass() -> None:
    handle = attach_backward(NetworkConfig(backward_normalization=("0",)), network())
    assert handle is not None
    assert handle.places == ("0",)


def test_a_place_that_is_not_in_the_network_is_a_config_error(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    settings = [*tiny_settings, "network.backward_normalization=[decoder]"]
    options = [word for override in settings for word in ("--set", override)]
    ended = znormseg("train", phantoms, tmp_path / "run", *options)
    assert (ended.code, (tmp_path / "run").exists()) == (4, False)
    assert "network.backward_normalization: the model has no module named 'decoder'" in ended.err
