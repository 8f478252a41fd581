"""Which rule the gradients go through before each optimiser step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

import znorm

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
