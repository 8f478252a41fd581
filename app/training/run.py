"""Train a network: from a data set folder to a run folder."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch

from app.config.load import RunConfig, load_config, to_yaml
from app.errors import ConfigError, RunError, message
from app.progress import LOG, OnProgress, Progress, silent
from app.runs import checkpoints
from app.runs.case_cache import prepared_cases
from app.runs.folder import (
    LEAST_ROOM_BYTES,
    LOCK,
    MetricsLog,
    job_of,
    locked,
    read_json,
    remove_partial_files,
    require_new,
    write_durably,
    write_json,
)
from app.runs.model_card import seal, unseal
from app.system.device import choose_runtime, machine, versions
from app.system.disk_full import RetryOnFullDisk
from app.system.process import keep_freed_memory
from app.training import config_changes, gradient
from app.training.cases import (
    ALL_CASES,
    cases_of,
    choose_split,
    labels_on_record,
    network_spacing,
    record_backgrounds,
    record_intensities,
    require_labels,
    require_same_labels,
    split_on_record,
    tell_of_names,
    tell_of_patients,
)
from app.training.distributed import ALONE, World
from app.training.pretrained import InitialWeights, initial_weights
from app.training.signals import not_ended_by_sigusr1, stop_on_signals
from app.training.state import State, new_state, restore, to_checkpoint
from app.training.telemetry import Telemetry
from app.training.trainer import Loop
from data.datasets.label_stats import read_label_maps, tumours_of
from data.datasets.layouts import Case, patients_of
from data.datasets.source import DataSource
from data.datasets.splits import Split, stratified_split
from data.labels import CONTRASTS, CONVENTIONS, REGIONS, LabelConvention
from data.nifti import Spacing
from data.patches.cache import CaseFolder
from data.patches.sampler import CachedCase, PatchSource, cache_cases

#: How long a restarted run waits for a killed process on another host to release the run folder.
_LOCK_SECONDS: Final = 120.0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a finished run."""

    run: Path
    steps: int
    seconds: float
    loss: float | None
    """Mean training loss over the last tenth of the steps."""
    dice: dict[str, float] | None
    """Dice by region of the checkpoint that ``predict`` uses; None without validation cases."""
    best_step: int
    skipped_steps: int
    stopped_early: bool = False
    """Whether ``training.patience`` ended the run with budget left."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "run": str(self.run),
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "loss": self.loss,
            "validation_dice": self.dice,
            "best_step": self.best_step,
            "skipped_steps": self.skipped_steps,
            "stopped_early": self.stopped_early,
        }


@not_ended_by_sigusr1()
def start(  # noqa: PLR0913 - one argument per command-line option
    data: DataSource,
    run: Path,
    config: RunConfig,
    *,
    fold: int | str = 0,
    split_file: Path | None = None,
    split_is_judged: bool = False,
    init_from: Path | None = None,
    store: CaseFolder | None = None,
    world: World = ALONE,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Start a run and train until its budget is spent.

    Args:
        data: the data set.
        run: folder for the run; it must be empty or not exist yet.
        config: the complete configuration.
        fold: 0 to 4, or ``all`` to train on every case and validate on none.
        split_file: JSON file with the lists ``train`` and ``validation``; overrides ``fold``.
        split_is_judged: the caller has already checked the patients in ``split_file``; skip the check here.
        init_from: folder of a run whose best weights replace the random initial weights.
        store: where prepared cases are kept; default: the user's cache.
        world: the processes that train together; each of them calls this, but only the first writes to ``run``.
        on_progress: called with the progress of the run.

    Raises:
        ConfigError: ``init_from`` has a different network; ``training.patience`` is set without validation cases;
            ``inference.crop`` is false.
        DataError: the data cannot be used.
        RunError: the run folder is not empty or is in use; ``init_from`` is not a run or has no weights.
        DeviceError: the requested device is not available.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; the state is saved.
    """
    clock = time.monotonic()
    if not world.is_first:
        return _follow(data, run, world, store=store)
    again = world.restarts > 0 and world.launch.job != "" and job_of(run) == world.launch.job
    if again and checkpoints.load_newest(run / "checkpoints", "last") is not None:
        return resume(data, run, config, store=store, world=world, on_progress=on_progress)
    if not again:
        require_new(run)
    cases = data.find_cases()
    patients = {case_id: case_id for case_id in cases} if split_is_judged else patients_of(cases.values())
    split = choose_split(patients, fold, split_file)
    require_labels([cases[case_id].require() for case_id in (*split.train, *split.validation)])
    if config.training.patience is not None and not split.validation:
        raise ConfigError(
            "training.patience: there are no validation cases to wait for; leave it out, or give a fold or a split "
            "with validation cases"
        )
    if not config.inference.crop:
        raise ConfigError("inference.crop: false is for imported networks; training and its validation take true")
    runtime = choose_runtime(config.runtime, local_rank=world.launch.local_rank)
    initial = None if init_from is None else initial_weights(init_from, config, runtime)
    held = read_label_maps(cases.values())
    convention = data.decide_convention(cases, held)
    if split_file is None and fold != ALL_CASES:
        split = stratified_split(tumours_of(cases, held, convention), patients, int(fold))
    if not split_is_judged:
        tell_of_patients(cases.values(), (split.train, split.validation))
        tell_of_names([cases[case_id] for case_id in (*split.train, *split.validation)])
    spacing_mm = network_spacing(config, [cases[case_id] for case_id in split.train])
    was_there = run.exists()
    with _locked(run, world), _opened(store, run) as opened:
        if again:
            _empty(run)  # killed before its first checkpoint
        require_new(run)  # checked again under the lock: another process may have got here first
        with _removed_unless_started(run, keep_folder=was_there):
            write_durably(run / "config.yaml", to_yaml(config).encode())
            write_json(run / "split.json", split.to_json())
            write_json(run / "labels.json", labels_on_record(split, held))
            write_json(
                run / "run.json",
                {
                    "data": str(data.root.resolve()),
                    "fold": fold if split_file is None else None,
                    "split_file": None if split_file is None else str(split_file.resolve()),
                    "contrasts": list(CONTRASTS),
                    "takes_missing_contrasts": config.takes_missing_contrasts,
                    "regions": list(REGIONS),
                    "labels": convention.name,
                    "spacing_mm": list(spacing_mm),
                    "versions": versions(),
                    "machine": machine(),
                    "processes": world.size,
                    "runtime": list(runtime.reasons),
                    "init_from": None if initial is None else initial.to_json(),
                },
            )
            torch.manual_seed(config.training.seed)
            state = new_state(config, runtime)
            if initial is not None:
                _start_from(initial, state, spacing_mm)
            begun = _Begun(config=config, split=split, facts=read_json(run / "run.json"))
            world.tell((begun, None if initial is None or world.size == 1 else _as_checkpoint(state)))
            return _train(
                data=data.root,
                run=run,
                begun=begun,
                state=state,
                cases=cases,
                store=opened,
                clock=clock,
                world=world,
                on_progress=on_progress,
            )


@not_ended_by_sigusr1()
def resume(
    data: DataSource,
    run: Path,
    config: RunConfig | None = None,
    *,
    allow: Collection[str] = (),
    split_is_judged: bool = False,
    store: CaseFolder | None = None,
    world: World = ALONE,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Resume an interrupted run, as if it had not been interrupted.

    Args:
        data: the data set that the run was started with; its ``labels`` are those of the run.
        run: the run's folder.
        config: the requested configuration; default: the run's own.
        allow: keys in which ``config`` may differ although they change what is learned; it may always differ in those
            of :data:`app.training.config_changes.HARMLESS`.
        split_is_judged: as in :func:`start`.
        store: where prepared cases are kept; default: the user's cache.
        world: the processes that train together; each of them calls this, but only the first writes to ``run``.
        on_progress: called with the progress of the run.

    Raises:
        RunError: there is nothing to resume, or another process is training in ``run``.
        ConfigError: ``config`` differs from the run's own in a key that cannot change, or that ``allow`` lacks.
        DataError: a case of the run is missing or damaged, or its label map has changed since the run began.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; the state is saved.
    """
    clock = time.monotonic()
    if not world.is_first:
        return _follow(data, run, world, store=store)
    if not (run / "checkpoints").is_dir():
        raise RunError(f"{run}: nothing to resume, no checkpoint there. Leave out --resume to start a run.")
    own = load_config(str(run / "config.yaml"))
    config = own if config is None else config
    changed = config_changes.require_allowed(run, own, config, allow)
    with _locked(run, world), _opened(store, run) as opened:
        remove_partial_files(run)
        checkpoint = checkpoints.load_newest(run / "checkpoints", "last")
        if checkpoint is None:
            raise RunError(f"{run}: nothing to resume, no checkpoint there. Leave out --resume to start a run.")
        split = split_on_record(run / "split.json")
        cases = cases_of(split, data)
        require_same_labels(run, data.root, cases)
        if not split_is_judged:
            tell_of_patients(cases.values(), (split.train, split.validation))
        state = new_state(config, choose_runtime(config.runtime, local_rank=world.launch.local_rank))
        restore(state, checkpoint, config.training)
        _require_best(run, state)
        LOG.info("resuming at step %d", state.step)
        before = checkpoint.details.get("processes", 1)
        if before != world.size:
            LOG.info("world size %d, before %d: the batch of all processes changes with it", world.size, before)
        unseal(run)
        config_changes.apply_changes(run, own, config, changed, state)
        begun = _Begun(config=config, split=split, facts=read_json(run / "run.json"))
        world.tell((begun, None if world.size == 1 else _as_checkpoint(state)))
        return _train(
            data=data.root,
            run=run,
            begun=begun,
            state=state,
            cases=cases,
            store=opened,
            clock=clock,
            world=world,
            on_progress=on_progress,
        )


@dataclass(frozen=True, kw_only=True)
class _Begun:
    """What all processes of a run need to know, as determined by the first one."""

    config: RunConfig
    split: Split
    facts: dict[str, Any]
    """Content of ``run.json``."""


def _as_checkpoint(state: State) -> checkpoints.Checkpoint:
    """Return the state as a checkpoint in RAM for other processes; a GPU tensor would arrive on the sender's GPU."""
    on_device, details = to_checkpoint(state)
    tensors = {name: tensor.detach().cpu() for name, tensor in on_device.items()}
    counts = {"seconds": state.seconds, "skipped_steps": state.skipped_before}
    return checkpoints.Checkpoint(step=state.step, tensors=tensors, details={**details, **counts}, sha256="")


def _follow(data: DataSource, run: Path, world: World, *, store: CaseFolder | None) -> TrainResult:
    """Take part in a run that the first process starts or resumes."""
    clock = time.monotonic()
    begun: _Begun
    checkpoint: checkpoints.Checkpoint | None
    begun, checkpoint = world.tell()
    cases = cases_of(begun.split, data)
    torch.manual_seed(begun.config.training.seed)
    state = new_state(begun.config, choose_runtime(begun.config.runtime, local_rank=world.launch.local_rank))
    if checkpoint is not None:  # otherwise the seed determines the state
        restore(state, checkpoint, begun.config.training)
        del checkpoint
    with _opened(store, run) as opened:
        return _train(
            data=data.root,
            run=run,
            begun=begun,
            state=state,
            cases=cases,
            store=opened,
            clock=clock,
            world=world,
            on_progress=silent,
        )


def _locked(run: Path, world: World) -> AbstractContextManager[None]:
    """Lock the run folder; after a restart, wait for a killed process on another host to release it."""
    return locked(run, job=world.launch.job, wait_seconds=_LOCK_SECONDS if world.restarts else 0.0)


def _train(
    *,
    data: Path,
    run: Path,
    begun: _Begun,
    state: State,
    cases: Mapping[str, Case],
    store: CaseFolder,
    clock: float,
    world: World,
    on_progress: OnProgress,
) -> TrainResult:
    """Prepare the cases, train until the budget is spent, and clean up; every process of a run calls this."""
    keep_freed_memory()
    config, split, facts = begun.config, begun.split, begun.facts
    runtime = choose_runtime(config.runtime, local_rank=world.launch.local_rank)
    convention = CONVENTIONS[facts["labels"]]
    world.require_same(
        {
            "the version of torch": torch.__version__,
            "the device": runtime.device.type,
            "the precision": runtime.precision,
        }
    )
    for reason in runtime.reasons:
        LOG.info("%s", reason)
    spacing = "x".join(f"{mm:g}" for mm in facts["spacing_mm"])
    counts = len(split.train), len(split.validation)
    LOG.info("%d cases train, %d validate; labels %s; spacing %s mm", *counts, convention.name, spacing)
    if world.size > 1:
        alone = config.training.batch_size
        LOG.info("%d processes with batches of %d: %d patches together", world.size, alone, world.size * alone)
    used = [cases[case_id].require() for case_id in (*split.train, *split.validation)]
    prepare = partial(
        _prepare,
        store=store,
        spacing_mm=tuple(facts["spacing_mm"]),
        convention=convention,
        nan_to_zero=config.data.nan_to_zero,
        on_progress=on_progress,
    )
    for share in world.shares(used):
        prepare(share)
        world.wait()
    prepared = prepare(used)
    if world.is_first:
        record_intensities(run, prepared[: len(split.train)])
        record_backgrounds(run, prepared)
    source = PatchSource(
        prepared[: len(split.train)],
        patch_voxels=config.training.patch_voxels,
        tumour_probability=config.training.tumour_probability,
        enhancing_probability=config.training.enhancing_probability,
        augmentation=config.augment,
        seed=config.training.seed,
    )
    transform = gradient.attach_transform(config.gradient, state.optimizer, state.network)
    LOG.info("%s", "\n".join(line for line in transform.report.splitlines() if not line.startswith(" ")))
    LOG.debug("%s", transform.report)  # one line per tensor
    with stop_on_signals(patient=world.size > 1) as stop:
        room = RetryOnFullDisk(stopped=lambda: stop.signal_name is not None)
        log = MetricsLog(
            run,
            keep_up_to_step=state.step,
            keep_validations_up_to_step=state.validated_step,
            patiently=lambda write: room.write(
                write, what="a line of metrics.jsonl", needed_bytes=LEAST_ROOM_BYTES, folder=run
            ),
            writes=world.is_first,
        )
        telemetry_steps = config.training.telemetry_steps if world.is_first else 0
        with closing(log):
            loop = Loop(
                run=run,
                data=data,
                config=config,
                runtime=runtime,
                state=state,
                clock=clock,
                transform=transform,
                telemetry=Telemetry(telemetry_steps, state.network, state.optimizer),
                log=log,
                stop=stop,
                room=room,
                on_progress=on_progress,
                world=world,
            )
            losses = loop.train(source, prepared[len(split.train) :])
    world.wait()
    shutil.rmtree(run / "cache", ignore_errors=True)
    if not world.is_first:
        return world.tell()
    best = checkpoints.load_newest(run / "checkpoints", "best")
    assert best is not None
    _seal(run)
    return world.tell(
        TrainResult(
            run=run,
            steps=state.step,
            seconds=loop.seconds(),
            loss=sum(tail) / len(tail) if (tail := losses[-max(1, len(losses) // 10) :]) else None,
            dice=best.details["dice"],
            best_step=best.step,
            skipped_steps=loop.skipped_steps(),
            stopped_early=loop.stopped_early(),
        )
    )


def _seal(run: Path) -> None:
    """Write the model card and checksums; a full disk here does not make a trained run fail."""
    try:
        seal(run)
    except OSError as error:
        unseal(run)
        LOG.warning("%s: no model card and no SHA256SUMS: %s", run, message(error))


def _require_best(run: Path, state: State) -> None:
    """Lower the state's best Dice to that of the best weights that still load, so that lost ones are replaced."""
    try:
        best = checkpoints.load_newest(run / "checkpoints", "best")
    except RunError as error:
        LOG.warning("%s A validation of this run saves new best weights.", error)
        best = None
    if state.best_dice >= 0 and (best is None or best.step < state.best_step):
        dice = None if best is None else best.details["dice"]
        state.best_dice = sum(dice.values()) / len(dice) if dice else -1.0
        state.best_step = best.step if best is not None else 0


def _start_from(initial: InitialWeights, state: State, spacing_mm: Spacing) -> None:
    """Load the weights of another run into a new state, and log their origin."""
    state.start_from(initial.weights)
    LOG.info("weights of %s, step %d, sha256 %s", initial.run, initial.step, initial.sha256)
    if any(abs(here - there) > 0.05 * there for here, there in zip(spacing_mm, initial.spacing_mm, strict=True)):
        there, here = ("x".join(f"{mm:g}" for mm in spacing) for spacing in (initial.spacing_mm, spacing_mm))
        LOG.warning(
            "the weights are of %s mm, this run works at %s mm; data.spacing_mm takes the cases there", there, here
        )


def _opened(store: CaseFolder | None, run: Path) -> AbstractContextManager[CaseFolder]:
    """Return the given store, or open the user's cache for the duration of the block."""
    return prepared_cases(run / "cache") if store is None else nullcontext(store)


def _prepare(
    cases: Sequence[Case],
    store: CaseFolder,
    *,
    spacing_mm: Spacing,
    convention: LabelConvention,
    nan_to_zero: bool,
    on_progress: OnProgress,
) -> list[CachedCase]:
    done: list[str] = []

    def ready(case_id: str) -> None:
        done.append(case_id)
        on_progress(Progress(job="preparing cases", share=len(done) / len(cases), detail=case_id))

    prepared = cache_cases(
        cases, store, spacing_mm=spacing_mm, convention=convention, nan_to_zero=nan_to_zero, on_case=ready
    )
    if store.problem is not None:
        LOG.warning("some prepared cases are in the run's own folder: %s", store.problem)
    return prepared


@contextmanager
def _removed_unless_started(run: Path, *, keep_folder: bool) -> Iterator[None]:
    """Remove the half-made, locked run folder if something fails before the first checkpoint."""
    try:
        yield
    except BaseException:
        if not any((run / "checkpoints").glob("*.json")):
            _empty(run)
            if not keep_folder:
                (run / LOCK).unlink()
                run.rmdir()
        raise


def _empty(run: Path) -> None:
    """Delete everything in a locked run folder but the lock file."""
    for entry in run.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != LOCK:
            entry.unlink()
