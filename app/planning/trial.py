"""The child's side of a dry run: a few real steps of a config.

``python -m app.planning.trial REQUEST.json OUTCOME.json`` reads a request and writes the measurements. It is a separate
process so that its peak memory is that of a training run, and so that running out of memory ends no other process.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from pydantic import TypeAdapter

from app.config.load import RunConfig, to_plain
from app.errors import exit_code, is_out_of_memory, message
from app.runs import checkpoints
from app.runs.case_cache import prepared_cases
from app.runs.folder import MetricsLog, write_durably
from app.system.device import Runtime, choose_runtime
from app.system.process import keep_freed_memory
from app.system.resources import memory_of
from app.training import gpu, gradient
from app.training.cases import patch_settings
from app.training.loader import Loader
from app.training.schedule import learning_rate
from app.training.state import State, new_state, to_checkpoint
from app.training.step import Stepper, loss_for
from app.training.telemetry import Telemetry
from app.training.validation import on_contrasts, validation_dice
from data.datasets.label_stats import read_label_maps
from data.datasets.source import DataSource
from data.labels import CONTRASTS, CONVENTIONS
from data.patches.sampler import CachedCase, PatchSource, cache_cases

#: Steps before the timed ones: the first one allocates memory and chooses kernels.
WARM_UP: Final = 3
#: Timed steps.
STEPS: Final = 5
#: Maximum number of patches cut from each case, to measure how much of its files a long run keeps mapped.
_WALKED_PER_CASE: Final = 60


@dataclass(frozen=True, kw_only=True)
class TrialRequest:
    """What to try."""

    data: DataSource
    folder: Path
    """An empty folder for the files that a run writes."""
    config: RunConfig
    prepare_only: bool = False
    """Whether to stop after preparing the cases."""
    training: tuple[str, ...]
    """Ids of the training cases to use."""
    validation: str | None
    """Id of the case whose windows are tried; None without validation cases."""
    labels: str
    """Name of the label convention."""
    spacing_mm: tuple[float, float, float]
    most_share_of_limits: float
    """Share of RLIMIT_AS and RLIMIT_DATA, if they are set, that may be used."""


@dataclass(frozen=True, kw_only=True)
class TrialReport:
    """Measurements of a trial, in bytes and seconds."""

    device: str
    step_seconds: tuple[float, ...]
    """Duration of each timed step, including the wait for its batch."""
    loader_seconds: float
    """Time that the loader's threads take to make the batches of one step."""
    window_seconds: float | None
    program_files_bytes: int | None
    """Pages of the program's files in RAM before the first step."""
    own_bytes: int | None
    """Peak of own memory: the peak of all resident memory, less the pages of files after the last step."""
    case_files_bytes: int | None
    """Bytes of a case's arrays that a long run keeps mapped, on average; the system reclaims them if needed."""
    gpu_bytes: int | None
    """Peak of what torch reserved on the GPU, including its cache but not the driver's own context."""
    gpu_free_bytes: int | None
    """Free GPU memory before the first step."""
    checkpoint_bytes: int
    """Size of both kinds of checkpoint together, on disk."""


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """Content of the file that a trial writes."""

    report: TrialReport | None = None
    """None after an error, or if the cases were only prepared."""
    error: str | None = None
    code: int = 0
    """The error's exit code."""
    out_of_memory: bool = False


#: Convert requests and outcomes to JSON and back.
REQUEST: Final = TypeAdapter(TrialRequest)
OUTCOME: Final = TypeAdapter(TrialOutcome)


def run_trial(request: TrialRequest) -> TrialReport | None:
    """Run the steps and report their time and memory; return None if the cases are only prepared.

    Raises:
        DataError: a case cannot be used.
        DeviceError: the device of the config is not available.
        MemoryError, RuntimeError: memory ran out.
    """
    keep_freed_memory()
    config, folder = request.config, request.folder
    runtime = choose_runtime(config.runtime)
    with prepared_cases(folder / "cache") as store:
        found = request.data.find_cases()
        ids = [*request.training, *([request.validation] if request.validation is not None else [])]
        used = [found[case_id].require() for case_id in ids]
        # A training run does this too, and the allocator keeps the memory that it frees, so it has to be measured.
        read_label_maps(used)
        prepared = cache_cases(
            used,
            store,
            spacing_mm=request.spacing_mm,
            convention=CONVENTIONS[request.labels],
            nan_to_zero=config.data.nan_to_zero,
        )
        if request.prepare_only:
            return None
        with closing(MetricsLog(folder, keep_up_to_step=0, keep_validations_up_to_step=0)):
            return _measure(request, runtime, prepared)


def _measure(request: TrialRequest, runtime: Runtime, prepared: list[CachedCase]) -> TrialReport:
    """Run steps, a validation and checkpoints with prepared cases."""
    config, folder, training = request.config, request.folder, prepared[: len(request.training)]
    torch.manual_seed(config.training.seed)
    state = new_state(config, runtime)
    source = _Timed(training, **patch_settings(config))
    gradient.attach_transform(config.gradient, state.optimizer, state.network)
    before = memory_of()
    gpu_free = torch.cuda.mem_get_info(runtime.device)[0] if runtime.device.type == "cuda" else None
    _save(state, config, folder)
    # Without cached cases, which would fill the GPU memory that this trial measures.
    without_cases = replace(config, runtime=replace(config.runtime, gpu_cases_gb=0.0))
    loader = Loader(source, without_cases, runtime)
    seconds = _steps(config, runtime, state, loader)
    _save(state, config, folder)
    window_seconds = None if request.validation is None else _window(config, runtime, state, prepared[-1])
    saved = _save(state, config, folder)
    after = memory_of()
    return TrialReport(
        device=str(runtime.device),
        step_seconds=tuple(seconds),
        loader_seconds=(mean(source.seconds) if source.seconds else loader.seconds_to_draft(0))
        * config.training.accumulate
        / config.runtime.loader_threads,
        window_seconds=window_seconds,
        program_files_bytes=None if before is None else before.files,
        own_bytes=None if after is None else after.peak - after.files,
        case_files_bytes=_mapped_by_a_long_run(config, training),
        gpu_bytes=int(torch.cuda.max_memory_reserved(runtime.device)) if runtime.device.type == "cuda" else None,
        gpu_free_bytes=gpu_free,
        checkpoint_bytes=saved,
    )


class _Timed(PatchSource):
    """A patch source that times each batch."""

    def __init__(self, cases: list[CachedCase], **settings: Any) -> None:
        super().__init__(cases, **settings)
        self.seconds: list[float] = []

    def batch(self, step: int, size: int) -> Any:
        began = time.perf_counter()
        made = super().batch(step, size)
        self.seconds.append(time.perf_counter() - began)
        return made


def _steps(config: RunConfig, runtime: Runtime, state: State, loader: Loader) -> list[float]:
    """Return the seconds of each step after the warm-up; with telemetry, one more, untimed step measures gradients."""
    timed = WARM_UP + STEPS
    every = timed + 1 if config.training.telemetry_steps else 0
    uncompiled = replace(config, runtime=replace(config.runtime, compile=False))  # compiling takes minutes
    computation = gpu.prepare_computation(uncompiled, runtime, state.network, loss_for(config))
    stepper = Stepper(
        config=config,
        runtime=runtime,
        state=state,
        telemetry=Telemetry(every, state.network, state.optimizer),
        loss_of=computation.loss,
        replica=computation.network,
    )
    made = loader.batches(first=0)
    seconds = []
    with closing(made):
        state.network.train()
        for _ in range(max(timed, every)):
            began = time.perf_counter()
            stepper.step(made, learning_rate(config.training, 0.5))
            _wait_for(runtime)
            state.step += 1
            seconds.append(time.perf_counter() - began)
    return seconds[WARM_UP:timed]


def _window(config: RunConfig, runtime: Runtime, state: State, case: CachedCase) -> float:
    """Validate a whole volume in which only two windows hold brain; return the seconds of the second window."""
    times: list[float] = []

    def note(*_: object) -> None:
        _wait_for(runtime)
        times.append(time.perf_counter())

    network = on_contrasts(state.network, config)
    handles = [network.register_forward_pre_hook(note), network.register_forward_hook(note)]
    case = _TwoCorners(id=case.id, folder=case.folder, shape=case.shape)
    validation_dice(network, [case], window=config.training.patch_voxels, config=config.inference, runtime=runtime)
    for handle in handles:
        handle.remove()
    return times[-1] - times[-2]


class _TwoCorners(CachedCase):
    """A case that is 0 except for two voxels in opposite corners: only its first and last windows are computed."""

    def image(self) -> npt.NDArray[np.float16]:
        """Return the image, shape (contrasts, X, Y, Z)."""
        image = np.zeros((len(CONTRASTS), *self.shape), dtype=np.float16)
        image[:, 0, 0, 0] = image[:, -1, -1, -1] = 1
        return image


def _save(state: State, config: RunConfig, folder: Path) -> int:
    """Save both kinds of checkpoint, as a validation does, and return their size in bytes."""
    weights = checkpoints.weight_tensors(state.network)
    checkpoints.save(folder / "checkpoints", "best", state.step, weights, {"config": to_plain(config)})
    tensors, details = to_checkpoint(state)
    checkpoints.save(folder / "checkpoints", "last", state.step, tensors, details)
    return sum(path.stat().st_size for path in (folder / "checkpoints").iterdir())


def _mapped_by_a_long_run(config: RunConfig, cases: list[CachedCase]) -> int | None:
    """Return the bytes of one case's arrays that stay mapped after many patches were cut from it."""
    before = memory_of()
    settings = config.training
    source = PatchSource(cases, **{**patch_settings(config), "seed": settings.seed + 1})
    patches = _WALKED_PER_CASE * len(cases)
    if settings.steps is not None:
        patches = min(patches, settings.steps * settings.batch_size * settings.accumulate)
    for number in range(patches):
        source.crop(number)
    after = memory_of()
    return None if before is None or after is None else max(0, after.files - before.files) // len(cases)


def _wait_for(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


def _lower_limits(share: float) -> None:
    """Lower the limits on address space and data, to reserve the additional memory of a long run."""
    import resource

    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, hard = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(kind, (int(soft * share), hard))


def _main(request_path: Path, outcome_path: Path) -> None:
    """Run the request in the first file; write the measurements, or the error, into the second."""
    with suppress(OSError):  # if memory runs out, this process should be the one that is killed
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    request = REQUEST.validate_json(request_path.read_bytes())
    _lower_limits(request.most_share_of_limits)
    try:
        outcome = TrialOutcome(report=run_trial(request))
    except Exception as error:
        outcome = TrialOutcome(error=message(error), code=exit_code(error), out_of_memory=is_out_of_memory(error))
    write_durably(outcome_path, OUTCOME.dump_json(outcome))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
