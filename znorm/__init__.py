"""ZNorm: z-score each layer's gradient before the optimiser step (Yun, arXiv 2408.01215). Needs torch alone."""

from znorm.hook import GradientHandle, ZNormConfig, attach, attach_rival
from znorm.overlap import Junction, find_junctions, watch_overlap
from znorm.select import Selection, TensorChoice, select
from znorm.stats import observe_step
from znorm.transforms import RIVALS
from znorm.zscore import EPS, zscore_

__all__ = [
    "EPS",
    "RIVALS",
    "GradientHandle",
    "Junction",
    "Selection",
    "TensorChoice",
    "ZNormConfig",
    "attach",
    "attach_rival",
    "find_junctions",
    "observe_step",
    "select",
    "watch_overlap",
    "zscore_",
]
