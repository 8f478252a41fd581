"""How a trained network is applied to whole volumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from data.labels import CONVENTIONS, LabelConvention


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


#: Nothing asked for.
DEFAULTS: Final = PredictOptions()


def options_to_plain(options: PredictOptions) -> dict[str, Any]:
    """Every option as plain data, a label convention by its name."""
    plain = {one.name: getattr(options, one.name) for one in fields(options) if one.name != "labels"}
    return {**plain, "labels": None if options.labels is None else options.labels.name}


def options_from_plain(content: Mapping[str, Any]) -> PredictOptions:
    """Options from the plain data that :func:`options_to_plain` made, also after a way through JSON."""
    labels = content["labels"]
    return PredictOptions(**{**content, "labels": None if labels is None else CONVENTIONS[labels]})
