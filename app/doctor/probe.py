"""The facts about a machine that the doctor examines, and how they are collected."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Final

import torch

from app.runs.case_cache import cache_folder
from app.system.device import bf16_flags, installed_version, processor
from app.system.resources import MemoryLimit, cores, free_disk, memory_limits, processor_quota

#: NVIDIA's vendor number on the PCI bus.
_NVIDIA: Final = "0x10de"
_REQUIREMENT: Final = re.compile(r"^([A-Za-z0-9._-]+)\s*>=\s*([0-9.]+)\s*$")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as torch sees it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that is read or written."""

    role: str
    """``cache``, ``current folder`` or ``given``."""
    path: str
    free_bytes: int | None
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Package:
    """A required package."""

    name: str
    least: str
    """Oldest supported version."""
    installed: str | None


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Facts about a machine."""

    torch: str
    torch_cuda: str | None
    """CUDA version that torch was built for; None for a build without CUDA."""
    torch_architectures: tuple[str, ...] = ()
    """Architectures that torch has code for, such as ``sm_90``, ``compute_90``; empty if torch cannot use a GPU."""
    gpu_in_machine: bool = False
    """Whether the system has an NVIDIA GPU, detected without torch."""
    driver: str | None = None
    """Version of the NVIDIA driver."""
    driver_cuda: tuple[int, int] | None = None
    """Newest CUDA version that the driver supports; None without a driver."""
    gpus: tuple[Gpu, ...] = ()
    """GPUs that torch can use."""
    processor: str
    bf16_flags: tuple[str, ...]
    """Instruction sets of the CPU that multiply bfloat16."""
    cores: int
    quota: float | None
    """CPU quota of the control group, in processors; None without a quota."""
    memory: tuple[MemoryLimit, ...]
    """Memory limits, the tightest first."""
    shm_bytes: int | None
    kernel_cache_noexec: str | None = None
    """Folder of compiled Triton kernels if its file system is mounted noexec; None otherwise."""
    torch_threads: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """Values of OMP_NUM_THREADS, OMP_WAIT_POLICY and CUDA_VISIBLE_DEVICES, where set."""
    places: tuple[Place, ...] = ()
    packages: tuple[Package, ...] = ()


def probe(given: Sequence[Path] = ()) -> Probe:
    """Collect the facts about this machine.

    Args:
        given: folders to examine in addition to the cache and the current folder.
    """
    places = [("current folder", Path.cwd()), *(("given", path) for path in given)]
    with suppress(OSError):
        places.insert(0, ("cache", cache_folder()))
    usable = torch.cuda.is_available()
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
    return Probe(
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        torch_architectures=tuple(torch.cuda.get_arch_list()) if usable else (),
        gpu_in_machine=_gpu_in_machine(),
        driver=_driver(),
        driver_cuda=_driver_cuda(),
        gpus=tuple(_gpu(index) for index in range(torch.cuda.device_count())) if usable else (),
        processor=processor(),
        bf16_flags=tuple(sorted(bf16_flags())),
        cores=cores(),
        quota=processor_quota(),
        memory=tuple(memory_limits()),
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None,  # noqa: S108 - only its size
        kernel_cache_noexec=_kernel_cache_noexec(),
        torch_threads=torch.get_num_threads(),
        environment={name: os.environ[name] for name in names if name in os.environ},
        places=tuple(_place(role, path) for role, path in places),
        packages=tuple(_packages()),
    )


def _gpu(index: int) -> Gpu:
    found = torch.cuda.get_device_properties(index)
    return Gpu(name=found.name, capability=(found.major, found.minor), memory_bytes=found.total_memory)


def _gpu_in_machine() -> bool:
    """Whether there is an NVIDIA device: its driver's device node, or a display controller on the PCI bus."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return True
    for device in Path("/sys/bus/pci/devices").glob("*"):
        with suppress(OSError):
            vendor, kind = ((device / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
            if vendor == _NVIDIA and kind.startswith("0x03"):
                return True
    return False


def _driver() -> str | None:
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        if found := re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text):
            return found[1]
    return None


def _driver_cuda() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver supports, as its library libcuda reports it."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        number = ctypes.c_int()
        if library.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return (number.value // 1000, number.value % 1000 // 10)


def _kernel_cache_noexec() -> str | None:
    """Return the folder of compiled Triton kernels, by Triton's own rule, if code cannot be loaded from it."""
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    with suppress(OSError):
        existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if os.statvfs(existing).f_flag & os.ST_NOEXEC:
            return str(folder)
    return None


def _place(role: str, path: Path) -> Place:
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    free: int | None = None
    with suppress(OSError):
        free = free_disk(existing)
    return Place(role=role, path=str(path), free_bytes=free, writable=_is_writable(existing))


def _is_writable(folder: Path) -> bool:
    """Whether a file can be created there; permissions are not conclusive on read-only and remote file systems."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _packages() -> list[Package]:
    """Return the packages that this program requires, from its own metadata."""
    needs = filter(None, map(_REQUIREMENT.match, metadata.requires("znormseg") or []))
    return [Package(name=need[1], least=need[2], installed=installed_version(need[1])) for need in needs]
