"""Config of the gradient rule that is applied before each optimiser step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final, Literal

import znorm

#: Placeholder that is resolved to one of the rules when the optimiser is known.
AUTO: Final = "auto"


@dataclass(frozen=True, kw_only=True)
class GradientConfig:
    """The rule applied to the gradients before each optimiser step."""

    transform: Literal["auto", "none", "clip", "clip-value", "centralize", "adaptive-clip", "scale", "znorm"] = "auto"
    """``auto``: ``clip`` under SGD, otherwise ``znorm`` (docs/evidence.md); ``clip``: by global norm; ``clip-value``:
    by element; ``centralize``: arXiv 2004.01461; ``adaptive-clip``: arXiv 2102.06171; ``scale``: ZNorm without
    subtracting the mean; ``znorm``: z-score per layer (arXiv 2408.01215)."""
    clip_norm: float = 1.0
    """Maximum global norm under ``clip``."""
    clip_value: float = 1.0
    """Maximum magnitude of an element under ``clip-value``."""
    adaptive_clip_ratio: float = 0.01
    """Maximum ratio of the norm of a channel's gradient to the norm of its weights, under ``adaptive-clip``."""
    znorm: znorm.ZNormConfig = field(default_factory=znorm.ZNormConfig)
    """Settings of ``znorm``. ``scale`` also uses ``eps`` and the selection of parameters; ``adaptive-clip`` also uses
    the output block."""

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
