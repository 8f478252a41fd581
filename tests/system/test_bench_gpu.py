"""The table of bench/gpu.py, from figures that are made up."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"
MACHINE: dict[str, Any] = {
    "machine": "a machine",
    "versions": {"torch": "2.13.0"},
    "cuda": None,
    "cudnn": None,
    "triton": None,
    "nnunetv2": None,
    "bfloat16_tflops": 1.0,
    "bandwidth_gb_s": 1.0,
}


@pytest.fixture(scope="module")
def gpu() -> Any:
    spec = importlib.util.spec_from_file_location("bench_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("version", "why"), [(None, "nnunetv2 is not installed"), ("2.6.2", "no part for it")])
def test_the_table_says_why_nnunet_is_not_measured(gpu: Any, version: str | None, why: str) -> None:
    (row,) = [line for line in gpu.report({"machine": {**MACHINE, "nnunetv2": version}}) if "nnU-Net" in line]
    assert "not measured" in row
    assert why in row


def test_measurements_that_did_not_run_are_in_the_table_with_the_reason(gpu: Any) -> None:
    found = {"machine": MACHINE, "train laptop ours": {"error": "stopped after 100 s"}, "doctor": {}}
    lines = gpu.report(found)
    assert "| training laptop | stopped after 100 s | | | |" in lines
    assert "| doctor | not run | | | |" in lines


def test_a_machine_that_cannot_be_examined_gives_one_line(gpu: Any) -> None:
    assert gpu.report({"machine": {"error": "no GPU"}}) == ["The machine could not be examined: no GPU"]
