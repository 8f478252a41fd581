"""The network that ships with the program: how it is packed, its use by name, and the packed folder itself.

The folder is models/starter. Its packing and use are tested with the tiny ensemble of tests/system/made_before, the
folder itself where it is part of the checkout.
"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from app.errors import RunError
from app.runs import published
from app.runs.model_card import CARD_FILE, seal, verify
from data.phantoms.files import write_phantoms
from data.quality.intensity_range import LEAST_CASES

Call = Callable[..., Any]

ROOT = Path(__file__).parents[2]
ENSEMBLE = Path(__file__).with_name("made_before") / "ensemble"
SHIPPED = ROOT / "models" / "starter"
PHANTOM = "BraTS2021_00000"
IN_FLOAT32 = ("--device", "cpu", "--precision", "float32", "--backend", "torch")

_spec = importlib.util.spec_from_file_location("starter", ROOT / "setup" / "starter.py")
assert _spec is not None
assert _spec.loader is not None
starter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(starter)


def write_crossval(folder: Path) -> Path:
    """A finished cross-validation of four cases around the tiny ensemble; one case has almost no enhancing tumour."""
    shutil.copytree(ENSEMBLE, folder / "ensemble")
    ensemble = json.loads((folder / "ensemble" / "ensemble.json").read_text())
    ids = [f"case{number:02}" for number in range(starter.CASES)]
    ensemble["case_ids_by_fold"] = [ids[:4], ids[4:]]
    (folder / "ensemble" / "ensemble.json").write_text(json.dumps(ensemble))
    seal(folder / "ensemble")
    means = {key: {"mean": 0.5} for region in ("WT", "TC", "ET") for key in (region, f"{region}_hd95_mm")}
    content = {
        "tuned": {"all": means},
        "tuning": {"gain_on_tuning_cases": 0.018, "estimated_gain": -0.014},
        "dice": "overlap",
        "hd95": "distance",
    }
    (folder / "crossval.json").write_text(json.dumps(content))
    with (folder / "crossval.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["masks", "case", "ET_dice", "ET_hd95_mm", "ET_reference_volume_ml"])
        rows.writerows([["raw", "a", 0, 0, 9], ["tuned", "a", 0.6, 4, 9], ["tuned", "b", 0.8, 6, 0.5]])
        rows.writerow(["tuned", "c", 0, 373.13, 0.49])
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny ensemble, packed; tests must not modify it."""
    folder = tmp_path_factory.mktemp("models") / "starter"
    starter.pack(write_crossval(tmp_path_factory.mktemp("crossval") / "out"), folder)
    return folder


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a phantom."""
    folder = tmp_path_factory.mktemp("cases")
    write_phantoms(folder, 1, seed=9, spacing_mm=5.0)
    return folder / PHANTOM


@pytest.fixture
def shipped(packed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The packed folder in place of models/starter, and no network."""
    monkeypatch.setattr(published, "shipped_folder", lambda: packed.parent)
    monkeypatch.setenv("ZNORMSEG_OFFLINE", "1")
    monkeypatch.setenv("ZNORMSEG_MODELS", str(tmp_path / "models"))
    return packed


def labels(path: Path) -> Any:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


def four_files(case: Path) -> list[str]:
    """Options that name the images of a case."""
    options = {"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair"}
    return [word for name, end in options.items() for word in (f"--{name}", str(case / f"{case.name}_{end}.nii.gz"))]


# Packing


def test_packed_weights_give_the_label_map_of_the_ensemble(
    packed: Path, case: Path, tmp_path: Path, znormseg: Call
) -> None:
    for number, model in enumerate((ENSEMBLE, packed)):
        assert znormseg("predict", model, case, tmp_path / str(number), *IN_FLOAT32).code == 0
    one, other = (labels(tmp_path / str(number) / f"{PHANTOM}.nii.gz") for number in (0, 1))
    assert np.count_nonzero(one) > 100
    assert np.mean(one == other) >= 0.999


def test_packed_weights_take_half_the_space_and_have_their_own_checksums(packed: Path) -> None:
    files = sorted(packed.glob("*/checkpoints/*.safetensors"))
    assert [path.stat().st_size < 0.7 * (ENSEMBLE / path.relative_to(packed)).stat().st_size for path in files] == [
        True,
        True,
    ]
    assert set(verify(packed)) >= {str(path.relative_to(packed)) for path in files}
    assert {str(tensor.dtype) for path in files for tensor in load_file(path).values()} == {"torch.float16"}


def test_the_training_device_is_left_out(packed: Path) -> None:
    assert '"runtime": [' in (ENSEMBLE / "ensemble.json").read_text()
    assert '"runtime": [' not in (packed / "ensemble.json").read_text()


def test_the_card_has_data_scores_limitations_and_licence(packed: Path) -> None:
    card = (packed / CARD_FILE).read_text()
    assert card.startswith("# starter\n")
    for text in ("10.7937/jc8x-9874", "2107.02314", "Dice of WT: 0.500", "Not for children", "CC BY 4.0"):
        assert text in card
    assert "Dice of ET, over the 2 cases with at least 0.5 ml of it: 0.700" in card
    assert "HD95 of ET, over the 2 cases with at least 0.5 ml of it: 5.0 mm" in card


def test_a_single_network_also_has_the_licence(packed: Path, znormseg: Call) -> None:
    ended = znormseg("model", "info", packed / "fold-0")
    assert ended.out.startswith("# starter/fold-0\n")
    assert "CC BY 4.0" in ended.out


def test_a_single_network_states_its_own_cases_and_scores(packed: Path, znormseg: Call) -> None:
    shown = znormseg("model", "info", packed / "fold-0").out
    assert "One network of starter: trained on 12 of its 16 cases." in shown
    assert "Trained on 12 adult gliomas" in shown
    assert "- training data: 12 adult gliomas" in shown
    assert "validation Dice WT" in shown
    assert "Dice of WT" not in shown
    assert "Four small networks" not in shown


def test_the_first_case_must_get_the_same_labels(
    case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    starter.pack(write_crossval(tmp_path / "crossval"), tmp_path / "starter", case.parent)
    assert re.search(rf"{PHANTOM}: float16 changes \d+ of \d+ voxels of tumour", capsys.readouterr().err)


def test_other_labels_are_refused(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "LEAST_AGREEMENT", 2.0)
    with pytest.raises(RunError, match="voxels of tumour; at most -100% may change"):
        starter.pack(write_crossval(tmp_path / "crossval"), tmp_path / "starter", case.parent)
    assert not (tmp_path / "starter").exists()


def test_another_number_of_cases_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crossval = write_crossval(tmp_path / "crossval")
    monkeypatch.setattr(starter, "CASES", 17)
    with pytest.raises(RunError, match="trained on 16 real cases, but the texts of starter say 17"):
        starter.pack(crossval, tmp_path / "starter")


def absolute_path(crossval: Path) -> str:
    path = crossval / "ensemble" / "ensemble.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "data": "/home/someone/cases"}))
    return "ensemble.json: names /home/someone/cases"


def large_weight(crossval: Path) -> str:
    path = next(crossval.glob("ensemble/fold-1/checkpoints/*.safetensors"))
    tensors = load_file(path)
    first = min(tensors)
    save_file({**tensors, first: tensors[first] + 1e6}, path)
    details = json.loads(path.with_suffix(".json").read_text())
    details.pop("json_sha256")
    details["sha256"] = starter.checkpoints._sha256(path.read_bytes())
    path.with_suffix(".json").write_text(json.dumps(details))
    return "too large for float16"


@pytest.mark.parametrize("spoil", [absolute_path, large_weight])
def test_models_that_must_not_be_shipped_are_refused_and_the_older_folder_is_kept(
    spoil: Callable[[Path], str], tmp_path: Path
) -> None:
    crossval = write_crossval(tmp_path / "crossval")
    (tmp_path / "starter").mkdir()
    reason = spoil(crossval)
    seal(crossval / "ensemble")
    with pytest.raises(RunError, match=re.escape(reason)):
        starter.pack(crossval, tmp_path / "starter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crossval", "starter"]
    assert list((tmp_path / "starter").iterdir()) == []


def test_a_folder_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starter, "MOST_BYTES", 1000)
    with pytest.raises(RunError, match="at most 1000 are shipped"):
        starter.pack(write_crossval(tmp_path / "crossval"), tmp_path / "starter")


def test_without_a_finished_cross_validation_one_message_is_shown(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "setup" / "starter.py"), str(tmp_path), str(tmp_path / "starter")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr == f"starter: {tmp_path / 'ensemble'}: does not exist; give the folder of a model\n"


# By name


@pytest.mark.usefixtures("shipped")
def test_four_files_give_a_label_map_and_a_page_with_the_limitations(
    case: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", "starter", tmp_path / "out", *four_files(case), "--json")
    assert ended.code == 0, ended.err
    (result,) = json.loads(ended.out)["cases"]
    assert labels(Path(result["label_map"])).any()
    assert result["model"] == {"name": "starter", "limits": list(published.MODELS["starter"].limits)}
    assert znormseg("report", tmp_path / "out", tmp_path / "pages").code == 0
    for page in (tmp_path / "pages" / "index.html", *(tmp_path / "pages" / "cases").iterdir()):
        assert "Not for children" in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("shipped")
def test_a_case_folder_comes_before_the_output(case: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("predict", "starter", case, tmp_path / "out")
    assert ended.code == 0, ended.err
    assert labels(tmp_path / "out" / f"{PHANTOM}.nii.gz").any()


def test_images_unlike_the_training_cases_are_flagged_on_the_page(
    shipped: Path, case: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(shipped, tmp_path / "models" / "starter"))
    monkeypatch.setattr(published, "shipped_folder", lambda: folder.parent)
    for path in folder.glob("*/intensities.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "cases": LEAST_CASES}))
    odd = Path(shutil.copytree(case, tmp_path / "odd"))
    flair = odd / f"{PHANTOM}_flair.nii.gz"
    image = nib.Nifti1Image.from_filename(flair)
    voxels = np.asarray(image.dataobj, dtype=np.float32)
    nib.save(nib.Nifti1Image(np.where(voxels > 0, 2 * voxels.max() - voxels, 0), image.affine), flair)
    assert znormseg("predict", "starter", odd, tmp_path / "out").code == 0
    assert znormseg("report", tmp_path / "out", tmp_path / "pages").code == 0
    page = (tmp_path / "pages" / "cases" / f"{PHANTOM}.html").read_text(encoding="utf-8")
    assert "The intensities of flair are unlike those of the training cases." in page


def test_the_model_list_shows_the_starter_as_included(shipped: Path, znormseg: Call) -> None:
    assert re.search(r"^starter .* shipped +0$", znormseg("model", "list").out, re.MULTILINE)
    first = json.loads(znormseg("model", "list", "--json").out)["models"][0]
    assert (first["name"], first["ships"], first["installed"]) == ("starter", True, True)
    assert first["folder"] == str(shipped)


def test_the_starter_needs_no_download(shipped: Path, znormseg: Call) -> None:
    ended = znormseg("model", "download", "starter")
    assert (ended.code, ended.out) == (0, f"starter ships with the program, nothing to download: {shipped}\n")
    ended = znormseg("model", "download", "starter", "--from", shipped)
    assert ended.code == 5
    assert "starter ships with the program" in ended.err


@pytest.mark.usefixtures("shipped")
def test_the_starter_is_described_and_verified_by_name(znormseg: Call) -> None:
    assert znormseg("model", "info", "starter").out.startswith("# starter\n")
    assert znormseg("model", "verify", "starter").code == 0


@pytest.mark.usefixtures("shipped")
@pytest.mark.parametrize("words", ["export starter {out} --format onnx", "train {cases} {out} --init-from starter"])
def test_if_a_single_network_is_needed_the_networks_are_named(
    words: str, case: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg(*(word.format(cases=case.parent, out=tmp_path / "out") for word in words.split()))
    assert ended.code == 5
    assert "an ensemble of 2 networks" in ended.err
    assert "starter/fold-1" in ended.err


@pytest.mark.parametrize("words", ["predict starter {cases} {out}", "model info starter", "model download starter"])
def test_missing_weights_give_one_clear_message(
    words: str, case: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "shipped_folder", lambda: tmp_path)
    ended = znormseg(*(word.format(cases=case, out=tmp_path / "out") for word in words.split()))
    assert ended.code == 5
    assert f"its weights are missing here: {tmp_path / 'starter'} does not exist" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_the_starter_folder_belongs_to_the_models_package() -> None:
    assert published.folder_of("starter") == SHIPPED


# The folder itself


def test_the_shipped_model_has_at_most_8_mb() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= 8_000_000


def test_the_shipped_model_contains_no_path_of_the_training_machine() -> None:
    starter._require_no_places(SHIPPED)


def test_the_shipped_model_is_intact_and_has_one_generation_of_weights(znormseg: Call) -> None:
    assert znormseg("model", "verify", "starter").code == 0
    listed = {*verify(SHIPPED), "SHA256SUMS"}
    assert {str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*") if path.is_file()} == listed
    assert [len(list(path.glob("best-*.json"))) for path in SHIPPED.glob("*/checkpoints")] == [1, 1, 1, 1]


@pytest.mark.parametrize("text", ["10.7937/jc8x-9874", "CC BY 4.0", "2107.02314", "Not for children", "not a medical"])
def test_the_shipped_card_names_data_licence_and_limitations(text: str) -> None:
    assert text in (SHIPPED / CARD_FILE).read_text(encoding="utf-8")


@pytest.mark.parametrize("how", ["a case folder", "four files"])
def test_the_shipped_model_predicts(how: str, case: Path, tmp_path: Path, znormseg: Call) -> None:
    given = [case, tmp_path / "out"] if how == "a case folder" else [tmp_path / "out", *four_files(case)]
    ended = znormseg("predict", "starter", *given, "--json")
    assert ended.code == 0, ended.err
    (result,) = json.loads(ended.out)["cases"]
    assert labels(Path(result["label_map"])).shape == labels(case / f"{PHANTOM}_t1.nii.gz").shape
