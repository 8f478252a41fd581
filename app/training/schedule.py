"""The learning rate as a pure function of progress."""

from __future__ import annotations

import math

from app.training.settings import TrainingConfig


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Learning rate at a point of the run.

    Args:
        config: peak, warm-up and shape.
        progress: share of the budget that is spent, 0 to 1; beyond 1 counts as 1.

    Example:
        >>> learning_rate(TrainingConfig(steps=1, learning_rate=1.0, warmup=0.0), 0.5)
        0.5
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        # Not from 0 itself: the first step should count.
        return config.learning_rate * max(progress / config.warmup, 0.01)
    left = (1 - progress) / (1 - config.warmup)
    match config.schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
        case "poly":
            return config.learning_rate * float(left**0.9)
        case "constant":
            return config.learning_rate
