"""Training progress, and the learning rate as a pure function of it."""

from __future__ import annotations

import math

from app.config.training import TrainingConfig


def spent_share(config: TrainingConfig, *, step: int, seconds: float, validation_seconds: float) -> float:
    """Return the share of the budget that is spent; 1 or more when it is used up.

    Args:
        config: budget in steps or hours; a budget in hours reserves time for the final validation.
        step: optimiser steps done.
        seconds: time since the run began.
        validation_seconds: duration of the latest validation; at most half the budget is reserved for it.
    """
    if config.steps is not None:
        return step / config.steps
    assert config.hours is not None
    budget = config.hours * 3600
    return seconds / max(budget - validation_seconds, 0.5 * budget)


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Return the learning rate at a point of the run.

    Args:
        config: peak, warm-up and shape.
        progress: share of the budget that is spent, 0 to 1; larger values count as 1.

    Example:
        >>> learning_rate(TrainingConfig(steps=1, learning_rate=1.0, warmup=0.0), 0.5)
        0.5
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < config.warmup:
        # Not 0, so that the first step has an effect.
        return config.learning_rate * max(progress / config.warmup, 0.01)
    left = (1 - progress) / (1 - config.warmup)
    match config.schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (1 - left)))
        case "poly":
            return config.learning_rate * float(left**0.9)
        case "constant":
            return config.learning_rate
