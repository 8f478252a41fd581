"""Exponential moving average of a network's weights, kept alongside the network in training."""

from __future__ import annotations

import copy
from typing import Final

import torch
from torch import Tensor, nn

#: The average forgets faster early in a run: after t steps its decay is at most (1 + t) / (_WARM_UP + t).
_WARM_UP: Final = 10


class WeightAverage:
    """A copy of a network whose weights are the moving average of the original's over its training steps.

    After step t each weight is d * average + (1 - d) * weight, with d = min(decay, (1 + t) / (10 + t)). Buffers are
    copied. The instance norms of these networks have no running statistics, so nothing needs to be recomputed.

    Args:
        network: the network to average, before its first step; the average starts from its weights.
        decay: above 0 and below 1.

    Source: Tarvainen and Valpola 2017, arXiv 1703.01780; the warm-up is TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Update the average with the weights after a step.

        Args:
            network: the network in training.
            step: number of optimiser steps done, including this one.
        """
        keep = min(self._decay, (1 + step) / (_WARM_UP + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - keep)
        for kept, now in zip(self.network.buffers(), network.buffers(), strict=True):
            kept.copy_(now)

    def load(self, weights: dict[str, Tensor]) -> None:
        """Replace the average by a state dict of the network: initial weights, or the average in a checkpoint."""
        self.network.load_state_dict(weights)
