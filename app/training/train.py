"""Train a network: from a data set folder to a run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from app import checkpoints
from app.config import RunConfig, differences, load_config, to_plain, to_yaml
from app.errors import ConfigError, InterruptedRunError, RunError
from app.progress import LOG, OnProgress, Progress, silent
from app.runlog import LOCK, MetricsLog, locked, read_json, require_new, write_json
from app.runtime import Runtime, choose_runtime, machine, versions
from app.training import gradient
from app.training.schedule import learning_rate
from app.training.stopping import StopRequest, stop_on_signals
from app.training.validate import validation_dice
from data.errors import DataError
from data.labels import CONTRASTS, CONVENTIONS, REGIONS, LabelConvention
from data.layouts import Case, convention_of, find_cases
from data.loaders import Batch, CachedCase, PatchSource, batches, cache_cases
from data.nifti import Spacing, canonical_spacing, read_grid
from data.splits import Split, fold_split, read_split
from models import RegionLoss, build_network

#: The fold that means: train on every case, validate on none.
ALL_CASES: Final = "all"
#: Validation may take this share of a budget in hours; beyond it, validations are left out, but for the last.
_VALIDATION_SHARE: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a finished run has to show."""

    run: Path
    steps: int
    seconds: float
    loss: float | None
    """Mean training loss over the last tenth of the steps."""
    dice: dict[str, float] | None
    """Dice by region of the checkpoint that ``predict`` takes; None without validation cases."""
    best_step: int
    skipped_steps: int

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "run": str(self.run),
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "loss": self.loss,
            "validation_dice": self.dice,
            "best_step": self.best_step,
            "skipped_steps": self.skipped_steps,
        }


@dataclass
class State:
    """What changes while a run trains; all of it is in a ``last`` checkpoint."""

    network: nn.Module
    optimizer: Optimizer
    step: int = 0
    seconds: float = 0.0
    """Spent by this run before the present process took over."""
    best_dice: float = -1.0
    best_step: int = 0
    validations: int = 0
    validated_step: int = 0
    """Step of the latest validation."""
    validation_seconds: float = 0.0
    skipped_before: int = 0


def start(
    data: Path,
    run: Path,
    config: RunConfig,
    *,
    fold: int | str = 0,
    split_file: Path | None = None,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Start a run.

    Args:
        data: folder of cases.
        run: folder for the run; empty or not there yet.
        config: the complete configuration.
        fold: 0 to 4, or ``all`` to train on every case and validate on none.
        split_file: JSON with the lists ``train`` and ``validation``, instead of a fold.
        on_progress: told where the run is.

    Raises:
        DataError: the data cannot be used.
        RunError: the run folder is not empty, or in use.
        DeviceError: the device asked for is not there.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; the state is saved.
    """
    clock = time.monotonic()
    require_new(run)
    cases = {case.id: case for case in find_cases(data)}
    split = _split(list(cases), fold, split_file)
    used = [cases[case_id].require() for case_id in (*split.train, *split.validation)]
    _require_labels(used)
    runtime = choose_runtime(config.runtime)
    convention = convention_of(list(cases.values()))
    spacing_mm = _spacing(config, [cases[case_id] for case_id in split.train])
    was_there = run.exists()
    with locked(run):
        require_new(run)  # once more: another process may have been here since
        with _removed_unless_started(run, keep_folder=was_there):
            (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
            write_json(run / "split.json", split.to_json())
            write_json(
                run / "run.json",
                {
                    "data": str(data.resolve()),
                    "fold": fold if split_file is None else None,
                    "split_file": None if split_file is None else str(split_file.resolve()),
                    "contrasts": list(CONTRASTS),
                    "regions": list(REGIONS),
                    "labels": convention.name,
                    "spacing_mm": list(spacing_mm),
                    "versions": versions(),
                    "machine": machine(),
                    "runtime": list(runtime.reasons),
                },
            )
            torch.manual_seed(config.training.seed)
            state = _new_state(config, runtime)
            job = _Job(
                run=run, data=data, config=config, runtime=runtime, state=state, clock=clock, on_progress=on_progress
            )
            return job.train(used[: len(split.train)], used[len(split.train) :], spacing_mm, convention)


def resume(data: Path, run: Path, config: RunConfig | None = None, *, on_progress: OnProgress = silent) -> TrainResult:
    """Go on with an interrupted run, as if it had not been interrupted.

    Args:
        data: the folder of cases it was started with.
        run: the run's folder.
        config: the configuration asked for now, where one was; it must be the run's own.
        on_progress: told where the run is.

    Raises:
        RunError: there is nothing to resume, or another process trains there.
        ConfigError: ``config`` differs from the run's own.
        DataError: a case of the run is gone or damaged.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; the state is saved.
    """
    clock = time.monotonic()
    checkpoint = checkpoints.load_newest(run / "checkpoints", "last") if run.is_dir() else None
    if checkpoint is None:
        raise RunError(f"{run}: nothing to resume, no checkpoint there. Leave out --resume to start a run.")
    own = load_config(str(run / "config.yaml"))
    if config is not None and (changed := differences(own, config)):
        raise ConfigError(
            f"{run} was started with another config; it resumes with its own only. Leave out --config and "
            f"--set, or start a new run. Different: {'; '.join(changed)}"
        )
    facts = read_json(run / "run.json")
    split = Split(**{part: tuple(ids) for part, ids in read_json(run / "split.json").items()})
    cases = {case.id: case for case in find_cases(data)}
    gone = [case_id for case_id in (*split.train, *split.validation) if case_id not in cases]
    if gone:
        raise DataError(f"{data}: cases of the run are not there: {', '.join(gone[:5])}. Give the run's data folder.")
    runtime = choose_runtime(own.runtime)
    state = _new_state(own, runtime)
    _restore(state, checkpoint)
    LOG.info("resuming at step %d", state.step)
    with locked(run):
        job = _Job(run=run, data=data, config=own, runtime=runtime, state=state, clock=clock, on_progress=on_progress)
        return job.train(
            [cases[case_id].require() for case_id in split.train],
            [cases[case_id].require() for case_id in split.validation],
            tuple(facts["spacing_mm"]),
            CONVENTIONS[facts["labels"]],
        )


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One process at work on a run."""

    run: Path
    data: Path
    config: RunConfig
    runtime: Runtime
    state: State
    clock: float
    """When this process took over, on the monotonic clock."""
    on_progress: OnProgress

    def train(
        self, training: Sequence[Case], validating: Sequence[Case], spacing_mm: Spacing, convention: LabelConvention
    ) -> TrainResult:
        """The whole of it: prepare, loop, finish."""
        settings, state = self.config.training, self.state
        for reason in self.runtime.reasons:
            LOG.info("%s", reason)
        LOG.info(
            "%d cases train, %d validate; labels %s; spacing %s mm",
            len(training),
            len(validating),
            convention.name,
            "x".join(f"{mm:g}" for mm in spacing_mm),
        )
        prepared = self._prepare([*training, *validating], spacing_mm, convention)
        source = PatchSource(
            prepared[: len(training)],
            patch_voxels=settings.patch_voxels,
            tumour_probability=settings.tumour_probability,
            augmentation=self.config.augment,
            seed=settings.seed,
        )
        transform = gradient.attach(self.config.gradient, state.optimizer, state.network)
        LOG.info("%s", transform.report)
        log = MetricsLog(self.run, keep_up_to_step=state.step, keep_validations_up_to_step=state.validated_step)
        try:
            with stop_on_signals() as stop:
                if state.step == 0:
                    self._save_last(transform)
                losses = self._loop(source, prepared[len(training) :], transform, log, stop)
        finally:
            log.close()
        shutil.rmtree(self.run / "cache", ignore_errors=True)
        best = checkpoints.load_newest(self.run / "checkpoints", "best")
        assert best is not None
        return TrainResult(
            run=self.run,
            steps=state.step,
            seconds=self._seconds(),
            loss=sum(tail) / len(tail) if (tail := losses[-max(1, len(losses) // 10) :]) else None,
            dice=best.details["dice"],
            best_step=best.step,
            skipped_steps=state.skipped_before + transform.skipped_steps(),
        )

    def _prepare(self, cases: Sequence[Case], spacing_mm: Spacing, convention: LabelConvention) -> list[CachedCase]:
        done: list[str] = []

        def ready(case_id: str) -> None:
            done.append(case_id)
            self.on_progress(Progress(job="preparing cases", share=len(done) / len(cases), detail=case_id))

        return cache_cases(cases, self.run / "cache", spacing_mm=spacing_mm, convention=convention, on_case=ready)

    def _loop(
        self,
        source: PatchSource,
        validating: Sequence[CachedCase],
        transform: gradient.AttachedTransform,
        log: MetricsLog,
        stop: StopRequest,
    ) -> list[float]:
        """Steps, validations and checkpoints until the budget is spent; returns the losses of this process."""
        settings, state = self.config.training, self.state
        loss_of = RegionLoss()
        losses: list[float] = []
        began = saved_at = time.monotonic()
        made = batches(
            source,
            first=state.step * settings.accumulate,
            size=settings.batch_size,
            threads=self.config.runtime.loader_threads,
        )
        with closing(made):
            state.network.train()
            while (progress := self._progress()) < 1:
                rate = learning_rate(settings, progress)
                loss = self._step(made, loss_of, rate)
                state.step += 1
                losses.append(loss)
                log.train(
                    step=state.step,
                    loss=loss,
                    learning_rate=rate,
                    seconds=self._seconds(),
                    skipped_steps=state.skipped_before + transform.skipped_steps(),
                )
                self._report(losses, time.monotonic() - began)
                if self._validation_is_due() and validating and self._progress() < 1:
                    self._validate(validating, log)
                    self._save_last(transform)
                    saved_at = time.monotonic()
                if stop.signal_name is not None:
                    self._save_last(transform)
                    raise InterruptedRunError(
                        f"stopped by {stop.signal_name} after step {state.step}; everything is saved. "
                        f"Go on with: znormseg train {self.data} {self.run} --resume"
                    )
                if time.monotonic() - saved_at >= 60 * settings.checkpoint_minutes:
                    self._save_last(transform)
                    saved_at = time.monotonic()
        if not validating:
            self._save_best(None)
        elif state.validated_step < state.step:
            self._validate(validating, log)
        self._save_last(transform)
        return losses

    def _step(self, made: Any, loss_of: RegionLoss, rate: float) -> float:
        """One optimiser step; returns the mean loss of its micro-batches."""
        state, settings = self.state, self.config.training
        total = 0.0
        for _ in range(settings.accumulate):
            batch: Batch = next(made)
            image = batch.image.to(self.runtime.device, non_blocking=True)
            masks = batch.masks.to(self.runtime.device, non_blocking=True)
            with self.runtime.autocast():
                logits = state.network(image.contiguous(memory_format=self.runtime.memory_format))
            loss = loss_of(logits, masks)
            (loss / settings.accumulate).backward()
            total += float(loss.detach()) / settings.accumulate
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        return total

    def _validate(self, cases: Sequence[CachedCase], log: MetricsLog) -> None:
        """Score the validation cases; keep the weights when they are the best so far."""
        state, settings = self.state, self.config.training
        before = time.monotonic()
        dice = validation_dice(
            state.network, cases, window=settings.patch_voxels, config=self.config.inference, runtime=self.runtime
        )
        state.validations += 1
        state.validated_step = state.step
        state.validation_seconds = time.monotonic() - before
        mean = sum(dice.values()) / len(dice)
        log.validation(step=state.step, dice=dice, mean_dice=mean, seconds=self._seconds())
        LOG.info("step %d: validation Dice %s", state.step, _in_words(dice))
        if mean > state.best_dice:
            state.best_dice, state.best_step = mean, state.step
            self._save_best(dice)

    def _save_best(self, dice: dict[str, float] | None) -> None:
        facts = read_json(self.run / "run.json")
        checkpoints.save(
            self.run / "checkpoints",
            "best",
            self.state.step,
            checkpoints.weight_tensors(self.state.network),
            {
                "dice": dice,
                "contrasts": facts["contrasts"],
                "regions": facts["regions"],
                "labels": facts["labels"],
                "spacing_mm": facts["spacing_mm"],
                "versions": facts["versions"],
                "config": to_plain(self.config),
            },
        )

    def _save_last(self, transform: gradient.AttachedTransform) -> None:
        state = self.state
        tensors, plain = checkpoints.optimizer_tensors(state.optimizer)
        checkpoints.save(
            self.run / "checkpoints",
            "last",
            state.step,
            {**checkpoints.weight_tensors(state.network), **tensors, **checkpoints.rng_tensors()},
            {
                "seconds": self._seconds(),
                "best_dice": state.best_dice,
                "best_step": state.best_step,
                "validations": state.validations,
                "validated_step": state.validated_step,
                "validation_seconds": state.validation_seconds,
                "skipped_steps": state.skipped_before + transform.skipped_steps(),
                "optimizer": plain,
            },
        )

    def _progress(self) -> float:
        """Share of the budget that is spent. A budget in hours keeps the time of one validation for the last one."""
        settings, state = self.config.training, self.state
        if settings.steps is not None:
            return state.step / settings.steps
        assert settings.hours is not None
        budget = settings.hours * 3600
        return self._seconds() / max(budget - state.validation_seconds, 0.5 * budget)

    def _validation_is_due(self) -> bool:
        """By steps: at even distances, whatever the clock says. By hours: only while validation stays cheap."""
        settings, state = self.config.training, self.state
        due = self._progress() * settings.validations >= state.validations + 1
        if settings.steps is not None or not due:
            return due
        spent = state.validations * state.validation_seconds
        return spent <= _VALIDATION_SHARE * self._seconds()

    def _seconds(self) -> float:
        """Wall-clock time of the run so far, over all its processes."""
        return self.state.seconds + time.monotonic() - self.clock

    def _report(self, losses: list[float], spent: float) -> None:
        progress = self._progress()
        recent = losses[-20:]
        best = f"  best Dice {self.state.best_dice:.3f}" if self.state.best_dice >= 0 else ""
        steps = self.config.training.steps
        left = (
            (steps - self.state.step) * spent / len(losses)
            if steps is not None
            else self._seconds() * (1 / progress - 1)
        )
        self.on_progress(
            Progress(
                job="training",
                share=min(progress, 1.0),
                detail=f"step {self.state.step}  loss {sum(recent) / len(recent):.3f}{best}",
                eta_seconds=max(0.0, left),
            )
        )


@contextmanager
def _removed_unless_started(run: Path, *, keep_folder: bool) -> Iterator[None]:
    """Leave no half-made run folder behind when something fails before the first checkpoint. Holds for a locked run."""
    try:
        yield
    except BaseException:
        if not any((run / "checkpoints").glob("*.json")):
            for entry in run.iterdir():
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                elif entry.name != LOCK:
                    entry.unlink()
            if not keep_folder:
                (run / LOCK).unlink()
                run.rmdir()
        raise


def _new_state(config: RunConfig, runtime: Runtime) -> State:
    network = build_network(config.network, in_channels=len(CONTRASTS), out_channels=len(REGIONS))
    network.to(runtime.device, memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
    return State(network=network, optimizer=_optimizer(config, network))


def _optimizer(config: RunConfig, network: nn.Module) -> Optimizer:
    """AdamW or SGD; weights decay, biases and norms do not."""
    settings = config.training
    groups = [
        {"params": [p for p in network.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in network.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
    return torch.optim.SGD(
        groups, lr=settings.learning_rate, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=True
    )


def _restore(state: State, checkpoint: checkpoints.Checkpoint) -> None:
    state.network.load_state_dict(checkpoint.weights)
    checkpoints.restore_optimizer(state.optimizer, checkpoint)
    checkpoints.restore_rng(checkpoint)
    details = checkpoint.details
    state.step = checkpoint.step
    state.seconds = details["seconds"]
    state.best_dice, state.best_step = details["best_dice"], details["best_step"]
    state.validations, state.validated_step = details["validations"], details["validated_step"]
    state.validation_seconds = details["validation_seconds"]
    state.skipped_before = details["skipped_steps"]


def _split(case_ids: Sequence[str], fold: int | str, split_file: Path | None) -> Split:
    if split_file is not None:
        return read_split(split_file, case_ids)
    if fold == ALL_CASES:
        return Split(train=tuple(case_ids), validation=())
    return fold_split(case_ids, int(fold))


def _require_labels(cases: Sequence[Case]) -> None:
    without = [case.id for case in cases if case.label is None]
    if without:
        raise DataError(
            f"{len(without)} cases have no label map (a file that ends in seg): {', '.join(without[:5])}. "
            "Add them, or leave the cases out with --split."
        )


def _spacing(config: RunConfig, cases: Sequence[Case]) -> Spacing:
    """The configured spacing, or the training cases' median along each axis."""
    if config.data.spacing_mm is not None:
        return (config.data.spacing_mm,) * 3
    found = [canonical_spacing(read_grid(case.contrasts["t1c"])[1]) for case in cases]
    x, y, z = (round(median(along), 4) for along in zip(*found, strict=True))
    return (x, y, z)


def _in_words(dice: dict[str, float]) -> str:
    return ", ".join(f"{region} {value:.3f}" for region, value in dice.items())
