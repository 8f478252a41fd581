"""How a run trains: budget, batches, optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Budget, batches and optimiser of a run."""

    steps: int | None = None
    """Budget in optimiser steps; exactly one of ``steps`` and ``hours`` is set."""
    hours: float | None = None
    """Budget in hours of wall-clock time, preparation and validation included."""
    patch_voxels: tuple[int, int, int] = (128, 128, 128)
    """Size of training patches and of inference windows."""
    batch_size: int = 2
    """Patches in one forward pass, of each process."""
    accumulate: int = 1
    """Forward passes whose gradients are summed before a step."""
    tumour_probability: float = 0.5
    """Share of patches that are centred on a tumour voxel, each tissue equally often."""
    enhancing_probability: float | None = None
    """Share of those that are centred on enhancing tumour where the case has some; null: each tissue equally often."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """``sgd`` has Nesterov momentum."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-5
    """Decay of weights; biases and norms are spared."""
    momentum: float = 0.9
    """Momentum of ``sgd``."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """How the learning rate falls after the warm-up; poly has exponent 0.9."""
    warmup: float = 0.05
    """Share of the budget in which the learning rate rises from 0."""
    ema_decay: float = 0.0
    """Above 0, such as 0.999: validation, the best weights and so prediction use a moving average of the weights.
    After step t the decay is at most (1 + t) / (10 + t), so that 0.99 and more are the same up to step 890."""
    validations: int = 10
    """How often the validation cases are predicted, spread evenly, the last at the end."""
    patience: int | None = None
    """Validations without a better mean Dice that end the run early; null: the budget alone ends it."""
    checkpoint_minutes: float = 10.0
    """Time between checkpoints; one is also saved at the start, at each validation and on interruption."""
    max_rollbacks: int = 3
    """How often a run may go back to its last checkpoint because of a loss that is not finite."""
    telemetry_steps: int = 0
    """Steps from one measurement of every layer's gradient and of the gradient overlap to the next; 0 measures none.
    In float16 the norms of the overlap are those of the scaled loss."""
    seed: int = 0
    """Initial weights, patches and their augmentation."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.hours is None):
            raise ValueError("training.steps, training.hours: set exactly one of them; the other is null")
        if min(self.patch_voxels) < 8 or max(self.patch_voxels) > 512:
            raise ValueError(f"training.patch_voxels: from 8 to 512 along each axis, got {list(self.patch_voxels)}")
        for name, (lowest, highest) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not lowest <= value <= highest:
                raise ValueError(f"training.{name}: from {lowest:g} to {highest:g}, got {value}")


_RANGES: Final[dict[str, tuple[float, float]]] = {
    "steps": (1, 10**9),
    "hours": (1 / 3600, 10_000),
    "batch_size": (1, 1024),
    "accumulate": (1, 1024),
    "tumour_probability": (0, 1),
    "enhancing_probability": (0, 1),
    "learning_rate": (1e-9, 100),
    "weight_decay": (0, 10),
    "momentum": (0, 0.9999),
    "warmup": (0, 0.9),
    "ema_decay": (0, 0.999999),
    "validations": (1, 10_000),
    "patience": (1, 10_000),
    "checkpoint_minutes": (0.001, 10_000),
    "max_rollbacks": (0, 10_000),
    "telemetry_steps": (0, 10**9),
    "seed": (0, 2**31),
}
