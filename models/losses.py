"""The loss over region channels, at one resolution or at several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class RegionLoss(nn.Module):
    """Soft Dice plus binary cross-entropy, each the mean over regions.

    Dice is computed for each region over the whole batch, so that a patch without the region cannot dominate it:
    1 - mean_r (2 sum(p t) + s) / (sum(p) + sum(t) + s), with p the sigmoid of the logits.

    Args:
        smooth: s above, in voxels; default 1.
        total: adds up this process's per-region sums over all processes that share the batch; gradients flow through
            it. Default: a single process, no reduction.

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
        """Return the loss of logits against masks, both of shape (N, regions, X, Y, Z); masks in 0..1.

        Computed in float32, or in float64 if the logits are float64.
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


class DeepLoss(nn.Module):
    """A loss at several resolutions: each weight is half that of the next finer resolution, and the weights sum to 1.

    Coarser masks take the voxel in the middle of each block, so they stay binary and nested, and a region keeps its
    volume on average. Max pooling would make tumours several times too large on the coarse grids; structures too small
    for a coarse grid remain in the finer ones.

    Args:
        loss: the loss at one resolution, called with logits and masks.

    Example:
        >>> logits, masks = torch.full((1, 1, 4, 4, 4), 50.0), torch.ones(1, 1, 4, 4, 4)
        >>> deep = DeepLoss(RegionLoss())
        >>> round(float(deep([logits, -logits[..., ::2, ::2, ::2]], masks)) / 50, 1)
        0.3

    Source: deep supervision as in nnU-Net (Isensee et al. 2021), where the coarsest head has weight 0.
    """

    def __init__(self, loss: RegionLoss) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, logits: Tensor | Sequence[Tensor], masks: Tensor) -> Tensor:
        """Return the weighted mean of the losses at all resolutions.

        Args:
            logits: one tensor, or one per resolution, finest first, each of shape (N, regions, x, y, z); their sides
                divide those of the first.
            masks: shape (N, regions, X, Y, Z), in 0..1, at the finest resolution.
        """
        if isinstance(logits, Tensor):
            return self.loss(logits, masks)  # type: ignore[no-any-return]
        weights = [0.5**level for level in range(len(logits))]
        losses = [
            weight * self.loss(at_level, coarser(masks, at_level.shape[2:]))
            for weight, at_level in zip(weights, logits, strict=True)
        ]
        return torch.stack(losses).sum() / sum(weights)


class PresenceLoss(nn.Module):
    """Binary cross-entropy of presence, with a weight for absent and for present examples of each output.

    mean_nr w_r(t) BCE(logit, t), with w_r(0) = absent_r and w_r(1) = present_r.

    Args:
        absent: weight of an example without output r; one number for each output.
        present: weight of an example with output r.

    Example:
        >>> round(float(PresenceLoss([1.0], [1.0])(torch.zeros(1, 1), torch.ones(1, 1))), 4)
        0.6931
    """

    def __init__(self, absent: Sequence[float], present: Sequence[float]) -> None:
        super().__init__()
        self.absent, self.present = tuple(absent), tuple(present)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits against 0 and 1, both of shape (N, outputs); computed in float32 at least."""
        precision = torch.promote_types(logits.dtype, torch.float32)
        logits, target = logits.to(precision), target.to(precision)
        pairs = enumerate(zip(self.absent, self.present, strict=True))
        weights = torch.stack([absent + (present - absent) * target[:, r] for r, (absent, present) in pairs], dim=1)
        return functional.binary_cross_entropy_with_logits(logits, target, weight=weights)


def coarser(masks: Tensor, shape: Sequence[int]) -> Tensor:
    """Return masks on a coarser grid: the voxel in the middle of each block.

    Args:
        masks: shape (N, regions, X, Y, Z).
        shape: of the coarser grid; its sides divide X, Y and Z.
    """
    x, y, z = (side // coarse for side, coarse in zip(masks.shape[2:], shape, strict=True))
    return masks[:, :, x // 2 :: x, y // 2 :: y, z // 2 :: z]
