"""Config of training: budget, batches and optimiser."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Budget, batches and optimiser of a run."""

    steps: int | None = None
    """Budget in optimiser steps; set exactly one of ``steps`` and ``hours``."""
    hours: float | None = None
    """Budget in hours of wall-clock time, including preparation and validation."""
    patch_voxels: tuple[int, int, int] = (128, 128, 128)
    """Size of training patches and of inference windows."""
    batch_size: int = 2
    """Patches per forward pass, in each process."""
    accumulate: int = 1
    """Forward passes whose gradients are accumulated before each step."""
    tumour_probability: float = 0.5
    """Fraction of patches that are centred on a tumour voxel; all tumour tissues are equally likely."""
    enhancing_probability: float | None = None
    """Fraction of the tumour-centred patches that are centred on enhancing tumour, in cases that have any; null makes
    all tumour tissues equally likely."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimiser; ``sgd`` uses Nesterov momentum."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 1e-5
    """Weight decay; biases and normalisation parameters are excluded."""
    momentum: float = 0.9
    """Momentum of ``sgd``."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """Decay of the learning rate after the warm-up; ``poly`` has exponent 0.9."""
    warmup: float = 0.05
    """Fraction of the budget during which the learning rate rises from 0."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, such as 0.999; 0 disables it. Validation, the best checkpoint and
    therefore prediction use the average. After step t the decay is capped at (1 + t) / (10 + t), so all values from
    0.99 on are equivalent up to step 890."""
    validations: int = 10
    """Number of validations, evenly spaced; the last one is at the end of the run. Those beyond the tenth, and with a
    budget in hours all but the last, are made only while validation takes less than a tenth of the run's time."""
    patience: int | None = None
    """Stop early after this many validations without a better mean score; null disables early stopping."""
    checkpoint_minutes: float = 10.0
    """Minutes between checkpoints; one is also saved at the start, at each validation and on interruption."""
    max_rollbacks: int = 3
    """Maximum number of rollbacks to the last checkpoint after a non-finite loss."""
    telemetry_steps: int = 0
    """Steps between measurements of each layer's gradient and of the gradient overlap; 0 disables them. In float16 the
    overlap's norms are measured on the scaled loss."""
    seed: int = 0
    """Random seed of the initial weights, the patches and their augmentation."""

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.hours is None):
            raise ValueError("training.steps, training.hours: set exactly one of them; the other is null")
        if min(self.patch_voxels[:2]) < 8 or min(self.patch_voxels) < 1 or max(self.patch_voxels) > 512:
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
