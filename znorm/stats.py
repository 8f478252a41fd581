"""Statistics of a step's gradients before and after a rule: mean, standard deviation and norm of each tensor.

Nothing here changes a gradient, and no hook stays installed outside :func:`observe_step`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class TensorStats:
    """Mean, standard deviation and norm of a gradient, in its own units; NaN or infinite where an element is."""

    mean: float
    """Mean of the elements."""
    std: float
    """Standard deviation of the population; 0 for one element."""
    norm: float
    """Root of the sum of squares."""


@dataclass(frozen=True, kw_only=True)
class LayerGradient:
    """One parameter's gradient as the backward pass produced it and as the optimiser received it."""

    before: TensorStats
    after: TensorStats | None
    """None if the step was skipped."""


class StepObservation:
    """Measurements of :func:`observe_step`."""

    def __init__(self) -> None:
        self._before: Mapping[str, Tensor] = {}
        self._after: Mapping[str, Tensor] = {}

    def layers(self) -> dict[str, LayerGradient]:
        """Statistics of each parameter that had a gradient, by name, in the model's order."""
        rows = _read([*self._before.values(), *self._after.values()])
        before = dict(zip(self._before, rows, strict=False))
        after = dict(zip(self._after, rows[len(before) :], strict=True))
        if not all(math.isfinite(stats.mean) for stats in before.values()):
            after = {}  # a GPU skips the step without removing the gradients
        return {name: LayerGradient(before=stats, after=after.get(name)) for name, stats in before.items()}


@contextmanager
def observe_step(optimizer: Optimizer, model: nn.Module) -> Iterator[StepObservation]:
    """Measure the gradients of one step, before and after the optimiser's hooks change them.

    Args:
        optimizer: steps within the block; attach rules to it before entering.
        model: supplies the parameter names; parameters without a gradient are left out.

    Yields:
        the observation, complete when the block ends; :meth:`StepObservation.layers` copies its numbers from the
        device once. Sums are float64 where the device supports it.

    With a GradScaler, enter the block after ``scaler.unscale_(optimizer)``.

    Example:
        >>> model = nn.Linear(3, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model.weight.grad = torch.tensor([[1.0, 2.0, 6.0]])
        >>> with observe_step(optimizer, model) as seen:
        ...     optimizer.step()
        >>> before = seen.layers()["weight"].before
        >>> before.mean, round(before.std, 4), round(before.norm, 4)
        (3.0, 2.1602, 6.4031)
    """
    seen = StepObservation()
    seen._before = _measured(model)

    def just_before_step(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:  # noqa: ARG001
        seen._after = _measured(model)

    # Pre-hooks run in the order of registration, so this one runs last, just before the step itself.
    hook = optimizer.register_step_pre_hook(just_before_step)
    try:
        yield seen
    finally:
        hook.remove()


def widest(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in the widest floating-point type of its device: float32 on MPS, else float64."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return tensor.detach().to(dtype, memory_format=torch.contiguous_format)


@torch.no_grad()
def _measured(model: nn.Module) -> dict[str, Tensor]:
    """Mean, standard deviation and norm of each gradient, as a tensor of three on its device; does not synchronise."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.numel() > 0:
            values = widest(parameter.grad).reshape(-1)
            mean = values.mean()
            centred = values - mean
            squares = torch.stack([centred.dot(centred) / len(values), values.dot(values)])
            found[name] = torch.cat([mean.reshape(1), squares.sqrt()])
    return found


def _read(rows: Sequence[Tensor]) -> list[TensorStats]:
    """Statistics from rows of three numbers, with a single transfer from the device."""
    if not rows:
        return []
    table = torch.stack([row.to(rows[0].device) for row in rows]).tolist()
    return [TensorStats(mean=mean, std=std, norm=norm) for mean, std, norm in table]
