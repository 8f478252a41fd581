"""ZNorm in a training loop: an optimiser pre-hook that z-scores gradients just before each step.

The hook sits on the optimiser, not on the tensors: there it runs once per step, after the last micro-batch of an
accumulation and after the all-reduce of distributed training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from znorm.select import AUTO, Selection, select
from znorm.zscore import EPS, zscore_

_attached: WeakSet[Optimizer] = WeakSet()


@dataclass(frozen=True, kw_only=True)
class ZNormConfig:
    """How ZNorm is applied."""

    eps: float = EPS
    """Added to the standard deviation, relative to the gradient's largest magnitude."""
    min_dimensions: int = 2
    """Parameters with fewer dimensions (biases, norms) are left as they are."""
    output_block: str = AUTO
    """``auto``, ``none``, or the name of the module that makes the logits; it is left as it is."""


class ZNormHandle:
    """ZNorm attached to an optimiser: its selection, its count of skipped steps, and the way to remove it."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, config: ZNormConfig) -> None:
        self.config = config
        self.selection: Selection = select(
            model, min_dimensions=config.min_dimensions, output_block=config.output_block
        )
        self.skipped_steps = 0
        """Steps left out because a gradient was not finite."""
        known = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters = _parameters(optimizer)
        strangers = [parameter for parameter in parameters if id(parameter) not in known]
        if strangers:
            raise ValueError(f"the optimizer holds {len(strangers)} parameters that are not the model's")
        self._normalised = {id(p) for p in parameters if known[id(p)] in self.selection.normalised}
        self._optimizer = optimizer
        self._hook: RemovableHandle | None = optimizer.register_step_pre_hook(self._before_step)
        _attached.add(optimizer)

    def remove(self) -> None:
        """Take ZNorm off the optimiser; a second call does nothing."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
            _attached.discard(self._optimizer)

    def _before_step(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        _refuse_closure(args, kwargs)
        _refuse_scaled(optimizer)
        parameters = [parameter for parameter in _parameters(optimizer) if parameter.grad is not None]
        gradients = [_dense(parameter) for parameter in parameters]
        if not gradients:
            return
        if not all_finite(gradients):
            # Without gradients the step changes nothing: no weight decay, no momentum, no count.
            optimizer.zero_grad(set_to_none=True)
            self.skipped_steps += 1
            return
        zscore_([g for p, g in zip(parameters, gradients, strict=True) if id(p) in self._normalised], self.config.eps)


def attach(optimizer: Optimizer, model: nn.Module, config: ZNormConfig | None = None) -> ZNormHandle:
    """Z-score the gradients of a model before every step of its optimiser.

    Args:
        optimizer: any torch optimiser over parameters of ``model``; hooks are not part of its ``state_dict``, so attach
            again after loading one.
        model: the network, for the names and the output block.
        config: what is normalised and how; the default is :class:`ZNormConfig`'s.

    Returns:
        a handle with ``remove()``, ``selection`` and ``skipped_steps``.

    Raises:
        ValueError: the optimiser has ZNorm already, holds parameters that are not the model's, or nothing is left to
            normalise.

    The step itself raises RuntimeError for gradients still scaled by a GradScaler (call ``scaler.unscale_(optimizer)``
    first) and for closures, and TypeError for sparse gradients. A step with a non-finite gradient is skipped and
    counted.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> handle = attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> sorted(handle.selection.normalised)
        ['0.weight']

    Source: Yun, arXiv 2408.01215.
    """
    if optimizer in _attached:
        raise ValueError("this optimizer has ZNorm already; remove() the first handle before attaching again")
    return ZNormHandle(optimizer, model, config if config is not None else ZNormConfig())


@torch.no_grad()
def all_finite(gradients: Sequence[Tensor]) -> bool:
    """Whether no element is infinite or NaN; one synchronisation per device and dtype."""
    by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel() > 0:
            by_kind.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    return all(
        bool(torch.isfinite(torch.stack(torch._foreach_norm(group, math.inf))).all()) for group in by_kind.values()
    )


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _refuse_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    # torch hands the bound arguments on: the optimiser itself may come first.
    given = [argument for argument in args if not isinstance(argument, Optimizer) and argument is not None]
    if given or kwargs.get("closure") is not None:
        raise RuntimeError("ZNorm does not work with a closure: it would run before the closure makes the gradients")


def _refuse_scaled(optimizer: Optimizer) -> None:
    if getattr(optimizer, "grad_scale", None) is not None:
        raise RuntimeError(
            "the gradients are still scaled by a GradScaler, and this fused optimizer would divide the normalised ones "
            "by the scale; call scaler.unscale_(optimizer) before scaler.step(optimizer)"
        )


def _dense(parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if gradient.layout is not torch.strided:
        raise TypeError(f"ZNorm needs dense gradients, got one with layout {gradient.layout}; set sparse=False")
    return gradient
