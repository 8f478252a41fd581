"""Device and precision: requests are met or refused, and automatic choices come with their reasons."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from app.errors import DeviceError
from app.system.device import (
    Runtime,
    RuntimeConfig,
    below_gpu,
    choose_runtime,
    cpu_precision,
    machine,
    require_device,
    versions,
)

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
with_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


def test_the_cpu_is_used_if_requested() -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    assert runtime.device == torch.device("cpu")
    assert runtime.reasons[0] == "device cpu: requested"


@without_cuda
def test_without_cuda_auto_uses_the_cpu_and_says_why() -> None:
    runtime = choose_runtime(RuntimeConfig())
    assert runtime.device == torch.device("cpu")
    assert runtime.reasons[0] == "device cpu: no CUDA device found"


@without_cuda
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_without_a_gpu_is_refused_with_a_remedy(device: str) -> None:
    with pytest.raises(DeviceError, match=f"device {device}: .*--device cpu"):
        choose_runtime(RuntimeConfig(device=device))


@with_cuda
def test_with_cuda_auto_uses_the_first_device_and_names_it() -> None:
    runtime = choose_runtime(RuntimeConfig())
    assert runtime.device == torch.device("cuda", 0)
    assert torch.cuda.get_device_name(0) in runtime.reasons[0]


@with_cuda
def test_a_cuda_device_beyond_the_last_is_refused_with_the_device_count() -> None:
    with pytest.raises(DeviceError, match=f"there are {torch.cuda.device_count()} CUDA devices"):
        choose_runtime(RuntimeConfig(device="cuda:99"))


@pytest.fixture
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that seems to have four."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_each_process_of_a_host_uses_its_own_gpu(device: str) -> None:
    runtime = choose_runtime(RuntimeConfig(device=device), local_rank=3)
    assert runtime.device == torch.device("cuda", 3)
    assert runtime.reasons[0] == "device cuda:3: the GPU of process 3 of this host"


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(("device", "local_rank", "index"), [("cuda:1", None, 1), ("cuda", None, 0), ("auto", 2, 2)])
def test_the_chosen_gpu_is_made_current_before_its_capabilities_are_queried(
    device: str, local_rank: int | None, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[object] = []
    monkeypatch.setattr(torch.cuda, "set_device", done.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: done.append("asked") or True)
    choose_runtime(RuntimeConfig(device=device), local_rank=local_rank)
    assert done == [torch.device("cuda", index), "asked"]


@pytest.mark.usefixtures("four_gpus")
def test_checking_a_device_does_not_select_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    require_device("cuda:3")
    with pytest.raises(DeviceError, match="device cuda:4: there are 4 CUDA devices"):
        require_device("cuda:4")
    assert taken == []


@pytest.mark.usefixtures("four_gpus")
def test_a_process_without_its_own_gpu_is_refused_with_the_device_count() -> None:
    with pytest.raises(DeviceError, match="process 4 of this host has no GPU: there are 4"):
        choose_runtime(RuntimeConfig(), local_rank=4)


@pytest.mark.usefixtures("four_gpus")
def test_one_gpu_for_several_processes_is_refused() -> None:
    with pytest.raises(DeviceError, match="device cuda:1: each process"):
        choose_runtime(RuntimeConfig(device="cuda:1"), local_rank=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_the_requested_precision_is_used(precision: Any) -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=precision))
    assert runtime.precision is getattr(torch, precision)
    assert runtime.reasons[1] == f"precision {precision}: requested"


@pytest.mark.parametrize(
    ("on_gpu", "asked_for", "on_cpu"),
    [("float32", False, "float32"), ("float16", True, "float16"), ("float16", False, "bfloat16")],
)
def test_the_cpu_fallback_has_the_requested_precision_but_at_least_float32(
    *, on_gpu: Any, asked_for: bool, on_cpu: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setattr("app.system.device.cpu_flags", lambda: {"amx_bf16"})
    given = Runtime(
        device_name="cuda:0", precision_name=on_gpu, channels_last=True, reasons=(), precision_asked_for=asked_for
    )
    found = below_gpu(given)
    assert (found.device_name, found.precision_name) == ("cpu", on_cpu)


@pytest.mark.parametrize(
    ("limit", "precision"),
    [("SSE41", "float32"), ("avx2", "float32"), ("AVX512_CORE", "float32"), ("AVX512_CORE_BF16", "bfloat16")],
)
@pytest.mark.parametrize("variable", ["ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"])
def test_auto_respects_the_instruction_set_limit_of_onednn(
    variable: str, limit: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.system.device.cpu_flags", lambda: {"avx512_bf16"})
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.setenv(variable, limit)
    found, reason = cpu_precision()
    assert found == precision
    assert (f"{variable}={limit} disables bfloat16 arithmetic" in reason) == (precision == "float32")


def test_a_requested_precision_is_distinguished_from_a_chosen_one() -> None:
    assert choose_runtime(RuntimeConfig(device="cpu", precision="float32")).precision_asked_for
    assert not choose_runtime(RuntimeConfig(device="cpu")).precision_asked_for


def test_the_precision_chosen_comes_with_its_reason() -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    name = str(runtime.precision).removeprefix("torch.")
    assert runtime.reasons[1].startswith(f"precision {name}: ")


@pytest.mark.parametrize(
    ("precision", "result"), [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_a_matrix_product_under_autocast_has_the_chosen_precision(precision: Any, result: torch.dtype) -> None:
    runtime = choose_runtime(RuntimeConfig(device="cpu", precision=precision))
    with runtime.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is result


@pytest.mark.parametrize(
    ("bfloat16", "capability", "precision"),
    [(True, (8, 0), torch.bfloat16), (False, (7, 5), torch.float16), (False, (6, 1), torch.float32)],
)
def test_on_a_gpu_auto_uses_the_precision_with_fast_multiplication(
    *, bfloat16: bool, capability: tuple[int, int], precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("is_available", True),
        ("get_device_name", "a GPU"),
        ("is_bf16_supported", bfloat16),
        ("get_device_capability", capability),
        ("set_device", None),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    runtime = choose_runtime(RuntimeConfig())
    assert runtime.precision is precision
    assert runtime.scales_gradients == (precision is torch.float16)


@pytest.mark.parametrize(("wanted", "format_"), [(True, torch.channels_last_3d), (False, torch.contiguous_format)])
def test_the_requested_memory_format_is_used(wanted: bool, format_: torch.memory_format) -> None:
    assert choose_runtime(RuntimeConfig(device="cpu", channels_last=wanted)).memory_format is format_


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "CPU", "mps"])
def test_an_unknown_device_type_is_refused_with_the_valid_ones(device: str) -> None:
    with pytest.raises(ValueError, match=r"runtime\.device: auto, cpu, cuda or cuda:N"):
        RuntimeConfig(device=device)


def test_versions_name_every_package_that_a_result_depends_on() -> None:
    found = versions()
    assert set(found) == {"python", "znormseg", "torch", "monai", "openvino", "nibabel", "numpy"}
    assert "unknown" not in found.values()


def test_the_machine_is_described_in_one_line_with_its_cores() -> None:
    assert " cores" in machine()
    assert "\n" not in machine()


@pytest.mark.parametrize("wanted", [True, False])
def test_operations_are_deterministic_on_request(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        choose_runtime(RuntimeConfig(device="cpu", deterministic=wanted))
        assert torch.are_deterministic_algorithms_enabled() is wanted
        assert torch.backends.cudnn.deterministic is wanted
        assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) is wanted
    finally:
        choose_runtime(RuntimeConfig(device="cpu"))
