"""The task of segmentation: Dice plus cross-entropy over the regions, scored by Dice on whole volumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from app.config.load import RunConfig
from app.inference.backends.graph import GRAPH_KEY
from app.inference.backends.trace import trace
from app.system.device import Runtime
from app.training.distributed import ALONE, World
from app.training.step import loss_for
from app.training.task import OnCodes, Task, ValidationScores
from app.training.validation import on_contrasts, validation_dice
from data.patches.sampler import Batch, CachedCase


class Segmentation(Task):
    """Outlines WT, TC and ET; ``config`` is that of the run."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def loss(self, world: World = ALONE) -> Callable[[Any, Tensor], Tensor]:
        """Return the region loss, at several resolutions with ``network.deep_supervision``."""
        return loss_for(self._config, world)

    def target(self, batch: Batch) -> Tensor:
        """Return the masks of the regions, shape (N, regions, X, Y, Z)."""
        return batch.masks

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
        """Return the mean Dice by region; see :meth:`Task.validate`."""
        by_case: dict[str, dict[str, float]] = {}
        dice = validation_dice(
            on_contrasts(network, self._config),
            cases,
            window=self._config.training.patch_voxels,
            config=self._config.inference,
            runtime=runtime,
            between_windows=between_windows,
            world=world,
            on_case=on_case,
            on_scores=by_case.update,
        )
        return ValidationScores(by_output=dice, cases=by_case)

    def describe(self, network: nn.Module) -> Mapping[str, Any]:
        """Return the network as a graph of operations, which ``predict`` runs."""
        return {GRAPH_KEY: trace(network, in_channels=self._config.input_channels).to_json()}
