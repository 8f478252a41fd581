"""ZNorm: z-score each layer's gradient before the optimiser step (Yun, arXiv 2408.01215). Needs torch alone."""

from znorm.hook import ZNormConfig, ZNormHandle, attach
from znorm.select import Selection, TensorChoice, select
from znorm.zscore import EPS, zscore_

__all__ = ["EPS", "Selection", "TensorChoice", "ZNormConfig", "ZNormHandle", "attach", "select", "zscore_"]
