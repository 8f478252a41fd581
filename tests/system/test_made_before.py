"""Models from an earlier version still load, and predict the same label maps as they did then.

tests/system/made_before has a run, an ensemble and two exports; its README says how they were made.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from data.phantoms.files import write_phantoms

Call = Callable[..., Any]

MADE = Path(__file__).with_name("made_before")
PHANTOM = "BraTS2021_00000"
#: Share of the tumour's voxels whose label may differ. Convolutions sum in another order on another processor or with
#: another backend; that rounding moves a logit across 0 only where it is almost 0.
MAY_DIFFER = 0.01


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantom that was predicted then."""
    folder = tmp_path_factory.mktemp("made_before")
    write_phantoms(folder, 1, seed=9, spacing_mm=5.0)
    return folder


def skip_without(backend: str, request: pytest.FixtureRequest) -> None:
    """Skip a test of OpenVINO where it cannot compute."""
    if backend == "openvino":
        request.getfixturevalue("openvino_computes")


def labels(path: Path) -> Any:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj)


def labels_of_then(name: str) -> Any:
    """The label map that a model gave then, from its runs of equal labels in C order: pairs of label and length."""
    content = json.loads((MADE / "predicted" / f"{name}.json").read_text(encoding="utf-8"))
    values, lengths = np.array(content["runs"]).T
    return np.repeat(values, lengths).reshape(content["shape"])


def assert_agree(found: Path, name: str) -> None:
    """A label map equals that of then, up to rounding."""
    new, old = labels(found), labels_of_then(name)
    assert new.shape == old.shape
    assert np.count_nonzero(old) > 100
    assert np.count_nonzero(new != old) <= MAY_DIFFER * np.count_nonzero(old)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
@pytest.mark.parametrize("name", ["run", "ensemble"])
def test_an_older_model_predicts_the_same_label_map(
    *, name: str, backend: str, cases: Path, tmp_path: Path, znormseg: Call, request: pytest.FixtureRequest
) -> None:
    skip_without(backend, request)
    options = ("--device", "cpu", "--precision", "float32", "--backend", backend)
    ended = znormseg("predict", MADE / name, cases, tmp_path / "out", *options)
    assert ended.code == 0, ended.err
    assert_agree(tmp_path / "out" / f"{PHANTOM}.nii.gz", name)


def onnx_answer(folder: Path) -> Callable[[Any], Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda windows: session.run(["logits"], {"image": windows})[0]


def openvino_answer(folder: Path) -> Callable[[Any], Any]:
    from app.inference.backends.openvino_backend import openvino_core

    compiled = openvino_core().compile_model(folder / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda windows: np.array(compiled(windows)["logits"])


@pytest.mark.parametrize(("name", "load"), [("onnx", onnx_answer), ("openvino", openvino_answer)])
def test_an_older_export_gives_the_same_label_map(
    *,
    name: str,
    load: Callable[[Path], Callable[[Any], Any]],
    cases: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    znormseg: Call,
    request: pytest.FixtureRequest,
) -> None:
    skip_without(name, request)
    from app.inference.backends.torch_backend import GraphNetwork

    answer = load(MADE / name)
    asked = []

    def forward(_: GraphNetwork, windows: torch.Tensor) -> torch.Tensor:
        asked.append(windows.shape)
        return torch.from_numpy(answer(windows.numpy()))

    monkeypatch.setattr(GraphNetwork, "forward", forward)
    options = ("--device", "cpu", "--precision", "float32", "--backend", "torch")
    ended = znormseg("predict", MADE / "run", cases, tmp_path / "out", *options)
    assert ended.code == 0, ended.err
    assert asked
    assert_agree(tmp_path / "out" / f"{PHANTOM}.nii.gz", "run")


@pytest.mark.parametrize("name", ["run", "ensemble", "onnx", "openvino"])
def test_files_of_an_older_model_match_their_checksums(name: str, znormseg: Call) -> None:
    ended = znormseg("model", "verify", MADE / name)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("name", ["run", "ensemble", "onnx", "openvino"])
def test_the_model_card_of_an_older_model_is_printed(name: str, znormseg: Call) -> None:
    ended = znormseg("model", "info", MADE / name)
    assert ended.code == 0, ended.err


def test_an_older_run_can_initialise_another(cases: Path, tmp_path: Path, znormseg: Call) -> None:
    data = tmp_path / "data"
    write_phantoms(data, 3, seed=1, spacing_mm=5.0)
    settings = (
        "training.patch_voxels=[16, 16, 16]",
        "training.batch_size=1",
        "training.steps=1",
        "training.hours=null",
    )
    words = [word for setting in settings for word in ("--set", setting)]
    ended = znormseg("train", data, tmp_path / "new", "--init-from", MADE / "run", *words)
    assert ended.code == 0, ended.err


def test_an_older_run_can_be_resumed(tmp_path: Path, znormseg: Call) -> None:
    write_phantoms(tmp_path / "cases", 6, seed=7, spacing_mm=5.0)
    run = Path(shutil.copytree(MADE / "run", tmp_path / "run"))
    more = ("--set", "training.steps=151", "--allow", "training.steps")
    ended = znormseg("train", tmp_path / "cases", run, "--resume", *more)
    assert ended.code == 0, ended.err
    assert (run / "checkpoints" / "last-000000151.json").exists()
