"""The state of a run in training, and its conversion to a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import znorm
from app.config.load import RunConfig
from app.config.training import TrainingConfig
from app.runs import checkpoints
from app.system.device import Runtime
from app.training.ema import WeightAverage
from app.training.gradient import attach_backward
from models import build_network

_AVERAGE: Final = "average."
#: Fields of the state that a checkpoint's JSON holds under their own names.
_RECORDED: Final = (
    *("best_score", "best_step", "best_validation", "validations", "validated_step", "validation_seconds"),
    *("patches", "rollbacks"),
)


@dataclass
class State:
    """Everything that changes while a run trains; a ``last`` checkpoint holds all of it."""

    network: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss if the run computes in float16; otherwise it does nothing."""
    backward_norm: znorm.BackwardNormHandle | None = None
    """Handle of the places that normalise gradients inside the network; None if there are none."""
    average: WeightAverage | None = None
    """Moving average of the weights; None if ``training.ema_decay`` is 0."""
    step: int = 0
    patches: int = 0
    """Number of the next patch; a rollback after a non-finite loss does not reset it."""
    seconds: float = 0.0
    """Time that the run had spent before the current process took over."""
    best_score: float = -1.0
    """Largest mean of the task's measure over the outputs; -1 before the first validation."""
    best_step: int = 0
    best_validation: int = 0
    """Number of the best validation, from 1; renumbered with ``validations`` when the budget changes, and may then be
    below 1."""
    validations: int = 0
    validated_step: int = 0
    """Step of the latest validation."""
    validation_seconds: float = 0.0
    skipped_before: int = 0
    rollbacks: list[dict[str, Any]] = field(default_factory=list)
    """One entry per rollback: ``step``, ``back_to``, ``cases`` and ``file``."""

    @property
    def evaluated(self) -> nn.Module:
        """The network that is validated and saved as the best: the average of the weights if there is one."""
        return self.network if self.average is None else self.average.network

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Load initial weights, a state dict, into the network and, if there is one, its average."""
        self.network.load_state_dict(weights)
        if self.average is not None:
            self.average.load(weights)


def new_state(config: RunConfig, runtime: Runtime) -> State:
    """Create a network with random weights, and its optimiser."""
    network = build_network(config.network, in_channels=config.input_channels, out_channels=len(config.outputs))
    network.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
    decay = config.training.ema_decay
    return State(
        network=network,
        optimizer=_optimizer(config, network),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=runtime.scales_gradients),
        average=WeightAverage(network, decay) if decay > 0 else None,
        backward_norm=attach_backward(config.network, network),
    )


def _optimizer(config: RunConfig, network: nn.Module) -> Optimizer:
    """Create AdamW or SGD; weight decay applies to weights, not to biases and norms."""
    settings = config.training
    groups = [
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    return torch.optim.SGD(
        groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=True
    )


def restore(state: State, checkpoint: checkpoints.Checkpoint, settings: TrainingConfig) -> None:
    """Restore what :func:`to_checkpoint` saved; fields that older versions did not save get a default."""
    state.network.load_state_dict(checkpoint.weights)
    checkpoints.restore_optimizer(state.optimizer, checkpoint)
    checkpoints.restore_rng(checkpoint)
    if state.average is not None:
        tensors = checkpoint.tensors.items()
        state.average.load({n.removeprefix(_AVERAGE): tensor for n, tensor in tensors if n.startswith(_AVERAGE)})
    details = {
        # Older versions did not save these.
        "patches": checkpoint.step * settings.accumulate * settings.batch_size,
        "best_validation": checkpoint.details["validations"],
        "rollbacks": [],
        "best_score": checkpoint.details.get("best_dice"),
        **checkpoint.details,
    }
    if details.get("scaler"):
        state.scaler.load_state_dict(details["scaler"])
    for name in _RECORDED:
        setattr(state, name, details[name])
    state.step, state.seconds, state.skipped_before = checkpoint.step, details["seconds"], details["skipped_steps"]


def to_checkpoint(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and plain data of a ``last`` checkpoint."""
    tensors, plain = checkpoints.optimizer_tensors(state.optimizer)
    if state.average is not None:
        tensors |= {_AVERAGE + name: tensor for name, tensor in state.average.network.state_dict().items()}
    return (
        {**checkpoints.weight_tensors(state.network), **tensors, **checkpoints.rng_tensors()},
        {
            **{name: getattr(state, name) for name in _RECORDED},
            "optimizer": plain,
            "scaler": state.scaler.state_dict(),
            "seconds": state.seconds,
            "skipped_steps": state.skipped_before,
        },
    )
