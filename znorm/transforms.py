"""Baselines to compare ZNorm with: named rules that change gradients in place before a step.

A rule returns whether every gradient was finite; if not, the step must be skipped. On a GPU the answer is an unread
tensor; if it is false, the gradients may have changed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from znorm.finite import Finite, all_finite, are_finite, stays_on_gpu
from znorm.zscore import zscore_unread_


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Input of a rule: the gradients of the chosen parameters, in the optimiser's order."""

    gradients: Sequence[Tensor]
    parameters: Sequence[Tensor]
    channel_dims: Sequence[int]
    """Dimension of each tensor that holds its output channels."""
    others: Sequence[Tensor] = ()
    """Gradients of the parameters that were not chosen; all finite."""


#: Changes gradients in place; returns whether all were finite.
GradientTransform = Callable[[Gradients], Finite]


def none_(work: Gradients) -> Finite:
    """Leave the gradients as they are."""
    return are_finite(work.gradients)


@torch.no_grad()
def clip_by_norm_(work: Gradients, *, limit: float) -> Finite:
    """Scale all gradients down together if their total norm exceeds a limit.

    Example:
        >>> g = torch.tensor([3.0, 4.0])
        >>> clip_by_norm_(Gradients(gradients=[g], parameters=[g], channel_dims=[0]), limit=1.0)
        True
        >>> [round(v, 4) for v in g.tolist()]
        [0.6, 0.8]

    Source: Pascanu, Mikolov and Bengio, arXiv 1211.5063; torch.nn.utils.clip_grad_norm_.
    """
    if not work.gradients:
        return True
    if stays_on_gpu(work.gradients) and all(gradient.dtype != torch.float64 for gradient in work.gradients):
        return _clip_unread(work, limit)
    norm = torch.nn.utils.get_total_norm(work.gradients)
    if not bool(torch.isfinite(norm)):
        return all_finite(work.gradients) and _clip_large(work, limit)
    factor = limit / (float(norm) + 1e-6)
    if factor < 1:
        torch._foreach_mul_(list(work.gradients), factor)
    return True


def _clip_unread(work: Gradients, limit: float) -> Tensor:
    """Clip without reading the norm; in float64 it overflows only if an element is not finite."""
    norm = _norm(work.gradients)
    _times_(work.gradients, (limit / (norm + 1e-6)).clamp_max(1))
    return torch.isfinite(norm)


def _clip_large(work: Gradients, limit: float) -> bool:
    """Clip gradients whose total norm overflows."""
    largest = max(float(torch.linalg.vector_norm(g, math.inf)) for g in work.gradients if g.numel())
    torch._foreach_mul_(list(work.gradients), 1 / largest)
    norm = float(torch.nn.utils.get_total_norm(work.gradients))
    torch._foreach_mul_(list(work.gradients), limit / norm)
    return True


@torch.no_grad()
def clip_by_value_(work: Gradients, *, limit: float) -> Finite:
    """Clamp every element to -limit .. limit.

    Example:
        >>> g = torch.tensor([-3.0, 0.5])
        >>> clip_by_value_(Gradients(gradients=[g], parameters=[g], channel_dims=[0]), limit=1.0)
        True
        >>> g.tolist()
        [-1.0, 0.5]

    Source: torch.nn.utils.clip_grad_value_.
    """
    finite = are_finite(work.gradients)
    if finite is not False and work.gradients:
        torch._foreach_clamp_min_(list(work.gradients), -limit)
        torch._foreach_clamp_max_(list(work.gradients), limit)
    return finite


@torch.no_grad()
def centralize_(work: Gradients) -> Finite:
    """Subtract the mean of each output channel, in tensors with two or more dimensions.

    Example:
        >>> g = torch.tensor([[1.0, 3.0], [0.0, 4.0]])
        >>> centralize_(Gradients(gradients=[g], parameters=[g], channel_dims=[0]))
        True
        >>> g.tolist()
        [[-1.0, 1.0], [-2.0, 2.0]]

    Source: Yong, Huang, Hua and Zhang, arXiv 2004.01461, equation 1.
    """
    finite = are_finite(work.gradients)
    if finite is False:
        return False
    for gradient, dim in zip(work.gradients, work.channel_dims, strict=True):
        if gradient.dim() > 1:
            gradient.sub_(gradient.mean(_all_but(gradient, dim), keepdim=True))
    return finite


@torch.no_grad()
def adaptive_clip_(work: Gradients, *, ratio: float, floor: float = 1e-3) -> Finite:
    """Scale down the gradient of each output channel whose norm exceeds a share of its weights' norm.

    Args:
        work: gradients with their parameters; in tensors with one dimension each element is a channel.
        ratio: the share; 0.01 in the paper.
        floor: lower bound on the weights' norm; default 1e-3.

    Example:
        >>> g, w = torch.tensor([[3.0, 4.0], [0.0, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> adaptive_clip_(Gradients(gradients=[g], parameters=[w], channel_dims=[0]), ratio=1.0)
        True
        >>> [[round(v, 4) for v in row] for row in g.tolist()]
        [[0.6, 0.8], [0.0, 0.5]]

    Source: Brock, De, Smith and Simonyan, arXiv 2102.06171, equation 3.
    """
    finite = are_finite(work.gradients)
    if finite is False:
        return False
    for gradient, parameter, dim in zip(work.gradients, work.parameters, work.channel_dims, strict=True):
        others = _all_but(gradient, dim)
        size, weight = (
            torch.linalg.vector_norm(tensor, dim=others, keepdim=True) if others else tensor.abs()
            for tensor in (gradient, parameter)
        )
        allowed = ratio * weight.clamp_min(floor)
        gradient.mul_(torch.where(size > allowed, allowed / size.clamp_min(1e-30), 1.0))
    return finite


def scale_(work: Gradients, *, eps: float) -> Finite:
    """Apply ZNorm without subtracting the mean: divide each tensor by its standard deviation."""
    return zscore_unread_(work.gradients, eps, mode="scale")


@torch.no_grad()
def rescale_to_clipped_norm_(work: Gradients, normalise: Callable[[], Finite], *, limit: float) -> Finite:
    """Normalise the chosen gradients, then rescale all gradients to the norm that clipping would leave.

    Let ||all|| and ||chosen|| be the initial norms of all and of the chosen gradients, and s = min(1, limit / ||all||).
    The chosen gradients end up with norm s * ||chosen||, and the others are multiplied by s. The size of a step, and so
    the meaning of the learning rate, is the same as with clipping, and it falls as the gradients fall; the
    normalisation only changes the share of each layer.

    Args:
        work: gradients, changed in place.
        normalise: changes the chosen gradients in place; if one is not finite, it returns False and changes nothing, or
            returns an unread tensor.
        limit: maximum norm of all gradients together, above 0.

    Example:
        >>> g, other = torch.tensor([3.0, 5.0]), torch.tensor([1.0])
        >>> work = Gradients(gradients=[g], parameters=[g], channel_dims=[0], others=[other])
        >>> rescale_to_clipped_norm_(work, lambda: zscore_unread_([g]), limit=1000.0)
        True
        >>> [round(v, 4) for v in g.tolist()], other.tolist()
        ([-4.1231, 4.1231], [1.0])

    Source: ours.
    """
    chosen, others = _norm(work.gradients), _norm(work.others)
    finite = normalise()
    if isinstance(finite, bool) and not finite:
        return False
    total = torch.hypot(chosen, others)
    shrink = torch.where(total > limit, limit / total, 1.0)
    now = _norm(work.gradients)
    _times_(work.gradients, torch.where(now > 0, shrink * chosen / now, 0.0))
    _times_(work.others, shrink)
    return finite


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of all elements of all tensors, in float64, where the square of a float32 number cannot overflow."""
    kept = [tensor for tensor in tensors if tensor.numel() > 0]
    if not kept:
        return torch.zeros((), dtype=torch.float64)
    norms = [norm.to(kept[0].device) for norm in torch._foreach_norm(kept, 2, dtype=torch.float64)]
    return torch.stack(norms).square().sum().sqrt()


def _times_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), group in kinds.items():
        # One launch for all float32 tensors; half precision needs the factor in a wider type.
        torch._foreach_mul_(group, factor.to(device, dtype if dtype.itemsize >= 4 else factor.dtype))


def _all_but(tensor: Tensor, dim: int) -> list[int]:
    return [d for d in range(tensor.dim()) if d != dim]


#: Every rule except ZNorm itself, by name; the numbers of a rule are its keyword arguments.
BASELINES: Final[Mapping[str, Callable[..., Finite]]] = {
    "none": none_,
    "clip": clip_by_norm_,
    "clip-value": clip_by_value_,
    "centralize": centralize_,
    "adaptive-clip": adaptive_clip_,
    "scale": scale_,
}
