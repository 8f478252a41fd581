"""One optimiser step: batches in, weights moved, what it came to."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from app.config import RunConfig
from app.runtime import Runtime
from app.training.distributed import World
from app.training.state import State
from app.training.telemetry import Telemetry
from data.loaders import Batch
from models import RegionLoss, with_presence


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimiser step came to."""

    loss: float
    """Mean over its micro-batches, and over the processes."""
    waited_seconds: float
    """For batches that were not ready."""
    cases: tuple[str, ...]
    """Ids of the cases whose patches were in it."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """Makes the optimiser steps of a run."""

    config: RunConfig
    runtime: Runtime
    state: State
    telemetry: Telemetry
    loss_of: RegionLoss
    world: World
    replica: nn.Module
    """The network as :meth:`World.replica` gives it."""

    def step(self, batches: Iterator[Batch], rate: float) -> StepResult:
        """One optimiser step.

        Args:
            batches: ``training.accumulate`` micro-batches are taken from it.
            rate: learning rate.
        """
        state, settings = self.state, self.config.training
        measured = self.telemetry.is_due(state.step + 1)
        self.world.seed_step(settings.seed, state.step)
        total, waited = 0.0, 0.0
        cases: list[str] = []
        for number in range(settings.accumulate):
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            cases.extend(batch.cases)
            last = number == settings.accumulate - 1
            with self.telemetry.backward(measured=measured and last), self.world.gradients(self.replica, last=last):
                loss = self._loss(batch)
                (loss / settings.accumulate).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach()) / settings.accumulate
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        with self.telemetry.step(measured=measured):
            state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        state.patches += settings.accumulate * settings.batch_size * self.world.size
        return StepResult(loss=self.world.mean(total), waited_seconds=waited, cases=tuple(cases))

    def _loss(self, batch: Batch) -> torch.Tensor:
        image = batch.image.to(self.runtime.device, non_blocking=True)
        masks = batch.masks.to(self.runtime.device, non_blocking=True)
        if self.config.takes_missing_contrasts:
            image = with_presence(image, batch.present)
        with self.runtime.autocast():
            logits = self.replica(image.contiguous(memory_format=self.runtime.memory_format))
        loss: torch.Tensor = self.loss_of(logits, masks)
        return loss
