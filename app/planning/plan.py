"""Plan a run: examine the data and the machine, choose a config, and try it out if requested."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from math import ceil, prod
from pathlib import Path
from typing import Any, Final

from app.config.load import RunConfig, load_config, to_plain, to_yaml
from app.errors import ConfigError, MemoryShortError
from app.inference.sliding_window.grid import window_starts
from app.planning.device_facts import device_facts
from app.planning.dry_run import TooMuch, memory_in_words, prepare_trial, try_out
from app.planning.fingerprint import DataSet, Fingerprint, read_data_set
from app.planning.fit import Attempt, Fitted, fit, step_in_words
from app.planning.rules import (
    CACHE_BYTES_A_VOXEL,
    FEWEST_STEPS,
    Chosen,
    Hardware,
    TrainingPlan,
    plan_training,
    times,
    with_steps,
)
from app.planning.trial import TrialRequest
from app.progress import OnProgress, Progress, silent
from app.runs.case_cache import cache_bytes, cache_folder
from app.system.resources import MemoryLimit, cores, free_disk, memory_limits
from app.training.data_sets import require_weights
from data.datasets.label_stats import tumours_of
from data.datasets.layouts import patients_of
from data.datasets.source import DataSource
from data.datasets.splits import Split, stratified_split
from data.patches.sampler import MOST_OPEN

#: Training cases that a dry run prepares and draws patches from.
_TRIAL_CASES: Final = 8
#: On a CPU, a plan is cut to this many hours once the time per step is measured.
_CPU_HOURS: Final = 12.0
#: Share of RLIMIT_AS and RLIMIT_DATA that a trial may use.
_SHARE_OF_LIMITS: Final = 0.9


@dataclass(frozen=True, kw_only=True)
class Disk:
    """Disk space that a run needs and that is free, in bytes."""

    cache_bytes: int
    cache_folder: str
    cache_free_bytes: int | None
    cache_limit_bytes: int
    checkpoint_bytes: int | None
    """Both kinds of checkpoint, old and new: they coexist while being replaced. Measured by a dry run."""
    here_free_bytes: int | None
    """Free in the current folder."""

    @property
    def warnings(self) -> list[str]:
        """What does not fit, and what to do about it."""
        found = []
        if self.cache_free_bytes is not None and self.cache_bytes > self.cache_free_bytes:
            found.append(
                f"prepared cases take up to {self.cache_bytes / 1e9:.1f} GB, but {self.cache_folder} has "
                f"{self.cache_free_bytes / 1e9:.1f} GB free; point $ZNORMSEG_CACHE to a larger disk"
            )
        if self.cache_bytes > self.cache_limit_bytes:
            found.append(
                f"prepared cases take {self.cache_bytes / 1e9:.1f} GB, but the cache is limited to "
                f"{self.cache_limit_bytes / 1e9:.1f} GB; raise $ZNORMSEG_CACHE_GB, or each run stores the rest itself"
            )
        needed, free = self.checkpoint_bytes, self.here_free_bytes
        if needed is not None and free is not None and needed > free:
            found.append(f"checkpoints take up to {needed / 1e9:.2f} GB, more than is free here")
        return found


@dataclass(frozen=True, kw_only=True)
class DryRun:
    """Results of a dry run, in bytes and seconds of the planned run."""

    device: str
    own_bytes: int | None
    """RAM that a run needs."""
    mapped_bytes: int | None
    """Mapped pages of prepared cases in addition: tools count them as memory, but the system can reclaim them."""
    gpu_bytes: int | None
    step_seconds: float
    window_seconds: float | None
    prepare_seconds: float
    """Time to prepare the cases of the dry run; close to 0 if they were in the cache."""
    validation_seconds: float
    """Time of all validations; an upper bound, as windows without brain are skipped."""
    seconds: float
    """Time of the whole budget, without preparing cases."""
    steps: int
    attempts: tuple[Attempt, ...]

    @property
    def resident_bytes(self) -> int | None:
        """Peak resident memory that tools will show for a long run."""
        return None if self.own_bytes is None or self.mapped_bytes is None else self.own_bytes + self.mapped_bytes

    def lines(self) -> list[str]:
        """Describe the results in words."""
        lines = [
            "",
            f"Dry run on {self.device}: five steps after three warm-up steps, a validation window, checkpoints",
        ]
        lines += [
            f"  attempt {number}{f' ({one.changed})' if one.changed else ''}: {one.outcome}"
            for number, one in enumerate(self.attempts, start=1)
        ]
        lines.append(f"  memory: {memory_in_words(self.own_bytes)} needed")
        if self.mapped_bytes is not None:
            lines[-1] += (
                f"; tools will show up to {memory_in_words(self.resident_bytes)}, as prepared cases are mapped: "
                "the system reclaims those pages when memory is short"
            )
        if self.gpu_bytes is not None:
            lines.append(f"  GPU memory: {self.gpu_bytes / 1e9:.2f} GB, plus the driver's own")
        window = f"; {self.window_seconds:.3g} s per validation window" if self.window_seconds is not None else ""
        lines.append(f"  speed: {self.step_seconds:.3g} s per step{window}")
        hours = self.seconds / 3600
        lines.append(
            f"  the budget: {self.steps} steps, {_duration(hours)}, of which validation takes at most "
            f"{_duration(self.validation_seconds / 3600)}; preparing the cases takes additional time"
        )
        lines.append("  /dev/shm: not needed, batches are made by threads")
        return lines


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A plan with the facts that it is based on."""

    data: DataSource
    fingerprint: Fingerprint
    split: Split
    limits: tuple[MemoryLimit, ...]
    config: RunConfig
    choices: tuple[Chosen, ...]
    disk: Disk
    dry_run: DryRun | None

    def lines(self) -> list[str]:
        """Describe the plan in words."""
        fingerprint = self.fingerprint
        spacing = times(fingerprint.spacing_mm)
        low, high = map(times, fingerprint.spacing_percentiles_mm)
        small, middle, large = fingerprint.tumour_ml
        lines = [
            f"Plan for {self.data.root}",
            "",
            f"Data: {fingerprint.cases} cases, of which {fingerprint.with_label_map} have a label map, "
            f"{fingerprint.patients} patients, {fingerprint.bytes_on_disk / 1e9:.2f} GB; labels {fingerprint.labels}",
            f"  fold 0: {len(self.split.train)} for training, {len(self.split.validation)} for validation",
            f"  spacing: median {spacing} mm (10 % to 90 %: {low} to {high})",
            f"  bounding box of the brain: median {_mm(fingerprint.brain_mm)} mm; of the tumour: "
            f"{_mm(fingerprint.tumour_mm)} mm (of {len(fingerprint.extents)} cases)",
            f"  tumour: median {middle:g} ml (10 % to 90 %: {small:g} to {large:g}); "
            f"{fingerprint.enhancing_share:.0%} have enhancing tumour",
        ]
        if fingerprint.with_label_map < fingerprint.cases:
            lines.append("  training needs a label map for every case: leave the others out with --split")
        if self.limits:
            lines.append(f"Memory: {self.limits[0].free_bytes / 1e9:.1f} GB free, according to {self.limits[0].name}")
        lines += ["", "Choices:", *(f"  {one.key} = {one.value}: {one.reason}" for one in self.choices), ""]
        disk = self.disk
        free = f", {disk.cache_free_bytes / 1e9:.1f} GB free" if disk.cache_free_bytes is not None else ""
        lines.append(
            f"Disk: prepared cases {disk.cache_bytes / 1e9:.2f} GB in {disk.cache_folder}{free} "
            f"(at most {disk.cache_limit_bytes / 1e9:g} GB)"
        )
        if disk.checkpoint_bytes is not None:
            here = "" if disk.here_free_bytes is None else f"; {disk.here_free_bytes / 1e9:.1f} GB free in this folder"
            lines.append(f"  checkpoints up to {disk.checkpoint_bytes / 1e9:.3f} GB{here}")
        lines += [f"  warning: {warning}" for warning in disk.warnings]
        lines += self.dry_run.lines() if self.dry_run is not None else ["", "Not tried yet: add --dry-run."]
        return lines

    def to_yaml(self) -> str:
        """Return the complete config, preceded by the reasons as comments."""
        return "".join(f"# {line}".rstrip() + "\n" for line in self.lines()) + to_yaml(self.config)

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        return {
            "data": str(self.data.root),
            "fingerprint": self.fingerprint.to_json(),
            "training_cases": len(self.split.train),
            "validation_cases": len(self.split.validation),
            "memory": [asdict(limit) for limit in self.limits],
            "choices": [asdict(choice) for choice in self.choices],
            "config": to_plain(self.config),
            "disk": {**asdict(self.disk), "warnings": self.disk.warnings},
            "dry_run": None
            if self.dry_run is None
            else {**asdict(self.dry_run), "resident_bytes": self.dry_run.resident_bytes, "shm_bytes": 0},
        }


def plan_run(
    data: DataSource,
    *,
    config: str | None = None,
    overrides: Sequence[str] = (),
    with_dry_run: bool = False,
    max_memory_bytes: int | None = None,
    on_progress: OnProgress = silent,
) -> PlannedRun:
    """Plan a run on fold 0 of a data set.

    Args:
        data: a data set with label maps.
        config: base of everything that is not planned; default: ``laptop`` on a CPU, ``resunet-znorm`` on a GPU.
        overrides: ``section.key=value``; these keys are kept.
        with_dry_run: try the plan, and make it smaller if it does not fit.
        max_memory_bytes: RAM that may be used, if less than the free RAM.
        on_progress: called with the progress of each stage.

    Raises:
        DataError: the data set cannot be used.
        ConfigError: the config cannot be used.
        DeviceError: the requested device is not available.
        MemoryShortError: a dry run found nothing that fits.
    """
    base = load_config(config or "laptop", overrides)
    if base.task.name != "segmentation":
        raise ConfigError("plan: only for segmentation. Give the config of another task to train as it is.")
    require_weights(base, data)
    device = device_facts(base.runtime)
    if config is None and device.kind == "cuda":
        base = load_config("resunet-znorm", overrides)
    fixed = {override.partition("=")[0].strip() for override in overrides}
    read = read_data_set(
        data, on_case=lambda case_id, share: on_progress(Progress(job="reading cases", share=share, detail=case_id))
    )
    tumours = tumours_of(read.cases, read.label_maps, read.convention)
    split = Split(train=tuple(read.cases), validation=())
    if read.fingerprint.patients > 1:
        split = stratified_split(tumours, patients_of(read.cases.values()), 0)
    limits = memory_limits()
    if max_memory_bytes is not None:
        limits = [*limits, MemoryLimit(name="--max-memory-gb", free_bytes=max_memory_bytes)]
    limits.sort(key=lambda limit: limit.free_bytes)
    hardware = Hardware(
        device=device.kind,
        half=device.half,
        memory_bytes=limits[0].free_bytes if limits else 1 << 62,
        gpu_bytes=device.gpu_bytes,
        cores=cores(),
    )
    plan = plan_training(read.fingerprint, hardware, base, training_cases=len(split.train), fixed=fixed)
    disk = _disk(plan, split)
    planned = PlannedRun(
        data=data,
        fingerprint=read.fingerprint,
        split=split,
        limits=tuple(limits),
        config=plan.config,
        choices=plan.choices,
        disk=disk,
        dry_run=None,
    )
    if not with_dry_run:
        return planned
    return _tried(planned, plan, read, on_progress)


def _tried(planned: PlannedRun, plan: TrainingPlan, read: DataSet, on_progress: OnProgress) -> PlannedRun:
    """Try a plan, and make it smaller if it does not fit; return it with the measurements."""
    split, hardware, fixed = planned.split, plan.bounds.hardware, plan.bounds.fixed
    validating = next(iter(_trial_cases(split.validation, read)), None)
    # The trial inherits this process's own limits and fails at them without being watched.
    outer = [limit.free_bytes for limit in planned.limits if not limit.name.startswith("RLIMIT")]
    most = min(outer, default=None)
    with tempfile.TemporaryDirectory(prefix="znormseg-plan-") as folder:
        work = Path(folder)
        request = TrialRequest(
            data=planned.data.resolved(),
            folder=work / "run",
            config=plan.config,
            training=_trial_cases(split.train, read),
            validation=validating,
            labels=read.convention.name,
            spacing_mm=plan.bounds.spacing_mm,
            most_share_of_limits=_SHARE_OF_LIMITS,
        )
        request.folder.mkdir()
        on_progress(Progress(job="preparing cases", share=0.0, detail="for the dry run"))
        prepare_seconds = prepare_trial(request, work, most_bytes=most)
        if isinstance(prepare_seconds, TooMuch):
            raise MemoryShortError(
                f"preparing cases for the dry run does not fit into memory: {prepare_seconds.why}. "
                "Free some memory, or allow more with --max-memory-gb."
            )
        on_progress(Progress(job="preparing cases", share=1.0, detail="for the dry run"))
        fitted = fit(
            plan.config,
            lambda config: try_out(replace(request, config=config), work, most_bytes=most),
            most_bytes=hardware.memory_bytes,
            half=hardware.half,
            gpu=hardware.device == "cuda",
            fixed=fixed,
            on_attempt=lambda config, number: on_progress(
                Progress(job=f"dry run, attempt {number}", share=0.0, detail=step_in_words(config))
            ),
        )
    config, why = with_steps(fitted.config, plan.bounds)
    dry_run = _foreseen(config, fitted, split, plan.bounds.brain, prepare_seconds)
    if hardware.device == "cpu" and "training.steps" not in fixed and config.training.steps is not None:
        config, dry_run, why = cut_to_hours(config, dry_run, why, fixed=fixed)
    choices = [_after_trial(choice, config, why) for choice in plan.choices]
    disk = replace(planned.disk, checkpoint_bytes=2 * fitted.needed.report.checkpoint_bytes)
    return replace(planned, config=config, choices=tuple(choices), disk=disk, dry_run=dry_run)


def _foreseen(
    config: RunConfig, fitted: Fitted, split: Split, brain: tuple[int, int, int], prepare_seconds: float
) -> DryRun:
    """Extrapolate from a few steps to a whole run."""
    needed, settings = fitted.needed, config.training
    report = needed.report
    windows = prod(
        len(window_starts(size, side, config.inference.overlap))
        for size, side in zip(brain, settings.patch_voxels, strict=True)
    )
    each = (report.window_seconds or 0.0) * windows * len(split.validation)
    validation = each * settings.validations
    if settings.steps is not None:
        steps = settings.steps
    else:
        assert settings.hours is not None
        steps = max(1, int((settings.hours * 3600 - each) / needed.step_seconds))
    per_case = report.case_files_bytes
    mapped = None if per_case is None else per_case * min(MOST_OPEN, len(split.train))
    return DryRun(
        device=report.device,
        own_bytes=needed.own_bytes,
        mapped_bytes=mapped,
        gpu_bytes=report.gpu_bytes,
        step_seconds=needed.step_seconds,
        window_seconds=report.window_seconds,
        prepare_seconds=prepare_seconds,
        validation_seconds=validation,
        seconds=steps * needed.step_seconds + validation if settings.hours is None else settings.hours * 3600,
        steps=steps,
        attempts=fitted.attempts,
    )


def cut_to_hours(
    config: RunConfig, dry_run: DryRun, why: str, *, fixed: Collection[str]
) -> tuple[RunConfig, DryRun, str]:
    """Reduce the steps if they would take longer than :data:`_CPU_HOURS`, and extend the reason.

    If that leaves too few steps, there are fewer validations, but at least one. The minimum steps for a CPU are always
    planned; if they take longer, the reason says so.

    Args:
        config: with a budget in steps.
        dry_run: measurements with that budget.
        why: the reason so far.
        fixed: keys that may not be changed.
    """
    settings, most = config.training, 3600 * _CPU_HOURS
    each = dry_run.validation_seconds / settings.validations
    fewest = min(FEWEST_STEPS["cpu"], dry_run.steps)
    validations = settings.validations
    if "training.validations" not in fixed and each > 0:
        validations = min(validations, max(1, int((most - fewest * dry_run.step_seconds) / each)))
    steps = min(dry_run.steps, max(fewest, int((most - validations * each) / dry_run.step_seconds)))
    seconds = steps * dry_run.step_seconds + validations * each
    if seconds > most:
        why += (
            f"; {_duration(seconds / 3600)} on this CPU, more than {_CPU_HOURS:g} h, with the minimum number of steps"
        )
    elif steps < dry_run.steps:
        why += f"; cut to {_CPU_HOURS:g} hours on this CPU"
    if validations < settings.validations:
        why += f"; {validations} instead of {settings.validations} validations"
    config = replace(config, training=replace(settings, steps=steps, validations=validations))
    return config, replace(dry_run, steps=steps, seconds=seconds, validation_seconds=validations * each), why


def _after_trial(choice: Chosen, config: RunConfig, steps_why: str) -> Chosen:
    """Update a choice to its value after the dry run."""
    if choice.key == "training.steps":
        return replace(choice, value=str(config.training.steps), reason=steps_why)
    values = {
        "training.patch_voxels": times(config.training.patch_voxels),
        "training.batch_size": str(config.training.batch_size),
        "network.channels": times(config.network.channels),
    }
    now = values.get(choice.key, choice.value)
    if now == choice.value:
        return choice
    return replace(choice, value=now, reason=f"{choice.value} did not fit into memory in the dry run")


def _disk(plan: TrainingPlan, split: Split) -> Disk:
    folder = cache_folder()
    return Disk(
        cache_bytes=CACHE_BYTES_A_VOXEL * prod(plan.bounds.brain) * len(split.cases),
        cache_folder=str(folder),
        cache_free_bytes=_free(folder),
        cache_limit_bytes=cache_bytes(),
        checkpoint_bytes=None,
        here_free_bytes=_free(Path.cwd()),
    )


def _free(place: Path) -> int | None:
    try:
        return free_disk(place)
    except OSError:
        return None


def _trial_cases(ids: Sequence[str], read: DataSet) -> tuple[str, ...]:
    """Return up to :data:`_TRIAL_CASES` ids: the largest cases first, those of unknown size last."""
    volumes = {case_id: prod(extent.brain_mm) for case_id, extent in read.fingerprint.extents.items()}
    return tuple(sorted(ids, key=lambda case_id: -volumes.get(case_id, 0.0))[:_TRIAL_CASES])


def _duration(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{ceil(60 * hours)} min"


def _mm(sides: Sequence[float] | None) -> str:
    return "none" if sides is None else times(sides, ".0f")


def require_new_file(path: Path) -> None:
    """Check that a plan can be written to a new file.

    Raises:
        ConfigError: the name does not end in .yaml or .yml, or the file already exists.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"--out {path}: train accepts only names that end in .yaml or .yml")
    if path.exists():
        raise ConfigError(f"--out {path}: already exists. Delete it, or give another name.")
