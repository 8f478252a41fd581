"""What a run learns, as seen by the loop: a loss, a target and a metric. The head is part of the network's config.

To add a task, write a subclass, name it in :class:`app.config.task.TaskConfig` and choose it in
:func:`app.training.tasks.task_of`; the loop, checkpoints, resuming and telemetry need no change.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from app.system.device import Runtime
from app.training.distributed import ALONE, World
from data.patches.sampler import Batch, CachedCase

#: Called with a case and its prediction, label codes of shape (X, Y, Z).
OnCodes = Callable[[CachedCase, npt.NDArray[np.uint8]], None]


@dataclass(frozen=True, kw_only=True)
class ValidationScores:
    """Result of one validation."""

    by_output: dict[str, float]
    """The task's measure for each output, from 0 to 1; the weights with the largest mean are the best."""
    cases: Mapping[str, Mapping[str, float]]
    """The same for each case, by case id."""
    more: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Further measures by output, for the log; None where a measure is not defined."""

    @property
    def mean(self) -> float:
        """Mean over the outputs."""
        return sum(self.by_output.values()) / len(self.by_output)


class Task(ABC):
    """What a run learns."""

    @abstractmethod
    def loss(self, world: World = ALONE) -> Callable[[Any, Tensor], Tensor]:
        """Return the training loss over the batches of all processes: called with the network's output and a target."""

    @abstractmethod
    def target(self, batch: Batch) -> Tensor:
        """Return what the network should answer for a batch, on the batch's device."""

    @abstractmethod
    def validate(
        self,
        network: nn.Module,
        cases: Sequence[CachedCase],
        *,
        runtime: Runtime,
        world: World = ALONE,
        between_windows: Callable[[], None] = lambda: None,
        on_case: OnCodes = lambda *_: None,
    ) -> ValidationScores:
        """Score a network on whole cases.

        Args:
            network: a network in any mode; it is set to eval mode and restored afterwards.
            cases: prepared cases, at least one.
            runtime: device and precision.
            world: the processes among which the cases are divided.
            between_windows: called before each forward pass; may raise to stop.
            on_case: called with each case of this process for which the task makes a label map.
        """

    def describe(self, network: nn.Module) -> Mapping[str, Any]:
        """Return further entries for the JSON of the best weights; by default none."""
        del network
        return {}
