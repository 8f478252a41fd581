"""ZNorm in a training loop: an optimiser pre-hook that changes gradients just before each step.

The hook is on the optimiser rather than on the tensors, so it runs once per step, after the last micro-batch of an
accumulation and after the all-reduce of distributed training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.hooks import RemovableHandle

from znorm.finite import Finite, are_finite, both
from znorm.select import AUTO, NONE, Selection, select
from znorm.transforms import BASELINES, Gradients, GradientTransform, rescale_to_clipped_norm_
from znorm.zscore import EPS, Mode, Scope, zscore_unread_

_attached: WeakSet[Optimizer] = WeakSet()


@dataclass(frozen=True, kw_only=True)
class ZNormConfig:
    """Settings of ZNorm."""

    eps: float = EPS
    """Added to the standard deviation, relative to the gradient's root mean square."""
    scope: Scope = "layer"
    """Scope of each mean and spread: a tensor (``layer``), an output ``channel``, or all tensors (``global``)."""
    mode: Mode = "zscore"
    """``zscore``; ``centre`` only subtracts the mean; ``scale`` only divides."""
    min_dimensions: int = 2
    """Parameters with fewer dimensions (biases, norms) are left as they are."""
    output_block: str = AUTO
    """Block that makes the logits and is left as it is: ``auto``, ``none`` or the name of a module."""
    modules: tuple[str, ...] = ()
    """Module types, such as ``Conv3d``; the parameters of other types are left as they are. Empty: any type."""
    only: tuple[str, ...] = ()
    """Patterns of parameter names, such as ``*.conv.*``; other parameters are left as they are. Empty: any name."""
    leave_out: tuple[str, ...] = ()
    """Patterns of parameter names that are left as they are."""
    clip_norm: float | None = None
    """None, as in the paper: the norm of each normalised tensor is the square root of its number of elements, and other
    gradients are unchanged. A number: all gradients together are rescaled to the norm that clipping to this number
    would leave (:func:`znorm.transforms.rescale_to_clipped_norm_`)."""


class GradientHandle:
    """Handle of a rule attached to an optimiser: its selection, the number of skipped steps, and ``remove()``."""

    def __init__(self, optimizer: Optimizer, model: nn.Module, rule: GradientTransform, selection: Selection) -> None:
        self.selection = selection
        self._skipped = 0
        self._skipped_on_gpu: Tensor | None = None
        choices = {choice.name: choice for choice in selection.choices}
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        parameters = _parameters(optimizer)
        strangers = [parameter for parameter in parameters if id(parameter) not in names]
        if strangers:
            strange = "parameter that does" if len(strangers) == 1 else "parameters that do"
            raise ValueError(f"the optimizer holds {len(strangers)} {strange} not belong to the model")
        self._channel_dims = {
            id(p): choices[names[id(p)]].channel_dim if choices[names[id(p)]].normalised else None for p in parameters
        }
        self._rule = rule
        self._optimizer = optimizer
        self._found_inf: Tensor | None = None
        self._hooks: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        _attached.add(optimizer)

    @property
    def skipped_steps(self) -> int:
        """Number of steps skipped because a gradient was not finite; the host waits if a GPU counts them."""
        return int(self.skipped)

    @property
    def skipped(self) -> int | Tensor:
        """Like :attr:`skipped_steps`, but unread: an integer tensor of shape () if a GPU counts them."""
        return self._skipped if self._skipped_on_gpu is None else self._skipped + self._skipped_on_gpu

    def remove(self) -> None:
        """Detach the rule from the optimiser; a second call does nothing."""
        if self._hooks:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()
            self._after_step(self._optimizer)
            _attached.discard(self._optimizer)

    def _before_step(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        _refuse_closure(args, kwargs)
        _refuse_scaled(optimizer)
        chosen: list[tuple[Tensor, Tensor, int]] = []
        others: list[Tensor] = []
        for parameter in _parameters(optimizer):
            if parameter.grad is None:
                continue
            gradient = _dense(parameter)
            channel_dim = self._channel_dim(parameter)
            if channel_dim is None:
                others.append(gradient)
            else:
                chosen.append((gradient, parameter, channel_dim))
        work = Gradients(
            gradients=[gradient for gradient, _, _ in chosen],
            parameters=[parameter for _, parameter, _ in chosen],
            channel_dims=[dim for _, _, dim in chosen],
            others=others,
        )
        finite = are_finite(others)
        if finite is not False:
            finite = both(finite, self._rule(work))
        if isinstance(finite, Tensor) and _takes_found_inf(optimizer):
            self._skip_on_gpu_unless(finite)
        elif not bool(finite):
            # Without gradients the step changes nothing: no weight decay, no momentum, no step count.
            optimizer.zero_grad(set_to_none=True)
            self._skipped += 1

    def _skip_on_gpu_unless(self, finite: Tensor) -> None:
        """Let the optimiser's kernel skip the step, so that the host need not wait for the answer."""
        found = (~finite).float()
        given = vars(self._optimizer).get("found_inf")
        if given is not None and given is not self._found_inf:  # from a GradScaler
            found = torch.maximum(found, given.to(found))
        if self._skipped_on_gpu is None:
            self._skipped_on_gpu = torch.zeros((), dtype=torch.int64, device=found.device)
        self._skipped_on_gpu += found.to(torch.int64)
        self._found_inf = found
        vars(self._optimizer)["found_inf"] = found  # an attribute of fused optimisers only

    def _after_step(self, optimizer: Optimizer, *_: object) -> None:
        """Remove ``found_inf`` from the optimiser, unless a GradScaler will."""
        attributes = vars(optimizer)
        if self._found_inf is not None and "grad_scale" not in attributes:
            attributes.pop("found_inf", None)
        self._found_inf = None

    def _channel_dim(self, parameter: Tensor) -> int | None:
        try:
            return self._channel_dims[id(parameter)]
        except KeyError:
            raise RuntimeError(
                "parameters were added to the optimizer after the rule was attached; call remove() on the handle and "
                "attach again"
            ) from None


def attach(optimizer: Optimizer, model: nn.Module, config: ZNormConfig | None = None) -> GradientHandle:
    """Z-score a model's gradients before every step of its optimiser.

    Args:
        optimizer: any torch optimiser over parameters of ``model``; hooks are not part of its ``state_dict``, so attach
            again to a new optimiser that loads one.
        model: supplies the parameter names and the output block.
        config: what to normalise and how; default: ``ZNormConfig()``.

    Returns:
        a handle with ``remove()``, ``selection`` and ``skipped_steps``.

    Raises:
        ValueError: the optimiser already has a rule or holds parameters that do not belong to the model, or nothing is
            left to normalise.

    The step itself raises RuntimeError for gradients that are still scaled by a GradScaler (call
    ``scaler.unscale_(optimizer)`` first), for closures and for parameters added after this call, and TypeError for
    sparse gradients. A step with a non-finite gradient is skipped and counted.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> handle = attach(torch.optim.SGD(model.parameters(), lr=0.1), model)
        >>> sorted(handle.selection.normalised)
        ['0.weight']

    Source: Yun, arXiv 2408.01215.
    """
    config = config if config is not None else ZNormConfig()

    def rule(work: Gradients) -> Finite:
        def normalise() -> Finite:
            return zscore_unread_(
                work.gradients, config.eps, scope=config.scope, mode=config.mode, channel_dims=work.channel_dims
            )

        return (
            normalise()
            if config.clip_norm is None
            else rescale_to_clipped_norm_(work, normalise, limit=config.clip_norm)
        )

    return _attach(optimizer, model, rule, _selection(model, config))


def attach_baseline(
    optimizer: Optimizer, model: nn.Module, name: str, config: ZNormConfig | None = None, **numbers: float
) -> GradientHandle:
    """Attach a rule other than ZNorm to an optimiser, with the same guards.

    Args:
        optimizer: as in :func:`attach`.
        model: as in :func:`attach`.
        name: one of :data:`znorm.transforms.BASELINES`.
        config: ``scale`` selects its parameters with it. ``adaptive-clip`` takes every parameter except those of the
            ``output_block``, as in its paper. The other rules ignore it and take every parameter.
        numbers: keyword arguments of the rule, such as ``limit=1.0`` for ``clip``.

    Raises:
        ValueError: there is no rule of this name; otherwise as raised by :func:`attach`.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown gradient rule {name!r}; available: {', '.join(BASELINES)}")
    config = config if config is not None else ZNormConfig()
    if name != "scale":
        block = config.output_block if name == "adaptive-clip" else NONE
        config = replace(ZNormConfig(), min_dimensions=0, output_block=block)
    rule = partial(BASELINES[name], **numbers)
    return _attach(optimizer, model, rule, _selection(model, config, single=name != "scale"))


def _selection(model: nn.Module, config: ZNormConfig, *, single: bool = False) -> Selection:
    return select(
        model,
        min_dimensions=config.min_dimensions,
        output_block=config.output_block,
        modules=config.modules,
        only=config.only,
        leave_out=config.leave_out,
        single=single or config.scope == "global",
    )


def _attach(optimizer: Optimizer, model: nn.Module, rule: GradientTransform, selection: Selection) -> GradientHandle:
    if optimizer in _attached:
        raise ValueError("this optimizer has a gradient rule already; remove() the first handle before attaching again")
    return GradientHandle(optimizer, model, rule, selection)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether the optimiser's kernel skips a step by itself if its attribute ``found_inf`` says so.

    In torch, fused optimisers do, for the sake of GradScaler. A first step that is skipped leaves the momentum of SGD
    uninitialised, so it starts from 0 here, which makes the first step no different: 0 * momentum + gradient.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    if isinstance(optimizer, SGD):
        for group in optimizer.param_groups:
            for parameter in group["params"] if group["momentum"] else ():
                if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
                    if group["dampening"]:
                        return False
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return True


def _refuse_closure(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    # torch passes the bound arguments on, so the optimiser itself may come first.
    given = [argument for argument in args if not isinstance(argument, Optimizer) and argument is not None]
    if given or kwargs.get("closure") is not None:
        raise RuntimeError(
            "a gradient rule does not work with a closure: it would run before the closure makes the gradients"
        )


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
        raise TypeError(f"gradient rules need dense gradients, got one with layout {gradient.layout}; set sparse=False")
    return gradient
