"""Published models by name: ``model list``, ``model download`` and a name as RUN; nothing is downloaded here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from app.exporting import install
from app.exporting.monai_import import import_published
from app.runs import published
from app.runs.published import MODELS, PublishedModel
from models.networks import build_network

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of installed models, and no downloads."""
    monkeypatch.setenv("ZNORMSEG_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("ZNORMSEG_OFFLINE", "1")
    return tmp_path / "models"


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of monai-brats with random weights, registered by its own hash."""
    from monai.networks.nets.segresnet import SegResNet

    torch.manual_seed(0)
    network = SegResNet(
        spatial_dims=3,
        blocks_down=(1, 2, 2, 4),
        blocks_up=(1, 1, 1),
        init_filters=16,
        in_channels=4,
        out_channels=3,
        dropout_prob=0.2,
    )
    path = tmp_path / "downloaded.pt"
    torch.save(network.state_dict(), path)
    real = MODELS["monai-brats"]
    md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    model = replace(real, files=(replace(real.files[0], hash=f"md5:{md5}"),))
    for module in (published, install):
        monkeypatch.setattr(module, "MODELS", {**MODELS, model.name: model})
    return path


def monai_brats() -> PublishedModel:
    return published.MODELS["monai-brats"]


def test_the_list_describes_each_model_and_whether_it_is_installed(znormseg: Call, folder: Path) -> None:
    (folder / "mindgrab").mkdir(parents=True)
    ended = znormseg("model", "list", "--json")
    assert ended.code == 0
    found = {model["name"]: model for model in json.loads(ended.out)["models"]}
    assert [name for name, model in found.items() if model["ships"]] == ["starter"]
    assert {name: model["installed"] for name, model in found.items() if not model["ships"]} == {
        "monai-brats": False,
        "mindgrab": True,
    }
    assert found["mindgrab"]["folder"] == str(folder / "mindgrab")
    assert all(model["licence"] and model["citation"] for model in found.values())
    assert all(model["files"] or model["ships"] for model in found.values())


def test_the_list_names_the_licence_in_a_terminal(znormseg: Call) -> None:
    ended = znormseg("model", "list")
    assert "Licence: MIT" in ended.out
    assert "may not be used commercially without permission" in ended.out


@pytest.mark.parametrize(
    ("present", "reason"),
    [
        ({"model.json": b"{}", "model.bin": b"1234"}, "model.json is not the published file"),
        ({"model.bin": b"1234"}, "model.json does not exist"),
    ],
    ids=["other files", "one file of two"],
)
def test_files_that_differ_from_the_published_ones_are_refused(
    znormseg: Call, tmp_path: Path, folder: Path, present: dict[str, bytes], reason: str
) -> None:
    (tmp_path / "mine").mkdir()
    for name, content in present.items():
        (tmp_path / "mine" / name).write_bytes(content)
    ended = znormseg("model", "download", "mindgrab", "--from", tmp_path / "mine")
    assert ended.code == 5
    assert reason in ended.err
    assert not (folder / "mindgrab").exists()


def test_one_file_for_a_model_with_two_files_is_refused(znormseg: Call, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"1234")
    ended = znormseg("model", "download", "mindgrab", "--from", tmp_path / "model.bin")
    assert ended.code == 5
    assert "give the folder that contains them" in ended.err


def test_an_unknown_name_is_refused_with_the_valid_ones(znormseg: Call) -> None:
    ended = znormseg("model", "download", "minegrab")
    assert ended.code == 5
    assert "available: starter, monai-brats, mindgrab" in ended.err


def test_a_misspelt_model_name_is_refused_with_how_to_list_names(tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("predict", "startr", tmp_path, tmp_path / "out")
    assert ended.code == 5
    assert "no published model has this name" in ended.err
    assert "znormseg model list" in ended.err


@pytest.mark.parametrize(
    "words",
    [
        "predict monai-brats {cases} {out}",
        "contrasts monai-brats {cases}",
        "export monai-brats {out} --format openvino",
        "model info monai-brats",
        "model verify monai-brats",
        "train {cases} {out} --init-from monai-brats",
    ],
)
def test_a_name_is_refused_offline_with_the_command_to_run(
    znormseg: Call, phantoms: Path, tmp_path: Path, words: str
) -> None:
    ended = znormseg(*(word.format(cases=phantoms, out=tmp_path / "out") for word in words.split()))
    assert ended.code == 5
    assert "znormseg model download monai-brats" in ended.err


def test_a_brain_mask_is_refused_offline_before_scans_are_read(znormseg: Call, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    ended = znormseg("data", "prepare", tmp_path / "scans", tmp_path / "out", "--mask", "mindgrab")
    assert ended.code == 5
    assert "znormseg model download mindgrab" in ended.err


def test_a_model_for_brain_masks_does_not_predict_tumours(znormseg: Call, phantoms: Path, tmp_path: Path) -> None:
    ended = znormseg("predict", "mindgrab", phantoms, tmp_path / "out")
    assert ended.code == 5
    assert "skull stripping, not for segmentation" in ended.err


def test_a_folder_takes_precedence_over_a_published_model_of_the_same_name(
    znormseg: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "monai-brats").mkdir()
    ended = znormseg("model", "info", "monai-brats")
    assert ended.code == 5
    assert "ZNORMSEG_OFFLINE" not in ended.err


def test_the_weights_are_rearranged_for_this_program(stand_in: Path, tmp_path: Path) -> None:
    from app.exporting.monai_import import in_our_order
    from app.runs import checkpoints

    made = import_published(stand_in, monai_brats(), tmp_path / "model")
    network = build_network(made.config.network, in_channels=4, out_channels=3)
    network.load_state_dict(in_our_order(torch.load(stand_in, weights_only=True)))
    newest = checkpoints.load_newest(tmp_path / "model" / "checkpoints", "best")
    assert newest is not None
    expected = checkpoints.weight_tensors(network)
    assert newest.tensors.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(newest.tensors[name]), expected[name]) for name in expected)


def test_weights_of_another_network_are_refused(stand_in: Path, tmp_path: Path, znormseg: Call, folder: Path) -> None:
    torch.save({"weight": torch.zeros(1)}, stand_in)
    ended = znormseg("model", "download", "monai-brats", "--from", stand_in)
    assert ended.code == 5
    assert "is not the published file" in ended.err
    assert list(folder.iterdir()) == []


def test_a_user_supplied_file_becomes_a_model_with_its_licence(stand_in: Path, folder: Path, znormseg: Call) -> None:
    ended = znormseg("model", "download", "monai-brats", "--from", stand_in, "--json")
    assert (ended.code, json.loads(ended.out)["folder"]) == (0, str(folder / "monai-brats")), ended.err
    assert znormseg("model", "verify", "monai-brats").code == 0
    assert "may not be used commercially" in znormseg("model", "info", "monai-brats").out


@pytest.mark.slow
def test_predict_accepts_a_user_supplied_model_by_name(
    stand_in: Path, case_1mm: Path, tmp_path: Path, folder: Path, znormseg: Call
) -> None:
    assert znormseg("model", "download", "monai-brats", "--from", stand_in).code == 0
    ended = znormseg("predict", "monai-brats", case_1mm, tmp_path / "out", "--device", "cpu", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["cases"][0]["model"]["name"] == "monai-brats"
    labels = np.asanyarray(nib.Nifti1Image.from_filename(tmp_path / "out" / f"{case_1mm.name}.nii.gz").dataobj)
    assert set(np.unique(labels)) <= {0, 1, 2, 4}
    assert labels.any()
