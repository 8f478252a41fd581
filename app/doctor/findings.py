"""Findings about a machine, derived from a probe by pure functions."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from app.doctor.probe import Gpu, Package, Place, Probe
from app.system.device import TENSOR_CORES

Level = Literal["ok", "note", "warning", "problem"]

#: Free memory in bytes: below the first, hardly anything can be trained; below the second, try a plan with --dry-run.
_LITTLE_MEMORY: Final = 2_000_000_000
_SOME_MEMORY: Final = 6_000_000_000
_LITTLE_DISK: Final = 1_000_000_000
_SOME_DISK: Final = 10_000_000_000
#: First compute capability with bfloat16.
_BF16_CAPABILITY: Final = (8, 0)
_SHM: Final = "/dev/shm"  # noqa: S108 - only its name; nothing is written to it
#: Shared memory that NVIDIA's guide for NCCL advises for containers.
_NCCL_SHM: Final = 1_000_000_000
#: Commands that install torch with CUDA. The builds of 2.12 to 2.14 are cu126, cu130 and cu132, with no cu128
#: (pytorch/pytorch#178665); 2.15 drops cu126, the last one for GPUs older than Turing (pytorch/pytorch#190385).
_WITH_CUDA: Final = "TORCH_INDEX=https://download.pytorch.org/whl/cu130 make setup"
_OLDER_CUDA: Final = "TORCH_INDEX=https://download.pytorch.org/whl/cu126 make setup"


@dataclass(frozen=True, kw_only=True)
class DoctorFinding:
    """Result of one check."""

    topic: str
    level: Level
    found: str
    remedy: str = ""
    """What to do; empty if nothing needs to be done."""


def examine(probe: Probe) -> list[DoctorFinding]:
    """Return all findings, in the order in which they are shown."""
    return [
        _gpu(probe),
        *(_architecture(probe, gpu) for gpu in probe.gpus),
        _bfloat16(probe),
        _memory(probe),
        _processors(probe),
        _threads(probe),
        *_waiting(probe),
        _shm(probe),
        *_kernels(probe),
        *(_disk(place) for place in probe.places),
        *_torch_2_9(probe),
        _packages(probe.packages),
    ]


def _gpu(probe: Probe) -> DoctorFinding:
    """Check whether there is a GPU, and whether torch can use it."""
    topic = "GPU"
    if not probe.gpu_in_machine and not probe.gpus:
        return _note(topic, f"none; torch {probe.torch} computes on the CPU", "znormseg plan chooses what a CPU can do")
    if probe.torch_cuda is None:
        return _problem(topic, f"there is an NVIDIA GPU, but torch {probe.torch} is built without CUDA", _WITH_CUDA)
    if probe.driver_cuda is None:
        return _problem(
            topic,
            "there is an NVIDIA GPU, but no driver (libcuda.so.1)",
            "install the NVIDIA driver; in a container pass the GPU: --gpus all, --device nvidia.com/gpu=all, --nv",
        )
    return _driver(probe, probe.torch_cuda, probe.driver_cuda)


def _driver(probe: Probe, torch_cuda: str, driver_cuda: tuple[int, int]) -> DoctorFinding:
    """Compare the driver's CUDA with torch's; by CUDA's own rule, any driver of the same major version works."""
    topic, built = "GPU", _numbers(torch_cuda)
    driver = f"driver {probe.driver or 'of unknown version'} supports CUDA {_dotted(driver_cuda)}"
    versions = f"{driver}, torch {probe.torch} is built for {torch_cuda}"
    if built[0] > driver_cuda[0]:
        return _problem(topic, versions, f"install a newer driver, or torch for an older CUDA: {_OLDER_CUDA}")
    if not probe.gpus:
        hidden = probe.environment.get("CUDA_VISIBLE_DEVICES")
        why = f"CUDA_VISIBLE_DEVICES={hidden}" if hidden is not None else "torch sees none"
        return _problem(topic, f"{versions}; {why}", "unset CUDA_VISIBLE_DEVICES; check that nvidia-smi works")
    names = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 1e9:.0f} GB)" for gpu in probe.gpus)
    if built > driver_cuda:
        return _note(topic, f"{names}; {versions}", "works within a major version; a newer driver is safer")
    return _ok(topic, f"{names}; {versions}")


def _architecture(probe: Probe, gpu: Gpu) -> DoctorFinding:
    """Check whether torch has machine code for a GPU, or code that its driver can compile."""
    major, minor = gpu.capability
    topic, name = "GPU architecture", f"{gpu.name} has compute capability {major}.{minor}"
    for architecture in probe.torch_architectures:
        if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", architecture)) is None:
            continue
        built_for = int(match[2]), int(match[3])
        exact = architecture[-1] in "af"
        if built_for == gpu.capability or (
            not exact and built_for <= gpu.capability and (match[1] == "compute" or built_for[0] == major)
        ):
            return _ok(topic, f"{name}; torch has {architecture}")
    return _problem(
        topic,
        f"{name}; torch is built for {', '.join(probe.torch_architectures) or 'none'}",
        f"older GPUs: {_OLDER_CUDA}; newer ones: a newer torch",
    )


def _bfloat16(probe: Probe) -> DoctorFinding:
    topic = "bfloat16"
    if probe.gpus:
        name, capability = probe.gpus[0].name, probe.gpus[0].capability
        if capability >= _BF16_CAPABILITY:
            return _ok(topic, f"{name} supports it, so precision auto uses it")
        precision, remedy = ("float16", "") if capability >= TENSOR_CORES else ("float32", "plan for twice the memory")
        return _note(topic, f"{name} does not support it, so precision auto uses {precision}", remedy)
    if probe.bf16_flags:
        return _ok(topic, f"the CPU has {', '.join(probe.bf16_flags)}, so precision auto uses it")
    return _note(topic, f"{probe.processor} does not support it, so precision auto uses float32", "")


def _memory(probe: Probe) -> DoctorFinding:
    topic = "memory"
    if not probe.memory:
        return _note(topic, "the system does not report it", "")
    tightest = probe.memory[0]
    found = f"{tightest.free_bytes / 1e9:.1f} GB, according to {tightest.name}"
    others = [f"{limit.free_bytes / 1e9:.1f} according to {limit.name}" for limit in probe.memory[1:]]
    found += f" ({', '.join(others)})" if others else ""
    if tightest.free_bytes < _LITTLE_MEMORY:
        return _warning(topic, found, "znormseg plan DATA --dry-run measures what fits; or raise the limit")
    if tightest.free_bytes < _SOME_MEMORY:
        return _note(topic, found, "znormseg plan DATA --dry-run measures what fits")
    return _ok(topic, found)


def _processors(probe: Probe) -> DoctorFinding:
    found = f"{probe.processor}, {probe.cores} cores"
    if probe.quota is None:
        return _ok("processors", found)
    return _ok("processors", f"{found}, but the control group limits their use to {probe.quota:g}")


def _threads(probe: Probe) -> DoctorFinding:
    """Compare the number of torch's threads with the number of processors."""
    share = probe.cores if probe.quota is None else min(probe.cores, max(1, math.ceil(probe.quota)))
    topic, remedy = "threads", f"export OMP_NUM_THREADS={share}"
    setting = probe.environment.get("OMP_NUM_THREADS")
    found = f"torch uses {probe.torch_threads}" + (f", OMP_NUM_THREADS={setting}" if setting is not None else "")
    if setting is not None and not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", setting):
        return _warning(topic, f"{found}, which is not a number", remedy)
    found += f", on {share} {'processor' if share == 1 else 'processors'}"
    if probe.torch_threads > share:
        return _warning(topic, f"{found}: the threads compete for them", remedy)
    if probe.torch_threads < share and not probe.gpus:
        return _note(topic, found, f"{remedy} if nothing else runs")
    return _ok(topic, found)


def _waiting(probe: Probe) -> Iterator[DoctorFinding]:
    policy = probe.environment.get("OMP_WAIT_POLICY", "")
    if policy.lower() == "active":
        found = f"{policy}: waiting threads keep their processors busy, and the loader's threads starve"
        yield _warning("OMP_WAIT_POLICY", found, "export OMP_WAIT_POLICY=passive")


def _shm(probe: Probe) -> DoctorFinding:
    """Check shared memory, which only NCCL uses, between GPUs that cannot access each other's memory."""
    size = "does not exist" if probe.shm_bytes is None else f"{probe.shm_bytes / 1e9:.2f} GB"
    if len(probe.gpus) > 1 and (probe.shm_bytes or 0) < _NCCL_SHM:
        remedy = "for training on several GPUs in a container, add --shm-size 1g --ulimit memlock=-1"
        return _note(_SHM, f"{size}; NCCL may need more between {len(probe.gpus)} GPUs", remedy)
    return _ok(_SHM, f"{size}; not needed: threads make the batches")


def _kernels(probe: Probe) -> Iterator[DoctorFinding]:
    """Check that code which Triton compiles for the GPU can be loaded from its cache."""
    if probe.gpus and probe.kernel_cache_noexec is not None:
        found = f"{probe.kernel_cache_noexec} is mounted noexec: ZNorm's kernels and torch.compile cannot be loaded"
        remedy = "mount it with exec (--tmpfs /tmp:exec), or set TRITON_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR"
        yield _warning("compiled kernels", found, remedy)


def _disk(place: Place) -> DoctorFinding:
    topic = {"cache": "cache", "current folder": "disk", "given": "disk"}[place.role]
    free = "unknown space" if place.free_bytes is None else f"{place.free_bytes / 1e9:.1f} GB"
    found = f"{place.path}: {free} free"
    if not place.writable:
        remedy = "set ZNORMSEG_CACHE to a folder that can be written to"
        if place.role == "cache":
            return _warning(topic, f"{found}, cannot be written to; each run then keeps its own prepared cases", remedy)
        return _note(topic, f"{found}, cannot be written to", "write runs and predictions to another folder")
    if place.free_bytes is not None and place.free_bytes < _LITTLE_DISK:
        return _problem(topic, found, "free some space, or choose another folder")
    if place.free_bytes is not None and place.free_bytes < _SOME_DISK:
        return _warning(topic, found, "znormseg plan DATA shows how much space prepared cases and checkpoints take")
    return _ok(topic, found)


def _torch_2_9(probe: Probe) -> Iterator[DoctorFinding]:
    if _numbers(probe.torch)[:2] == (2, 9):
        found = "its 3D convolutions are slow and take much memory (pytorch/pytorch#166122)"
        yield _warning("torch 2.9", found, "install torch 2.10 or newer: make setup")


def _packages(packages: tuple[Package, ...]) -> DoctorFinding:
    """Compare the installed versions with the supported ones."""
    topic = "packages"
    if not packages:
        return _note(topic, "znormseg is not installed as a package, so its requirements are unknown", "make setup")
    bad = [
        f"{package.name} {package.installed or 'is missing'} (needed: {package.least} or newer)"
        for package in packages
        if package.installed is None or _numbers(package.installed) < _numbers(package.least)
    ]
    if bad:
        return _problem(topic, ", ".join(bad), "make setup, or pip install --upgrade with these names")
    return _ok(topic, f"all {len(packages)} are installed and new enough")


def _numbers(version: str) -> tuple[int, ...]:
    """Return the numbers at the start of a version.

    Example:
        >>> _numbers("2.10.0+cu128")
        (2, 10, 0)
    """
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(number) for number in match[0].split(".")) if match else ()


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _ok(topic: str, found: str) -> DoctorFinding:
    return DoctorFinding(topic=topic, level="ok", found=found)


def _note(topic: str, found: str, remedy: str) -> DoctorFinding:
    return DoctorFinding(topic=topic, level="note", found=found, remedy=remedy)


def _warning(topic: str, found: str, remedy: str) -> DoctorFinding:
    return DoctorFinding(topic=topic, level="warning", found=found, remedy=remedy)


def _problem(topic: str, found: str, remedy: str) -> DoctorFinding:
    return DoctorFinding(topic=topic, level="problem", found=found, remedy=remedy)
