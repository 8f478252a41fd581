"""The one place where a run's task is chosen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from app.config.load import RunConfig
from app.training.segmentation import Segmentation
from app.training.task import Task


def task_of(config: RunConfig, facts: Mapping[str, Any]) -> Task:
    """Return the task that a run learns.

    Args:
        config: config of the run.
        facts: content of its ``run.json``.
    """
    del facts
    return Segmentation(config)
