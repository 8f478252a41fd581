"""Telemetry: gradient statistics every few steps, with no hooks installed in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

from torch import nn
from torch.optim import Optimizer

from app.runs.folder import MetricsLog
from znorm.overlap import OverlapWatch, find_junctions, watch_overlap
from znorm.stats import LayerGradient, StepObservation, observe_step


class Telemetry:
    """Measures gradients and their overlap at every ``every``-th step; never if ``every`` is 0.

    Args:
        every: interval between measured steps: ``every``, ``2 * every`` and so on, so that a resumed run measures the
            same ones.
        network: the network in training.
        optimizer: its optimiser, with the gradient rule attached.
    """

    def __init__(self, every: int, network: nn.Module, optimizer: Optimizer) -> None:
        self._every = every
        self._network = network
        self._optimizer = optimizer
        self._junctions = find_junctions(network) if every else ()
        self._overlap: OverlapWatch | None = None
        self._step: StepObservation | None = None

    def is_due(self, step: int) -> bool:
        """Whether a step (counted from 1) is measured."""
        return self._every > 0 and step % self._every == 0

    @contextmanager
    def backward(self, *, measured: bool) -> Iterator[None]:
        """Context for the forward and backward pass of one micro-batch."""
        if not measured:
            yield
            return
        with watch_overlap(self._junctions) as self._overlap:
            yield

    @contextmanager
    def step(self, *, measured: bool) -> Iterator[None]:
        """Context for the optimiser's step."""
        if not measured:
            yield
            return
        with observe_step(self._optimizer, self._network) as self._step:
            yield

    def write(self, log: MetricsLog, *, step: int, skipped_steps: int) -> None:
        """Log the measurements of a step and discard them; do nothing if there are none.

        Args:
            log: the log to write to.
            step: number of the step, from 1.
            skipped_steps: steps skipped in the run so far, including this one.
        """
        if self._step is not None:
            layers = {name: _plain(gradient) for name, gradient in self._step.layers().items()}
            log.gradients(step=step, layers=layers, skipped_steps=skipped_steps)
        if self._overlap is not None and (overlap := self._overlap.read()):
            log.overlap(step=step, junctions={name: asdict(values) for name, values in overlap.items()})
        self.forget()

    def forget(self) -> None:
        """Drop measurements that have not been logged."""
        self._step = self._overlap = None


def _plain(gradient: LayerGradient) -> dict[str, float | None]:
    return {
        f"{name}_{when}": None if stats is None else getattr(stats, name)
        for when, stats in (("before", gradient.before), ("after", gradient.after))
        for name in ("mean", "std", "norm")
    }
