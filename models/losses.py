"""The loss over region channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class RegionLoss(nn.Module):
    """Soft Dice plus binary cross-entropy, each the mean over regions.

    Dice is taken over the whole batch for each region, so that a patch without a region does not decide alone:
    1 - mean_r (2 sum(p t) + s) / (sum(p) + sum(t) + s), with p the sigmoid of the logits.

    Args:
        smooth: s above, in voxels; default 1.
        total: takes the regions' sums of this process to those of all processes that share the batch; gradients flow
            through it. Default: the process is alone.

    Example:
        >>> logits, masks = torch.full((1, 1, 2, 2, 2), 50.0), torch.ones(1, 1, 2, 2, 2)
        >>> round(float(RegionLoss()(logits, masks)), 6)
        0.0

    Source: the region loss of nnU-Net's BraTS 2020 entry (Isensee et al., arXiv 2011.00848).
    """

    def __init__(self, smooth: float = 1.0, *, total: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.smooth = smooth
        self._total = total

    def forward(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Loss of logits against masks, both of shape (N, regions, X, Y, Z); masks in 0..1.

        Computed in float32, in float64 where the logits are.
        """
        precision = torch.promote_types(logits.dtype, torch.float32)
        logits, masks = logits.to(precision), masks.to(precision)
        bce = functional.binary_cross_entropy_with_logits(logits, masks)
        probabilities = torch.sigmoid(logits)
        axes = (0, 2, 3, 4)
        overlap = (probabilities * masks).sum(axes)
        sizes = probabilities.sum(axes) + masks.sum(axes)
        if self._total is not None:
            overlap, sizes = self._total(torch.stack([overlap, sizes]))
        dice = (2 * overlap + self.smooth) / (sizes + self.smooth)
        return bce + (1 - dice).mean()
