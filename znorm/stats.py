"""What a step's gradients are like before and after a rule: mean, standard deviation and norm of each tensor.

Observation apart from the rules: nothing here changes a gradient, and outside :func:`observe_step` nothing is
installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, kw_only=True)
class TensorStats:
    """One gradient in three numbers, in the gradient's own units; NaN or infinite where an element is."""

    mean: float
    """Mean of the elements."""
    std: float
    """Standard deviation of the population; 0 for one element."""
    norm: float
    """Root of the sum of squares."""


@dataclass(frozen=True, kw_only=True)
class LayerGradient:
    """One parameter's gradient as it came from the backward pass and as the optimiser took it."""

    before: TensorStats
    after: TensorStats | None
    """None where the step was skipped."""


class StepObservation:
    """What :func:`observe_step` saw."""

    def __init__(self) -> None:
        self._before: Mapping[str, Tensor] = {}
        self._after: Mapping[str, Tensor] = {}

    @property
    def skipped(self) -> bool:
        """Whether there were gradients and the optimiser took none of them."""
        return bool(self._before) and not self._after

    def layers(self) -> dict[str, LayerGradient]:
        """Name of each parameter that had a gradient, and what it was like; in the model's order."""
        rows = _read([*self._before.values(), *self._after.values()])
        before = dict(zip(self._before, rows, strict=False))
        after = dict(zip(self._after, rows[len(before) :], strict=True))
        return {name: LayerGradient(before=stats, after=after.get(name)) for name, stats in before.items()}


@contextmanager
def observe_step(optimizer: Optimizer, model: nn.Module) -> Iterator[StepObservation]:
    """Measure the gradients of one step, before and after what hooks on the optimiser do to them.

    Args:
        optimizer: the optimiser that steps within the block; rules must be attached to it before.
        model: the network, for the names; parameters without a gradient are left out.

    Yields:
        the observation, complete when the block ends. Its numbers are read from the device once, by
        :meth:`StepObservation.layers`; sums are float64 where the device has it.

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

    # Pre-hooks run in the order of registration: this one comes last, just before the step itself.
    hook = optimizer.register_step_pre_hook(just_before_step)
    try:
        yield seen
    finally:
        hook.remove()


def widest(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, in the widest floating-point type of its device: float64, but on MPS float32."""
    dtype = torch.float32 if tensor.device.type == "mps" else torch.float64
    return tensor.detach().to(dtype, memory_format=torch.contiguous_format)


@torch.no_grad()
def _measured(model: nn.Module) -> dict[str, Tensor]:
    """Mean, standard deviation and norm of each gradient as a tensor of three on its device; nothing is read."""
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
    """Rows of three numbers, brought over in one transfer."""
    if not rows:
        return []
    table = torch.stack([row.to(rows[0].device) for row in rows]).tolist()
    return [TensorStats(mean=mean, std=std, norm=norm) for mean, std, norm in table]
