"""What a step's gradients are like before and after a rule: mean, standard deviation and norm of each tensor.

Observation apart from the rules: nothing here changes a gradient, and outside :class:`observe_step` nothing is
installed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


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


class observe_step:  # noqa: N801 - used as `with observe_step(...)`
    """Measure the gradients of one step, before and after what hooks on the optimiser do to them.

    Args:
        optimizer: the optimiser that steps within the block; rules must be attached to it before.
        model: the network, for the names; parameters without a gradient are left out.

    With a GradScaler, enter the block after ``scaler.unscale_(optimizer)``. The numbers are read from the device once,
    by :meth:`layers`; sums are float64 where the device has it.

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

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self._optimizer = optimizer
        self._model = model
        self._before: Mapping[str, Tensor] = {}
        self._after: Mapping[str, Tensor] = {}
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> Self:
        self._before = _measured(self._model)
        # Pre-hooks run in the order of registration: this one comes last, just before the step itself.
        self._hook = self._optimizer.register_step_pre_hook(self._just_before_step)
        return self

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

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

    def _just_before_step(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:  # noqa: ARG002
        self._after = _measured(self._model)


def widest(tensor: Tensor) -> Tensor:
    """The tensor in the widest floating-point type of its device: float64, but on MPS float32."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


@torch.no_grad()
def _measured(model: nn.Module) -> dict[str, Tensor]:
    """Mean, standard deviation and norm of each gradient as a tensor of three on its device; nothing is read."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.numel() > 0:
            values = widest(parameter.grad)
            variance, mean = torch.var_mean(values, correction=0)
            found[name] = torch.stack([mean, variance.sqrt(), torch.linalg.vector_norm(values)])
    return found


def _read(rows: Sequence[Tensor]) -> list[TensorStats]:
    """Rows of three numbers, brought over in one transfer."""
    if not rows:
        return []
    table = torch.stack([row.to(rows[0].device) for row in rows]).tolist()
    return [TensorStats(mean=mean, std=std, norm=norm) for mean, std, norm in table]
