"""A dry run, seen from inside: a few real steps of a config, in a process of its own.

``python -m app.planning.trial ASKED.json TOLD.json`` reads what to do and writes what it took. It is a process of its
own so that its peak of memory is that of a training run, and so that running out of memory ends nothing else.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from app.config.load import RunConfig, from_plain, to_plain
from app.errors import exit_code, is_out_of_memory, message
from app.runs import checkpoints
from app.runs.case_cache import prepared_cases
from app.runs.folder import MetricsLog, write_json
from app.system.device import Runtime, choose_runtime
from app.system.process import keep_freed_memory
from app.system.resources import memory_of
from app.training import gradient
from app.training.schedule import learning_rate
from app.training.state import State, new_state, to_checkpoint
from app.training.step import Stepper, loss_for
from app.training.telemetry import Telemetry
from app.training.validation import validation_dice
from data.contrasts import presence_mask
from data.datasets.label_stats import read_label_maps
from data.datasets.layouts import find_cases
from data.labels import CONTRASTS, CONVENTIONS
from data.patches.sampler import CachedCase, PatchSource, batches, cache_cases
from models import GivenPresence

#: Steps before the ones that are timed: the first allocates, and chooses its kernels.
WARM_UP: Final = 3
#: Steps that are timed.
STEPS: Final = 5
#: Patches cut from each case, at most, to see how much of its files a long run keeps mapped.
_WALKED_PER_CASE: Final = 60


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What to try; paths and settings as plain data."""

    data: str
    folder: str
    """An empty folder for what a run writes."""
    config: dict[str, Any]
    prepare_only: bool
    """Prepare the cases and stop there."""
    training: tuple[str, ...]
    """Ids of the training cases that are used."""
    validation: str | None
    """Id of the case whose windows are tried; None where no case validates."""
    labels: str
    spacing_mm: tuple[float, float, float]
    follow_links: bool
    most_share_of_limits: float
    """Share of RLIMIT_AS and RLIMIT_DATA, where there are such bounds, that may be taken."""


@dataclass(frozen=True, kw_only=True)
class TrialReport:
    """What it took; bytes, seconds."""

    device: str
    reasons: tuple[str, ...]
    step_seconds: tuple[float, ...]
    """Of each timed step, waiting for its batch included."""
    loader_seconds: float
    """The loader's threads take to make the batches of one step."""
    window_seconds: float | None
    program_files_bytes: int | None
    """Of the program's files in RAM, before the first step."""
    own_bytes: int | None
    """Own memory at its peak: the peak of all that was resident, less what was of files at the end of the steps."""
    case_files_bytes: int | None
    """Of one case's prepared arrays, kept mapped by a long run; on average. The system takes them back when it must."""
    gpu_bytes: int | None
    """Peak of what torch took from the GPU, its cache included; the driver's own context comes on top."""
    gpu_free_bytes: int | None
    """Free on the GPU before."""
    checkpoint_bytes: int
    """Both kinds together, on disk."""
    parameters: int
    cases: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data, as :func:`told_from_json` takes it."""
        return asdict(self)


def told_from_json(content: dict[str, Any]) -> TrialReport:
    """Undo :meth:`TrialReport.to_json`."""
    lists = {name: tuple(content[name]) for name in ("reasons", "step_seconds", "cases")}
    return TrialReport(**{**content, **lists})


def run_trial(asked: Asked) -> TrialReport | None:
    """Do the steps and tell what they took; nothing where the cases are only prepared.

    Raises:
        DataError: a case cannot be used.
        DeviceError: the device of the config is not there.
        MemoryError, RuntimeError: memory ran out.
    """
    keep_freed_memory()
    config, folder = from_plain(asked.config, "plan"), Path(asked.folder)
    runtime = choose_runtime(config.runtime)
    with prepared_cases(folder / "cache") as store:
        found = {case.id: case for case in find_cases(Path(asked.data), follow_links=asked.follow_links)}
        ids = [*asked.training, *([asked.validation] if asked.validation is not None else [])]
        used = [found[case_id].require() for case_id in ids]
        # As a run does; what it frees, the allocator keeps for later, so that it belongs to the run's memory.
        read_label_maps(used)
        prepared = cache_cases(
            used,
            store,
            spacing_mm=asked.spacing_mm,
            convention=CONVENTIONS[asked.labels],
            nan_to_zero=config.data.nan_to_zero,
        )
        if asked.prepare_only:
            return None
        log = MetricsLog(folder, keep_up_to_step=0, keep_validations_up_to_step=0)
        with closing(log):
            return _measure(asked, config, runtime, prepared)


def _measure(asked: Asked, config: RunConfig, runtime: Runtime, prepared: list[CachedCase]) -> TrialReport:
    """Steps, a validation and checkpoints with prepared cases."""
    folder = Path(asked.folder)
    torch.manual_seed(config.training.seed)
    state = new_state(config, runtime)
    source = _Timed(
        prepared[: len(asked.training)],
        patch_voxels=config.training.patch_voxels,
        tumour_probability=config.training.tumour_probability,
        augmentation=config.augment,
        seed=config.training.seed,
    )
    gradient.attach_transform(config.gradient, state.optimizer, state.network)
    before = memory_of()
    gpu_free = torch.cuda.mem_get_info(runtime.device)[0] if runtime.device.type == "cuda" else None
    _save(state, config, folder)
    seconds = _steps(config, runtime, state, source)
    _save(state, config, folder)
    window_seconds = None
    if asked.validation is not None:
        window_seconds = _window(config, runtime, state, prepared[-1])
    saved = _save(state, config, folder)
    after = memory_of()
    return TrialReport(
        device=str(runtime.device),
        reasons=runtime.reasons,
        step_seconds=tuple(seconds),
        loader_seconds=mean(source.seconds) * config.training.accumulate / config.runtime.loader_threads,
        window_seconds=window_seconds,
        program_files_bytes=None if before is None else before.files,
        own_bytes=None if after is None else after.peak - after.files,
        case_files_bytes=_mapped_by_a_long_run(config, prepared[: len(asked.training)]),
        gpu_bytes=int(torch.cuda.max_memory_reserved(runtime.device)) if runtime.device.type == "cuda" else None,
        gpu_free_bytes=gpu_free,
        checkpoint_bytes=saved,
        parameters=sum(p.numel() for p in state.network.parameters()),
        cases=asked.training,
    )


class _Timed(PatchSource):
    """Patches, and the time that each batch of them took."""

    def __init__(self, cases: list[CachedCase], **settings: Any) -> None:
        super().__init__(cases, **settings)
        self.seconds: list[float] = []

    def batch(self, step: int, size: int) -> Any:
        began = time.perf_counter()
        made = super().batch(step, size)
        self.seconds.append(time.perf_counter() - began)
        return made


def _steps(config: RunConfig, runtime: Runtime, state: State, source: PatchSource) -> list[float]:
    """Seconds of each step after the warm-up; where a run measures gradients, one more step does."""
    timed = WARM_UP + STEPS
    every = timed + 1 if config.training.telemetry_steps else 0
    stepper = Stepper(
        config=config,
        runtime=runtime,
        state=state,
        telemetry=Telemetry(every, state.network, state.optimizer),
        loss_of=loss_for(config),
    )
    made = batches(source, first=0, size=config.training.batch_size, threads=config.runtime.loader_threads)
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
    """Validate one case of which but two windows hold brain, as a whole volume; seconds of the second window."""
    times: list[float] = []

    def note(*_: object) -> None:
        _wait_for(runtime)
        times.append(time.perf_counter())

    network: nn.Module = state.network
    if config.takes_missing_contrasts:
        network = GivenPresence(network, presence_mask(CONTRASTS))
    handles = [network.register_forward_pre_hook(note), network.register_forward_hook(note)]
    case = _TwoCorners(id=case.id, folder=case.folder, shape=case.shape)
    validation_dice(network, [case], window=config.training.patch_voxels, config=config.inference, runtime=runtime)
    for handle in handles:
        handle.remove()
    return times[-1] - times[-2]


class _TwoCorners(CachedCase):
    """A case with nothing but two voxels in opposite corners: its first and its last window alone are computed."""

    def image(self) -> npt.NDArray[np.float16]:
        """Shape (contrasts, X, Y, Z)."""
        image = np.zeros((len(CONTRASTS), *self.shape), dtype=np.float16)
        image[:, 0, 0, 0] = image[:, -1, -1, -1] = 1
        return image


def _save(state: State, config: RunConfig, folder: Path) -> int:
    """Save both kinds of checkpoint, as a validation does; their bytes."""
    weights = checkpoints.weight_tensors(state.network)
    checkpoints.save(folder / "checkpoints", "best", state.step, weights, {"config": to_plain(config)})
    tensors, details = to_checkpoint(state)
    checkpoints.save(folder / "checkpoints", "last", state.step, tensors, details)
    return sum(path.stat().st_size for path in (folder / "checkpoints").iterdir())


def _mapped_by_a_long_run(config: RunConfig, cases: list[CachedCase]) -> int | None:
    """Bytes of one case's arrays that stay mapped once many patches were cut from it."""
    before = memory_of()
    source = PatchSource(
        cases,
        patch_voxels=config.training.patch_voxels,
        tumour_probability=config.training.tumour_probability,
        augmentation=config.augment,
        seed=config.training.seed + 1,
    )
    settings = config.training
    patches = _WALKED_PER_CASE * len(cases)
    if settings.steps is not None:
        patches = min(patches, settings.steps * settings.batch_size * settings.accumulate)
    for number in range(patches):
        source.piece(number)
    after = memory_of()
    return None if before is None or after is None else max(0, after.files - before.files) // len(cases)


def _wait_for(runtime: Runtime) -> None:
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)


def _lower_limits(share: float) -> None:
    """Leave some of the bounds on address space and data to what a long run needs more."""
    import resource

    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, hard = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            resource.setrlimit(kind, (int(soft * share), hard))


def _main(asked_path: str, told_path: str) -> None:
    """Try what the first file asks for; write what it took, or what went wrong, into the second."""
    with suppress(OSError):  # where memory runs out, this process is the one to go
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    content = json.loads(Path(asked_path).read_text(encoding="utf-8"))
    asked = Asked(**{**content, **{name: tuple(content[name]) for name in ("training", "spacing_mm")}})
    _lower_limits(asked.most_share_of_limits)
    try:
        result = run_trial(asked)
        told: dict[str, Any] = {"told": None if result is None else result.to_json()}
    except Exception as error:
        told = {"error": message(error), "code": exit_code(error), "memory": is_out_of_memory(error)}
    write_json(Path(told_path), told)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
