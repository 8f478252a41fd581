"""Choose the backend and device for a trained network, and give the reasons."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal, get_args

from app.errors import DeviceError
from app.system.device import Runtime, RuntimeConfig, choose_runtime, cpu_precision, limit_below_avx512, without_avx2

Backend = Literal["auto", "torch", "openvino"]

#: Device files of the GPU drivers that torch supports: NVIDIA, NVIDIA Tegra, AMD, and either under WSL.
_DRIVERS: Final = ("nvidiactl", "nvidia0", "nvhost-gpu", "kfd", "dxg")


def choose_backend(wanted: str, config: RuntimeConfig, *, devices: Path = Path("/dev")) -> Runtime:
    """Choose the backend, device and precision for a trained network.

    ``auto`` uses torch on a GPU. On a CPU it uses OpenVINO if installed, which is faster there and does not need torch
    to be imported. Everything that scores a trained network calls this function, as ``predict`` does, so that all
    results on one machine are computed in the same way: different backends and precisions round differently.

    Args:
        wanted: ``auto``, ``torch`` or ``openvino``.
        config: the requested device and precision.
        devices: folder of the system's device files.

    Raises:
        DeviceError: the requested backend, device or precision is not available.
        ValueError: ``wanted`` is not one of the three.
    """
    if wanted not in get_args(Backend):
        raise ValueError(f"{wanted!r} is not one of {', '.join(get_args(Backend))}")
    if wanted == "openvino":
        _require_openvino(config)
        return _by_openvino(config, "backend openvino: requested")
    if wanted == "torch":
        reason = "requested"
    elif config.device not in ("auto", "cpu"):
        reason = f"the device is {config.device}"
    elif config.precision == "float16":
        reason = "float16 is requested"
    elif config.device == "auto" and may_have_gpu(devices) and choose_runtime(config).device_name != "cpu":
        reason = "the device is a GPU"
    elif not _is_installed():
        reason = "OpenVINO, faster on a CPU, is not installed"
    elif why := without_avx2():
        reason = f"OpenVINO, faster on a CPU, needs AVX2, and {why}"
    else:
        return _by_openvino(config, "backend openvino: on a CPU it is faster than torch")
    runtime = choose_runtime(config)
    return replace(runtime, reasons=(f"backend torch: {reason}", *runtime.reasons))


def _require_openvino(config: RuntimeConfig) -> None:
    if config.device not in ("auto", "cpu"):
        raise DeviceError(
            f"device {config.device}: znormseg uses OpenVINO only on the CPU. Leave out --device or --backend openvino."
        )
    if config.precision == "float16":
        raise DeviceError("precision float16: OpenVINO computes in float32 or bfloat16 on a CPU. Use one of these.")
    if not _is_installed():
        raise DeviceError("backend openvino: the package is not installed. Use --backend torch, or install openvino.")
    if why := without_avx2():
        raise DeviceError(f"backend openvino: OpenVINO needs AVX2, and {why}. Use --backend torch.")


def may_have_gpu(devices: Path = Path("/dev")) -> bool:
    """Return whether a GPU driver is present, so that importing torch to look for a GPU is worthwhile.

    The answer is True on systems without a folder of device files.
    """
    return not devices.is_dir() or any((devices / name).exists() for name in _DRIVERS)


def _is_installed() -> bool:
    return importlib.util.find_spec("openvino") is not None


def _by_openvino(config: RuntimeConfig, reason: str) -> Runtime:
    device = "device cpu: " + ("requested" if config.device == "cpu" else "no GPU driver found")
    if config.precision == "auto":
        precision, why = cpu_precision()
    else:
        assert config.precision != "float16"
        if config.precision == "bfloat16" and (limit := limit_below_avx512()):
            raise DeviceError(
                f"precision bfloat16: OpenVINO needs AVX-512 for it, and {limit} disables that. Unset the "
                "variable, or use float32."
            )
        precision, why = config.precision, f"precision {config.precision}: requested"
    return Runtime(
        device_name="cpu",
        precision_name=precision,
        channels_last=False,
        reasons=(reason, device, why),
        backend="openvino",
        precision_asked_for=config.precision != "auto",
    )
