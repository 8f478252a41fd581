"""The rules of a plan, which derive a config from a fingerprint and a machine, with a reason for each choice.

The ideas are nnU-Net's (Isensee et al., Nature Methods 18, 203, 2021): spacing and patch follow the data's medians, the
patch is as large as memory allows, the batch has at least two patches. The differences: a plan uses the free memory of
this machine instead of a fixed budget, a CPU limits the voxels of a step, and the steps follow the number of cases.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from math import ceil, prod
from typing import Final

from app.config.load import RunConfig
from app.planning.estimate import estimate
from app.planning.fingerprint import Fingerprint
from data.nifti import Spacing
from models import NetworkConfig, patch_divisor

#: Maximum voxels of a step on a CPU (two patches of 64 a side), so that a network trains in hours.
CPU_STEP_VOXELS: Final = 2 * 64**3
#: Axes whose spacings differ by no more than this share count as equal.
_EQUAL: Final = 0.02
#: The coarsest level of the network keeps at least this many voxels of a patch along each axis.
_COARSEST_VOXELS: Final = 4
_LEAST_BATCH: Final = 2
_MOST_BATCH: Final = 8
#: A batch has at most this share of the voxels of all training brains, as in nnU-Net.
_BATCH_SHARE: Final = 0.05
#: Number of times that the patches of a run cover every training brain.
_COVERS: Final = 50
FEWEST_STEPS: Final = {"cpu": 1_000, "cuda": 10_000}
_MOST_STEPS: Final = {"cpu": 20_000, "cuda": 50_000}
#: Shares of the free memory that a plan may use; the rest allows for what an estimate misses.
_HOST_SHARE: Final = 0.8
_GPU_SHARE: Final = 0.85
#: Memory of a training process before its first step; on a GPU, that of the driver.
PROGRAM_BYTES: Final = 600_000_000
_GPU_PROGRAM_BYTES: Final = 600_000_000
#: Minimum side of a patch, in voxels, when patches are shortened to save memory.
SMALLEST_SIDE: Final = 32
_FEWEST_CHANNELS: Final = 8
#: Bytes per voxel of the brain's box in the cache: four contrasts in float16, one label code.
CACHE_BYTES_A_VOXEL: Final = 9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """Resources that a run may use."""

    device: str
    """``cpu`` or ``cuda``."""
    half: bool
    """Whether activations are bfloat16 or float16."""
    memory_bytes: int
    """RAM that is free for a run."""
    gpu_bytes: int
    """Free GPU memory; 0 without a GPU."""
    cores: int

    def __str__(self) -> str:
        return "a GPU" if self.device == "cuda" else "a CPU"

    def fits(self, config: RunConfig) -> bool:
        """Whether a config is estimated to fit into the share of the free memory that a plan may use."""
        gpu = self.device == "cuda"
        needed = estimate(config, half=self.half, gpu=gpu)
        if gpu and needed.gpu > _GPU_SHARE * self.gpu_bytes - _GPU_PROGRAM_BYTES:
            return False
        return needed.host <= _HOST_SHARE * self.memory_bytes - PROGRAM_BYTES

    def memory(self) -> str:
        """Describe the memory that bounds a step."""
        if self.device == "cuda":
            return f"{self.gpu_bytes / 1e9:.1f} GB of GPU memory by estimate"
        return f"{self.memory_bytes / 1e9:.1f} GB of memory by estimate"


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """One decision of a plan."""

    key: str
    """Key of the config, or the subject of the decision."""
    value: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Facts that the sizes in a plan depend on, other than the config."""

    brain: tuple[int, int, int]
    """Median brain box in voxels of the network's spacing."""
    spacing_mm: Spacing
    """Spacing that the network works at."""
    training_cases: int
    hardware: Hardware
    fixed: Collection[str]
    """Keys that the user set; they are kept."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A config for a data set on a machine."""

    config: RunConfig
    bounds: Bounds
    choices: tuple[Chosen, ...]


def plan_training(
    fingerprint: Fingerprint, hardware: Hardware, base: RunConfig, *, training_cases: int, fixed: Collection[str]
) -> TrainingPlan:
    """Plan a run.

    Args:
        fingerprint: of the data set.
        hardware: resources that may be used.
        base: supplies everything that is not planned: optimiser, gradient rule, augmentation and the rest.
        training_cases: number of training cases.
        fixed: keys that the user set, such as ``training.batch_size``; they are kept too.
    """
    choices: list[Chosen] = []

    def chosen(key: str, value: object, reason: str) -> None:
        text = times(value) if isinstance(value, tuple) else str(value)
        choices.append(Chosen(key=key, value=text, reason="set by you" if key in fixed else reason))

    spacing_mm, wanted_mm, why = _spacing(fingerprint, base, fixed)
    config = replace(base, data=replace(base.data, spacing_mm=wanted_mm))
    chosen("data.spacing_mm", spacing_mm, why)
    bounds = Bounds(
        brain=fingerprint.brain_voxels(spacing_mm),
        spacing_mm=spacing_mm,
        training_cases=training_cases,
        hardware=hardware,
        fixed=fixed,
    )
    config, levels_why = _with_levels(config, bounds)
    config, patch_why = _with_patch(config, bounds)
    patch = config.training.patch_voxels
    chosen("network.channels", config.network.channels, levels_why)
    sides_mm = [side * mm for side, mm in zip(patch, spacing_mm, strict=True)]
    inside = f"{fingerprint.tumours_inside(sides_mm):.0%} of the tumours fit into a patch"
    chosen("training.patch_voxels", patch, f"{patch_why}; {inside}")
    config, why = _with_batch(config, bounds)
    chosen("training.batch_size", config.training.batch_size, why)
    config, why = with_steps(config, bounds)
    budget = "steps" if config.training.steps is not None else "hours"
    chosen(f"training.{budget}", getattr(config.training, budget), why)
    config, why = _with_threads(config, bounds)
    chosen("runtime.loader_threads", config.runtime.loader_threads, why)
    return TrainingPlan(config=config, bounds=bounds, choices=tuple(choices))


def smaller_network(config: RunConfig, *, fixed: Collection[str]) -> tuple[RunConfig, str] | None:
    """Return the next smaller config and a description of the change; None if there is no smaller one.

    The steps, in order: halve a batch of more than two patches; shorten patches by a quarter, down to 32 voxels a side;
    halve the network's channels, down to eight at the finest level; reduce the batch to one patch.

    Args:
        config: one that does not fit.
        fixed: keys that may not be changed.
    """
    training, network = config.training, config.network
    batch, patch = training.batch_size, training.patch_voxels
    if "training.batch_size" not in fixed and batch > _LEAST_BATCH:
        fewer = max(_LEAST_BATCH, batch // 2)
        return _training(config, batch_size=fewer), f"batch {batch} -> {fewer}"
    divisor = patch_divisor(network)
    floor = _smallest_side(divisor)
    shorter = tuple(min(side, max(floor, int(0.75 * side) // divisor * divisor)) for side in patch)
    if "training.patch_voxels" not in fixed and shorter != patch:
        x, y, z = shorter
        return _training(config, patch_voxels=(x, y, z)), f"patch {times(patch)} -> {times(shorter)}"
    step = 8 if network.architecture == "segresnet" else 4
    fewest = min(_FEWEST_CHANNELS, network.channels[0])
    thinner = tuple(max(fewest, count // 2 // step * step) for count in network.channels)
    if "network.channels" not in fixed and network.channels[0] > fewest:
        words = f"channels {list(network.channels)} -> {list(thinner)}"
        return replace(config, network=replace(network, channels=thinner)), words
    if "training.batch_size" not in fixed and batch > 1:
        return _training(config, batch_size=1), f"batch {batch} -> 1"
    return None


def with_steps(config: RunConfig, bounds: Bounds) -> tuple[RunConfig, str]:
    """Return the config with its number of steps, and the reason for it."""
    settings, hardware, training_cases = config.training, bounds.hardware, bounds.training_cases
    if not {"training.steps", "training.hours"}.isdisjoint(bounds.fixed):
        return config, "set by you"
    covering = ceil(prod(bounds.brain) / prod(settings.patch_voxels))
    patches = _COVERS * training_cases * covering
    wanted = ceil(patches / (settings.batch_size * settings.accumulate))
    low, high = FEWEST_STEPS[hardware.device], _MOST_STEPS[hardware.device]
    steps = min(max(wanted, low), high)
    why = (
        f"{covering} patches cover a brain; {_COVERS} times for each of {training_cases} training cases: {wanted} steps"
    )
    if steps != wanted:
        why += f"; at least {low} and at most {high} on {hardware}"
    return _training(config, steps=steps, hours=None), why


def _spacing(fingerprint: Fingerprint, base: RunConfig, fixed: Collection[str]) -> tuple[Spacing, float | None, str]:
    """Return the spacing by axis, the value for the config, and the reason."""
    if "data.spacing_mm" in fixed and base.data.spacing_mm is not None:
        return (base.data.spacing_mm,) * 3, base.data.spacing_mm, ""
    found = fingerprint.spacing_mm
    if max(found) <= (1 + _EQUAL) * min(found):
        equal = min(max(round(sum(found) / 3, 3), 0.25), 10.0)
        return (equal,) * 3, equal, "median of the cases, the same along all axes"
    return found, None, "median of the training cases along each axis (null in the config)"


def _with_levels(config: RunConfig, bounds: Bounds) -> tuple[RunConfig, str]:
    """Remove the levels for which the median brain has too few voxels."""
    network, fixed = config.network, bounds.fixed
    levels = len(network.channels)
    why = f"levels: the coarsest keeps {_COARSEST_VOXELS} voxels or more of the median brain"
    if "network.blocks" in fixed and network.blocks is not None:
        why = "levels: as many as network.blocks has, set by you"
    elif "network.channels" not in fixed:
        while levels > _fewest_levels(network) and min(bounds.brain) < _COARSEST_VOXELS * patch_divisor(network):
            levels -= 1
            blocks = None if network.blocks is None else network.blocks[:levels]
            network = replace(network, channels=network.channels[:levels], blocks=blocks)
    # A provisional patch that the network accepts; a patch set by the user remains valid with fewer levels.
    patch = (_least_side(patch_divisor(network)),) * 3
    if "training.patch_voxels" in fixed:
        patch = config.training.patch_voxels
    config = replace(config, network=network, training=replace(config.training, patch_voxels=patch))
    return config, f"{levels} {why}"


def _fewest_levels(network: NetworkConfig) -> int:
    """Return the minimum number of levels of a network; deep supervision needs coarser logits."""
    return 3 if network.deep_supervision and network.first_stride == 1 else 2


def _with_patch(config: RunConfig, bounds: Bounds) -> tuple[RunConfig, str]:
    """Find the largest patch that fits the machine in a batch of two, starting from the median brain's box."""
    if "training.patch_voxels" in bounds.fixed:
        return config, ""
    divisor = patch_divisor(config.network)
    floor = _smallest_side(divisor)
    sides = [max(_least_side(divisor), ceil(side / divisor) * divisor) for side in bounds.brain]
    batch = config.training.batch_size if "training.batch_size" in bounds.fixed else _LEAST_BATCH
    most = CPU_STEP_VOXELS if bounds.hardware.device == "cpu" else None
    why = "the median brain's box, rounded up to a size that the network accepts"

    def tried() -> RunConfig:
        x, y, z = sides
        return _training(config, patch_voxels=(x, y, z), batch_size=batch)

    while (slow := most is not None and batch * prod(sides) > most) or not bounds.hardware.fits(tried()):
        longest = [axis for axis in range(3) if sides[axis] > floor]
        if not longest:
            break
        sides[max(longest, key=lambda axis: (sides[axis] * bounds.spacing_mm[axis], axis))] -= divisor
        fits = f"a batch of {batch} fits {bounds.hardware.memory()}"
        reason = f"at most {most} voxels per step on a CPU" if slow else fits
        why = f"the median brain's box {times(bounds.brain)}, its longest side cut until {reason}"
    return tried(), why


def _with_batch(config: RunConfig, bounds: Bounds) -> tuple[RunConfig, str]:
    """Find the largest batch that memory and data allow, of at least two patches."""
    if "training.batch_size" in bounds.fixed:
        return config, ""
    voxels = prod(config.training.patch_voxels)
    most = int(_BATCH_SHARE * bounds.training_cases * prod(bounds.brain) / voxels)
    if bounds.hardware.device == "cpu":
        most = min(most, CPU_STEP_VOXELS // voxels)
    batch = _LEAST_BATCH
    while batch < min(most, _MOST_BATCH) and bounds.hardware.fits(_training(config, batch_size=batch + 1)):
        batch += 1
    why = (
        f"from {_LEAST_BATCH} up to {_MOST_BATCH}, while it fits {bounds.hardware.memory()}"
        f"{', has no more voxels than a CPU should process in a step' if bounds.hardware.device == 'cpu' else ''}"
        f" and no more than {_BATCH_SHARE:.0%} of the training brains"
    )
    return _training(config, batch_size=batch), why


def _with_threads(config: RunConfig, bounds: Bounds) -> tuple[RunConfig, str]:
    hardware = bounds.hardware
    if "runtime.loader_threads" in bounds.fixed:
        return config, ""
    if hardware.device == "cuda":
        threads, why = min(8, hardware.cores), f"the processors ({hardware.cores}), up to 8"
    else:
        threads = min(4, max(1, hardware.cores // 4))
        why = f"a quarter of the processors ({hardware.cores}), 1 to 4; the network uses the others"
    why += "; threads, so /dev/shm is not used"
    return replace(config, runtime=replace(config.runtime, loader_threads=threads)), why


def _smallest_side(divisor: int) -> int:
    """Return the minimum side of a patch that is shortened to save memory, in voxels."""
    return max(2 * divisor, ceil(SMALLEST_SIDE / divisor) * divisor)


def _least_side(divisor: int) -> int:
    """Return the minimum side of a patch that a config accepts, in voxels."""
    return max(2 * divisor, 8)


def _training(config: RunConfig, **changes: object) -> RunConfig:
    return replace(config, training=replace(config.training, **changes))  # type: ignore[arg-type]


def times(sides: Iterable[float], form: str = "g") -> str:
    """Describe a size by its sides, such as ``64x64x48``."""
    return "x".join(f"{side:{form}}" for side in sides)
