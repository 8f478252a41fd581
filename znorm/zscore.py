"""The maths of ZNorm, in place on a list of tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

#: Relative to a gradient's largest magnitude: about float32's resolution, so that rounding noise is not blown up.
EPS: Final = 1e-7


@torch.no_grad()
def zscore_(gradients: Sequence[Tensor], eps: float = EPS) -> None:
    """Replace each tensor g by (g - mean(g)) / (std(g) + eps * max|g|), in place.

    Each tensor is first brought to a largest magnitude of 1, so the result does not depend on its scale, from the
    smallest normal numbers up to the largest. A tensor of one element has no spread and stays as it is; a constant one
    becomes 0. Half-precision tensors are computed in float32. One non-finite element makes its whole tensor NaN:
    check before.

    Args:
        gradients: floating-point tensors of any shapes; on one or several devices.
        eps: added to the standard deviation (the population's), relative to max|g|; default 1e-7.

    Raises:
        ValueError: eps is negative or not finite.

    Example:
        >>> g = torch.tensor([1.0, 2.0, 3.0])
        >>> zscore_([g])
        >>> [round(v, 4) for v in g.tolist()]
        [-1.2247, 0.0, 1.2247]

    Source: Yun, arXiv 2408.01215.
    """
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel() > 1:
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (_, dtype), group in by_kind.items():
        if dtype in (torch.float16, torch.bfloat16):
            wide = [gradient.float() for gradient in group]
            _zscore_group_(wide, eps)
            torch._foreach_copy_(group, wide)
        else:
            _zscore_group_(group, eps)


def _zscore_group_(group: list[Tensor], eps: float) -> None:
    """The same for tensors of one device and dtype."""
    largest = torch.stack(torch._foreach_norm(group, math.inf))
    # The reciprocal of a subnormal number overflows, hence a division by the magnitude itself.
    torch._foreach_div_(group, list(torch.where(largest > 0, largest, 1).unbind()))
    # Two passes, mean then spread of what is left: exact where |mean| is much larger than the spread.
    torch._foreach_sub_(group, [gradient.mean() for gradient in group])
    root_of_counts = torch.tensor([math.sqrt(g.numel()) for g in group], dtype=largest.dtype, device=largest.device)
    spread = torch.stack(torch._foreach_norm(group, 2)) / root_of_counts
    # A tensor of zeros has spread 0; with eps 0 it would be divided by 0.
    divisor = spread + eps
    torch._foreach_div_(group, list(torch.where(divisor > 0, divisor, 1).unbind()))
