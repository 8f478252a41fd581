"""The training loop: steps, validations, checkpoints, until the budget is spent."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app import checkpoints
from app.config import RunConfig, to_plain
from app.errors import InterruptedRunError
from app.progress import LOG, OnProgress, Progress
from app.runlog import MetricsLog, read_json
from app.runtime import Runtime
from app.training import gradient
from app.training.distributed import World
from app.training.schedule import learning_rate
from app.training.state import State, to_checkpoint
from app.training.step import Stepper
from app.training.stopping import StopRequest
from app.training.telemetry import Telemetry
from app.training.validate import validation_dice
from data.labels import CONTRASTS
from data.loaders import CachedCase, PatchSource, batches
from data.presence import presence_mask
from models import GivenPresence, RegionLoss

#: Validation may take this share of a budget in hours; beyond it, validations are left out, but for the last.
_VALIDATION_SHARE: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class Loop:
    """One process at work on a run: steps, validations and checkpoints."""

    run: Path
    data: Path
    config: RunConfig
    runtime: Runtime
    state: State
    clock: float
    """When this process took over, on the monotonic clock."""
    transform: gradient.AttachedTransform
    telemetry: Telemetry
    log: MetricsLog
    on_progress: OnProgress
    world: World

    def train(self, source: PatchSource, validating: Sequence[CachedCase], stop: StopRequest) -> list[float]:
        """Train until the budget is spent; returns the losses of this process.

        Raises:
            InterruptedRunError: a stop was asked for; everything is saved.
        """
        settings, state, world = self.config.training, self.state, self.world
        stepper = Stepper(
            config=self.config,
            runtime=self.runtime,
            state=state,
            telemetry=self.telemetry,
            loss_of=RegionLoss(total=world.total if world.size > 1 else None),
            world=world,
            replica=world.replica(state.network),
        )
        losses: list[float] = []
        if state.step == 0:
            self._save_last()
        began = saved_at = time.monotonic()
        made = batches(
            source,
            first=state.patches // settings.batch_size + world.rank,
            every=world.size,
            size=settings.batch_size,
            threads=self.config.runtime.loader_threads,
        )
        with closing(made):
            state.network.train()
            self._agree(stop)
            while (progress := self._progress()) < 1:
                rate = learning_rate(settings, progress)
                loss = stepper.step(made, rate).loss
                state.step += 1
                losses.append(loss)
                asked = self._agree(stop)
                self.log.train(
                    step=state.step,
                    loss=loss,
                    learning_rate=rate,
                    seconds=self.seconds(),
                    skipped_steps=self.skipped_steps(),
                )
                self.telemetry.write(self.log, step=state.step, skipped_steps=self.skipped_steps())
                self._report(losses, time.monotonic() - began)
                if self._validation_is_due() and validating and self._progress() < 1:
                    self._validate(validating)
                    self._save_last()
                    saved_at = time.monotonic()
                    asked = self._agree(stop)
                if asked is not None:
                    self._save_last()
                    world.wait()
                    raise InterruptedRunError(
                        f"stopped by {asked} after step {state.step}; everything is saved. "
                        f"Go on with: znormseg train {self.data} {self.run} --resume"
                    )
                if time.monotonic() - saved_at >= 60 * settings.checkpoint_minutes:
                    self._save_last()
                    saved_at = time.monotonic()
        if not validating:
            self._save_best(None)
        elif state.validated_step < state.step:
            self._validate(validating)
        self._save_last()
        return losses

    def _validate(self, cases: Sequence[CachedCase]) -> None:
        """Score the validation cases; keep the weights when they are the best so far."""
        state, settings = self.state, self.config.training
        before = time.monotonic()
        network = state.network
        if self.config.takes_missing_contrasts:
            network = GivenPresence(network, presence_mask(CONTRASTS))
        dice = validation_dice(
            network,
            cases,
            window=settings.patch_voxels,
            config=self.config.inference,
            runtime=self.runtime,
            world=self.world,
        )
        state.validations += 1
        state.validated_step = state.step
        state.validation_seconds = self.world.largest(time.monotonic() - before)
        mean = sum(dice.values()) / len(dice)
        self.log.validation(step=state.step, dice=dice, mean_dice=mean, seconds=self.seconds())
        LOG.info("step %d: validation Dice %s", state.step, _in_words(dice))
        if mean > state.best_dice:
            state.best_dice, state.best_step = mean, state.step
            self._save_best(dice)

    def _save_best(self, dice: dict[str, float] | None) -> None:
        if not self.world.is_first:
            return
        facts = read_json(self.run / "run.json")
        checkpoints.save(
            self.run / "checkpoints",
            "best",
            self.state.step,
            checkpoints.weight_tensors(self.state.network),
            {
                "dice": dice,
                "contrasts": facts["contrasts"],
                "takes_missing_contrasts": self.config.takes_missing_contrasts,
                "regions": facts["regions"],
                "labels": facts["labels"],
                "spacing_mm": facts["spacing_mm"],
                "versions": facts["versions"],
                "config": to_plain(self.config),
            },
        )

    def _save_last(self) -> None:
        if not self.world.is_first:
            return
        tensors, details = to_checkpoint(self.state)
        checkpoints.save(
            self.run / "checkpoints",
            "last",
            self.state.step,
            tensors,
            {
                **details,
                "processes": self.world.size,
                "seconds": self._own_seconds(),
                "skipped_steps": self.skipped_steps(),
            },
        )

    def _progress(self) -> float:
        """Share of the budget that is spent. A budget in hours keeps the time of one validation for the last one."""
        settings, state = self.config.training, self.state
        if settings.steps is not None:
            return state.step / settings.steps
        assert settings.hours is not None
        budget = settings.hours * 3600
        return self.seconds() / max(budget - state.validation_seconds, 0.5 * budget)

    def _validation_is_due(self) -> bool:
        """By steps: at even distances, whatever the clock says. By hours: only while validation stays cheap."""
        settings, state = self.config.training, self.state
        due = self._progress() * settings.validations >= state.validations + 1
        if settings.steps is not None or not due:
            return due
        spent = state.validations * state.validation_seconds
        return spent <= _VALIDATION_SHARE * self.seconds()

    def skipped_steps(self) -> int:
        """Steps left out because a gradient was not finite, over all processes of the run."""
        return self.state.skipped_before + self.transform.skipped_steps()

    def seconds(self) -> float:
        """Wall-clock time of the run so far, over all its processes."""
        return self.world.seconds(self._own_seconds())

    def _own_seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.clock

    def _agree(self, stop: StopRequest) -> str | None:
        """Make all processes go by one clock; the name of the signal that asked any of them to stop, or None."""
        return self.world.agree(seconds=self._own_seconds(), signal_name=stop.signal_name)

    def _report(self, losses: list[float], spent: float) -> None:
        progress = self._progress()
        recent = losses[-20:]
        best = f"  best Dice {self.state.best_dice:.3f}" if self.state.best_dice >= 0 else ""
        steps = self.config.training.steps
        left = (
            (steps - self.state.step) * spent / len(losses)
            if steps is not None
            else self.seconds() * (1 / progress - 1)
        )
        self.on_progress(
            Progress(
                job="training",
                share=min(progress, 1.0),
                detail=f"step {self.state.step}  loss {sum(recent) / len(recent):.3f}{best}",
                eta_seconds=max(0.0, left),
            )
        )


def _in_words(dice: dict[str, float]) -> str:
    return ", ".join(f"{region} {value:.3f}" for region, value in dice.items())
