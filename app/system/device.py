"""Device, precision, threads, versions: each choice with its reason."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from app.errors import DeviceError
from app.system.resources import cores

# torch is imported where it is used: predicting with OpenVINO does without it, and it takes a second.
if TYPE_CHECKING:
    import torch

#: CPU flags of instruction sets that multiply bfloat16; without them it is emulated, and slower than float32.
BF16_FLAGS: Final = {"avx512_bf16", "amx_bf16"}

#: Variables that limit oneDNN, which multiplies for torch and OpenVINO, to older instructions; the first one counts.
ISA_VARIABLES: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
#: Their values that exclude AVX2, AVX-512, and products of bfloat16 (oneDNN, "CPU Dispatcher Control").
_BELOW_AVX2: Final = {"SSE41", "AVX"}
_BELOW_AVX512: Final = _BELOW_AVX2 | {"AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}
_BELOW_BF16: Final = _BELOW_AVX512 | {"AVX512_CORE", "AVX512_CORE_VNNI"}

#: Compute capability from which on GPUs multiply float16 faster than float32.
TENSOR_CORES: Final = (7, 0)


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """What a run computes on."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto`` takes bfloat16 autocast where the hardware multiplies it, else float16 on a GPU with tensor cores."""
    channels_last: bool = True
    """Keep channels innermost in memory; faster for small 3D U-Nets on CPU."""
    loader_threads: int = 2
    """Threads that make batches."""
    deterministic: bool = False
    """On a GPU, only operations that give the same numbers each time, slower; a CPU does so anyway."""

    def __post_init__(self) -> None:
        if not 1 <= self.loader_threads <= 256:
            raise ValueError(f"runtime.loader_threads: from 1 to 256, got {self.loader_threads}")
        if self.device not in ("auto", "cpu", "cuda") and not _is_cuda_index(self.device):
            raise ValueError(f"runtime.device: auto, cpu, cuda or cuda:N, got {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """What is computed on, and why."""

    device_name: str
    """``cpu`` or ``cuda:N``."""
    precision_name: Literal["float32", "bfloat16", "float16"]
    channels_last: bool
    reasons: tuple[str, ...]
    backend: Literal["torch", "openvino"] = "torch"
    """What computes a trained network; only ``predict`` knows another than torch."""
    precision_asked_for: bool = False
    """Whether the precision was chosen by the user, not by the hardware."""

    def record(self) -> dict[str, str]:
        """What results depend on, as plain data: ``backend``, ``precision`` and ``device``."""
        return {"backend": self.backend, "precision": self.precision_name, "device": self.device_name}

    @property
    def device(self) -> torch.device:
        """Of tensors."""
        import torch

        return torch.device(self.device_name)

    @property
    def precision(self) -> torch.dtype:
        """Of the matrix products."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.precision_name]

    def autocast(self) -> torch.autocast:
        """Context for forward passes."""
        import torch

        lower = torch.bfloat16 if self.precision is torch.float32 else self.precision
        return torch.autocast(self.device.type, lower, enabled=self.precision is not torch.float32)

    @property
    def scales_gradients(self) -> bool:
        """Whether training scales its loss: small gradients are 0 in float16."""
        return self.precision_name == "float16"

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory layout of the network's weights and input."""
        import torch

        return torch.channels_last_3d if self.channels_last else torch.contiguous_format


def choose_runtime(config: RuntimeConfig, *, local_rank: int | None = None) -> Runtime:
    """Choose device and precision; a GPU that is chosen becomes torch's current one.

    Args:
        config: what is asked for.
        local_rank: number of this process among those of a training on this host: it takes the GPU of that number.
            None: there are no others.

    Raises:
        DeviceError: the device asked for is not there, or is one for several processes.
    """
    _set_deterministic(on=config.deterministic)
    device, device_reason = _choose_device(_own_device(config.device, local_rank))
    if local_rank is not None and device.type == "cuda":
        device_reason = f"device {device}: the GPU of process {local_rank} of this host"
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)  # what is asked of "the" GPU from here on is asked of this one
    precision, precision_reason = _choose_precision(config.precision, device)
    return Runtime(
        device_name=str(device),
        precision_name=precision,
        channels_last=config.channels_last,
        reasons=(device_reason, precision_reason),
        precision_asked_for=config.precision != "auto",
    )


def below_gpu(runtime: Runtime) -> Runtime:
    """What computes on the CPU where a GPU's memory is not enough.

    A precision that was asked for stays, and so does float32; else it is what the CPU multiplies fastest.
    """
    if runtime.precision_asked_for or runtime.precision_name == "float32":
        return replace(runtime, device_name="cpu")
    return replace(runtime, device_name="cpu", precision_name=cpu_precision()[0])


def require_device(name: str) -> None:
    """Make sure that a device is there, without taking any of its memory.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DeviceError: it is not.
    """
    _choose_device(name)


def _set_deterministic(*, on: bool) -> None:
    """Have torch take operations whose result does not depend on the order in which a GPU's threads end, or not.

    Source: PyTorch's notes on reproducibility.
    """
    import torch

    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("znormseg", "torch", "monai", "openvino", "nibabel", "numpy")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def machine() -> str:
    """Processor, cores and GPU, in one line."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {cores()} cores{gpu}"


def _own_device(wanted: str, local_rank: int | None) -> str:
    """The device that one of several processes on a host takes."""
    import torch

    if local_rank is None or wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return wanted
    if _is_cuda_index(wanted):
        raise DeviceError(
            f"device {wanted}: each process that torchrun starts takes a GPU of its own. Use --set runtime.device=cuda."
        )
    count = torch.cuda.device_count()
    if torch.cuda.is_available() and local_rank >= count:
        raise DeviceError(
            f"process {local_rank} of this host has no GPU: there are {count}, counted from 0. Start as many processes "
            "(torchrun --nproc-per-node), or use --set runtime.device=cpu."
        )
    return f"cuda:{local_rank}"


def _choose_device(wanted: str) -> tuple[torch.device, str]:
    import torch

    cuda = torch.cuda.is_available()
    if wanted == "cpu":
        return torch.device("cpu"), "device cpu: asked for"
    if wanted == "auto":
        if cuda:
            return torch.device("cuda", 0), f"device cuda:0: {torch.cuda.get_device_name(0)} found"
        return torch.device("cpu"), "device cpu: no CUDA device found"
    if not cuda:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        raise DeviceError(f"device {wanted}: {built}. Use --device cpu, or install a CUDA build and its driver.")
    device = torch.device(wanted)
    if (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {wanted}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    return torch.device("cuda", device.index or 0), f"device {wanted}: asked for"


def _choose_precision(
    wanted: Literal["auto", "float32", "bfloat16", "float16"], device: torch.device
) -> tuple[Literal["float32", "bfloat16", "float16"], str]:
    if wanted != "auto":
        return wanted, f"precision {wanted}: asked for"
    if device.type == "cuda":
        import torch

        # Emulated bfloat16 on older GPUs is slower than float32.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "precision bfloat16: the GPU has it"
        if torch.cuda.get_device_capability(device) >= TENSOR_CORES:
            return "float16", "precision float16 with a scaled loss: the GPU has tensor cores, but no bfloat16"
        return "float32", "precision float32: the GPU has neither bfloat16 nor tensor cores"
    return cpu_precision()


def cpu_precision() -> tuple[Literal["float32", "bfloat16"], str]:
    """What a CPU multiplies fastest, and why."""
    if found := sorted(bf16_flags()):
        return "bfloat16", f"precision bfloat16: the CPU has {', '.join(found)}"
    if BF16_FLAGS & cpu_flags():
        return "float32", f"precision float32: {_isa_limit()} switches bfloat16 arithmetic off"
    return "float32", "precision float32: the CPU has no bfloat16 arithmetic, autocast would slow it down"


def bf16_flags() -> set[str]:
    """Instruction sets that multiply bfloat16, of those that the CPU has and oneDNN's environment variable allows."""
    return set() if _isa_limit(_BELOW_BF16) else BF16_FLAGS & cpu_flags()


def limit_below_avx512() -> str | None:
    """The setting that keeps oneDNN from AVX-512, such as ``ONEDNN_MAX_CPU_ISA=AVX2``; None where there is none."""
    return _isa_limit(_BELOW_AVX512)


def without_avx2() -> str | None:
    """Why AVX2 cannot be used, in words; None where it can, or where the system does not say what the CPU has.

    OpenVINO's kernels for norms need it: below, it cannot compile the networks (measured with 2026.4 on an EPYC).
    """
    flags = cpu_flags()
    if flags and "avx2" not in flags:
        return "the CPU has none"
    limit = _isa_limit(_BELOW_AVX2)
    return f"{limit} switches it off" if limit else None


def _isa_limit(among: Collection[str] = frozenset(_BELOW_BF16)) -> str | None:
    """The variable of oneDNN that is set, with its value, where that is one of some; oneDNN ignores upper case."""
    for variable in ISA_VARIABLES:
        if value := os.environ.get(variable):
            return f"{variable}={value}" if value.upper() in among else None
    return None


def cpu_flags() -> set[str]:
    """Instruction sets of the CPU, as Linux names them; empty where they are not told."""
    for line in _cpuinfo():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()


def processor() -> str:
    """Name of the CPU."""
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "unknown"


def _is_cuda_index(device: str) -> bool:
    kind, _, index = device.partition(":")
    return kind == "cuda" and index.isdecimal()
