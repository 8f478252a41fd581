"""Choice of device and precision, each with its reason; facts about the CPU, the machine and package versions."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from app.errors import DeviceError
from app.system.resources import cores

# torch is imported lazily: it takes a second, and prediction with OpenVINO does not need it.
if TYPE_CHECKING:
    import torch

#: CPU flags of instruction sets with bfloat16 products; without them bfloat16 is emulated and slower than float32.
BF16_FLAGS: Final = {"avx512_bf16", "amx_bf16"}

#: Environment variables that limit oneDNN (used by torch and OpenVINO) to older instructions; the first one set wins.
ISA_VARIABLES: Final = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
#: Values of these variables that exclude AVX2, AVX-512 and bfloat16 products (oneDNN, "CPU Dispatcher Control").
_BELOW_AVX2: Final = {"SSE41", "AVX"}
_BELOW_AVX512: Final = _BELOW_AVX2 | {"AVX2", "AVX2_VNNI", "AVX2_VNNI_2"}
_BELOW_BF16: Final = _BELOW_AVX512 | {"AVX512_CORE", "AVX512_CORE_VNNI"}

#: Lowest compute capability of GPUs that multiply float16 faster than float32.
TENSOR_CORES: Final = (7, 0)

Precision = Literal["float32", "bfloat16", "float16"]
WantedPrecision = Literal["auto", Precision]


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """Device, precision and threads of a run."""

    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    precision: WantedPrecision = "auto"
    """``auto``: bfloat16 autocast if the hardware supports it, else float16 on a GPU with tensor cores, else
    float32."""
    channels_last: bool = True
    """Use the channels-last memory format; faster for small 3D U-Nets on a CPU."""
    loader_threads: int = 2
    """Number of threads that prepare batches."""
    deterministic: bool = False
    """Use only deterministic operations on a GPU, which is slower; a CPU is deterministic anyway."""
    tf32: bool = True
    """With ``precision`` float32 on a GPU from Ampere on, round the inputs of convolutions to 10 bits (TF32), which is
    several times faster; false computes them in full float32."""
    compile: bool | None = None
    """Compile network and loss with ``torch.compile`` for training; null does so on a GPU if the run is long enough."""
    gpu_cases_gb: float | None = None
    """Gigabytes of prepared cases that stay in GPU memory during training; null uses what the first steps leave free, 0
    uploads each patch."""

    def __post_init__(self) -> None:
        if self.gpu_cases_gb is not None and not 0 <= self.gpu_cases_gb <= 10_000:
            raise ValueError(f"runtime.gpu_cases_gb: from 0 to 10000, or null, got {self.gpu_cases_gb:g}")
        if not 1 <= self.loader_threads <= 256:
            raise ValueError(f"runtime.loader_threads: from 1 to 256, got {self.loader_threads}")
        if self.device not in ("auto", "cpu", "cuda") and not _is_cuda_index(self.device):
            raise ValueError(f"runtime.device: auto, cpu, cuda or cuda:N, got {self.device!r}")


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """The chosen device, precision and backend, with reasons."""

    device_name: str
    """``cpu`` or ``cuda:N``."""
    precision_name: Precision
    channels_last: bool
    reasons: tuple[str, ...]
    backend: Literal["torch", "openvino"] = "torch"
    """The library that runs a trained network; only ``predict`` supports one other than torch."""
    precision_asked_for: bool = False
    """Whether the user chose the precision; if not, it was chosen for the hardware."""

    def record(self) -> dict[str, str]:
        """Return the parts that results depend on, as plain data: ``backend``, ``precision`` and ``device``."""
        return {"backend": self.backend, "precision": self.precision_name, "device": self.device_name}

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        import torch

        return torch.device(self.device_name)

    @property
    def precision(self) -> torch.dtype:
        """The dtype of matrix products."""
        import torch

        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.precision_name]

    def autocast(self) -> torch.autocast:
        """Return the autocast context for forward passes."""
        import torch

        lower = torch.bfloat16 if self.precision is torch.float32 else self.precision
        return torch.autocast(self.device.type, lower, enabled=self.precision is not torch.float32)

    @property
    def scales_gradients(self) -> bool:
        """Whether training scales the loss; small gradients would underflow to 0 in float16."""
        return self.precision_name == "float16"

    @property
    def memory_format(self) -> torch.memory_format:
        """The memory format of the network's weights and input."""
        import torch

        return torch.channels_last_3d if self.channels_last else torch.contiguous_format


def choose_runtime(config: RuntimeConfig, *, local_rank: int | None = None) -> Runtime:
    """Choose device and precision; a chosen GPU becomes torch's current device.

    Args:
        config: the user's request.
        local_rank: rank of this process among the training processes on this host; it uses the GPU of that index.
            None if there is only one process.

    Raises:
        DeviceError: the requested device does not exist, or several processes request one GPU.
    """
    _set_deterministic(on=config.deterministic)
    _set_tf32(on=config.tf32)
    device, device_reason = _choose_device(_own_device(config.device, local_rank))
    if local_rank is not None and device.type == "cuda":
        device_reason = f"device {device}: the GPU of process {local_rank} of this host"
    if device.type == "cuda":
        import torch

        torch.cuda.set_device(device)  # for later calls that do not name a device
    precision, precision_reason = _choose_precision(config.precision, device)
    if precision == "float32" and device.type == "cuda":
        precision_reason += "; " + _tf32_in_words(on=config.tf32)
    return Runtime(
        device_name=str(device),
        precision_name=precision,
        channels_last=config.channels_last,
        reasons=(device_reason, precision_reason),
        precision_asked_for=config.precision != "auto",
    )


def below_gpu(runtime: Runtime) -> Runtime:
    """Return the CPU runtime to fall back to when a GPU is out of memory.

    A precision that the user chose is kept, and so is float32; otherwise the CPU's fastest precision is used.
    """
    if runtime.precision_asked_for or runtime.precision_name == "float32":
        return replace(runtime, device_name="cpu")
    return replace(runtime, device_name="cpu", precision_name=cpu_precision()[0])


def require_device(name: str) -> None:
    """Check that a device exists, without allocating memory on it.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        DeviceError: the device does not exist.
    """
    _choose_device(name)


def _set_deterministic(*, on: bool) -> None:
    """Switch torch's deterministic algorithms on or off, as described in PyTorch's notes on reproducibility.

    Their results do not depend on the order of GPU threads.
    """
    import torch

    if on:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read on the first use of cuBLAS
        torch.backends.cudnn.benchmark = False
    if torch.are_deterministic_algorithms_enabled() != on:  # the call imports torch's compiler, which takes a second
        torch.use_deterministic_algorithms(on)
    torch.backends.cudnn.deterministic = on


def _set_tf32(*, on: bool) -> None:
    """Choose between TF32 and full float32 for convolutions of float32 on a GPU; matrix products stay in float32.

    The rest of a network, and everything that autocast leaves in float32, is not affected.
    """
    import torch

    # torch refuses to read this flag once its successor (conv.fp32_precision) was set, and torch itself reads it.
    if torch.backends.cudnn.allow_tf32 != on:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.cudnn.allow_tf32 = on


def _tf32_in_words(*, on: bool) -> str:
    return (
        "convolutions round their inputs to TF32 where the GPU can (runtime.tf32)"
        if on
        else "convolutions do not use TF32 (runtime.tf32)"
    )


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    names = ("znormseg", "torch", "monai", "openvino", "nibabel", "numpy")
    return {"python": platform.python_version(), **{name: installed_version(name) or "unknown" for name in names}}


def machine() -> str:
    """Describe processor, cores and GPU in one line."""
    import torch

    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor()}, {cores()} cores{gpu}"


def _own_device(wanted: str, local_rank: int | None) -> str:
    """Return the device for one of several training processes on a host."""
    import torch

    if local_rank is None or wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return wanted
    if _is_cuda_index(wanted):
        raise DeviceError(
            f"device {wanted}: each process that torchrun starts takes its own GPU. Use --set runtime.device=cuda."
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
        return torch.device("cpu"), "device cpu: requested"
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
    return torch.device("cuda", device.index or 0), f"device {wanted}: requested"


def _choose_precision(wanted: WantedPrecision, device: torch.device) -> tuple[Precision, str]:
    if wanted != "auto":
        return wanted, f"precision {wanted}: requested"
    if device.type == "cuda":
        import torch

        # Emulated bfloat16 on older GPUs is slower than float32.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", "precision bfloat16: the GPU supports it"
        if torch.cuda.get_device_capability(device) >= TENSOR_CORES:
            return (
                "float16",
                "precision float16 with a scaled loss: the GPU has tensor cores, but does not support bfloat16",
            )
        return "float32", "precision float32: the GPU has neither bfloat16 nor tensor cores"
    return cpu_precision()


def cpu_precision() -> tuple[Precision, str]:
    """Return the precision that this CPU multiplies fastest, and the reason."""
    if found := sorted(bf16_flags()):
        return "bfloat16", f"precision bfloat16: the CPU has {', '.join(found)}"
    if BF16_FLAGS & cpu_flags():
        return "float32", f"precision float32: {_isa_limit()} disables bfloat16 arithmetic"
    return "float32", "precision float32: the CPU has no bfloat16 arithmetic, so autocast would slow it down"


def bf16_flags() -> set[str]:
    """Return the instruction sets with bfloat16 products that the CPU has and oneDNN's variables allow."""
    return set() if _isa_limit(_BELOW_BF16) else BF16_FLAGS & cpu_flags()


def limit_below_avx512() -> str | None:
    """Return the setting that keeps oneDNN below AVX-512, such as ``ONEDNN_MAX_CPU_ISA=AVX2``, or None."""
    return _isa_limit(_BELOW_AVX512)


def without_avx2() -> str | None:
    """Return why AVX2 is unavailable, in words; None if it is available or the system does not list the CPU's flags.

    OpenVINO's normalisation kernels need AVX2: without it, the networks do not compile (measured with OpenVINO 2026.4
    on an EPYC).
    """
    flags = cpu_flags()
    if flags and "avx2" not in flags:
        return "the CPU lacks it"
    limit = _isa_limit(_BELOW_AVX2)
    return f"{limit} disables it" if limit else None


def _isa_limit(among: Collection[str] = frozenset(_BELOW_BF16)) -> str | None:
    """Return oneDNN's variable as ``NAME=VALUE`` if its value is in ``among``; case is ignored, as in oneDNN."""
    for variable in ISA_VARIABLES:
        if value := os.environ.get(variable):
            return f"{variable}={value}" if value.upper() in among else None
    return None


def cpu_flags() -> set[str]:
    """Return the CPU's instruction sets by their Linux names; empty if the system does not list them."""
    return set(_cpuinfo("flags").split())


def processor() -> str:
    """Return the name of the CPU."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(key: str) -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(key):
                return line.partition(":")[2].strip()
    return ""


def installed_version(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _is_cuda_index(device: str) -> bool:
    kind, _, index = device.partition(":")
    return kind == "cuda" and index.isdecimal()
