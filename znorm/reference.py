"""ZNorm in float64, straight from the definition: the slow twin that the tests trust."""

from __future__ import annotations

import torch
from torch import Tensor


def zscore_reference(gradient: Tensor, eps: float) -> Tensor:
    """The z-score (g - mean(g)) / (std(g) + eps * max|g|) with the population's standard deviation.

    Args:
        gradient: any shape; a tensor of one element comes back as it is.
        eps: relative to the largest magnitude, so that the result does not depend on the gradient's scale.

    Returns:
        float64 tensor of the same shape; zeros for a gradient that is zero everywhere.

    Source: Yun, arXiv 2408.01215, the update rule; the relative eps is ours.
    """
    values = gradient.to(torch.float64)
    if values.numel() == 1:
        return values.clone()
    largest = values.abs().max()
    if largest == 0:
        return torch.zeros_like(values)
    centred = values - values.mean()
    spread = (centred**2).mean().sqrt()
    return centred / (spread + eps * largest)
