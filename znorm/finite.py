"""Whether gradients are finite, answered on their device where the host would otherwise have to wait for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

#: Whether every element is finite: a bool, or a bool tensor of shape () on the GPU, which has not been read.
Finite: TypeAlias = bool | Tensor


def stays_on_gpu(gradients: Sequence[Tensor]) -> bool:
    """Whether all gradients are on one GPU, so that the host would wait for an answer about them."""
    return bool(gradients) and gradients[0].is_cuda and len({gradient.device for gradient in gradients}) == 1


@torch.no_grad()
def are_finite(gradients: Sequence[Tensor]) -> Finite:
    """Whether no element is infinite or NaN; the answer for gradients on one GPU stays there.

    For other devices than a CPU and one GPU, the host waits once.
    """
    if stays_on_gpu(gradients):
        return _all_finite_on_device(gradients)
    elsewhere: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.device.type == "cpu":
            # A sum is faster than a test of each element, but it may overflow: only then are the elements tested.
            if not math.isfinite(float(gradient.sum())) and not bool(torch.isfinite(gradient).all()):
                return False
        else:
            elsewhere.setdefault(gradient.device, []).append(gradient)
    found = [_all_finite_on_device(group) for group in elsewhere.values()]
    return not found or bool(torch.stack([flag.to(found[0].device) for flag in found]).all())


def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Like :func:`are_finite`; the host waits for the answer."""
    return bool(are_finite(gradients))


def both(one: Finite, other: Finite) -> Finite:
    """Combine two answers without reading them."""
    if isinstance(one, bool):
        return other if one else False
    if isinstance(other, bool):
        return one if other else False
    return one & other.to(one.device)


def _all_finite_on_device(gradients: Sequence[Tensor]) -> Tensor:
    of_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel() > 0:
            of_dtype.setdefault(gradient.dtype, []).append(gradient)
    if not of_dtype:
        return torch.ones((), dtype=torch.bool, device=gradients[0].device)
    flags = [torch.isfinite(torch.stack(torch._foreach_norm(group, math.inf))).all() for group in of_dtype.values()]
    return flags[0] if len(flags) == 1 else torch.stack(flags).all()
