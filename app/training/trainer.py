"""The training loop: steps, validations and checkpoints until the budget is spent."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from app.config.load import RunConfig, to_plain
from app.errors import InterruptedRunError, RunError
from app.html.overlay import OverlayCase, axial_picture
from app.inference.backends.graph import GRAPH_KEY
from app.inference.backends.trace import trace
from app.progress import LOG, OnProgress, Progress
from app.runs import checkpoints
from app.runs.folder import MetricsLog, read_json
from app.system.device import Runtime
from app.system.disk_full import RetryOnFullDisk
from app.training import gradient, rollback
from app.training.distributed import World
from app.training.schedule import learning_rate, spent_share
from app.training.signals import StopRequest
from app.training.state import State, restore, to_checkpoint
from app.training.step import Stepper, StepResult, loss_for
from app.training.telemetry import Telemetry
from app.training.validation import validation_dice
from data.contrasts import presence_mask
from data.labels import CONTRASTS
from data.patches.sampler import Batch, CachedCase, PatchSource, batches
from models import GivenPresence

#: Maximum share of a budget in hours spent on validation; beyond it, all validations but the last are skipped.
_VALIDATION_SHARE: Final = 0.1
#: Number of steps between measurements of the gradient norm.
_NORM_EVERY: Final = 10
#: Number of recent steps over which progress reports average the loss and the waiting time.
_RECENT_STEPS: Final = 20


class _WentBackError(Exception):
    """The run rolled back to a checkpoint, so its batches must be restarted."""


@dataclass
class _View:
    """Figures for progress reports."""

    first_step: int = 0
    """Step at which this process took over, or to which it rolled back."""
    began: float = field(default_factory=time.monotonic)
    losses: list[float] = field(default_factory=list)
    """One loss per step of this process."""
    times: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    """Seconds of each recent step: waiting for batches, and in total."""
    gradient_norm: float | None = None
    dice: dict[str, float] | None = None
    """Dice of the latest validation."""

    def add(self, result: StepResult, seconds: float) -> None:
        self.losses.append(result.loss)
        self.times.append((result.waited_seconds, seconds))
        if result.gradient_norm is not None:
            self.gradient_norm = result.gradient_norm

    def go_back(self, step: int) -> None:
        """Discard the losses after a step."""
        del self.losses[max(0, step - self.first_step) :]
        self.first_step = min(self.first_step, step)

    def seconds_a_step(self) -> float:
        """Return the mean seconds per step, including validations and checkpoints."""
        return (time.monotonic() - self.began) / max(len(self.losses), 1)

    def in_words(self, rate: float, best_dice: float) -> str:
        waited, spent = (sum(column) for column in zip(*self.times, strict=True))
        recent = self.losses[-_RECENT_STEPS:]
        parts = [
            f"loss {sum(recent) / len(recent):.3f}",
            f"lr {rate:.3g}",
            f"data wait {waited / max(spent, 1e-9):.0%}",
        ]
        if self.gradient_norm is not None:
            parts.append(f"gradient norm {self.gradient_norm:.3g}")
        if self.dice is not None:
            parts.append(f"Dice {_in_words(self.dice)}")
        if best_dice >= 0:
            parts.append(f"best Dice {best_dice:.3f}")
        return "  ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The training loop of one process: steps, validations and checkpoints."""

    run: Path
    data: Path
    config: RunConfig
    runtime: Runtime
    state: State
    clock: float
    """Monotonic time at which this process took over."""
    transform: gradient.AttachedTransform
    telemetry: Telemetry
    log: MetricsLog
    stop: StopRequest
    room: RetryOnFullDisk
    on_progress: OnProgress
    world: World
    view: _View = field(default_factory=_View)

    def train(self, source: PatchSource, validating: Sequence[CachedCase]) -> list[float]:
        """Train until the budget is spent, and return the losses of this process's steps.

        Raises:
            InterruptedRunError: a stop was requested; everything is saved.
            RunError: the loss was non-finite more often than ``training.max_rollbacks``, or no checkpoint is good.
            OSError: the disk is full, and a stop was requested or the first checkpoint does not fit.
        """
        self.view.first_step, self.view.began = self.state.step, time.monotonic()
        if self.state.step == 0:
            self._save_last()
        replica = self.world.replica(self.state.network)
        done = False
        while not done:
            try:
                self._train_on(replica, source, validating)
                done = True
            except _WentBackError:
                continue
        return self.view.losses

    def _train_on(self, replica: nn.Module, source: PatchSource, validating: Sequence[CachedCase]) -> None:
        """Train from the current state.

        Raises:
            _WentBackError: the state was rolled back to an earlier step.
        """
        settings, state, world = self.config.training, self.state, self.world
        stepper = Stepper(
            config=self.config,
            runtime=self.runtime,
            state=state,
            telemetry=self.telemetry,
            loss_of=loss_for(self.config, world),
            world=world,
            replica=replica,
        )
        saved_at = time.monotonic()
        made = batches(
            source,
            first=state.patches // settings.batch_size + world.rank,
            every=world.size,
            size=settings.batch_size,
            threads=self.config.runtime.loader_threads,
        )
        with closing(made):
            state.network.train()
            self._agree(saved_at)
            if self._validation_is_due(validating):  # a stop interrupted it
                self._validate(validating)
                self._save_last()
            while self._progress() < 1 and not self._has_stalled():
                self._step(stepper, made, source)
                stop, save = self._agree(saved_at)
                if self._validation_is_due(validating):
                    self._require_finite_weights(source)
                    self._validate(validating)
                    self._save_last()
                    saved_at = time.monotonic()
                    stop, save = self._agree(saved_at)
                if stop is not None:
                    self._require_finite_weights(source)
                    self._save_last()
                    world.wait()
                    raise self._stopped(stop)
                if save:
                    self._require_finite_weights(source)
                    self._save_as_asked()
                    saved_at = time.monotonic()
            self._require_finite_weights(source)
        if not validating:
            self._save_best(None)
        elif state.validated_step < state.step:
            self._validate(validating)
        elif state.best_dice < 0:
            self._validate_again(validating)
        self._save_last()

    def _step(self, stepper: Stepper, made: Iterator[Batch], source: PatchSource) -> None:
        """Perform and log one step.

        Raises:
            _WentBackError: the loss was not finite.
        """
        state = self.state
        began = time.monotonic()
        rate = learning_rate(self.config.training, self._progress())
        result = stepper.step(made, rate, with_norm=state.step % _NORM_EVERY == 0)
        state.step += 1
        if not math.isfinite(result.loss):
            self._go_back(f"its loss is {result.loss}", result.loss, source)
        spent = time.monotonic() - began
        self.view.add(result, spent)
        self.log.train(
            step=state.step,
            loss=result.loss,
            learning_rate=rate,
            seconds=self.seconds(),
            skipped_steps=self.skipped_steps(),
            waited_seconds=result.waited_seconds,
            step_seconds=spent,
            gradient_norm=result.gradient_norm,
        )
        self.telemetry.write(self.log, step=state.step, skipped_steps=self.skipped_steps())
        self._report(rate)

    def _require_finite_weights(self, source: PatchSource) -> None:
        """Roll back before a save if the weights are not finite although the loss was."""
        if not rollback.weights_are_finite(self.state.network):
            self._go_back("it left weights that are not finite", self.view.losses[-1], source)

    def _go_back(self, why: str, loss: float, source: PatchSource) -> None:
        """Roll back from a failed step to the last good checkpoint, and continue with other patches.

        Raises:
            _WentBackError: always, unless RunError is raised.
            RunError: ``training.max_rollbacks`` is exceeded, or no checkpoint is good.
        """
        state, settings = self.state, self.config.training
        failed, after = state.step, state.patches
        good, record = self.world.tell(self._last_good(why, loss, source) if self.world.is_first else None)
        every = [*state.rollbacks, record]
        if len(state.rollbacks) >= settings.max_rollbacks:
            raise RunError(
                f"{self.run}: step {failed}: {why}. The run went back {len(state.rollbacks)} times before "
                f"(training.max_rollbacks: {settings.max_rollbacks}): {rollback.rollbacks_in_words(every)}. The last "
                f"good checkpoint is that of step {good.step}. Look at these cases, or resume with a lower learning "
                "rate: "
                "--resume --set training.learning_rate=... --allow training.learning_rate --set training.max_rollbacks="
                f"{settings.max_rollbacks + 3}"
            )
        LOG.warning(
            "step %d: %s; cases %s; the batch is in %s. Going back to the checkpoint of step %d, and on with other "
            "patches (%d of %d)",
            *(failed, why, ", ".join(record["cases"]), record["file"], good.step, len(every), settings.max_rollbacks),
        )
        seconds = state.seconds
        restore(state, good, settings)
        state.seconds = seconds  # a rollback gives no time back
        state.skipped_before -= self.transform.skipped_steps()
        state.patches = after
        state.rollbacks = every
        state.optimizer.zero_grad(set_to_none=True)
        self.telemetry.forget()
        self.view.go_back(state.step)
        self.log.go_back(step=state.step, validated_step=state.validated_step)
        self._save_last()
        raise _WentBackError

    def _last_good(self, why: str, loss: float, source: PatchSource) -> tuple[checkpoints.Checkpoint, dict[str, Any]]:
        """Save the batch of the failed step; return the checkpoint to go back to, and a record of the rollback.

        Raises:
            RunError: no checkpoint is good.
        """
        state, settings = self.state, self.config.training
        failed, after = state.step, state.patches // settings.batch_size
        numbers = range(after - settings.accumulate * self.world.size, after)
        seen = [source.batch(number, settings.batch_size) for number in numbers]
        cases = sorted({case for batch in seen for case in batch.cases})
        facts = {
            "why": why,
            "loss": rollback.plain_number(loss),
            "cases": cases,
            "batch_numbers": list(numbers),
            "batch_size": settings.batch_size,
        }
        kept: list[Path] = []
        self.room.write(
            lambda: kept.append(rollback.keep_batch(self.run, failed, seen, facts)),
            what=f"the batch of step {failed}",
            needed_bytes=sum(batch.image.nbytes + batch.masks.nbytes for batch in seen),
            folder=self.run,
        )
        good = checkpoints.load_newest(self.run / "checkpoints", "last", unfit=rollback.unfit_to_go_on)
        if good is None:
            raise RunError(f"{self.run}: step {failed}: {why}, and there is no checkpoint to go back to")
        record: dict[str, Any] = {"step": failed, "back_to": good.step, "cases": cases, "file": str(kept[0])}
        return good, record

    def _agree(self, saved_at: float) -> tuple[str | None, bool]:
        """Synchronise the clocks; return the signal that asked any process to stop, and whether to save now."""
        late = time.monotonic() - saved_at >= 60 * self.config.training.checkpoint_minutes
        return self.world.agree(
            seconds=self._own_seconds(), signal_name=self.stop.signal_name, save=late or self.stop.save
        )

    def _save_as_asked(self) -> None:
        """Save a checkpoint, and log it if SIGUSR1 requested it."""
        asked, self.stop.save = self.stop.save, False
        self._save_last()
        if asked:
            LOG.info("SIGUSR1: step %d is saved; going on", self.state.step)

    def _stopped(self, signal_name: str) -> InterruptedRunError:
        return InterruptedRunError(
            f"stopped by {signal_name} after step {self.state.step}; everything is saved. "
            f"Go on with: znormseg train {self.data} {self.run} --resume"
        )

    def _while_validating(self) -> None:
        """Handle signals between windows: a full validation can outlast the sender's grace period."""
        if self.world.size > 1:
            return  # several processes stop together, between steps
        if self.stop.signal_name is not None:
            self._save_last()
            raise self._stopped(self.stop.signal_name)
        if self.stop.save:
            self._save_as_asked()

    def _validate(self, cases: Sequence[CachedCase]) -> None:
        """Score the validation cases, and save the weights if they are the best so far."""
        state, settings = self.state, self.config.training
        before = time.monotonic()
        network = state.evaluated
        if self.config.takes_missing_contrasts:
            network = GivenPresence(network, presence_mask(CONTRASTS))
        first: list[tuple[CachedCase, npt.NDArray[np.uint8]]] = []
        by_case: dict[str, dict[str, float]] = {}
        dice = validation_dice(
            network,
            cases,
            window=settings.patch_voxels,
            config=self.config.inference,
            runtime=self.runtime,
            between_windows=self._while_validating,
            world=self.world,
            on_case=lambda case, codes: first.append((case, codes)) if not first else None,
            on_scores=by_case.update,
        )
        state.validations += 1
        state.validated_step = state.step
        state.validation_seconds = self.world.largest(time.monotonic() - before)
        mean = sum(dice.values()) / len(dice)
        self.log.validation(step=state.step, dice=dice, mean_dice=mean, cases=by_case, seconds=self.seconds())
        if self.world.is_first:
            self.log.picture(step=state.step, rgb=self._picture(*first[0]))
        self.view.dice = dice
        LOG.info("step %d: validation Dice %s", state.step, _in_words(dice))
        if mean > state.best_dice:
            state.best_dice, state.best_step, state.best_validation = mean, state.step, state.validations
            self._save_best(dice)

    def _validate_again(self, validating: Sequence[CachedCase]) -> None:
        """Repeat the latest validation of a finished run whose best weights are lost.

        The count for ``training.patience`` is preserved, so that a run it has ended stays ended.
        """
        state = self.state
        since_best = state.validations - state.best_validation
        self.log.go_back(step=state.step, validated_step=state.step - 1)
        state.validations = max(0, state.validations - 1)
        self._validate(validating)
        state.best_validation = state.validations - since_best

    def _picture(self, case: CachedCase, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Draw an axial slice through the tumour: reference on the left, prediction on the right."""
        contrast = CONTRASTS[-1]
        x, y, z = read_json(self.run / "run.json")["spacing_mm"]
        shown = OverlayCase(
            case=case.id,
            background=case.image()[CONTRASTS.index(contrast)].astype(np.float32),
            background_name=contrast.upper(),
            prediction=codes,
            reference=np.asarray(case.codes()),
            spacing_mm=(x, y, z),
        )
        return axial_picture(shown)

    def _save_best(self, dice: dict[str, float] | None) -> None:
        if not self.world.is_first:
            return
        facts = read_json(self.run / "run.json")
        self._save(
            "best",
            checkpoints.weight_tensors(self.state.evaluated),
            {
                "dice": dice,
                "contrasts": facts["contrasts"],
                "takes_missing_contrasts": self.config.takes_missing_contrasts,
                "regions": facts["regions"],
                "labels": facts["labels"],
                "spacing_mm": facts["spacing_mm"],
                "versions": facts["versions"],
                "config": to_plain(self.config),
                GRAPH_KEY: trace(self.state.evaluated, in_channels=self.config.input_channels).to_json(),
            },
        )

    def _save_last(self) -> None:
        if not self.world.is_first:
            return
        self.log.sync()
        tensors, details = to_checkpoint(self.state)
        counts = {"seconds": self._own_seconds(), "skipped_steps": self.skipped_steps()}
        self._save("last", tensors, {**details, **counts, "processes": self.world.size})

    def _save(self, kind: checkpoints.Kind, tensors: dict[str, Tensor], details: dict[str, Any]) -> None:
        folder, step = self.run / "checkpoints", self.state.step

        def save() -> None:
            checkpoints.save(folder, kind, step, tensors, details)

        if step == 0 and not self.state.rollbacks:
            save()  # nothing to lose yet: report a full disk at once instead of waiting
            return
        self.room.write(
            save,
            what=f"the checkpoint of step {step}",
            needed_bytes=checkpoints.size_bytes(tensors),
            folder=self.run,
        )

    def _progress(self) -> float:
        """Return the share of the budget that is spent."""
        return spent_share(
            self.config.training,
            step=self.state.step,
            seconds=self.seconds(),
            validation_seconds=self.state.validation_seconds,
        )

    def _has_stalled(self) -> bool:
        """Whether the latest ``training.patience`` validations failed to improve the mean Dice."""
        patience, state = self.config.training.patience, self.state
        return patience is not None and state.validations - state.best_validation >= patience

    def stopped_early(self) -> bool:
        """Whether the run ended with budget left because validation stopped improving."""
        return self._has_stalled() and self._progress() < 1

    def _validation_is_due(self, validating: Sequence[CachedCase]) -> bool:
        """Whether to validate now: at even intervals; with a budget in hours, only while validation stays cheap."""
        settings, state = self.config.training, self.state
        progress = self._progress()
        if not validating or progress >= 1 or state.validated_step == state.step:
            return False
        due = progress * settings.validations >= state.validations + 1
        if settings.steps is not None or not due:
            return due
        spent = state.validations * state.validation_seconds
        return spent <= _VALIDATION_SHARE * self.seconds()

    def skipped_steps(self) -> int:
        """Return how many steps were skipped because a gradient was not finite, over all resumptions of the run."""
        return self.state.skipped_before + self.transform.skipped_steps()

    def seconds(self) -> float:
        """Return the run's wall-clock time so far, over all its resumptions, excluding waits for a full disk."""
        return self.world.seconds(self._own_seconds())

    def _own_seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.clock - self.room.waited_seconds

    def _report(self, rate: float) -> None:
        progress, state, steps = self._progress(), self.state, self.config.training.steps
        left = (
            (steps - state.step) * self.view.seconds_a_step()
            if steps is not None
            else self.seconds() * (1 / progress - 1)
        )
        self.on_progress(
            Progress(
                job="training",
                share=min(progress, 1.0),
                detail=f"step {state.step}  {self.view.in_words(rate, state.best_dice)}",
                eta_seconds=max(0.0, left),
            )
        )


def _in_words(dice: dict[str, float]) -> str:
    return ", ".join(f"{region} {value:.3f}" for region, value in dice.items())
