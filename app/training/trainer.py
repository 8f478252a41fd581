"""The training loop: steps, validations and checkpoints until the budget is spent."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from torch import Tensor

from app.config.load import RunConfig, to_plain
from app.errors import InterruptedRunError, RunError
from app.progress import LOG, OnProgress, Progress
from app.runs import checkpoints
from app.runs.folder import LEAST_ROOM_BYTES, MetricsLog
from app.system.device import Runtime
from app.system.disk_full import RetryOnFullDisk
from app.training import gpu, gradient, rollback
from app.training.cases import patch_settings
from app.training.distributed import World
from app.training.loader import Loader
from app.training.schedule import learning_rate, spent_share
from app.training.signals import StopRequest, stop_on_signals
from app.training.state import State, restore, to_checkpoint
from app.training.step import QueuedStep, Stepper, StepResult
from app.training.task import Task, ValidationScores
from app.training.telemetry import Telemetry
from data.datasets.layouts import Case
from data.datasets.source import DataSource
from data.datasets.splits import Split
from data.patches.sampler import Batch, CachedCase, PatchSource

Codes = npt.NDArray[np.uint8]

#: Maximum share of a run's time spent on validation; beyond it, validations but the last are skipped.
_VALIDATION_SHARE: Final = 0.1
#: Evenly spaced validations that a budget in steps gets whatever they cost, if as many are requested.
_FEW_VALIDATIONS: Final = 10
#: Number of steps between measurements of the gradient norm.
_NORM_EVERY: Final = 10
#: Number of steps that a GPU may lag behind before their losses are read; a CPU never lags behind.
_READ_EVERY: Final = 10
#: Number of recent steps over which progress reports average the loss and the waiting time.
_RECENT_STEPS: Final = 20
#: Entries of ``run.json`` that are copied to the JSON of the best weights.
_CARRIED: Final = ("contrasts", "takes_missing_contrasts", "regions", "labels", "spacing_mm", "versions")


class _RolledBackError(Exception):
    """The run rolled back to a checkpoint, so its batches must be restarted."""


@dataclass
class _Figures:
    """Figures for progress reports."""

    first_step: int = 0
    """Step at which this process took over, or to which it rolled back."""
    began: float = field(default_factory=time.monotonic)
    losses: list[float] = field(default_factory=list)
    """One loss per step of this process."""
    times: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=_RECENT_STEPS))
    """Seconds of each recent step: waiting for batches, and in total."""
    gradient_norm: float | None = None
    scores: ValidationScores | None = None
    """Scores of the latest validation."""

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

    def in_words(self, rate: float, best_score: float, measure: str) -> str:
        waited, spent = (sum(column) for column in zip(*self.times, strict=True))
        recent = self.losses[-_RECENT_STEPS:]
        mean, waiting = sum(recent) / len(recent), waited / max(spent, 1e-9)
        parts = [f"loss {mean:.3f}", f"lr {rate:.3g}", f"data wait {waiting:.0%}"]
        if self.gradient_norm is not None:
            parts.append(f"gradient norm {self.gradient_norm:.3g}")
        if self.scores is not None:
            parts.append(f"{measure} {_in_words(self.scores.by_output)}")
        if best_score >= 0:
            parts.append(f"best {measure} {best_score:.3f}")
        return "  ".join(parts)


@dataclass(frozen=True, kw_only=True)
class _Unread:
    """A step whose loss has not been read."""

    step: int
    patches: int
    """Number of the next patch after the step."""
    rate: float
    began: float
    """Monotonic time."""
    seconds: float
    """Seconds of the run after the step was queued."""
    queued: QueuedStep


@dataclass(frozen=True, kw_only=True)
class Session:
    """One process's share of a run, from the start of its command to the end."""

    data: DataSource
    run: Path
    world: World
    on_progress: OnProgress
    began: float = field(default_factory=time.monotonic)
    """Monotonic time at the start."""


@dataclass
class Trainer:
    """A run in training: the facts that all its processes share, its state, and the loop."""

    session: Session
    config: RunConfig
    facts: Mapping[str, Any]
    """Content of ``run.json``."""
    split: Split
    cases: Mapping[str, Case]
    """Cases by id, including those of the split."""
    runtime: Runtime
    state: State
    task: Task
    # Set by train:
    validating: Sequence[CachedCase] = field(init=False)
    source: PatchSource = field(init=False)
    transform: gradient.AttachedTransform = field(init=False)
    telemetry: Telemetry = field(init=False)
    stop: StopRequest = field(init=False)
    disk_retry: RetryOnFullDisk = field(init=False)
    log: MetricsLog = field(init=False)
    figures: _Figures = field(init=False)
    unread: list[_Unread] = field(init=False, default_factory=list)
    saved_at: float = field(init=False)
    """Monotonic time of the latest ``last`` checkpoint."""
    draw: Callable[[CachedCase, Codes], Codes] = field(init=False)

    def train(
        self,
        prepared: Sequence[CachedCase],
        *,
        draw: Callable[[CachedCase, Codes], Codes],
    ) -> list[float]:
        """Train until the budget is spent, and return the losses of this process's steps.

        Args:
            prepared: the training cases, then the validation cases.
            draw: draws a validation case and its prediction for TensorBoard, as RGB of shape (height, width, 3).

        Raises:
            InterruptedRunError: a stop was requested; everything is saved.
            RunError: the loss was non-finite more often than ``training.max_rollbacks``, or no checkpoint is usable.
            OSError: the disk is full, and a stop was requested or the first checkpoint does not fit.
        """
        settings, state, world = self.config.training, self.state, self.session.world
        self.draw = draw
        training, self.validating = prepared[: len(self.split.train)], prepared[len(self.split.train) :]
        self.source = PatchSource(training, **patch_settings(self.config))
        self.transform = gradient.attach_transform(self.config.gradient, state.optimizer, state.network)
        telemetry_steps = settings.telemetry_steps if world.is_first else 0
        self.telemetry = Telemetry(telemetry_steps, state.network, state.optimizer)
        with stop_on_signals(patient=world.size > 1) as self.stop, closing(self._open_log()) as self.log:
            self.figures = _Figures(first_step=state.step)
            self.saved_at = time.monotonic()
            if state.step == 0:
                self._save_last()
            stepper = self._stepper()
            loader = Loader(self.source, self.config, self.runtime)
            done = False
            while not done:
                made = loader.batches(first=state.patches // settings.batch_size + world.rank, every=world.size)
                with closing(made), suppress(_RolledBackError):
                    state.network.train()
                    self._agree()
                    if self._validation_is_due():  # a stop interrupted the last one
                        self._validate_and_save()
                    while self._progress() < 1 and not self._has_stalled():
                        self._step(stepper, made)
                        if self.unread:
                            continue
                        stop, save = self._agree()
                        if self._validation_is_due():
                            self._require_finite_weights()
                            stop, save = self._validate_and_save()
                        if stop is not None or save:
                            self._require_finite_weights()
                            self._save_last()
                            world.wait()  # here, as a collective operation on GPUs has a shorter timeout
                        if stop is not None:
                            raise self._stopped(stop)
                    self._read(stepper)
                    self._require_finite_weights()
                    done = True
            if not self.validating:
                self._save_best(None)
            elif state.validated_step < state.step:
                self._validate()
            elif state.best_score < 0:
                self._validate_again()
            self._save_last()
        return self.figures.losses

    def _stepper(self) -> Stepper:
        LOG.info("%s", "\n".join(line for line in self.transform.report.splitlines() if not line.startswith(" ")))
        LOG.debug("%s", self.transform.report)  # one line per tensor
        world, network = self.session.world, self.state.network
        loss = self.task.loss(world)
        computation = gpu.prepare_computation(self.config, self.runtime, network, loss, processes=world.size)
        for reason in computation.reasons:
            LOG.info("%s", reason)
        return Stepper(
            config=self.config,
            runtime=self.runtime,
            state=self.state,
            telemetry=self.telemetry,
            loss_of=computation.loss,
            target_of=self.task.target,
            world=world,
            replica=world.replica(computation.network),
        )

    def _open_log(self) -> MetricsLog:
        run = self.session.run
        self.disk_retry = RetryOnFullDisk(stopped=lambda: self.stop.signal_name is not None)
        return MetricsLog(
            run,
            keep_up_to_step=self.state.step,
            keep_validations_up_to_step=self.state.validated_step,
            patiently=lambda write: self.disk_retry.write(
                write, what="a line of metrics.jsonl", needed_bytes=LEAST_ROOM_BYTES, folder=run
            ),
            writes=self.session.world.is_first,
        )

    def _step(self, stepper: Stepper, made: Iterator[Batch]) -> None:
        """Perform one step; read it, and those before it, if it is time.

        Raises:
            _RolledBackError: the loss of one of them was not finite.
        """
        state = self.state
        began = time.monotonic()
        rate = learning_rate(self.config.training, self._progress())
        queued = stepper.queue(made, rate, with_norm=state.step % _NORM_EVERY == 0)
        state.step += 1
        seconds = self.seconds()
        self.unread.append(
            _Unread(step=state.step, patches=state.patches, rate=rate, began=began, seconds=seconds, queued=queued)
        )
        if not _lags_behind(self.runtime) or self._reads_now():
            self._read(stepper)

    def _reads_now(self) -> bool:
        """Whether to wait for the GPU after this step; the answer is the same in all processes."""
        state, alone = self.state, self.session.world.size == 1
        every = self.config.training.telemetry_steps  # only the first process has telemetry
        requested = self.stop.signal_name is not None or self.stop.save or self._save_is_late()
        return (
            state.step % _READ_EVERY == 0
            or (every > 0 and state.step % every == 0)
            or self._progress() >= 1
            or self._validation_is_due()
            or (alone and requested)
        )

    def _read(self, stepper: Stepper) -> None:
        """Wait for the steps since the last call, and check and log them; in several processes, all call this together.

        Raises:
            _RolledBackError: the loss of one of them was not finite.
        """
        steps, self.unread = self.unread, []
        if not steps:
            return
        results, skipped = stepper.read([one.queued for one in steps], self.transform.skipped())
        skipped += self.state.skipped_before
        spent = (time.monotonic() - steps[0].began) / len(steps)
        for one, result in zip(steps, results, strict=True):
            if not math.isfinite(result.loss):
                self._go_back(f"its loss is {result.loss}", result.loss, failed=one.step, after=one.patches)
            self.figures.add(result, spent)
            self.log.train(
                step=one.step,
                loss=result.loss,
                learning_rate=one.rate,
                seconds=one.seconds,
                skipped_steps=skipped,
                waited_seconds=result.waited_seconds,
                step_seconds=spent,
                gradient_norm=result.gradient_norm,
            )
        self.telemetry.write(self.log, step=self.state.step, skipped_steps=skipped)
        self._report(steps[-1].rate)

    def _require_finite_weights(self) -> None:
        """Roll back before a save if the weights are not finite although the loss was."""
        if not rollback.weights_are_finite(self.state.network):
            state = self.state
            loss = self.figures.losses[-1]
            self._go_back("the weights are not finite", loss, failed=state.step, after=state.patches)

    def _go_back(self, why: str, loss: float, *, failed: int, after: int) -> None:
        """Roll back from a failed step to the last good checkpoint, and continue with other patches.

        Args:
            why: what is wrong, in words.
            loss: loss of the failed step.
            failed: the step; a GPU may have made further ones since.
            after: number of the next patch after it.

        Raises:
            _RolledBackError: always, unless RunError is raised.
            RunError: ``training.max_rollbacks`` is exceeded, or no checkpoint is usable.
        """
        state, settings, world = self.state, self.config.training, self.session.world
        good, record = world.broadcast(self._last_good(why, loss, failed, after) if world.is_first else None)
        next_patch = state.patches
        rollbacks = [*state.rollbacks, record]
        if len(rollbacks) > settings.max_rollbacks:
            times = "1 time" if len(state.rollbacks) == 1 else f"{len(state.rollbacks)} times"
            raise RunError(
                f"{self.session.run}: step {failed}: {why}. The run has rolled back {times} "
                f"(training.max_rollbacks: {settings.max_rollbacks}): {rollback.rollbacks_in_words(rollbacks)}. The "
                f"last good checkpoint is that of step {good.step}. Check these cases, or resume with a lower "
                "learning rate: --resume --set training.learning_rate=... --allow training.learning_rate --set "
                f"training.max_rollbacks={settings.max_rollbacks + 3}"
            )
        LOG.warning(
            "step %d: %s; cases %s; the batch is in %s. Rolling back to the checkpoint of step %d and continuing with "
            "other patches (rollback %d of %d)",
            *(failed, why, ", ".join(record["cases"]), record["file"], good.step),
            *(len(rollbacks), settings.max_rollbacks),
        )
        seconds = state.seconds
        restore(state, good, settings)
        state.seconds = seconds  # a rollback does not refund time
        state.skipped_before -= self.transform.skipped_steps()
        state.patches = next_patch
        state.rollbacks = rollbacks
        state.optimizer.zero_grad(set_to_none=True)
        self.telemetry.forget()
        self.figures.go_back(state.step)
        self.log.go_back(step=state.step, validated_step=state.validated_step)
        self._save_last()
        raise _RolledBackError

    def _last_good(
        self, why: str, loss: float, failed: int, after: int
    ) -> tuple[checkpoints.Checkpoint, dict[str, Any]]:
        """Save the batch of the failed step; return the checkpoint to roll back to, and a record of the rollback.

        Raises:
            RunError: no checkpoint is usable.
        """
        settings, run = self.config.training, self.session.run
        end = after // settings.batch_size
        numbers = range(end - settings.accumulate * self.session.world.size, end)
        seen = [self.source.batch(number, settings.batch_size) for number in numbers]
        cases = sorted({case for batch in seen for case in batch.cases})
        facts = {
            "why": why,
            "loss": rollback.plain_number(loss),
            "cases": cases,
            "batch_numbers": list(numbers),
            "batch_size": settings.batch_size,
        }
        kept: list[Path] = []
        self.disk_retry.write(
            lambda: kept.append(rollback.keep_batch(run, failed, seen, facts)),
            what=f"the batch of step {failed}",
            needed_bytes=sum(batch.image.nbytes + batch.masks.nbytes for batch in seen),
            folder=run,
        )
        good = checkpoints.load_newest(run / "checkpoints", "last", unfit=rollback.unfit_to_resume)
        if good is None:
            raise RunError(f"{run}: step {failed}: {why}, and there is no checkpoint to roll back to")
        return good, {"step": failed, "back_to": good.step, "cases": cases, "file": str(kept[0])}

    def _agree(self) -> tuple[str | None, bool]:
        """Synchronise the clocks; return the signal that asked any process to stop, and whether to save now."""
        return self.session.world.agree(
            seconds=self._own_seconds(),
            signal_name=self.stop.signal_name,
            save=self._save_is_late() or self.stop.save,
        )

    def _save_is_late(self) -> bool:
        return time.monotonic() - self.saved_at >= 60 * self.config.training.checkpoint_minutes

    def _stopped(self, signal_name: str) -> InterruptedRunError:
        return InterruptedRunError(
            f"stopped by {signal_name} after step {self.state.step}; everything is saved. "
            f"Resume with: znormseg train {self.session.data.name} {self.session.run} --resume"
        )

    def _while_validating(self) -> None:
        """Handle signals between windows: a full validation can outlast the sender's grace period."""
        if self.session.world.size > 1 or not (self.stop.signal_name or self.stop.save):
            return  # several processes stop together, between steps
        self._save_last()
        if self.stop.signal_name is not None:
            raise self._stopped(self.stop.signal_name)

    def _validate(self) -> None:
        """Score the validation cases, and save the weights if they are the best so far."""
        state, world = self.state, self.session.world
        before = time.monotonic()
        first: list[tuple[CachedCase, Codes]] = []
        scores = self.task.validate(
            state.evaluated,
            self.validating,
            runtime=self.runtime,
            world=world,
            between_windows=self._while_validating,
            on_case=lambda case, codes: first.append((case, codes)) if not first else None,
        )
        state.validations += 1
        state.validated_step = state.step
        state.validation_seconds = world.largest(time.monotonic() - before)
        self.log.validation(
            step=state.step,
            measure=self.config.measure.key,
            by_output=scores.by_output,
            mean=scores.mean,
            cases=scores.cases,
            more=scores.more,
            seconds=self.seconds(),
        )
        if world.is_first and first:
            self.log.picture(step=state.step, rgb=self.draw(*first[0]))
        self.figures.scores = scores
        LOG.info("step %d: validation %s %s", state.step, self.config.measure.in_words, _in_words(scores.by_output))
        if scores.mean > state.best_score:
            state.best_score, state.best_step, state.best_validation = scores.mean, state.step, state.validations
            self._save_best(scores.by_output)

    def _validate_and_save(self) -> tuple[str | None, bool]:
        """Validate, save everything, and return what :meth:`_agree` does.

        If the disk is full, the other processes wait there, and not in a step on GPUs, which has a shorter timeout.
        """
        self._validate()
        self._save_last()
        return self._agree()

    def _validate_again(self) -> None:
        """Repeat the latest validation of a finished run whose best weights are lost.

        The count for ``training.patience`` is preserved, so that a run that ended early does not continue.
        """
        state = self.state
        since_best = state.validations - state.best_validation
        self.log.go_back(step=state.step, validated_step=state.step - 1)
        state.validations = max(0, state.validations - 1)
        self._validate()
        state.best_validation = state.validations - since_best

    def _save_best(self, by_output: dict[str, float] | None) -> None:
        if not self.session.world.is_first:
            return
        network = self.state.evaluated
        facts = {**self.facts, "takes_missing_contrasts": self.config.takes_missing_contrasts}
        carried = {name: facts[name] for name in _CARRIED}
        scores = {self.config.measure.key: by_output}
        details = {**scores, **carried, "config": to_plain(self.config), **self.task.describe(network)}
        self._save("best", checkpoints.weight_tensors(network), details)

    def _save_last(self) -> None:
        """Save everything; this also fulfils a request by SIGUSR1."""
        requested, self.stop.save = self.stop.save, False
        if self.session.world.is_first:
            self.log.sync()
            tensors, details = to_checkpoint(self.state)
            counts = {"seconds": self._own_seconds(), "skipped_steps": self.skipped_steps()}
            self._save("last", tensors, {**details, **counts, "processes": self.session.world.size})
        self.saved_at = time.monotonic()
        if requested:
            LOG.info("SIGUSR1: saved step %d; training continues", self.state.step)

    def _save(self, kind: checkpoints.Kind, tensors: dict[str, Tensor], details: dict[str, Any]) -> None:
        run, step = self.session.run, self.state.step

        def save() -> None:
            checkpoints.save(run / "checkpoints", kind, step, tensors, details)

        if step == 0 and not self.state.rollbacks:
            save()  # nothing to lose yet: report a full disk at once instead of waiting
            return
        needed_bytes = checkpoints.size_bytes(tensors)
        self.disk_retry.write(save, what=f"the checkpoint of step {step}", needed_bytes=needed_bytes, folder=run)

    def _progress(self) -> float:
        """Return the share of the budget that is spent."""
        state = self.state
        return spent_share(
            self.config.training, step=state.step, seconds=self.seconds(), validation_seconds=state.validation_seconds
        )

    def _has_stalled(self) -> bool:
        """Whether the latest ``training.patience`` validations failed to improve the mean score."""
        patience, state = self.config.training.patience, self.state
        return patience is not None and state.validations - state.best_validation >= patience

    def stopped_early(self) -> bool:
        """Whether the run ended with budget left because validation stopped improving."""
        return self._has_stalled() and self._progress() < 1

    def _validation_is_due(self) -> bool:
        """Whether to validate now: at even intervals, but only while validation stays cheap.

        With a budget in steps, the first ten of the requested validations are due in any case, so that a run with no
        more of them makes the same ones on every machine.
        """
        settings, state = self.config.training, self.state
        progress = self._progress()
        if not self.validating or progress >= 1 or state.validated_step == state.step:
            return False
        cheap = state.validations * state.validation_seconds <= _VALIDATION_SHARE * self.seconds()
        few = min(settings.validations, _FEW_VALIDATIONS) if settings.steps is not None else 0
        return progress * (settings.validations if cheap else few) >= state.validations + 1

    def skipped_steps(self) -> int:
        """Return how many steps were skipped because a gradient was not finite, over all resumptions of the run."""
        return self.state.skipped_before + self.transform.skipped_steps()

    def seconds(self) -> float:
        """Return the run's wall-clock time so far, over all its resumptions, excluding waits for a full disk."""
        return self.session.world.seconds(self._own_seconds())

    def _own_seconds(self) -> float:
        return self.state.seconds + time.monotonic() - self.session.began - self.disk_retry.waited_seconds

    def _report(self, rate: float) -> None:
        progress, state, steps = self._progress(), self.state, self.config.training.steps
        if steps is not None:
            left = (steps - state.step) * self.figures.seconds_a_step()
        else:
            left = self.seconds() * (1 / progress - 1)
        detail = f"step {state.step}  {self.figures.in_words(rate, state.best_score, self.config.measure.in_words)}"
        share, eta_seconds = min(progress, 1.0), max(0.0, left)
        self.session.on_progress(Progress(job="training", share=share, detail=detail, eta_seconds=eta_seconds))


def _lags_behind(runtime: Runtime) -> bool:
    """Whether the device may still be computing steps that the host has queued."""
    return runtime.device.type == "cuda"


def _in_words(by_output: dict[str, float]) -> str:
    return ", ".join(f"{output} {value:.3f}" for output, value in by_output.items())
