"""ZNorm: z-score each layer's gradient before the optimiser step (Yun, arXiv 2408.01215). Depends only on torch."""

from typing import Any

from znorm.backward import BackwardNormHandle, attach_backward_norm, backward_norm, find_places
from znorm.hook import GradientHandle, ZNormConfig, attach, attach_baseline
from znorm.overlap import Junction, find_junctions, watch_overlap
from znorm.select import Selection, TensorChoice, select
from znorm.stats import observe_step
from znorm.transforms import BASELINES
from znorm.zscore import EPS, zscore_

__all__ = [
    "BASELINES",
    "EPS",
    "BackwardNormHandle",
    "GradientHandle",
    "Junction",
    "Selection",
    "TensorChoice",
    "ZNormConfig",
    "attach",
    "attach_backward_norm",
    "attach_baseline",
    "backward_norm",
    "find_junctions",
    "find_places",
    "observe_step",
    "select",
    "watch_overlap",
    "zscore_",
]

#: Names in earlier versions, with their present names.
_RENAMED = {"RIVALS": "BASELINES", "attach_rival": "attach_baseline"}


def __getattr__(name: str) -> Any:
    """Return the object under its old name, with a warning; the next version drops old names."""
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import warnings

    warnings.warn(f"znorm.{name} is now znorm.{_RENAMED[name]}", DeprecationWarning, stacklevel=2)
    return globals()[_RENAMED[name]]
