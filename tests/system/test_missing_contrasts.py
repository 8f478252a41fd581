"""Cases that lack contrasts: a run trained with contrast dropout accepts them and says so, other runs refuse them."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
import torch

from data.contrasts import SUBSETS
from data.datasets.source import DataSource
from data.errors import DataError

Call = Callable[..., Any]

CASE = "BraTS2021_00000"
ENDINGS = {"t1": "t1", "t1c": "t1ce", "t2": "t2", "flair": "flair"}


@pytest.fixture(scope="session")
def dropout_run(phantoms: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny settings with contrast dropout, 40 steps long."""
    from app.config.load import load_config
    from app.training.run import start

    run = tmp_path_factory.mktemp("dropout") / "run"
    settings = [*tiny_settings, "training.steps=40", "augment.contrast_dropout=0.5"]
    start(DataSource(phantoms), run, load_config("laptop", settings))
    return run


@pytest.fixture(scope="session")
def subset_table(dropout_run: Path, phantoms: Path) -> Any:
    """The table of that run on its validation cases."""
    from app.inference.backends.choose import choose_backend
    from app.inference.model import load_model
    from app.inference.subsets import choose_cases, score_subsets
    from app.system.device import RuntimeConfig
    from data.datasets.layouts import find_cases

    runtime = choose_backend("auto", RuntimeConfig(device="cpu"))
    cases = choose_cases(dropout_run, find_cases(phantoms), "validation")
    return score_subsets(load_model(dropout_run, runtime), cases, runtime)


def place(phantoms: Path, case: str, contrast: str) -> Path:
    return phantoms / case / f"{case}_{ENDINGS[contrast]}.nii.gz"


def with_only(phantoms: Path, folder: Path, *contrasts: str, case: str = CASE) -> Path:
    """A copy of a case with some of its contrasts."""
    (folder / case).mkdir(parents=True)
    for contrast in contrasts:
        shutil.copy(place(phantoms, case, contrast), folder / case)
    return folder / case


def voxels(path: Path) -> npt.NDArray[np.uint8]:
    return np.asarray(nib.Nifti1Image.from_filename(path).dataobj)


def test_the_labels_of_another_data_set_are_read_with_its_own_convention(
    dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Any
) -> None:
    case = shutil.copytree(phantoms / CASE, tmp_path / "other" / CASE)
    (label_map,) = case.glob("*seg.nii.gz")
    image = nib.Nifti1Image.from_filename(label_map)
    swapped = np.array([0, 2, 1, 3, 3], dtype=np.uint8)[np.asarray(image.dataobj).astype(int)]  # as the Decathlon's
    nib.save(nib.Nifti1Image(swapped, image.affine), label_map)
    words = ["contrasts", dropout_run, tmp_path / "other", "--cases", "all", "--json"]
    ended = znormseg(*words, "--labels", "msd")
    same = znormseg("contrasts", dropout_run, phantoms / CASE, *words[3:])
    assert json.loads(ended.out)["subsets"] == json.loads(same.out)["subsets"]


# What a run records


@pytest.mark.parametrize(("fixture", "expected"), [("tiny_run", False), ("dropout_run", True)])
def test_run_and_checkpoint_record_whether_contrasts_may_be_missing(
    fixture: str, expected: bool, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(fixture)
    best = max((run / "checkpoints").glob("best-*.json"))
    for path in (run / "run.json", best):
        assert json.loads(path.read_text())["takes_missing_contrasts"] is expected


def test_a_checkpoint_that_contradicts_its_config_is_refused(
    dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    shutil.copytree(dropout_run, tmp_path / "run")
    for best in (tmp_path / "run" / "checkpoints").glob("best-*.json"):
        details = {**json.loads(best.read_text()), "takes_missing_contrasts": False, "json_sha256": None}
        best.write_text(json.dumps(details))
    ended = znormseg("predict", tmp_path / "run", phantoms / CASE, tmp_path / "out")
    assert ended.code == 5
    assert "contradict each other" in ended.err


def test_only_a_run_with_dropout_has_presence_channels(tiny_run: Path, dropout_run: Path) -> None:
    from app.inference.model import load_model
    from app.system.device import RuntimeConfig, choose_runtime

    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    channels = [load_model(run, runtime).engine.graph.in_channels for run in (tiny_run, dropout_run)]
    assert channels == [4, 8]


def test_a_resumed_run_with_dropout_equals_an_uninterrupted_one(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.config.load import load_config
    from app.errors import InterruptedRunError
    from app.runs.checkpoints import load_newest
    from app.training.run import resume, start
    from app.training.step import QueuedStep, Stepper

    # A checkpoint after nearly every step.
    frequent = ["training.checkpoint_minutes=0.001"]
    config = load_config("laptop", [*tiny_settings, *frequent, "augment.contrast_dropout=0.5"])
    start(DataSource(phantoms), tmp_path / "whole", config)
    steps = Stepper.queue

    def stopping(self: Stepper, *arguments: Any, **options: Any) -> QueuedStep:
        if self.state.step == 2:
            raise InterruptedRunError("stopped")
        return steps(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "queue", stopping)
        with pytest.raises(InterruptedRunError):
            start(DataSource(phantoms), tmp_path / "parts", config)
    resume(DataSource(phantoms), tmp_path / "parts")
    whole, parts = (load_newest(tmp_path / run / "checkpoints", "last") for run in ("whole", "parts"))
    assert whole is not None
    assert parts is not None
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())


# predict


@pytest.mark.parametrize("subset", [SUBSETS[0], SUBSETS[1], ("t1", "flair"), ("t2",)], ids="+".join)
def test_a_subset_of_the_files_is_enough_and_the_result_lists_what_was_missing(
    subset: tuple[str, ...], dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = with_only(phantoms, tmp_path / "in", *subset)
    ended = znormseg("predict", dropout_run, case, tmp_path / "out", "--json")
    assert ended.code == 0, ended.err
    missing = [contrast for contrast in ENDINGS if contrast not in subset]
    (content,) = json.loads(ended.out)["cases"]
    assert content["missing_contrasts"] == missing
    assert set(content["inputs"]) == set(subset)
    assert (f"case {CASE}: predicted without {', '.join(missing)}" in ended.err) == bool(missing)


def test_fewer_than_four_single_files_are_accepted(
    dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = with_only(phantoms, tmp_path / "in", "t1", "t2")
    files = [word for c in ("t2", "t1") for word in (f"--{c}", place(phantoms, CASE, c))]
    assert znormseg("predict", dropout_run, tmp_path / "one", *files).code == 0
    assert znormseg("predict", dropout_run, case, tmp_path / "two").code == 0
    one, two = (voxels(tmp_path / folder / f"{CASE}.nii.gz") for folder in ("one", "two"))
    assert np.array_equal(one, two)


def test_without_t1c_the_label_map_is_on_the_grid_of_the_first_available_contrast(
    dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = with_only(phantoms, tmp_path / "in", "t2", "flair")
    stored = nib.Nifti1Image.from_filename(place(phantoms, CASE, "t2"))
    other_order = stored.as_reoriented([[0, -1], [1, 1], [2, 1]])
    nib.save(other_order, case / f"{CASE}_t2.nii.gz")
    ended = znormseg("predict", dropout_run, case, tmp_path / "out")
    assert ended.code == 0, ended.err
    label_map = nib.Nifti1Image.from_filename(tmp_path / "out" / f"{CASE}.nii.gz")
    assert np.array_equal(label_map.affine, other_order.affine)
    assert not np.array_equal(label_map.affine, stored.affine)
    assert voxels(tmp_path / "out" / f"{CASE}.nii.gz").any()


@pytest.mark.parametrize("missing", ["t1c", "flair"])
def test_a_run_that_needs_all_contrasts_points_to_contrast_dropout(
    missing: str, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = with_only(phantoms, tmp_path / "in", *(c for c in ENDINGS if c != missing))
    ended = znormseg("predict", tiny_run, case, tmp_path / "out")
    assert ended.code == 3
    assert f"case {CASE}: contrast {missing} is missing. Add its file, or leave the case out" in ended.err
    assert "trained with augment.contrast_dropout above 0" in ended.err


def test_other_problems_of_a_case_are_still_errors(
    dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = with_only(phantoms, tmp_path / "in", "t1", "t2")
    shutil.copy(case / f"{CASE}_t2.nii.gz", case / f"{CASE}_t2w.nii.gz")
    ended = znormseg("predict", dropout_run, case, tmp_path / "out")
    assert ended.code == 3
    assert "two files for t2" in ended.err
    assert "is missing" not in ended.err


# contrasts


def test_the_table_has_fifteen_rows_complete_input_first(subset_table: Any) -> None:
    assert [scores.contrasts for scores in subset_table.subsets] == list(SUBSETS)
    assert {len(scores.cases) for scores in subset_table.subsets} == {2}


@pytest.mark.parametrize("subset", [SUBSETS[0], ("t1", "t2")], ids="+".join)
def test_a_row_equals_predict_and_evaluate_without_the_files(
    *, subset: tuple[str, ...], subset_table: Any, dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    (scores,) = (scores for scores in subset_table.subsets if scores.contrasts == subset)
    for case in scores.cases:
        with_only(phantoms, tmp_path / "in", *subset, case=case)
    assert znormseg("predict", dropout_run, tmp_path / "in", tmp_path / "out").code == 0
    regions = json.loads(znormseg("evaluate", tmp_path / "out", phantoms, "--json").out)["regions"]
    assert scores.dice() == pytest.approx({region: regions[region]["dice"] for region in regions})


def test_text_csv_and_json_contain_the_same_table(
    dropout_run: Path, phantoms: Path, subset_table: Any, tmp_path: Path, znormseg: Call
) -> None:
    out = tmp_path / "table.csv"
    words = ("contrasts", dropout_run, phantoms, "--out", out)
    ended = znormseg(*words, "--json")
    assert ended.code == 0, ended.err
    content = json.loads(ended.out)
    assert content == json.loads(json.dumps(subset_table.to_json()))
    with out.open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["subset"] for row in table] == ["+".join(subset) for subset in SUBSETS]
    assert [float(row["mean_dice"]) for row in table] == [row["mean_dice"] for row in content["subsets"]]
    from app.inference.subsets import subset_rows

    assert subset_rows(subset_table)[0] == ["contrasts", "n", "WT Dice", "TC Dice", "ET Dice", "mean"]
    assert [row[1] for row in subset_rows(subset_table)[1:]] == ["2"] * 15


def test_a_case_that_lacks_a_contrast_counts_in_the_rows_without_it(
    dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = with_only(phantoms, tmp_path / "in", "t1", "flair")
    shutil.copy(phantoms / CASE / f"{CASE}_seg.nii.gz", case)
    ended = znormseg("contrasts", dropout_run, case, "--cases", "all")
    assert ended.code == 0, ended.err
    *table, notice = ended.out.splitlines()
    assert notice == "Research use only; not a medical device."
    assert [line.split()[:2] for line in table[2:]] == [["t1+flair", "1"], ["t1", "1"], ["flair", "1"]]


def chosen(run: Path, phantoms: Path, which: Any) -> list[str]:
    from app.inference.subsets import choose_cases
    from data.datasets.layouts import find_cases

    return [case.id for case in choose_cases(run, find_cases(phantoms), which)]


def test_training_cases_are_left_out_unless_requested(dropout_run: Path, phantoms: Path) -> None:
    split = json.loads((dropout_run / "split.json").read_text())
    assert chosen(dropout_run, phantoms, "validation") == split["validation"]
    assert chosen(dropout_run, phantoms, "unseen") == split["validation"]
    assert chosen(dropout_run, phantoms, "all") == sorted([*split["train"], *split["validation"]])


def test_if_the_run_trained_on_all_cases_a_remedy_is_reported(
    dropout_run: Path, phantoms: Path, znormseg: Call
) -> None:
    seen = json.loads((dropout_run / "split.json").read_text())["train"][0]
    ended = znormseg("contrasts", dropout_run, phantoms / seen)
    assert ended.code == 3
    said = " ".join(ended.err.split())
    assert "the only case with a label map (compared by id) was used for training. Give others, or --cases all" in said


def test_if_no_case_was_used_for_validation_it_is_reported(dropout_run: Path, phantoms: Path) -> None:
    from app.inference.subsets import choose_cases
    from data.datasets.layouts import find_cases

    seen = json.loads((dropout_run / "split.json").read_text())["train"]
    cases = [case for case in find_cases(phantoms) if case.id in seen]
    with pytest.raises(DataError, match=rf"none of the {len(seen)} cases .* were used for validation"):
        choose_cases(dropout_run, cases, "validation")


def test_cases_without_label_maps_are_refused(
    dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    case = with_only(phantoms, tmp_path / "in", *ENDINGS)
    ended = znormseg("contrasts", dropout_run, case, "--cases", "all")
    assert ended.code == 3
    assert "the only case has no label map" in ended.err


def test_a_broken_case_is_reported_and_the_others_are_scored(
    dropout_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    for case in sorted(phantoms.iterdir())[:2]:
        shutil.copytree(case, tmp_path / "in" / case.name)
    broken = place(tmp_path / "in", CASE, "t2")
    broken.write_bytes(broken.read_bytes()[:1000])
    ended = znormseg("contrasts", dropout_run, tmp_path / "in", "--cases", "all", "--json")
    assert ended.code == 6
    content = json.loads(ended.out)
    assert str(broken) in content["failures"][CASE]
    assert {row["n"] for row in content["subsets"]} == {1}


def test_an_ensemble_of_one_run_has_the_same_table_as_the_run(
    dropout_run: Path, subset_table: Any, phantoms: Path, tmp_path: Path
) -> None:
    from app.inference.backends.choose import choose_backend
    from app.inference.ensemble import load_predictor
    from app.inference.postprocess import Postprocess
    from app.inference.subsets import score_subsets
    from app.system.device import RuntimeConfig
    from data.datasets.layouts import find_cases

    shutil.copytree(dropout_run / "checkpoints", tmp_path / "fold-0" / "checkpoints")
    network = {"network": "fold-0", "weights_sha256": subset_table.weights_sha256, "step": 40}
    content = {"version": 1, "networks": [network], "postprocess": Postprocess().to_json()}
    (tmp_path / "ensemble.json").write_text(json.dumps(content))
    runtime = choose_backend("auto", RuntimeConfig(device="cpu"))
    cases = [case for case in find_cases(phantoms) if case.id in subset_table.subsets[0].cases]
    table = score_subsets(load_predictor(tmp_path, runtime), cases[:1], runtime)
    for one, other in zip(table.subsets, subset_table.subsets, strict=True):
        assert one.cases[cases[0].id] == other.cases[cases[0].id]


def test_a_run_that_needs_all_contrasts_has_no_table_of_subsets(tiny_run: Path, phantoms: Path, znormseg: Call) -> None:
    ended = znormseg("contrasts", tiny_run, phantoms)
    assert ended.code == 5
    assert "--set augment.contrast_dropout=0.5" in ended.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--cases", "some"], 2, "Invalid value for '--cases'"),
        (["--resample"], 2, "No such option: --resample"),
        (["--device", "nonsense"], 4, "auto, cpu, cuda or cuda:N, got 'nonsense'"),
        (["--out", "nowhere/table.csv"], 3, "the folder nowhere does not exist"),
    ],
)
def test_an_invalid_option_is_refused_before_any_work(
    *, arguments: list[str], code: int, words: str, dropout_run: Path, phantoms: Path, znormseg: Call
) -> None:
    ended = znormseg("contrasts", dropout_run, phantoms, *arguments)
    assert ended.code == code
    assert words in ended.err


@pytest.mark.parametrize(
    "arguments", [["--contrast-subsets"], ["--contrast-subsets", "--cases", "all"], ["--device", "cpu"]], ids=" ".join
)
def test_evaluate_names_the_command_that_scores_missing_contrasts(
    arguments: list[str], dropout_run: Path, phantoms: Path, znormseg: Call
) -> None:
    ended = znormseg("evaluate", dropout_run, phantoms, *arguments)
    assert ended.code == 2
    assert "znormseg contrasts RUN DATA" in ended.err.splitlines()[-1]
