"""MONAI bundles, exported and imported: MONAI itself and ``predict`` give the same masks."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from app.config.load import to_plain
from app.errors import RunError
from app.exporting.export import _RUNTIME, export_run
from app.exporting.monai_import import BUNDLE_CONTRASTS, import_bundle
from app.inference.batch.predict import predict
from app.inference.model import load_model
from app.runs import checkpoints
from app.runs.model_card import verify
from data.datasets.layouts import find_cases
from data.labels import from_regions

Call = Callable[..., Any]

#: Share of the brain voxels whose label may differ from MONAI's: those whose logit is all but 0.
MASK_DISAGREEMENT = 1e-3

needs_fire = pytest.mark.skipif(
    not (importlib.util.find_spec("fire") and importlib.util.find_spec("ignite")),
    reason="monai.bundle's command line needs fire and pytorch-ignite (extra dev)",
)


def monai_bundle(*arguments: str | Path, cwd: Path) -> str:
    """Call MONAI's own command line; its output."""
    ended = subprocess.run(
        [sys.executable, "-m", "monai.bundle", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout + ended.stderr


def label_map(path: Path) -> Any:
    return np.asanyarray(nib.Nifti1Image.from_filename(path).dataobj)


def brain_of(case: Path) -> Any:
    images = [path for path in case.glob("*.nii.gz") if "seg" not in path.name]
    return np.any([label_map(path) != 0 for path in images], axis=0)


# Export


def with_settings(tiny_run: Path, run: Path, *, spacing_mm: float) -> Path:
    """The tiny run's network as a run of windows of 32 voxels and another spacing."""
    newest = checkpoints.load_newest(tiny_run / "checkpoints", "best")
    assert newest is not None
    details = dict(newest.details)
    details["config"] = {**details["config"], "training": {**details["config"]["training"], "patch_voxels": [32] * 3}}
    details["spacing_mm"] = [spacing_mm] * 3
    checkpoints.save(run / "checkpoints", "best", newest.step, newest.tensors, details)
    return run


@pytest.fixture(scope="session")
def bundle(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run as a bundle; tests read it and leave it as it is."""
    folder = tmp_path_factory.mktemp("bundle")
    run = with_settings(tiny_run, folder / "run", spacing_mm=4.0)
    return export_run(run, folder / "bundle", file_format="monai-bundle").folder


@pytest.mark.slow
@needs_fire
@pytest.mark.parametrize("spacing_mm", [4.0, 5.0], ids=["own spacing", "resampled"])
def test_monai_runs_the_bundle_and_gives_the_mask_of_predict(
    tiny_run: Path, phantoms: Path, tmp_path: Path, spacing_mm: float
) -> None:
    run = with_settings(tiny_run, tmp_path / "run", spacing_mm=spacing_mm)
    folder = export_run(run, tmp_path / "bundle", file_format="monai-bundle").folder
    case = sorted(phantoms.iterdir())[0]
    places = ("--dataset_dir", case, "--output_dir", tmp_path / "theirs")
    monai_bundle("run", "--config_file", "configs/inference.json", *places, cwd=folder)
    predict(load_model(run, _RUNTIME), find_cases(case), tmp_path / "ours", runtime=_RUNTIME)
    ours, theirs = tmp_path / "ours" / f"{case.name}.nii.gz", tmp_path / "theirs" / f"{case.name}_t1_seg.nii.gz"
    brain = brain_of(case)
    assert np.count_nonzero(label_map(ours)) > 100
    assert np.count_nonzero(label_map(ours) != label_map(theirs)) <= MASK_DISAGREEMENT * np.count_nonzero(brain)
    np.testing.assert_allclose(
        nib.Nifti1Image.from_filename(ours).affine, nib.Nifti1Image.from_filename(theirs).affine, atol=1e-4
    )


@pytest.mark.slow
@needs_fire
def test_monai_verifies_input_and_output_of_the_network(bundle: Path) -> None:
    files = ("--meta_file", "configs/metadata.json", "--config_file", "configs/inference.json")
    assert "verified with no error" in monai_bundle("verify_net_in_out", "--net_id", "network_def", *files, cwd=bundle)


#: What MONAI's bundle specification asks of metadata.json; MONAI's own schema is read from the network.
_SPECIFIED = {
    "type": "object",
    "required": [
        *("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version"),
        *("required_packages_version", "task", "description", "authors", "copyright", "network_data_format"),
    ],
    "properties": {
        **{name: {"type": "string"} for name in ("schema", "version", "task", "description", "authors", "copyright")},
        **{f"{name}_version": {"type": "string"} for name in ("monai", "pytorch", "numpy")},
        "changelog": {"type": "object", "additionalProperties": {"type": "string"}},
        "required_packages_version": {"type": "object", "additionalProperties": {"type": "string"}},
        "network_data_format": {
            "type": "object",
            "required": ["inputs", "outputs"],
            "additionalProperties": {
                "additionalProperties": {
                    "required": [
                        *("type", "format", "num_channels", "spatial_shape", "dtype", "value_range"),
                        *("is_patch_data", "channel_def"),
                    ]
                }
            },
        },
    },
}


@pytest.mark.slow
@needs_fire
def test_monai_verifies_the_metadata(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(json.dumps(_SPECIFIED))
    files = ("--meta_file", "configs/metadata.json", "--filepath", tmp_path / "schema.json")
    assert "verified with no error" in monai_bundle("verify_metadata", *files, cwd=bundle)


def test_the_metadata_has_everything_the_specification_requires(bundle: Path) -> None:
    import jsonschema

    jsonschema.validate(json.loads((bundle / "configs" / "metadata.json").read_text()), _SPECIFIED)


def test_the_weights_of_a_bundle_are_only_tensors(bundle: Path) -> None:
    state = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [("network", "architecture", "resenc", "resenc"), ("augment", "contrast_dropout", 0.5, "contrast_dropout")],
)
def test_settings_that_monai_does_not_support_are_refused(
    tiny_run: Path, section: str, key: str, value: Any, said: str
) -> None:
    from app.exporting.monai_export import require_monai

    model = load_model(tiny_run, _RUNTIME)
    changed = replace(model.config, **{section: replace(getattr(model.config, section), **{key: value})})
    with pytest.raises(RunError, match=said):
        require_monai(
            replace(model, plain_config=to_plain(changed), takes_missing_contrasts=changed.takes_missing_contrasts),
            tiny_run,
        )


# Import


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle as MONAI's brats_mri_segmentation, with random weights and a smaller window; and no step that saves."""
    from monai.networks.nets.segresnet import SegResNet

    folder = tmp_path_factory.mktemp("zoo") / "brats_mri_segmentation"
    network: dict[str, Any] = {
        "blocks_down": [1, 2, 2, 4],
        "blocks_up": [1, 1, 1],
        "init_filters": 16,
        "in_channels": 4,
    }
    network |= {"out_channels": 3, "dropout_prob": 0.2}
    steps = [
        {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
        {"_target_": "NormalizeIntensityd", "keys": "image", "nonzero": True, "channel_wise": True},
    ]
    inferer = {"_target_": "SlidingWindowInferer", "roi_size": [64, 64, 40], "sw_batch_size": 1, "overlap": 0.5}
    inference = {
        "network_def": {"_target_": "SegResNet", **network},
        "preprocessing": {"_target_": "Compose", "transforms": steps},
        "inferer": inferer,
    }
    inputs = {"num_channels": 4, "channel_def": {"0": "T1c", "1": "T1", "2": "T2", "3": "FLAIR"}}
    outputs = {"num_channels": 3, "channel_def": {"0": "Tumor core", "1": "Whole tumor", "2": "Enhancing tumor"}}
    formats = {"inputs": {"image": inputs}, "outputs": {"pred": outputs}}
    metadata: dict[str, Any] = {
        "task": "Multimodal Brain Tumor segmentation",
        "version": "0.5.3",
        "copyright": "Copyright (c) someone",
    }
    metadata |= {"eval_metrics": {"val_mean_dice": 0.5}, "network_data_format": formats}
    for name, content in (("inference", inference), ("metadata", metadata)):
        (folder / "configs").mkdir(parents=True, exist_ok=True)
        (folder / "configs" / f"{name}.json").write_text(json.dumps(content))
    (folder / "models").mkdir()
    torch.manual_seed(0)
    torch.save(SegResNet(spatial_dims=3, **network).state_dict(), folder / "models" / "model.pt")
    return folder


@pytest.fixture
def changed(zoo: Path, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may change."""
    return Path(shutil.copytree(zoo, tmp_path / "bundle"))


def masks_by_monai(zoo: Path, case: Path) -> Any:
    """WT, TC and ET as MONAI's transforms, inferer and network of the bundle give them."""
    from monai.bundle.config_parser import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(zoo / "configs" / "inference.json"))
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(torch.load(zoo / "models" / "model.pt", weights_only=True))
    files = find_cases(case)[0].contrasts
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns about readers that are not installed
        image = parser.get_parsed_content("preprocessing")({"image": [files[c] for c in BUNDLE_CONTRASTS]})["image"]
    with torch.inference_mode():
        logits = parser.get_parsed_content("inferer")(image[None], network.eval())[0]
    core, whole, enhancing = (logits.sigmoid() > 0.5).numpy()
    return np.stack([whole, core, enhancing])


def test_an_imported_bundle_predicts_the_same_masks_as_monai(zoo: Path, case_1mm: Path, tmp_path: Path) -> None:
    import_bundle(zoo, tmp_path / "model")
    predict(load_model(tmp_path / "model", _RUNTIME), find_cases(case_1mm), tmp_path / "out", runtime=_RUNTIME)
    ours = label_map(tmp_path / "out" / f"{case_1mm.name}.nii.gz")
    brain = brain_of(case_1mm)
    theirs = np.array([0, 1, 2, 4])[from_regions(masks_by_monai(zoo, case_1mm) & brain)]
    assert len(np.unique(theirs)) > 1
    assert np.count_nonzero(ours != theirs) <= MASK_DISAGREEMENT * np.count_nonzero(brain)


def test_the_command_creates_a_folder_that_verify_and_predict_accept(
    zoo: Path, case_1mm: Path, tmp_path: Path, znormseg: Call
) -> None:
    assert znormseg("model", "import", zoo, tmp_path / "model").code == 0
    assert "config.yaml" in verify(tmp_path / "model")
    said = json.loads(znormseg("model", "info", tmp_path / "model", "--json").out)
    assert (said["kind"], said["metrics"]) == ("import", {"val_mean_dice, as the bundle states it": 0.5})
    assert "Copyright (c) someone" in said["licence"]


@pytest.mark.slow
def test_an_imported_model_can_be_exported_again(zoo: Path, tmp_path: Path) -> None:
    import_bundle(zoo, tmp_path / "model")
    assert export_run(tmp_path / "model", tmp_path / "again", file_format="monai-bundle").parity.holds


def change(path: Path, edit: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "edit", "said"),
    [
        ("inference", lambda c: c["network_def"].update(init_filters=32), "init_filters is 32"),
        ("inference", lambda c: c["network_def"].update(norm="batch"), "norm is 'batch'"),
        ("inference", lambda c: c["network_def"].update(_target_="UNet"), "UNet"),
        ("inference", lambda c: c.pop("inferer"), "inferer"),
        ("inference", lambda c: c["preprocessing"]["transforms"].append({"_target_": "Spacingd"}), "Spacingd"),
        ("inference", lambda c: c["preprocessing"]["transforms"][1].update(nonzero=False), "non-zero voxels"),
        ("inference", lambda c: c["inferer"].update(roi_size=[60, 60, 60]), "patch_voxels"),
        ("inference", lambda c: c["inferer"].update(roi_size=[math.inf, 64, 40]), "infinity"),
        ("inference", lambda c: c["preprocessing"]["transforms"][0].update(_target_=1), "also has 1"),
        ("metadata", lambda c: c["network_data_format"]["inputs"]["image"].update(channel_def=[1, 2]), "IndexError"),
        (
            "metadata",
            lambda c: c["network_data_format"]["inputs"]["image"]["channel_def"].update({"0": "T1", "1": "T1c"}),
            "T1, T1c, T2, FLAIR",
        ),
    ],
)
def test_an_unsupported_bundle_is_refused_naming_the_supported_one(
    changed: Path, tmp_path: Path, file: str, edit: Callable[[Any], None], said: str
) -> None:
    change(changed / "configs" / f"{file}.json", edit)
    with pytest.raises(RunError, match=said) as refused:
        import_bundle(changed, tmp_path / "model")
    assert "brats_mri_segmentation" in str(refused.value)
    assert not (tmp_path / "model").exists()


def test_pickled_weights_are_refused_and_not_executed(changed: Path, tmp_path: Path, znormseg: Call) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was executed"),)

    (changed / "models" / "model.pt").write_bytes(pickle.dumps({"convInit.conv.weight": Malicious()}))
    ended = znormseg("model", "import", changed, tmp_path / "model")
    assert ended.code == 5
    assert "unpickling it could run arbitrary code" in " ".join(ended.err.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle"]


def test_a_bundle_without_weights_says_how_to_get_them(changed: Path, tmp_path: Path, znormseg: Call) -> None:
    (changed / "models" / "model.pt").unlink()
    ended = znormseg("model", "import", changed, tmp_path / "model")
    assert ended.code == 5
    assert "download_large_files" in ended.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"abc" * 100, "cannot be read as weights"),
        ({"conv_final.2.conv.bias": torch.tensor(1.0)}, "do not belong to this network"),
    ],
    ids=["a text", "a number for a vector"],
)
def test_a_file_without_suitable_weights_is_refused(changed: Path, tmp_path: Path, content: Any, said: str) -> None:
    if isinstance(content, bytes):
        (changed / "models" / "model.pt").write_bytes(content)
    else:
        torch.save(content, changed / "models" / "model.pt")
    with pytest.raises(RunError, match=said):
        import_bundle(changed, tmp_path / "model")


def test_non_finite_weights_are_refused(changed: Path, tmp_path: Path) -> None:
    weights = torch.load(changed / "models" / "model.pt", weights_only=True)
    weights["convInit.conv.weight"][0] = torch.nan
    torch.save(weights, changed / "models" / "model.pt")
    with pytest.raises(RunError, match="NaN or infinite"):
        import_bundle(changed, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_of_another_network_are_refused(changed: Path, tmp_path: Path) -> None:
    torch.save({"convInit.conv.weight": torch.zeros(8, 4, 3, 3, 3)}, changed / "models" / "model.pt")
    with pytest.raises(RunError, match="do not belong to this network"):
        import_bundle(changed, tmp_path / "model")


def test_training_without_cropping_is_refused(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, znormseg: Call
) -> None:
    options = [word for setting in [*tiny_settings, "inference.crop=false"] for word in ("--set", setting)]
    ended = znormseg("train", phantoms, tmp_path / "run", *options)
    assert ended.code == 4
    assert "inference.crop" in ended.err
