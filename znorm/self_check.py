"""The rules in float64, straight from their definitions: slow references for the tests and the kernels' self-check."""

from __future__ import annotations

import torch
from torch import Tensor


def zscore_reference(gradient: Tensor, eps: float, mode: str = "zscore") -> Tensor:
    """Compute the z-score (g - mean(g)) / (std(g) + eps * rms(g)), with the population's standard deviation.

    Args:
        gradient: any shape; a tensor of one element is copied unchanged.
        eps: relative to the root mean square, so that the result does not depend on the gradient's scale.
        mode: ``zscore``; ``centre`` only subtracts the mean; ``scale`` only divides.

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
    if mode == "centre":
        return centred
    # Divide by the largest magnitude first: the square of 1e-200 underflows in float64.
    spread = largest * ((centred / largest) ** 2).mean().sqrt()
    size = largest * ((values / largest) ** 2).mean().sqrt()
    divisor = spread + eps * size
    return (values if mode == "scale" else centred) / (divisor if divisor > 0 else 1.0)
