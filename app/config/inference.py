"""How a trained network is applied to whole volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final, Literal

from app.runs.training_record import UNKNOWN, TrainingRecord
from data.labels import CONVENTIONS, LabelConvention


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
    window: Literal["trained", "brain"] | tuple[int, int, int] = "trained"
    """Size of the windows: ``trained`` as the network was trained on; ``brain`` one window around the whole brain; or
    voxels along each axis. Sides are rounded up to what the network takes."""
    overlap: float | None = None
    """Share of a window that its neighbour covers too; None takes that of the run's validations."""
    max_memory_gb: float | None = None
    """Memory that the process may hold at its peak, in 10^9 bytes; None for no bound."""

    tta: bool = False
    """Test-time augmentation: the mean over the image mirrored along every subset of its axes; eight times the work."""
    save_probabilities: bool = False
    """Write ``<case>_probabilities.nii.gz``: WT, TC and ET in one 4D file on the label map's grid."""
    uncertainty: bool = False
    """Write ``<case>_uncertainty.nii.gz`` and, of several answers, ``<case>_disagreement.nii.gz``, likewise."""
    training: TrainingRecord = UNKNOWN
    """What is known of the cases that the networks learnt from, for the flags of a case."""

    def __post_init__(self) -> None:
        if isinstance(self.window, tuple) and not all(1 <= side <= 1024 for side in self.window):
            raise ValueError(f"window: from 1 to 1024 voxels along each axis, got {self.window}")
        if self.overlap is not None and not 0 <= self.overlap <= 0.9:
            raise ValueError(f"overlap: from 0 to 0.9, got {self.overlap:g}")
        if self.max_memory_gb is not None and not 0 < self.max_memory_gb < float("inf"):
            raise ValueError(f"max_memory_gb: above 0, got {self.max_memory_gb:g}")


#: Nothing asked for.
DEFAULTS: Final = PredictOptions()


def options_to_plain(options: PredictOptions) -> dict[str, Any]:
    """Every option as plain data, a label convention by its name; but ``training``, which the run's folder tells."""
    left_out = ("labels", "training")
    plain = {one.name: getattr(options, one.name) for one in fields(options) if one.name not in left_out}
    return {**plain, "labels": None if options.labels is None else options.labels.name}


def options_from_plain(content: Mapping[str, Any]) -> PredictOptions:
    """Options from the plain data that :func:`options_to_plain` made, also after a way through JSON."""
    labels, window = content["labels"], content["window"]
    return PredictOptions(
        **{
            **content,
            "labels": None if labels is None else CONVENTIONS[labels],
            "window": window if isinstance(window, str) else tuple(window),
        }
    )
