"""The doctor, on made-up facts about machines with GPUs, and on the real facts of this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.doctor.findings import DoctorFinding, examine
from app.doctor.probe import Gpu, Package, Place, Probe, probe
from app.system.resources import MemoryLimit

Call = Callable[..., Any]

A100 = Gpu(name="A100", capability=(8, 0), memory_bytes=40 * 10**9)
MADE_UP = Probe(
    torch="2.10.0+cu128",
    torch_cuda="12.8",
    torch_architectures=("sm_75", "sm_80", "sm_90", "sm_120"),
    gpu_in_machine=True,
    driver="570.1",
    driver_cuda=(12, 8),
    gpus=(A100,),
    processor="a CPU",
    bf16_flags=(),
    cores=8,
    quota=None,
    memory=(MemoryLimit(name="MemAvailable", free_bytes=64 * 10**9),),
    shm_bytes=64 * 10**6,
    torch_threads=8,
    places=(Place(role="cache", path="/cache", free_bytes=10**12, writable=True),),
    packages=(Package(name="monai", least="1.6", installed="1.6.0"),),
)
SEVERAL = replace(MADE_UP, gpus=(A100, A100))
CPU_ONLY = replace(MADE_UP, torch="2.10.0+cpu", torch_cuda=None, gpus=(), gpu_in_machine=False, driver_cuda=None)


def finding(made_up: Probe, topic: str) -> DoctorFinding:
    """The one finding on a topic."""
    (found,) = [found for found in examine(made_up) if found.topic == topic]
    return found


def test_a_healthy_machine_passes_every_check() -> None:
    assert {found.level for found in examine(MADE_UP)} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        ({"gpus": (), "torch": "2.10.0+cpu", "torch_cuda": None}, "problem", "is built without CUDA"),
        ({"gpus": (), "driver_cuda": None}, "problem", "no driver"),
        ({"gpus": (), "driver_cuda": (11, 8)}, "problem", "supports CUDA 11.8, torch 2.10.0+cu128 is built for 12.8"),
        ({"gpus": (), "environment": {"CUDA_VISIBLE_DEVICES": ""}}, "problem", "CUDA_VISIBLE_DEVICES="),
        ({"driver_cuda": (12, 4)}, "note", "A100 (40 GB)"),
        ({"driver_cuda": (13, 0)}, "ok", "A100 (40 GB)"),
        ({"gpus": (), "gpu_in_machine": False}, "note", "computes on the CPU"),
    ],
)
def test_the_driver_is_compared_with_torch(changes: dict[str, Any], level: str, words: str) -> None:
    found = finding(replace(MADE_UP, **changes), "GPU")
    assert (found.level, words in found.found) == (level, True), found


@pytest.mark.parametrize(
    ("capability", "architectures", "level"),
    [
        ((8, 6), ("sm_80",), "ok"),  # machine code runs on later minors of its major
        ((9, 0), ("sm_80",), "problem"),
        ((9, 0), ("sm_80", "compute_80"), "ok"),  # the driver compiles it
        ((7, 0), ("sm_75", "sm_80"), "problem"),
        ((6, 1), ("compute_75",), "problem"),
        ((9, 0), ("sm_90a",), "ok"),
        ((12, 0), ("sm_90", "sm_120"), "ok"),
        ((12, 1), ("compute_120a",), "problem"),  # only for that GPU
    ],
)
def test_a_gpu_needs_binary_code_or_ptx(
    capability: tuple[int, int], architectures: tuple[str, ...], level: str
) -> None:
    gpu = replace(A100, capability=capability)
    found = finding(replace(MADE_UP, gpus=(gpu,), torch_architectures=architectures), "GPU architecture")
    assert (found.level, bool(found.remedy)) == (level, level != "ok")


@pytest.mark.parametrize(
    ("made_up", "level"),
    [
        (MADE_UP, "ok"),
        (replace(MADE_UP, gpus=(replace(A100, capability=(7, 5)),)), "note"),
        (CPU_ONLY, "note"),
        (replace(CPU_ONLY, bf16_flags=("amx_bf16",)), "ok"),
    ],
)
def test_bfloat16_is_supported_where_the_hardware_multiplies_it(made_up: Probe, level: str) -> None:
    assert finding(made_up, "bfloat16").level == level


@pytest.mark.parametrize(
    ("capability", "precision"),
    [((9, 0), "it"), ((8, 0), "it"), ((7, 5), "float16"), ((7, 0), "float16"), ((6, 1), "float32")],
)
def test_the_precision_that_auto_uses_on_a_gpu_is_reported(capability: tuple[int, int], precision: str) -> None:
    found = finding(replace(MADE_UP, gpus=(replace(A100, capability=capability),)), "bfloat16")
    assert found.found.endswith(f"precision auto uses {precision}")
    assert ("twice the memory" in found.remedy) is (precision == "float32")


@pytest.mark.parametrize(("gigabytes", "level"), [(1, "warning"), (4, "note"), (8, "ok")])
def test_low_memory_is_reported_with_what_limits_it(gigabytes: int, level: str) -> None:
    limit = MemoryLimit(name="control group (memory.max)", free_bytes=gigabytes * 10**9)
    found = finding(replace(MADE_UP, memory=(limit, *MADE_UP.memory)), "memory")
    assert (found.level, "memory.max" in found.found) == (level, True)


@pytest.mark.parametrize(
    ("changes", "level", "remedy"),
    [
        ({"torch_threads": 16}, "warning", "OMP_NUM_THREADS=8"),
        ({"quota": 1.5}, "warning", "OMP_NUM_THREADS=2"),
        ({"quota": 0.5, "torch_threads": 1}, "ok", ""),
        ({"environment": {"OMP_NUM_THREADS": "many"}}, "warning", "OMP_NUM_THREADS=8"),
        ({"environment": {"OMP_NUM_THREADS": "1"}, "torch_threads": 1, "gpus": ()}, "note", "OMP_NUM_THREADS=8"),
        ({"environment": {"OMP_NUM_THREADS": "1"}, "torch_threads": 1}, "ok", ""),
        ({"environment": {"OMP_NUM_THREADS": "8,1"}}, "ok", ""),
    ],
)
def test_threads_are_compared_with_cores_and_quota(changes: dict[str, Any], level: str, remedy: str) -> None:
    found = finding(replace(MADE_UP, **changes), "threads")
    assert (found.level, remedy in found.remedy) == (level, True)


@pytest.mark.parametrize(("policy", "told"), [("ACTIVE", True), ("passive", False)])
def test_busy_waiting_threads_are_reported(policy: str, told: bool) -> None:
    found = examine(replace(MADE_UP, environment={"OMP_WAIT_POLICY": policy}))
    assert any(one.topic == "OMP_WAIT_POLICY" for one in found) is told


@pytest.mark.parametrize(
    ("place", "level"),
    [
        (Place(role="cache", path="/c", free_bytes=10**12, writable=False), "warning"),
        (Place(role="given", path="/d", free_bytes=10**12, writable=False), "note"),
        (Place(role="current folder", path="/d", free_bytes=5 * 10**8, writable=True), "problem"),
        (Place(role="cache", path="/c", free_bytes=5 * 10**9, writable=True), "warning"),
        (Place(role="cache", path="/c", free_bytes=None, writable=True), "ok"),
    ],
)
def test_folders_are_checked_for_free_space_and_write_permission(place: Place, level: str) -> None:
    topic = "cache" if place.role == "cache" else "disk"
    assert finding(replace(MADE_UP, places=(place,)), topic).level == level


@pytest.mark.parametrize(("version", "told"), [("2.9.1+cu128", True), ("2.10.0", False), ("2.8.0", False)])
def test_torch_2_9_is_reported_as_slow(version: str, told: bool) -> None:
    assert any(found.topic == "torch 2.9" for found in examine(replace(MADE_UP, torch=version))) is told


@pytest.mark.parametrize(
    ("installed", "level"), [("1.6.0", "ok"), ("1.10", "ok"), ("1.5.9", "problem"), (None, "problem")]
)
def test_packages_are_compared_with_the_requirements(installed: str | None, level: str) -> None:
    package = Package(name="monai", least="1.6", installed=installed)
    assert finding(replace(MADE_UP, packages=(package,)), "packages").level == level


def test_every_problem_found_on_this_machine_has_a_remedy(tmp_path: Path) -> None:
    looked = probe([tmp_path / "not" / "there"])
    findings = examine(looked)
    assert [place.role for place in looked.places] == ["cache", "current folder", "given"]
    assert {package.name for package in looked.packages} >= {"torch", "monai", "numpy"}
    assert [found for found in findings if found.level in ("warning", "problem") and not found.remedy] == []


@pytest.mark.parametrize(("installed", "code"), [("1.6.0", 0), ("1.5", 7)])
def test_the_command_exits_with_7_if_it_finds_a_problem(
    installed: str, code: int, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = Package(name="monai", least="1.6", installed=installed)
    monkeypatch.setattr("app.doctor.probe.probe", lambda folders: replace(MADE_UP, packages=(package,)))
    ended = znormseg("doctor", "--json")
    assert (ended.code, json.loads(ended.out)["ok"]) == (code, code == 0)
    assert ("problem  packages: monai 1.5" in znormseg("doctor").out) is (code != 0)


@pytest.mark.parametrize(("shm_bytes", "level"), [(64 * 10**6, "note"), (None, "note"), (10**9, "ok")])
def test_several_gpus_with_little_shared_memory_are_noted(shm_bytes: int | None, level: str) -> None:
    found = finding(replace(SEVERAL, shm_bytes=shm_bytes), "/dev/shm")
    assert (found.level, "--shm-size" in found.remedy) == (level, level == "note")


def test_a_noexec_cache_is_a_warning_only_with_a_gpu() -> None:
    noexec = replace(MADE_UP, kernel_cache_noexec="/tmp/triton")
    assert finding(noexec, "compiled kernels").level == "warning"
    assert "compiled kernels" not in {found.topic for found in examine(replace(noexec, gpus=()))}


def test_a_noexec_folder_for_compiled_kernels_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    assert probe().kernel_cache_noexec is None
    real = os.statvfs
    monkeypatch.setattr(
        os,
        "statvfs",
        lambda path: SimpleNamespace(
            f_flag=os.ST_NOEXEC,
            **{name: getattr(real(path), name) for name in ("f_bavail", "f_frsize", "f_blocks", "f_bfree")},
        ),
    )
    assert probe().kernel_cache_noexec == str(tmp_path / "triton")
