"""One optimiser step: from batches to updated weights and a result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from app.config.load import RunConfig
from app.system.device import Runtime
from app.training.distributed import ALONE, World
from app.training.state import State
from app.training.telemetry import Telemetry
from data.patches.sampler import Batch
from models import DeepLoss, RegionLoss, with_presence


def loss_for(config: RunConfig, world: World = ALONE) -> RegionLoss | DeepLoss:
    """Return the training loss of a run, taken over the batches of all processes."""
    loss = RegionLoss(total=world.total if world.size > 1 else None)
    return DeepLoss(loss) if config.network.deep_supervision else loss


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of one optimiser step."""

    loss: float
    """Mean over the micro-batches and processes."""
    waited_seconds: float
    """Time spent waiting for batches."""
    gradient_norm: float | None = None
    """Global norm before the gradient rule; None unless requested."""


@dataclass(frozen=True, kw_only=True)
class QueuedStep:
    """An optimiser step that a GPU may still be computing; reading its numbers would wait for it."""

    loss: torch.Tensor
    """float64, shape (): mean over the micro-batches of this process."""
    waited_seconds: float
    """Time spent waiting for batches."""
    gradient_norm: torch.Tensor | None = None
    """Shape (): global norm before the gradient rule; None unless requested."""


@dataclass(frozen=True, kw_only=True)
class Stepper:
    """Performs the optimiser steps of a run."""

    config: RunConfig
    runtime: Runtime
    state: State
    telemetry: Telemetry
    loss_of: Callable[[Any, torch.Tensor], torch.Tensor]
    """Called with logits and masks."""
    world: World = ALONE
    replica: nn.Module | None = None
    """The network compiled, or wrapped by :meth:`World.replica`; None for the network itself."""

    def step(self, batches: Iterator[Batch], rate: float, *, with_norm: bool = False) -> StepResult:
        """Perform one optimiser step, and wait for it; the arguments are those of :meth:`queue`."""
        (result,), _ = self.read([self.queue(batches, rate, with_norm=with_norm)])
        return result

    def read(self, queued: Sequence[QueuedStep], skipped: int | torch.Tensor = 0) -> tuple[list[StepResult], int]:
        """Wait for queued steps and return their results; in several processes, all must call this together.

        Args:
            queued: results of :meth:`queue`, at least one.
            skipped: a number that may be on the device, such as that of the skipped steps.

        Returns:
            the results, and ``skipped`` as a number. The host reads from the device only once.
        """
        norms = [step.gradient_norm for step in queued if step.gradient_norm is not None]
        counts = [skipped] if isinstance(skipped, torch.Tensor) else []
        numbers = (
            torch.stack([number.double() for number in [*(step.loss for step in queued), *norms, *counts]])
            .cpu()
            .tolist()
        )
        losses, rest = self.world.means(numbers[: len(queued)]), iter(numbers[len(queued) :])
        results = [
            StepResult(
                loss=loss,
                waited_seconds=step.waited_seconds,
                gradient_norm=None if step.gradient_norm is None else next(rest),
            )
            for step, loss in zip(queued, losses, strict=True)
        ]
        return results, int(next(rest)) if isinstance(skipped, torch.Tensor) else skipped

    def queue(self, batches: Iterator[Batch], rate: float, *, with_norm: bool = False) -> QueuedStep:
        """Perform one optimiser step without waiting for the device.

        Args:
            batches: iterator from which ``training.accumulate`` micro-batches are taken.
            rate: learning rate.
            with_norm: measure the norm of the gradient.
        """
        state, settings = self.state, self.config.training
        measured = self.telemetry.is_due(state.step + 1)
        network = state.network if self.replica is None else self.replica
        self.world.seed_step(settings.seed, state.step)
        waited = 0.0
        losses: list[torch.Tensor] = []
        for number in range(settings.accumulate):
            began_waiting = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began_waiting
            last = number == settings.accumulate - 1
            with self.telemetry.backward(measured=measured and last), self.world.gradients(network, last=last):
                loss = self._loss(network, batch)
                state.scaler.scale(loss / settings.accumulate).backward()
            losses.append(loss.detach())
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        # The gradient rule runs at the beginning of the optimiser's step and must see unscaled gradients.
        state.scaler.unscale_(state.optimizer)
        norm = self._gradient_norm() if with_norm else None
        with self.telemetry.step(measured=measured):
            state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad(set_to_none=True)
        if state.average is not None:
            state.average.update(state.network, state.step + 1)
        state.patches += settings.accumulate * settings.batch_size * self.world.size
        return QueuedStep(loss=torch.stack(losses).double().mean(), waited_seconds=waited, gradient_norm=norm)

    def _gradient_norm(self) -> torch.Tensor:
        gradients = [p.grad for p in self.state.network.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _loss(self, network: nn.Module, batch: Batch) -> torch.Tensor:
        image = batch.image.to(self.runtime.device, non_blocking=True)
        masks = batch.masks.to(self.runtime.device, non_blocking=True)
        if self.config.takes_missing_contrasts:
            image = with_presence(image, batch.present)
        with self.runtime.autocast():
            logits = network(image.contiguous(memory_format=self.runtime.memory_format))
        return self.loss_of(logits, masks)
