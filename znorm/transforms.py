"""The rivals of ZNorm: rules that change gradients in place before a step, each told by one name.

A rule says whether every gradient was finite; where it says no, the step is to be left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from znorm.zscore import zscore_


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What a rule works on: the gradients of the chosen parameters, in the order of the optimiser."""

    gradients: Sequence[Tensor]
    parameters: Sequence[Tensor]
    channel_dims: Sequence[int]
    """Dimension of each tensor that holds its output channels."""
    others: Sequence[Tensor] = ()
    """Gradients of the parameters that were not chosen; finite."""


#: Changes gradients in place; False where one was not finite.
GradientTransform = Callable[[Gradients], bool]


@torch.no_grad()
def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no element is infinite or NaN; one synchronisation for all that do not lie on a CPU."""
    elsewhere: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.device.type == "cpu":
            # A sum is quicker than a test of each element; one that overflowed says nothing yet.
            if not math.isfinite(float(gradient.sum())) and not bool(torch.isfinite(gradient).all()):
                return False
        elif gradient.numel() > 0:
            elsewhere.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    found = [torch.isfinite(torch.stack(torch._foreach_norm(group, math.inf))).all() for group in elsewhere.values()]
    return not found or bool(torch.stack([flag.to(found[0].device) for flag in found]).all())


def none_(work: Gradients) -> bool:
    """Leave the gradients as they are."""
    return all_finite(work.gradients)


@torch.no_grad()
def clip_by_norm_(work: Gradients, *, limit: float) -> bool:
    """Scale all gradients down together where the norm of all of them is above a limit.

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
    norm = torch.nn.utils.get_total_norm(work.gradients)
    if not bool(torch.isfinite(norm)):
        return all_finite(work.gradients) and _clip_large(work, limit)
    factor = limit / (float(norm) + 1e-6)
    if factor < 1:
        torch._foreach_mul_(list(work.gradients), factor)
    return True


def _clip_large(work: Gradients, limit: float) -> bool:
    """The same where the norm itself is too large a number."""
    largest = max(float(torch.linalg.vector_norm(g, math.inf)) for g in work.gradients if g.numel())
    torch._foreach_mul_(list(work.gradients), 1 / largest)
    norm = float(torch.nn.utils.get_total_norm(work.gradients))
    torch._foreach_mul_(list(work.gradients), limit / norm)
    return True


@torch.no_grad()
def clip_by_value_(work: Gradients, *, limit: float) -> bool:
    """Cut every element to -limit .. limit.

    Example:
        >>> g = torch.tensor([-3.0, 0.5])
        >>> clip_by_value_(Gradients(gradients=[g], parameters=[g], channel_dims=[0]), limit=1.0)
        True
        >>> g.tolist()
        [-1.0, 0.5]

    Source: torch.nn.utils.clip_grad_value_.
    """
    if not all_finite(work.gradients):
        return False
    if work.gradients:
        torch._foreach_clamp_min_(list(work.gradients), -limit)
        torch._foreach_clamp_max_(list(work.gradients), limit)
    return True


@torch.no_grad()
def centralize_(work: Gradients) -> bool:
    """Take the mean of each output channel off, of tensors with two or more dimensions.

    Example:
        >>> g = torch.tensor([[1.0, 3.0], [0.0, 4.0]])
        >>> centralize_(Gradients(gradients=[g], parameters=[g], channel_dims=[0]))
        True
        >>> g.tolist()
        [[-1.0, 1.0], [-2.0, 2.0]]

    Source: Yong, Huang, Hua and Zhang, arXiv 2004.01461, equation 1.
    """
    if not all_finite(work.gradients):
        return False
    for gradient, dim in zip(work.gradients, work.channel_dims, strict=True):
        if gradient.dim() > 1:
            gradient.sub_(gradient.mean(_all_but(gradient, dim), keepdim=True))
    return True


@torch.no_grad()
def adaptive_clip_(work: Gradients, *, ratio: float, floor: float = 1e-3) -> bool:
    """Scale the gradient of an output channel down where its norm is above a share of its weights' norm.

    Args:
        work: gradients with their parameters; of tensors with one dimension each element is a channel.
        ratio: the share; 0.01 in the paper.
        floor: norm that weights count with at least.

    Example:
        >>> g, w = torch.tensor([[3.0, 4.0], [0.0, 0.5]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> adaptive_clip_(Gradients(gradients=[g], parameters=[w], channel_dims=[0]), ratio=1.0)
        True
        >>> [[round(v, 4) for v in row] for row in g.tolist()]
        [[0.6, 0.8], [0.0, 0.5]]

    Source: Brock, De, Smith and Simonyan, arXiv 2102.06171, equation 3.
    """
    if not all_finite(work.gradients):
        return False
    for gradient, parameter, dim in zip(work.gradients, work.parameters, work.channel_dims, strict=True):
        others = _all_but(gradient, dim)
        size, weight = (
            torch.linalg.vector_norm(tensor, dim=others, keepdim=True) if others else tensor.abs()
            for tensor in (gradient, parameter)
        )
        allowed = ratio * weight.clamp_min(floor)
        gradient.mul_(torch.where(size > allowed, allowed / size.clamp_min(1e-30), 1.0))
    return True


def scale_(work: Gradients, *, eps: float) -> bool:
    """ZNorm without taking the mean off: each tensor divided by its standard deviation."""
    return zscore_(work.gradients, eps, mode="scale")


@torch.no_grad()
def rescale_to_clipped_norm_(work: Gradients, normalise: Callable[[], bool], *, limit: float) -> bool:
    """Normalise the chosen gradients, then bring all gradients to the size that clipping by norm would leave them.

    With the norms ||all|| of all gradients and ||chosen|| of the chosen ones before, and s = min(1, limit / ||all||):
    the chosen ones leave with norm s * ||chosen||, the others are multiplied by s. So the size of a step, and with it
    the learning rate, means what it means with clipping, and falls as the gradients fall; what the normalisation has
    changed is the share of each layer in it.

    Args:
        work: gradients, changed in place.
        normalise: changes the chosen gradients in place; False where one is not finite, then nothing is changed.
        limit: largest norm of all gradients together, above 0.

    Example:
        >>> g, other = torch.tensor([3.0, 5.0]), torch.tensor([1.0])
        >>> work = Gradients(gradients=[g], parameters=[g], channel_dims=[0], others=[other])
        >>> keep_size_(work, lambda: zscore_([g]), limit=1000.0)
        True
        >>> [round(v, 4) for v in g.tolist()], other.tolist()
        ([-4.1231, 4.1231], [1.0])

    Source: ours.
    """
    chosen, others = _norm(work.gradients), _norm(work.others)
    if not normalise():
        return False
    total = torch.hypot(chosen, others)
    shrink = torch.where(total > limit, limit / total, 1.0)
    now = _norm(work.gradients)
    _times_(work.gradients, torch.where(now > 0, shrink * chosen / now, 0.0))
    _times_(work.others, shrink)
    return True


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Norm of all elements of all tensors, in float64, where no square of a float32 number overflows."""
    kept = [tensor for tensor in tensors if tensor.numel() > 0]
    if not kept:
        return torch.zeros((), dtype=torch.float64)
    norms = [norm.to(kept[0].device) for norm in torch._foreach_norm(kept, 2, dtype=torch.float64)]
    return torch.stack(norms).square().sum().sqrt()


def _times_(tensors: Sequence[Tensor], factor: Tensor) -> None:
    for tensor in tensors:
        tensor.mul_(factor.to(tensor.device))


def _all_but(tensor: Tensor, dim: int) -> list[int]:
    return [d for d in range(tensor.dim()) if d != dim]


#: Every rule but ZNorm's own by its name, and by the names of its numbers.
BASELINES: Final[Mapping[str, Callable[..., bool]]] = {
    "none": none_,
    "clip": clip_by_norm_,
    "clip-value": clip_by_value_,
    "centralize": centralize_,
    "adaptive-clip": adaptive_clip_,
    "scale": scale_,
}
