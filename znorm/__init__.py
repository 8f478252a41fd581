"""ZNorm: z-score each layer's gradient before the optimiser step (Yun, arXiv 2408.01215). Depends only on torch."""

from znorm.hook import GradientHandle, ZNormConfig, attach, attach_baseline
from znorm.overlap import Junction, find_junctions, watch_overlap
from znorm.select import Selection, TensorChoice, select
from znorm.stats import observe_step
from znorm.transforms import BASELINES
from znorm.zscore import EPS, zscore_

__all__ = [
    "BASELINES",
    "EPS",
    "GradientHandle",
    "Junction",
    "Selection",
    "TensorChoice",
    "ZNormConfig",
    "attach",
    "attach_baseline",
    "find_junctions",
    "observe_step",
    "select",
    "watch_overlap",
    "zscore_",
]
