"""How a trained network is applied to whole volumes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Sliding-window settings, used by validation and by ``predict``."""

    overlap: float = 0.5
    """Share of a window that its neighbour covers too."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"inference.overlap: from 0 to 0.9, got {self.overlap:g}")
