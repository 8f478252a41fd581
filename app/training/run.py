"""Train a network: from a data set folder to a run folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from app.config.load import RunConfig, load_config, to_yaml
from app.config.task import Measure
from app.errors import ConfigError, RunError, message
from app.html.overlay import OverlayCase, axial_picture
from app.progress import LOG, OnProgress, Progress, silent
from app.runs import checkpoints
from app.runs.case_cache import prepared_cases
from app.runs.folder import (
    LOCK,
    job_of,
    locked,
    read_json,
    remove_partial_files,
    require_new,
    write_durably,
    write_json,
)
from app.runs.model_card import seal, unseal
from app.system.device import machine, versions
from app.system.process import keep_freed_memory
from app.training import config_changes
from app.training.cases import (
    ALL_CASES,
    cases_of,
    deal_fold,
    labels_on_record,
    network_spacing,
    record_backgrounds,
    record_intensities,
    report_misnamed_files,
    report_same_label_maps,
    report_visits,
    require_fold,
    require_labels,
    require_same_labels,
    split_on_record,
    unlabelled_conventions,
)
from app.training.data_sets import (
    conventions_on_record,
    data_sets_on_record,
    require_same_data_sets,
    require_use,
    require_weights,
)
from app.training.distributed import ALONE, World
from app.training.gpu import training_runtime
from app.training.pretrained import origin_of, pretrained_model, start_from
from app.training.signals import not_ended_by_sigusr1
from app.training.state import State, new_state, restore, to_checkpoint
from app.training.tasks import labels_of_task, record_of_task, task_of
from app.training.trainer import Codes, Session, Trainer
from data.datasets.label_stats import LabelMap, read_label_maps
from data.datasets.layouts import Case, patients_of
from data.datasets.source import DataSource
from data.datasets.splits import Split, read_split
from data.labels import CONTRASTS, LabelConvention
from data.nifti import Spacing
from data.patches.cache import CaseFolder
from data.patches.sampler import CachedCase, cache_cases

#: Seconds that a restarted run waits for a killed process on another host to release the run folder.
_LOCK_SECONDS: Final = 120.0


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """Result of a finished run."""

    run: Path
    steps: int
    seconds: float
    loss: float | None
    """Mean training loss over the last tenth of the steps."""
    measure: Measure
    validation_scores: dict[str, float] | None
    """The measure by output of the checkpoint that ``predict`` uses; None without validation cases."""
    best_step: int
    skipped_steps: int
    stopped_early: bool = False
    """Whether ``training.patience`` ended the run with budget left."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``; the scores are under ``validation_dice`` or that of another measure."""
        content = {**asdict(self), "run": str(self.run), "seconds": round(self.seconds, 3)}
        del content["measure"]
        scores = content.pop("validation_scores")
        return {**content, f"validation_{self.measure.key}": scores}


@not_ended_by_sigusr1()
def start(  # noqa: PLR0913 - one argument per command-line option
    data: DataSource,
    run: Path,
    config: RunConfig,
    *,
    fold: int | str = 0,
    split_file: Path | None = None,
    split_is_checked: bool = False,
    init_from: Path | None = None,
    store: CaseFolder | None = None,
    world: World = ALONE,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Start a run and train until its budget is spent.

    Args:
        data: the data set, or several; synthetic cases are used only for training.
        run: folder for the run; it must be empty or not exist yet.
        config: the complete configuration.
        fold: 0 to 4, or ``all`` to train on every case and validate on none.
        split_file: JSON file with the lists ``train`` and ``validation``; overrides ``fold``.
        split_is_checked: the caller has already checked the patients in ``split_file``; skip the check here.
        init_from: folder of a run whose best weights replace the random initial weights.
        store: where prepared cases are kept; default: the user's cache.
        world: the processes that train together; each of them calls this, but only the first writes to ``run``.
        on_progress: called with the progress of the run.

    Raises:
        ConfigError: ``init_from`` has a different network; ``training.patience`` is set without validation cases;
            ``inference.crop`` is false; ``data.weights`` does not fit the number of data sets.
        DataError: the data cannot be used.
        RunError: the run folder is not empty or is in use; ``init_from`` is not a run or has no weights.
        DeviceError: the requested device is not available.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; the state is saved.
    """
    session = Session(data=data, run=run, world=world, on_progress=on_progress)
    if not world.is_first:
        return _follow(session, store)
    restarted = world.restarts > 0 and world.launch.job != "" and job_of(run) == world.launch.job
    if restarted and checkpoints.load_newest(run / "checkpoints", "last") is not None:
        return resume(data, run, config, store=store, world=world, on_progress=on_progress)
    if not restarted:
        require_new(run)
    require_weights(config, data)
    cases = data.find_cases()
    patients = {case_id: case_id for case_id in cases} if split_is_checked else patients_of(cases.values())
    split: Split | None = None
    if split_file is not None:
        split = read_split(split_file, patients)
    elif fold == ALL_CASES:
        split = Split(train=tuple(patients), validation=())
    else:  # dealt below, once the label maps are read
        require_fold(data, cases, int(fold))
    used = [cases[case_id].require() for case_id in (cases if split is None else split.cases)]
    if config.task.labels_csv is None:
        require_labels(used)
    _require_trainable(config, split)
    runtime = training_runtime(config, world)
    initial = None if init_from is None else pretrained_model(init_from, config, runtime)
    label_maps = read_label_maps(cases.values())
    conventions = data.decide_conventions(cases, label_maps) if label_maps else unlabelled_conventions(data)
    split, of_task = _dealt(config, cases, label_maps, conventions, split if split is not None else int(fold))
    require_use(split, cases, data, config)
    if not split_is_checked:
        report_visits(cases.values(), (split.train, split.validation))
        report_same_label_maps(label_maps, [split])
        report_misnamed_files([cases[case_id] for case_id in split.cases])
    spacing_mm = network_spacing(config, [cases[case_id] for case_id in split.train])
    was_there = run.exists()
    with _locked(run, world), _opened(store, run) as opened:
        if restarted:
            _empty(run)  # killed before its first checkpoint
        require_new(run)  # checked again under the lock: another process may have been faster
        with _removed_unless_started(run, keep_folder=was_there):
            write_durably(run / "config.yaml", to_yaml(config).encode())
            write_json(run / "split.json", split.to_json())
            write_json(run / "labels.json", labels_on_record(split, label_maps))
            facts = {
                **_data_facts(data, [cases[case_id] for case_id in split.cases], conventions),
                "fold": fold if split_file is None else None,
                "split_file": None if split_file is None else str(split_file.resolve()),
                "contrasts": list(CONTRASTS),
                "takes_missing_contrasts": config.takes_missing_contrasts,
                "regions": list(config.outputs),
                **of_task,
                "spacing_mm": list(spacing_mm),
                "versions": versions(),
                "machine": machine(),
                "processes": world.size,
                "runtime": list(runtime.reasons),
                "init_from": None if initial is None else origin_of(initial),
            }
            write_json(run / "run.json", facts)
            task = task_of(config, facts)
            torch.manual_seed(config.training.seed)
            state = new_state(config, runtime)
            if initial is not None:
                start_from(initial, state, spacing_mm)
            return _train(Trainer(session, config, facts, split, cases, runtime, state, task), opened)


@not_ended_by_sigusr1()
def resume(
    data: DataSource,
    run: Path,
    config: RunConfig | None = None,
    *,
    allow: Collection[str] = (),
    split_is_checked: bool = False,
    store: CaseFolder | None = None,
    world: World = ALONE,
    on_progress: OnProgress = silent,
) -> TrainResult:
    """Resume an interrupted run, as if it had not been interrupted.

    Args:
        data: the data sets that the run was started with; their label conventions are read from the run.
        run: the run's folder.
        config: the requested configuration; default: the run's own.
        allow: keys in which ``config`` may differ although they change what is learned; it may always differ in those
            of :data:`app.training.config_changes.HARMLESS`.
        split_is_checked: as in :func:`start`.
        store: where prepared cases are kept; default: the user's cache.
        world: the processes that train together; each of them calls this, but only the first writes to ``run``.
        on_progress: called with the progress of the run.

    Raises:
        RunError: there is nothing to resume, or another process is training in ``run``.
        ConfigError: ``config`` differs from the run's own in a key that cannot change, or that ``allow`` lacks.
        DataError: a case of the run is missing or damaged, its label map has changed since the run began, the data
            sets are given in another order, or ``data.weights`` is set and one of them has no training case.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; the state is saved.
    """
    session = Session(data=data, run=run, world=world, on_progress=on_progress)
    if not world.is_first:
        return _follow(session, store)
    if not (run / "checkpoints").is_dir():
        raise RunError(f"{run}: nothing to resume: the folder has no checkpoint. Leave out --resume to start a run.")
    own = load_config(str(run / "config.yaml"))
    config = own if config is None else config
    changed = config_changes.require_allowed(run, own, config, allow)
    with _locked(run, world), _opened(store, run) as opened:
        remove_partial_files(run)
        checkpoint = checkpoints.load_newest(run / "checkpoints", "last")
        if checkpoint is None:
            raise RunError(
                f"{run}: nothing to resume: the folder has no checkpoint. Leave out --resume to start a run."
            )
        split = split_on_record(run / "split.json")
        cases = cases_of(split, data)
        facts = read_json(run / "run.json")
        require_same_data_sets(run, facts, [cases[case_id] for case_id in split.cases], len(data.data_sets))
        require_weights(config, data)
        require_use(split, cases, data, config)
        require_same_labels(run, data, cases)
        if not split_is_checked:
            report_visits(cases.values(), (split.train, split.validation))
        task = task_of(config, facts)
        runtime = training_runtime(config, world)
        state = new_state(config, runtime)
        restore(state, checkpoint, config.training)
        _require_best(run, state, config.measure.key)
        LOG.info("resuming at step %d", state.step)
        before = checkpoint.details.get("processes", 1)
        if before != world.size:
            LOG.info("world size %d, previously %d: the total batch size changes with it", world.size, before)
        unseal(run)
        config_changes.apply_changes(run, own, config, changed, state)
        facts = read_json(run / "run.json")
        return _train(Trainer(session, config, facts, split, cases, runtime, state, task), opened)


def _require_trainable(config: RunConfig, split: Split | None) -> None:
    """Require settings that a new run can use; ``split`` is None if it is dealt later, with validation cases."""
    if config.training.patience is not None and split is not None and not split.validation:
        raise ConfigError(
            "training.patience: needs validation cases, and there are none; leave it out, or give a fold or a split "
            "with validation cases"
        )
    if not config.inference.crop:
        raise ConfigError("inference.crop: false is only for imported networks; training requires true")


def _dealt(
    config: RunConfig,
    cases: Mapping[str, Case],
    label_maps: Mapping[str, LabelMap],
    conventions: Sequence[LabelConvention],
    split: Split | int,
) -> tuple[Split, dict[str, Any]]:
    """Return the split, dealt if the number of a fold is given, and the task's entries of ``run.json``."""
    used = cases if isinstance(split, int) else split.cases
    labels = labels_of_task(config, cases, used, label_maps, conventions)
    if isinstance(split, int):
        split = deal_fold(cases, label_maps, conventions, split, classes=labels)
    return split, record_of_task(config, labels, split.train)


def _data_facts(data: DataSource, cases: Sequence[Case], conventions: Sequence[LabelConvention]) -> dict[str, Any]:
    """Return the entries of ``run.json`` about the data.

    ``labels`` is the convention in which ``predict`` writes label maps: that of the first data set.
    """
    places, data_sets = data.resolved().arguments, data_sets_on_record(cases, conventions)
    facts = {"data": list(places) if len(places) > 1 else places[0], "labels": conventions[0].name}
    return {**facts, "data_sets": data_sets} if data_sets else facts


def _follow(session: Session, store: CaseFolder | None) -> TrainResult:
    """Take part in a run that the first process starts or resumes."""
    world = session.world
    received: tuple[RunConfig, dict[str, Any], Split, checkpoints.Checkpoint] = world.broadcast()
    config, facts, split, checkpoint = received
    cases = cases_of(split, session.data)
    runtime = training_runtime(config, world)
    state, task = new_state(config, runtime), task_of(config, facts)
    restore(state, checkpoint, config.training)
    with _opened(store, session.run) as opened:
        return _train(Trainer(session, config, facts, split, cases, runtime, state, task), opened)


def _as_checkpoint(state: State) -> checkpoints.Checkpoint:
    """Return the state as a checkpoint in RAM for other processes; a GPU tensor would arrive on the sender's GPU."""
    on_device, details = to_checkpoint(state)
    tensors = {name: tensor.detach().cpu() for name, tensor in on_device.items()}
    return checkpoints.Checkpoint(step=state.step, tensors=tensors, details=details, sha256="")


def _locked(run: Path, world: World) -> AbstractContextManager[None]:
    """Lock the run folder; after a restart, wait for a killed process on another host to release it."""
    return locked(run, job=world.launch.job, wait_seconds=_LOCK_SECONDS if world.restarts else 0.0)


def _train(trainer: Trainer, store: CaseFolder) -> TrainResult:
    """Prepare the cases, train until the budget is spent, and clean up; every process of a run calls this."""
    session, config, facts, split = trainer.session, trainer.config, trainer.facts, trainer.split
    run, world, runtime, state = session.run, session.world, trainer.runtime, trainer.state
    keep_freed_memory()
    if world.is_first and world.size > 1:
        world.broadcast((config, facts, split, _as_checkpoint(state)))
    machine_facts = {"the device": runtime.device.type, "the precision": runtime.precision}
    world.require_same({"the version of torch": torch.__version__, **machine_facts})
    for reason in runtime.reasons:
        LOG.info("%s", reason)
    x, y, z = facts["spacing_mm"]
    counts = len(split.train), len(split.validation)
    labels = ", ".join(dict.fromkeys(convention.name for convention in conventions_on_record(facts)))
    LOG.info("%d cases for training, %d for validation; labels %s; spacing %gx%gx%g mm", *counts, labels, x, y, z)
    for data_set, record in zip(session.data.arguments, facts.get("data_sets", []), strict=False):
        LOG.info("%s: %d cases, labels %s", data_set, record["cases"], record["labels"])
    if world.size > 1:
        batch = config.training.batch_size
        LOG.info("%d processes with batches of %d: %d patches in total", world.size, batch, world.size * batch)
    used = [trainer.cases[case_id].require() for case_id in split.cases]
    for share in world.shares(used):
        _prepare(trainer, share, store)
        world.wait()
    prepared = _prepare(trainer, used, store)
    if world.is_first:
        record_intensities(run, prepared[: len(split.train)])
        record_backgrounds(run, prepared)
    losses = trainer.train(
        prepared,
        draw=partial(_picture, spacing_mm=(x, y, z)),
    )
    world.wait()
    shutil.rmtree(run / "cache", ignore_errors=True)
    if not world.is_first:
        return world.broadcast()
    best = checkpoints.load_newest(run / "checkpoints", "best")
    assert best is not None
    _seal(run)
    return world.broadcast(
        TrainResult(
            run=run,
            steps=state.step,
            seconds=trainer.seconds(),
            loss=sum(tail) / len(tail) if (tail := losses[-max(1, len(losses) // 10) :]) else None,
            measure=config.measure,
            validation_scores=best.details[config.measure.key],
            best_step=best.step,
            skipped_steps=trainer.skipped_steps(),
            stopped_early=trainer.stopped_early(),
        )
    )


def _picture(case: CachedCase, codes: Codes, *, spacing_mm: Spacing) -> Codes:
    """Draw an axial slice through the tumour: reference on the left, prediction on the right."""
    shown = OverlayCase(
        case=case.id,
        background=case.image()[-1].astype(np.float32),
        background_name=CONTRASTS[-1].upper(),
        prediction=codes,
        reference=np.asarray(case.codes()),
        spacing_mm=spacing_mm,
    )
    return axial_picture(shown)


def _seal(run: Path) -> None:
    """Write the model card and checksums; a full disk here does not make a trained run fail."""
    try:
        seal(run)
    except OSError as error:
        unseal(run)
        LOG.warning("%s: model card and SHA256SUMS were not written: %s", run, message(error))


def _require_best(run: Path, state: State, measure: str) -> None:
    """Lower the state's best score to that of the best weights that still load, so that lost weights are replaced."""
    try:
        best = checkpoints.load_newest(run / "checkpoints", "best")
    except RunError as error:
        LOG.warning("%s The next validation of this run will save new best weights.", error)
        best = None
    if state.best_score >= 0 and (best is None or best.step < state.best_step):
        scores = None if best is None else best.details[measure]
        state.best_score = sum(scores.values()) / len(scores) if scores else -1.0
        state.best_step = best.step if best is not None else 0


def _opened(store: CaseFolder | None, run: Path) -> AbstractContextManager[CaseFolder]:
    """Return the given store, or open the user's cache for the duration of the block."""
    return prepared_cases(run / "cache") if store is None else nullcontext(store)


def _prepare(trainer: Trainer, cases: Sequence[Case], store: CaseFolder) -> list[CachedCase]:
    done = count(1)

    def ready(case_id: str) -> None:
        share = next(done) / len(cases)
        trainer.session.on_progress(Progress(job="preparing cases", share=share, detail=case_id))

    prepared = prepare_as_run(cases, store, trainer.config, trainer.facts, on_case=ready)
    if store.problem is not None:
        LOG.warning("some prepared cases are stored in the run folder: %s", store.problem)
    return prepared


def prepare_as_run(
    cases: Sequence[Case],
    store: CaseFolder,
    config: RunConfig,
    facts: Mapping[str, Any],
    on_case: Callable[[str], None] | None = None,
) -> list[CachedCase]:
    """Prepare cases for a run, or find them in the store.

    Args:
        cases: cases with label maps.
        store: where prepared cases are kept.
        config: config of the run.
        facts: content of its ``run.json``.
        on_case: called with the id of each case that is ready.

    Raises:
        DataError: a case is unusable.
    """
    options: dict[str, Any] = {"spacing_mm": tuple(facts["spacing_mm"]), "nan_to_zero": config.data.nan_to_zero}
    prepared: dict[str, CachedCase] = {}
    for number, convention in enumerate(conventions_on_record(facts)):
        own = [case for case in cases if case.data_set == number]
        prepared |= {
            case.id: case for case in cache_cases(own, store, convention=convention, on_case=on_case, **options)
        }
    return [prepared[case.id] for case in cases]


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
