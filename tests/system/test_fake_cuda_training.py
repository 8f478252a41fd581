"""A training step on tensors that only pretend to be on a GPU: where they are, what the host reads, what it uploads.

The limits here are part of what the program promises: raise one only on purpose.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).with_name("fake_cuda_training.py")
#: Times that the host may wait for the GPU in a step and the reading of its loss; training reads every tenth.
MOST_WAITS = 1
#: Bytes that a step may upload if its cases are in GPU memory.
MOST_BYTES = 1e6
#: A step of the config `resunet-znorm` whose patches are uploaded: two crops in float16 with their label codes.
BYTES_OF_TWO_PATCHES = 2 * 128**3 * 9
#: Share of a step's memory traffic that only changes layouts; instance norms answer NCDHW, as torch's kernel does.
MOST_LAYOUT_SHARE = 0.3

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="changes torch's library in memory"),
]

Found = dict[str, dict[str, Any]]


def run(kind: str) -> Found:
    ended = subprocess.run([sys.executable, SCRIPT, kind], capture_output=True, text=True, check=False, timeout=1800)
    if "mprotect" in ended.stderr:
        pytest.skip("this system does not let a process change its code")
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    assert lines, ended.stderr
    assert [line["name"] + ": " + line["error"] for line in lines if "error" in line] == []
    return {line["name"]: line["found"] for line in lines}


@pytest.fixture(scope="module")
def fast() -> Found:
    return run("--fast")


@pytest.fixture(scope="module")
def slow() -> Found:
    return run("--slow")


def check(found: Found) -> None:
    """Nothing is on another device, and no step waits or uploads more than it may."""
    for name, counts in found.items():
        assert counts["devices"] == ["cuda:0"], name
        assert counts["ndhwc"] == (name != "contiguous"), name
        assert counts["waits_while_queued"] == 0, (name, counts["waits_at"])
        assert counts["waits"] <= MOST_WAITS, (name, counts["waits_at"])
        assert counts["pageable_bytes"] == 0, (name, counts["uploads"])
        if name not in ("patches uploaded", "synthetic patches"):
            assert counts["uploaded_bytes"] < MOST_BYTES, (name, counts["uploads"])


def test_no_step_synchronises_with_the_gpu_or_repeats_an_upload(fast: Found) -> None:
    check({name: counts for name, counts in fast.items() if name != "a read in the step"})


def test_a_read_back_within_a_step_is_detected(fast: Found) -> None:
    counts = fast["a read in the step"]
    assert counts["waits_while_queued"] > 0
    assert any(place.startswith("download at ") for place in counts["waits_at"])


def test_layouts_change_only_as_often_as_the_norms_require(fast: Found) -> None:
    counts = fast["resunet-znorm"]
    assert counts["layout_bytes"] <= MOST_LAYOUT_SHARE * counts["moved_bytes"]


@pytest.mark.slow
def test_every_config_rule_architecture_and_option_stays_within_the_limits(slow: Found) -> None:
    check(slow)


@pytest.mark.slow
def test_patches_of_non_resident_cases_are_uploaded_once_and_compactly(slow: Found) -> None:
    assert slow["patches uploaded"]["uploaded_bytes"] < BYTES_OF_TWO_PATCHES + MOST_BYTES
