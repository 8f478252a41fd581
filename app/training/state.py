"""What changes while a run trains, and how it goes to a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from app import checkpoints
from app.config import RunConfig
from app.runtime import Runtime
from app.training.settings import TrainingConfig
from data.labels import REGIONS
from models import build_network


@dataclass
class State:
    """What changes while a run trains; all of it is in a ``last`` checkpoint."""

    network: nn.Module
    optimizer: Optimizer
    step: int = 0
    patches: int = 0
    """How many were trained on, and the number of the next one."""
    seconds: float = 0.0
    """Spent by this run before the present process took over."""
    best_dice: float = -1.0
    best_step: int = 0
    validations: int = 0
    validated_step: int = 0
    """Step of the latest validation."""
    validation_seconds: float = 0.0
    skipped_before: int = 0


def new_state(config: RunConfig, runtime: Runtime) -> State:
    """A network with random weights and its optimiser, before the first step."""
    network = build_network(config.network, in_channels=config.input_channels, out_channels=len(REGIONS))
    network.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
    return State(network=network, optimizer=_optimizer(config, network))


def _optimizer(config: RunConfig, network: nn.Module) -> Optimizer:
    """AdamW or SGD; weights decay, biases and norms do not."""
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
    """Put back what :func:`to_checkpoint` took; checkpoints of older versions count no patches."""
    state.network.load_state_dict(checkpoint.weights)
    checkpoints.restore_optimizer(state.optimizer, checkpoint)
    checkpoints.restore_rng(checkpoint)
    details = checkpoint.details
    state.step = checkpoint.step
    state.patches = details.get("patches", checkpoint.step * settings.accumulate * settings.batch_size)
    state.seconds = details["seconds"]
    state.best_dice, state.best_step = details["best_dice"], details["best_step"]
    state.validations, state.validated_step = details["validations"], details["validated_step"]
    state.validation_seconds = details["validation_seconds"]
    state.skipped_before = details["skipped_steps"]


def to_checkpoint(state: State) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain data of a ``last`` checkpoint; ``seconds`` and ``skipped_steps`` are the caller's to add."""
    tensors, plain = checkpoints.optimizer_tensors(state.optimizer)
    return (
        {**checkpoints.weight_tensors(state.network), **tensors, **checkpoints.rng_tensors()},
        {
            "patches": state.patches,
            "best_dice": state.best_dice,
            "best_step": state.best_step,
            "validations": state.validations,
            "validated_step": state.validated_step,
            "validation_seconds": state.validation_seconds,
            "optimizer": plain,
        },
    )
