"""What happens to the gradients before each optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, Literal

from torch import nn
from torch.optim import SGD, Optimizer

import znorm
from app.errors import ConfigError

#: The name that stands for a choice, no rule of its own.
AUTO: Final = "auto"


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """Which rule the gradients go through."""

    transform: Literal["auto", "none", "clip", "clip-value", "centralize", "adaptive-clip", "scale", "znorm"] = "auto"
    """``auto``: ``clip`` under SGD, else ``znorm`` (docs/evidence.md); ``clip``: by global norm; ``clip-value``: each
    element; ``centralize``: arXiv 2004.01461; ``adaptive-clip``: arXiv 2102.06171; ``scale``: ZNorm without taking the
    mean off; ``znorm``: z-score by layer (arXiv 2408.01215)."""
    clip_norm: float = 1.0
    """Largest global norm with ``clip``."""
    clip_value: float = 1.0
    """Largest magnitude of an element with ``clip-value``."""
    adaptive_clip_ratio: float = 0.01
    """Largest norm of a channel's gradient as a share of its weights' norm, with ``adaptive-clip``."""
    znorm: znorm.ZNormConfig = field(default_factory=znorm.ZNormConfig)
    """Settings of ``znorm``, and which parameters ``scale`` takes."""

    def __post_init__(self) -> None:
        for name in ("clip_norm", "clip_value", "adaptive_clip_ratio"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"gradient.{name}: above 0, got {value:g}")
        if not (math.isfinite(self.znorm.eps) and self.znorm.eps >= 0):
            raise ValueError(f"gradient.znorm.eps: at least 0, got {self.znorm.eps:g}")
        if self.znorm.clip_norm is not None and not (math.isfinite(self.znorm.clip_norm) and self.znorm.clip_norm > 0):
            raise ValueError(f"gradient.znorm.clip_norm: above 0, or null, got {self.znorm.clip_norm:g}")
        if self.znorm.min_dimensions < 0:
            raise ValueError(f"gradient.znorm.min_dimensions: at least 0, got {self.znorm.min_dimensions}")


@dataclass(frozen=True, kw_only=True)
class AttachedTransform:
    """A rule on its optimiser."""

    report: str
    """What it does to which tensors, for the log."""
    skipped_steps: Callable[[], int]
    """How many steps were left out because a gradient was not finite."""


def attach(config: GradientConfig, optimizer: Optimizer, model: nn.Module) -> AttachedTransform:
    """Put the configured rule before every step of an optimiser; steps with a non-finite gradient are skipped.

    Raises:
        ConfigError: what ``gradient.znorm`` chooses is not in the model, or leaves nothing to normalise.
    """
    name, reason = choose_transform(config, optimizer)
    try:
        handle = _handle(name, config, optimizer, model)
    except ValueError as error:
        raise ConfigError(f"gradient.znorm: {error}") from error
    return AttachedTransform(report=_report(name, reason, config, handle), skipped_steps=lambda: handle.skipped_steps)


def choose_transform(config: GradientConfig, optimizer: Optimizer) -> tuple[str, str]:
    """Name of the rule for an optimiser, and the reason where the configuration leaves it open."""
    if config.transform != AUTO:
        return config.transform, ""
    if isinstance(optimizer, SGD):
        return "clip", " (auto: under SGD clipping scored higher than ZNorm, docs/evidence.md)"
    return "znorm", " (auto: under AdamW no rule scored higher than ZNorm, docs/evidence.md)"


def _handle(name: str, config: GradientConfig, optimizer: Optimizer, model: nn.Module) -> znorm.GradientHandle:
    if name == "znorm":
        return znorm.attach(optimizer, model, config.znorm)
    numbers = {
        "clip": {"limit": config.clip_norm},
        "clip-value": {"limit": config.clip_value},
        "adaptive-clip": {"ratio": config.adaptive_clip_ratio},
        "scale": {"eps": config.znorm.eps},
    }.get(name, {})
    return znorm.attach_rival(optimizer, model, name, config.znorm, **numbers)


def _report(name: str, reason: str, config: GradientConfig, handle: znorm.GradientHandle) -> str:
    words = {
        "none": "gradients as is",
        "clip": f"gradients clipped to norm {config.clip_norm:g}",
        "clip-value": f"gradients clipped to {config.clip_value:g} by element",
        "centralize": "gradients centralized by output channel",
        "adaptive-clip": f"gradients clipped by output channel to {config.adaptive_clip_ratio:g} of the weights",
    }
    if name in words:
        return words[name] + reason
    title = {"znorm": "ZNorm", "scale": "division by the standard deviation"}[name]
    return f"{title}{reason} on these tensors:\n{handle.selection.report()}"
