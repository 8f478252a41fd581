"""Attach the configured gradient rule, which runs before each optimiser step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import SGD, Optimizer

import znorm
from app.config.gradient import AUTO, GradientConfig
from app.errors import ConfigError
from app.progress import LOG
from models import NetworkConfig


@dataclass(frozen=True, kw_only=True)
class AttachedTransform:
    """A gradient rule attached to its optimiser."""

    report: str
    """Description of the rule and its tensors, for the log."""
    skipped_steps: Callable[[], int]
    """Returns how many steps were skipped because a gradient was not finite; waits for a GPU."""
    skipped: Callable[[], int | Tensor]
    """Like ``skipped_steps``, but does not wait: a GPU's count is a tensor of shape ()."""


def attach_transform(config: GradientConfig, optimizer: Optimizer, model: nn.Module) -> AttachedTransform:
    """Attach the configured rule to every step of an optimiser; steps with a non-finite gradient are skipped.

    Raises:
        ConfigError: ``gradient.znorm`` selects something that is not in the model, or leaves nothing to normalise.
    """
    name, reason = choose_transform(config, optimizer)
    numbers, words = _described(config).get(name, ({}, ""))
    try:
        if name == "znorm":
            handle = znorm.attach(optimizer, model, config.znorm)
        else:
            handle = znorm.attach_baseline(optimizer, model, name, config.znorm, **numbers)
    except ValueError as error:
        raise ConfigError(f"gradient.znorm: {error}") from error
    report = words + reason
    if not words:
        title = {"znorm": "ZNorm", "scale": "division by the standard deviation"}[name]
        report = f"{title}{reason} on these tensors:\n{handle.selection.report()}"
    return AttachedTransform(report=report, skipped_steps=lambda: handle.skipped_steps, skipped=lambda: handle.skipped)


def attach_backward(config: NetworkConfig, network: nn.Module) -> znorm.BackwardNormHandle | None:
    """Normalise gradients inside a network where ``network.backward_normalization`` says; None if it is empty.

    Raises:
        ConfigError: a pattern matches no module of the network.
    """
    if not config.backward_normalization:
        return None
    try:
        handle = znorm.attach_backward_norm(network, config.backward_normalization)
    except ValueError as error:
        raise ConfigError(f"network.backward_normalization: {error}") from error
    LOG.info("gradients normalised on their way back at the outputs of %s", ", ".join(handle.places))
    return handle


def choose_transform(config: GradientConfig, optimizer: Optimizer) -> tuple[str, str]:
    """Return the name of the rule for an optimiser, and the reason if the configuration leaves the choice open."""
    if config.transform != AUTO:
        return config.transform, ""
    if isinstance(optimizer, SGD):
        return "clip", " (auto: under SGD, clipping scored higher than ZNorm, docs/evidence.md)"
    return "znorm", " (auto: under AdamW, no rule scored higher than ZNorm, docs/evidence.md)"


def _described(config: GradientConfig) -> dict[str, tuple[dict[str, float], str]]:
    """Return settings and description of each rule except ZNorm; the description is empty if its tensors are listed."""
    ratio = config.adaptive_clip_ratio
    return {
        "none": ({}, "gradients unchanged"),
        "clip": ({"limit": config.clip_norm}, f"gradients clipped to norm {config.clip_norm:g}"),
        "clip-value": ({"limit": config.clip_value}, f"gradients clipped element-wise to {config.clip_value:g}"),
        "centralize": ({}, "gradients centralized by output channel"),
        "adaptive-clip": ({"ratio": ratio}, f"gradients clipped by output channel to {ratio:g} of the weights"),
        "scale": ({"eps": config.znorm.eps}, ""),
    }
