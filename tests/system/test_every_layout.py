"""Training, prediction and scoring on data sets that are not BraTS case folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from data.datasets.export import export_dataset
from data.datasets.source import DataSource
from data.labels import CONVENTIONS, decode

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def decathlon(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The phantoms as 4D files."""
    return export_dataset(DataSource(phantoms), tmp_path_factory.mktemp("exported") / "Task01", "msd").out


def predicted(folder: Path, case: str) -> Any:
    """A predicted label map in the program's codes."""
    convention = CONVENTIONS[json.loads((folder / f"{case}.json").read_text())["labels"]["convention"]]
    return decode(np.asarray(nib.Nifti1Image.from_filename(folder / f"{case}.nii.gz").dataobj), convention)


def test_a_prediction_from_a_4d_file_equals_that_from_single_files_and_is_3d(
    phantoms: Path, decathlon: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    for name, source in (("one", phantoms), ("other", decathlon)):
        ended = znormseg("predict", tiny_run, source, tmp_path / name)
        assert ended.code == 0, ended.err
    for path in (tmp_path / "one").glob("BraTS*.json"):
        np.testing.assert_array_equal(predicted(tmp_path / "one", path.stem), predicted(tmp_path / "other", path.stem))
        assert json.loads((tmp_path / "other" / path.name).read_text())["labels"]["convention"] == "msd"
        written = nib.Nifti1Image.from_filename(tmp_path / "other" / f"{path.stem}.nii.gz")
        told = [json.loads((tmp_path / name / path.name).read_text()).get("input_volumes") for name in ("one", "other")]
        assert told == [None, {"t1": 1, "t1c": 2, "t2": 3, "flair": 0}]
        np.testing.assert_array_equal(
            written.affine, nib.Nifti1Image.from_filename(decathlon / "imagesTr" / f"{path.stem}.nii.gz").affine
        )
    ended = znormseg("evaluate", tmp_path / "one", tmp_path / "other", "--json")
    assert {values["dice"] for values in json.loads(ended.out)["regions"].values()} == {1.0}


def test_a_run_on_4d_files_records_their_label_numbers(
    decathlon: Path, tmp_path: Path, tiny_settings: list[str], znormseg: Call
) -> None:
    options = [word for setting in tiny_settings for word in ("--set", setting)]
    ended = znormseg("train", decathlon, tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["labels"] == "msd"


@pytest.mark.parametrize("verb", ["train", "compare", "data check", "data export"])
def test_ambiguous_label_numbers_are_resolved_by_the_flag(
    verb: str, render: Call, tmp_path: Path, tiny_settings: list[str], znormseg: Call
) -> None:
    root = render(tmp_path / "in", "flat").root
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": ["a"], "validation": ["b"]}))
    settings = [word for setting in tiny_settings for word in ("--set", setting)]
    options: dict[str, list[Any]] = {
        "train": [tmp_path / "out", *settings, "--split", split],
        "compare": [tmp_path / "out", "--split", split, "--arms", "none,znorm", "--steps", "2"],
        "data check": [],
        "data export": [tmp_path / "out", "--format", "csv"],
    }
    ended = znormseg(*verb.split(), root, *options[verb])
    assert ended.code == 3
    assert "--labels: brats2023" in ended.out + ended.err
    assert znormseg(*verb.split(), root, *options[verb], "--labels", "nonsense").code == 3


def test_with_the_flag_a_flat_data_set_can_be_checked_and_trained_on(
    render: Call, tmp_path: Path, tiny_settings: list[str], znormseg: Call
) -> None:
    root = render(tmp_path / "in", "flat").root
    assert "labels: msd" in znormseg("data", "check", root, "--labels", "msd").out
    assert (
        "are not in brats2021, the convention stated by --labels"
        in znormseg("data", "check", root, "--labels", "brats2021").out
    )
    options = [word for setting in tiny_settings for word in ("--set", setting)]
    ended = znormseg("train", root, tmp_path / "run", *options, "--fold", "all", "--labels", "msd")
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["labels"] == "msd"


@pytest.mark.parametrize(("folder", "why"), [("imagesTr", "contains the scans"), ("labelsTr", "would replace its own")])
def test_a_prediction_never_replaces_a_file_of_its_case(
    *, folder: str, why: str, render: Call, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    root = render(tmp_path, "MSD").root
    before = {path: path.read_bytes() for path in (root / folder).iterdir()}
    ended = znormseg("predict", tiny_run, root, root / folder)
    assert (ended.code, {path: path.read_bytes() for path in (root / folder).iterdir()}) == (3, before)
    assert why in ended.err


def test_the_help_names_every_convention(znormseg: Call) -> None:
    for verb in (["train"], ["predict"], ["evaluate"], ["compare"], ["data", "check"], ["data", "export"]):
        words = znormseg(*verb, "--help").out.replace(",", " ").split()
        assert {name.rstrip(".") for name in CONVENTIONS} <= {word.rstrip(".;") for word in words}


def test_a_resumed_run_keeps_its_label_numbers(tiny_run: Path, phantoms: Path, znormseg: Call) -> None:
    assert znormseg("train", phantoms, tiny_run, "--resume", "--labels", "msd").code == 2
