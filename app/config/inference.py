"""Config of inference on whole volumes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from app.runs.training_record import UNKNOWN, TrainingRecord
from data.labels import LabelConvention


@dataclass(frozen=True, kw_only=True)
class InferenceConfig:
    """Sliding-window settings of validation and ``predict``."""

    overlap: float = 0.5
    """Overlap of neighbouring windows, as a fraction of the window's side."""
    crop: bool = True
    """Crop the volume to the brain before placing the windows. False keeps the empty space around the brain, for
    imported networks that were trained with it and whose group norms depend on it. Training requires True."""

    def __post_init__(self) -> None:
        if not 0 <= self.overlap <= 0.9:
            raise ValueError(f"inference.overlap: from 0 to 0.9, got {self.overlap:g}")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Options of ``predict`` other than the network and the cases."""

    labels: LabelConvention | None = None
    """Label convention of the output; None follows each case's file names or, if they imply none, the model."""
    nan_to_zero: bool = False
    """Replace NaN and infinite voxels with 0; their number is logged and recorded in ``<case>.json``."""
    window: Literal["trained", "brain"] | tuple[int, int, int] = "trained"
    """Size of the windows: ``trained``, the network's training patch; ``brain``, one window around the whole brain; or
    voxels along each axis. Sides are rounded up to sizes that the network accepts."""
    overlap: float | None = None
    """Overlap of neighbouring windows, as a fraction of the window's side; None uses the run's."""
    max_memory_gb: float | None = None
    """Peak memory that the process may use, in 10^9 bytes; None for no limit."""

    tta: bool = False
    """Test-time augmentation: average over mirroring along every subset of the axes, at eight times the cost."""
    save_probabilities: bool = False
    """Write ``<case>_probabilities.nii.gz``: WT, TC and ET in one 4D file on the label map's grid."""
    uncertainty: bool = False
    """Write ``<case>_uncertainty.nii.gz`` in the same form and, if several answers are averaged (an ensemble, test-time
    augmentation), ``<case>_disagreement.nii.gz``."""
    training: TrainingRecord = UNKNOWN
    """What is known about the networks' training cases; used to flag unusual cases."""

    def __post_init__(self) -> None:
        if isinstance(self.window, tuple) and not all(1 <= side <= 1024 for side in self.window):
            raise ValueError(f"window: from 1 to 1024 voxels along each axis, got {self.window}")
        if self.overlap is not None and not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap: from 0 to 0.9, got {self.overlap:g}")
        if self.max_memory_gb is not None and not 0 < self.max_memory_gb < float("inf"):
            raise ValueError(f"max_memory_gb: above 0, got {self.max_memory_gb:g}")


#: Every option at its default.
DEFAULTS: Final = PredictOptions()


def options_to_plain(options: PredictOptions) -> dict[str, Any]:
    """Return the options, except ``training``, as plain data; the label convention is given by its name."""
    left_out = ("labels", "training")
    plain = {one.name: getattr(options, one.name) for one in fields(options) if one.name not in left_out}
    return {**plain, "labels": None if options.labels is None else options.labels.name}
