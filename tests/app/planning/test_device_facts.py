"""The facts about a device that a plan is based on, without opening the GPU in the planning process."""

from __future__ import annotations

import subprocess

import pytest
import torch

from app.errors import DeviceError
from app.planning import device_facts as module
from app.planning.device_facts import DeviceFacts, device_facts
from app.system.device import RuntimeConfig


@pytest.fixture
def with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose GPU this process must not open; other processes see none."""

    def opened(*_: object) -> None:
        raise AssertionError("opened in this process")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", opened)
    monkeypatch.setattr(module, "choose_runtime", opened)


def test_without_a_gpu_no_process_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "app.planning.device_facts.subprocess.run", lambda *_, **__: pytest.fail("a process was started")
    )
    assert device_facts(RuntimeConfig(device="cpu", precision="bfloat16")) == DeviceFacts(half=True)
    assert device_facts(RuntimeConfig(precision="float32")) == DeviceFacts()


@pytest.mark.usefixtures("with_a_gpu")
def test_a_gpu_is_queried_in_another_process() -> None:
    assert device_facts(RuntimeConfig(precision="bfloat16")) == DeviceFacts(half=True)


@pytest.mark.usefixtures("with_a_gpu")
def test_a_gpu_that_the_other_process_cannot_use_is_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = subprocess.CompletedProcess([], 1, stdout="", stderr="CUDA-capable device(s) is/are busy")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: ended)
    with pytest.raises(DeviceError, match=r"is/are busy\. If another process holds it, wait"):
        device_facts(RuntimeConfig())


@pytest.mark.usefixtures("with_a_gpu")
def test_a_device_that_the_other_process_cannot_find_is_an_error() -> None:
    with pytest.raises(DeviceError, match="device cuda:1: "):
        device_facts(RuntimeConfig(device="cuda:1"))
