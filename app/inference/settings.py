"""How a trained network is applied to whole volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from data.labels import LabelConvention


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Sliding-window settings, used by validation and by ``predict``."""

    overlap: float = 0.5
    """Share of a window that its neighbour covers too."""
    crop: bool = True
    """Cut the volume to the brain before windows are laid over it. False leaves the empty space around it in, as
    imported networks saw it: group norms count it. Training takes True alone."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"inference.overlap: from 0 to 0.9, got {self.overlap:g}")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """What may be asked of ``predict`` beside the network and the cases."""

    labels: LabelConvention | None = None
    """Numbers of the label maps; None takes those that go with each case's file names, else the model's."""
    nan_to_zero: bool = False
    """Take voxels that are NaN or infinite as 0; how many is logged and stands in ``<case>.json``."""


#: Nothing asked for.
DEFAULTS: Final = PredictOptions()
