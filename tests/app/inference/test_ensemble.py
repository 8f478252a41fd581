"""Several networks as one: equal networks act as one, rules are applied and reported, damaged files are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.errors import RunError
from app.inference.ensemble import CROSSVAL_FILE, Ensemble, load_predictor
from app.inference.postprocess import Postprocess
from app.inference.probabilities import predict_centred
from app.system.device import RuntimeConfig, choose_runtime
from data.datasets.layouts import find_cases
from data.preprocess import prepare

Call = Callable[..., Any]

RUNTIME = choose_runtime(RuntimeConfig(device="cpu"))


RATIOS = {"WT": 0.5, "TC": 0.0, "ET": 1.0}
#: As crossval writes it.
CALIBRATION = {
    "version": 1,
    "temperature": {"WT": 2.0, "TC": 0.5, "ET": 1.0},
    "volume_interval": {
        "level": 0.9,
        "offset_ml": 1.0,
        "cases": 12,
        "log_ratio": {"plain": dict.fromkeys(RATIOS, 3.0), "postprocessed": RATIOS},
    },
}


def packed(place: Path, *runs: Path, rules: Postprocess | None = None) -> Path:
    """An ensemble of runs."""
    networks = []
    for number, run in enumerate(runs):
        target = place / f"fold-{number}" / "checkpoints"
        target.mkdir(parents=True)
        newest = max((run / "checkpoints").glob("best-*.json"))
        for path in (newest, newest.with_suffix(".safetensors")):
            shutil.copy(path, target)
        details = max(target.glob("*.json"))
        told = json.loads(details.read_text())
        networks.append({"network": f"fold-{number}", "weights_sha256": told["sha256"], "step": told["step"]})
    content = {"version": 1, "networks": networks, "postprocess": (rules or Postprocess()).to_json()}
    (place / "ensemble.json").write_text(json.dumps(content))
    return place


def centred(folder: Path, phantoms: Path) -> Any:
    """What a run or an ensemble says of the first phantom."""
    model = load_predictor(folder, RUNTIME)
    prepared = prepare(find_cases(phantoms)[0], spacing_mm=model.spacing_mm)
    return predict_centred(model, prepared, RUNTIME)


def changed(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.pop("json_sha256", None)
    path.write_text(json.dumps({**content, **changes}))


@pytest.fixture(scope="module")
def other_run(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run with other weights."""
    import torch

    from app.runs import checkpoints

    run = tmp_path_factory.mktemp("other") / "run"
    checkpoint = checkpoints.load_newest(tiny_run / "checkpoints", "best")
    assert checkpoint is not None
    torch.manual_seed(0)
    tensors = {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in checkpoint.tensors.items()}
    details = {key: value for key, value in checkpoint.details.items() if key not in {"kind", "step", "sha256"}}
    checkpoints.save(run / "checkpoints", "best", checkpoint.step, tensors, details)
    return run


@pytest.mark.parametrize("count", [1, 3])
def test_an_ensemble_of_equal_runs_predicts_like_the_run(
    count: int, tiny_run: Path, phantoms: Path, tmp_path: Path
) -> None:
    ensemble = packed(tmp_path / "ensemble", *[tiny_run] * count)
    assert np.array_equal(centred(ensemble, phantoms), centred(tiny_run, phantoms))


def test_an_ensemble_predicts_the_mean_of_its_networks(
    tiny_run: Path, other_run: Path, phantoms: Path, tmp_path: Path
) -> None:
    ensemble = packed(tmp_path / "ensemble", tiny_run, other_run)
    mean = (centred(tiny_run, phantoms) + centred(other_run, phantoms)) / 2
    assert np.allclose(centred(ensemble, phantoms), mean, atol=1e-6)


def test_a_large_ensemble_loads_each_network_when_needed(
    tiny_run: Path, other_run: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = packed(tmp_path / "ensemble", tiny_run, other_run)
    held = centred(folder, phantoms)
    monkeypatch.setattr("app.inference.ensemble._MOST_HELD_BYTES", 0)
    ensemble = load_predictor(folder, RUNTIME)
    assert isinstance(ensemble, Ensemble)
    assert ensemble.held == ()
    assert np.array_equal(centred(folder, phantoms), held)


def test_a_network_that_changed_before_it_is_loaded_is_refused(
    tiny_run: Path, other_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.inference.ensemble._MOST_HELD_BYTES", 0)
    folder = packed(tmp_path / "ensemble", tiny_run, tiny_run)
    ensemble = load_predictor(folder, RUNTIME)
    shutil.copytree(other_run / "checkpoints", folder / "fold-1" / "checkpoints", dirs_exist_ok=True)
    with pytest.raises(RunError, match=r"the weights of fold-1 are not those that ensemble.json lists"):
        list(ensemble.members())


def codes(path: Path) -> Any:
    image: Any = nib.load(path)
    return np.asarray(image.dataobj)


def test_predict_accepts_an_ensemble_like_a_run(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ensemble, case = packed(tmp_path / "ensemble", tiny_run, tiny_run), find_cases(phantoms)[0]
    assert znormseg("predict", tiny_run, case.folder, tmp_path / "one", "--device=cpu").code == 0
    assert znormseg("predict", ensemble, case.folder, tmp_path / "two", "--device=cpu").code == 0
    name = f"{case.id}.nii.gz"
    assert np.array_equal(codes(tmp_path / "one" / name), codes(tmp_path / "two" / name))


@pytest.mark.parametrize("left_out", [False, True])
def test_the_rules_are_applied_and_reported(
    *, left_out: bool, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    rules = Postprocess(smallest_mm3=(1e9, 0.0, 0.0))
    ensemble, case = packed(tmp_path / "ensemble", tiny_run, rules=rules), find_cases(phantoms)[0]
    options = ["--device=cpu", *(["--no-postprocess"] if left_out else [])]
    assert znormseg("predict", ensemble, case.folder, tmp_path / "out", *options).code == 0
    told = json.loads((tmp_path / "out" / f"{case.id}.json").read_text())
    assert told["postprocess"] == (None if left_out else rules.to_json())
    assert [one["network"] for one in told["ensemble"]] == ["fold-0"]
    assert codes(tmp_path / "out" / f"{case.id}.nii.gz").any() == left_out


@pytest.mark.slow
@pytest.mark.parametrize("left_out", [False, True])
def test_the_rules_are_also_applied_to_prepared_scans(
    *, left_out: bool, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    rules = Postprocess(smallest_mm3=(1e9, 0.0, 0.0))
    ensemble, case = packed(tmp_path / "ensemble", tiny_run, rules=rules), find_cases(phantoms)[0]
    options = ["--device=cpu", "--prepare", *(["--no-postprocess"] if left_out else [])]
    assert znormseg("predict", ensemble, case.folder, tmp_path / "out", *options).code == 0
    assert codes(tmp_path / "out" / f"{case.id}.nii.gz").any() == left_out


def test_a_run_has_no_rules_to_report(tiny_run: Path) -> None:
    assert list(load_predictor(tiny_run, RUNTIME).record()) == ["weights_sha256", "weights_step"]


def test_the_folder_of_a_cross_validation_points_to_its_ensemble(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / CROSSVAL_FILE).write_text("{}")
    with pytest.raises(RunError, match="a cross-validation that has not finished"):
        load_predictor(tmp_path, RUNTIME)
    packed(tmp_path / "ensemble", tiny_run)
    with pytest.raises(RunError, match=f"Give its ensemble, {tmp_path / 'ensemble'}"):
        load_predictor(tmp_path, RUNTIME)


def test_modified_weights_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    ensemble = packed(tmp_path / "ensemble", tiny_run, tiny_run)
    weights = max(ensemble.glob("fold-1/checkpoints/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(RunError, match=r"network fold-1: .*SHA-256 is not the one"):
        load_predictor(ensemble, RUNTIME)


def test_weights_of_another_run_are_refused(tiny_run: Path, other_run: Path, tmp_path: Path) -> None:
    ensemble = packed(tmp_path / "ensemble", tiny_run)
    shutil.rmtree(ensemble / "fold-0" / "checkpoints")
    shutil.copytree(other_run / "checkpoints", ensemble / "fold-0" / "checkpoints")
    with pytest.raises(RunError, match=r"weights of fold-0 are not those that ensemble.json lists"):
        load_predictor(ensemble, RUNTIME)


def test_a_missing_network_is_named(tiny_run: Path, tmp_path: Path) -> None:
    ensemble = packed(tmp_path / "ensemble", tiny_run, tiny_run)
    shutil.rmtree(ensemble / "fold-1")
    with pytest.raises(RunError, match=r"network fold-1: .*does not exist"):
        load_predictor(ensemble, RUNTIME)


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"networks": []},
        {"networks": [{"network": "../run", "weights_sha256": "", "step": 1}]},
        {"networks": None},
        {"postprocess": {"thresholds": {"WT": 2.0}}},
        {"postprocess": Postprocess().to_json() | {"least_enhancing_mm3": -1}},
        {"calibration": CALIBRATION | {"version": 2}},
        {"calibration": CALIBRATION | {"temperature": {"WT": 1.0, "TC": 0.0, "ET": 1.0}}},
        {"calibration": CALIBRATION | {"temperature": {"WT": 1.0, "TC": 1.0}}},
        {"calibration": CALIBRATION | {"volume_interval": None}},
        {"calibration": "none"},
    ],
)
def test_a_damaged_description_is_refused(changes: dict[str, Any], tiny_run: Path, tmp_path: Path) -> None:
    ensemble = packed(tmp_path / "ensemble", tiny_run)
    changed(ensemble / "ensemble.json", **changes)
    with pytest.raises(RunError, match=r"ensemble.json: damaged, or of another version"):
        load_predictor(ensemble, RUNTIME)


def test_a_description_that_is_not_json_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    ensemble = packed(tmp_path / "ensemble", tiny_run)
    (ensemble / "ensemble.json").write_text("{")
    with pytest.raises(RunError, match=r"ensemble.json: missing or damaged"):
        load_predictor(ensemble, RUNTIME)


def test_an_older_ensemble_is_loaded_and_reported_as_uncalibrated(tiny_run: Path, tmp_path: Path) -> None:
    calibration = load_predictor(packed(tmp_path / "ensemble", tiny_run), RUNTIME).calibration
    told = calibration.record([1.0, 1.0, 1.0], complete=True)
    assert told["calibration"] == {"state": "not calibrated", "temperature": None}
    assert told["volume_interval_ml"] is None
    assert "version without calibration" in told["volume_interval_note"]


@pytest.mark.parametrize("left_out", [False, True])
def test_predict_reports_temperatures_and_intervals_without_changing_masks(
    *, left_out: bool, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    plain, calibrated = packed(tmp_path / "plain", tiny_run), packed(tmp_path / "calibrated", tiny_run)
    changed(calibrated / "ensemble.json", calibration=CALIBRATION)
    case = find_cases(phantoms)[0]
    options = ["--device=cpu", *(["--no-postprocess"] if left_out else [])]
    for ensemble in (plain, calibrated):
        assert znormseg("predict", ensemble, case.folder, tmp_path / "out" / ensemble.name, *options).code == 0
    maps = [codes(tmp_path / "out" / name / f"{case.id}.nii.gz") for name in ("plain", "calibrated")]
    assert np.array_equal(*maps)
    told = json.loads((tmp_path / "out" / "calibrated" / f"{case.id}.json").read_text())
    assert told["calibration"] == {"state": "calibrated", "temperature": CALIBRATION["temperature"]}
    assert told["volume_interval_level"] == 0.9
    ratios = dict.fromkeys(RATIOS, 3.0) if left_out else RATIOS
    for region, (low, high) in told["volume_interval_ml"].items():
        volume = told["volumes_ml"][region]
        assert high == pytest.approx((volume + 1) * np.exp(ratios[region]) - 1, abs=0.1)
        assert low == pytest.approx(max(0, (volume + 1) / np.exp(ratios[region]) - 1), abs=0.1)


def test_networks_of_different_spacings_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    ensemble = packed(tmp_path / "ensemble", tiny_run, tiny_run)
    details = max(ensemble.glob("fold-1/checkpoints/*.json"))
    changed(details, spacing_mm=[1.0, 4.0, 4.0])
    with pytest.raises(RunError, match="its networks cannot be combined: spacing"):
        load_predictor(ensemble, RUNTIME)
