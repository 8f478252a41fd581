"""Prediction and validation on tensors that pretend to be on a GPU: how often the host waits, and what it uploads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("fake_cuda_inference.py")
FAST = (
    "predict",
    "predict, mirrored",
    "predict, float16",
    "predict, presence",
    "predict, padded, whole volume",
    "validate",
    "validate, ema, presence",
    "presence, brain",
    "presence, validate slabs",
)
SLOW = (
    "predict, size of a brain",
    "predict, unet",
    "predict, large",
    "predict, segresnet",
    "predict, float32",
    "predict, contiguous",
    "predict, two networks",
    "predict, resampled",
    "predict, logits in float16",
    "validate, size of a brain",
    "validate, large",
    "validate, float16",
    "validate, float32",
    "presence, slabs",
    "presence, two networks",
    "presence, validate brain",
)
#: A presence network sees a brain in one pass.
WHOLE_BRAIN = ("presence, brain", "presence, validate brain")
#: Bytes of everything but the volume and its mask or label map: the weights of windows along their sides.
LITTLE = 10_000

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="changes torch's library in memory"),
]


def run(names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    ended = subprocess.run([sys.executable, SCRIPT, *names], text=True, capture_output=True, check=False)
    lines = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert [line["name"] for line in lines] == list(names), ended.stderr
    assert [line["error"] for line in lines if "error" in line] == []
    return {line["name"]: line["found"] for line in lines}


@pytest.fixture(scope="module")
def fast() -> dict[str, dict[str, Any]]:
    return run(FAST)


@pytest.fixture(scope="module")
def slow() -> dict[str, dict[str, Any]]:
    return run(SLOW)


def check(found: dict[str, Any], networks: int = 1, flips: int = 1, fewest_passes: int = 2) -> None:
    """The limits: one wait a volume, none a window; one upload, from pinned memory."""
    assert found["passes"] >= fewest_passes, "several windows, or the rest shows nothing"
    assert found["waits"] == 1, found["waits_at"]
    assert next(iter(found["waits_at"])).startswith("download")
    assert found["pageable_bytes"] == 0, found["uploads"]
    assert found["uploaded_bytes"] <= 1.25 * found["volume_bytes"] + LITTLE * networks * flips, found["uploads"]
    assert found["devices"] == ["cuda:0"]


@pytest.mark.parametrize("name", FAST)
def test_a_volume_is_uploaded_once_and_waited_for_once(name: str, fast: dict[str, dict[str, Any]]) -> None:
    check(fast[name], flips=8 if "mirrored" in name else 1, fewest_passes=1 if name in WHOLE_BRAIN else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_this_also_holds_at_full_size_and_for_every_network(name: str, slow: dict[str, dict[str, Any]]) -> None:
    check(slow[name], networks=2, flips=8, fewest_passes=1 if name in WHOLE_BRAIN else 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict, size of a brain", "predict, unet"])
def test_prediction_copies_almost_nothing_into_another_layout(name: str, slow: dict[str, dict[str, Any]]) -> None:
    assert slow[name]["layout_bytes"] < 0.02 * slow[name]["moved_bytes"]


@pytest.mark.slow
def test_falling_back_to_blending_on_the_cpu_mixes_no_devices() -> None:
    (found,) = run(("predict, blended on the CPU",)).values()
    assert found["devices"] == ["cuda:0"]
