"""What happens to the gradients before each optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

import znorm


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """Which transform the gradients go through."""

    transform: Literal["none", "clip", "znorm"] = "znorm"
    """``clip``: by global norm; ``znorm``: z-score by layer (arXiv 2408.01215)."""
    clip_norm: float = 1.0
    """Largest global norm with ``clip``."""
    znorm: znorm.ZNormConfig = field(default_factory=znorm.ZNormConfig)
    """Settings of ``znorm``."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ValueError(f"gradient.clip_norm: above 0, got {self.clip_norm:g}")
        if not (math.isfinite(self.znorm.eps) and self.znorm.eps >= 0):
            raise ValueError(f"gradient.znorm.eps: at least 0, got {self.znorm.eps:g}")
        if self.znorm.min_dimensions < 0:
            raise ValueError(f"gradient.znorm.min_dimensions: at least 0, got {self.znorm.min_dimensions}")


@dataclass(frozen=True, kw_only=True)
class AttachedTransform:
    """A transform on its optimiser."""

    report: str
    """What it does to which tensors, for the log."""
    skipped_steps: Callable[[], int]
    """How many steps were left out because a gradient was not finite."""


def attach(config: GradientConfig, optimizer: Optimizer, model: nn.Module) -> AttachedTransform:
    """Put the configured transform before every step of an optimiser; steps with a non-finite gradient are skipped."""
    if config.transform == "znorm":
        handle = znorm.attach(optimizer, model, config.znorm)
        return AttachedTransform(
            report=f"ZNorm on these tensors:\n{handle.selection.report()}", skipped_steps=lambda: handle.skipped_steps
        )
    guard = _Guard(config.clip_norm if config.transform == "clip" else None)
    optimizer.register_step_pre_hook(guard)
    return AttachedTransform(
        report=f"gradients clipped to norm {config.clip_norm:g}" if config.transform == "clip" else "gradients as is",
        skipped_steps=lambda: guard.skipped,
    )


class _Guard:
    """Clip by global norm, or only watch; skip what is not finite."""

    def __init__(self, clip_norm: float | None) -> None:
        self.clip_norm = clip_norm
        self.skipped = 0

    def __call__(self, optimizer: Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
        if not torch.isfinite(norm):
            optimizer.zero_grad(set_to_none=True)
            self.skipped += 1
        elif self.clip_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
