"""How a trained network is applied to whole volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from app.inference.known import UNKNOWN, TrainingRecord
from data.labels import LabelConvention


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Sliding-window settings, used by validation and by ``predict``."""

    overlap: float = 0.5
    """Share of a window that its neighbour covers too."""

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
    tta: bool = False
    """Test-time augmentation: the mean over the image mirrored along every subset of its axes; eight times the work."""
    save_probabilities: bool = False
    """Write ``<case>_probabilities.nii.gz``: WT, TC and ET in one 4D file on the label map's grid."""
    uncertainty: bool = False
    """Write ``<case>_uncertainty.nii.gz`` and, of several answers, ``<case>_disagreement.nii.gz``, likewise."""
    training: TrainingRecord = UNKNOWN
    """What is known of the cases that the networks learnt from, for the flags of a case."""


#: Nothing asked for.
DEFAULTS: Final = PredictOptions()
