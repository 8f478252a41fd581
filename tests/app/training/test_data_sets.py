"""Runs on several data sets: what they record, that they resume bit for bit, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.config.load import load_config
from app.errors import InterruptedRunError
from app.experiments.crossval.plan import deal, read_folds, require_same
from app.reports.run import render_run
from app.runs.checkpoints import load_newest
from app.runs.folder import read_json
from app.runs.model_card import describe_model
from app.runs.training_record import training_record
from app.training.cases import record_intensities, report_same_label_maps
from app.training.run import prepare_as_run, resume, start
from app.training.trainer import Trainer
from data.datasets.label_stats import LabelMap
from data.datasets.layouts import find_cases
from data.datasets.source import DataSource, data_source
from data.datasets.splits import Split
from data.errors import DataError
from data.patches.cache import CaseFolder

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def halves(phantoms: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The phantoms as two data sets of three."""
    root = tmp_path_factory.mktemp("halves")
    for number, case in enumerate(sorted(phantoms.iterdir())):
        shutil.copytree(case, root / "AB"[number // 3] / case.name)
    return str(root / "A"), str(root / "B")


@pytest.fixture(scope="module")
def mixed(halves: tuple[str, str]) -> DataSource:
    """Both, and the synthetic cases of the first."""
    return data_source([*halves, f"synthetic:{halves[0]}"])


@pytest.fixture(scope="module")
def finished(mixed: DataSource, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on all of them with weights; tests must not modify it."""
    run = tmp_path_factory.mktemp("mixed") / "run"
    start(mixed, run, load_config("laptop", [*tiny_settings, "data.weights=[2, 1, 1]"]))
    return run


def options(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        action()
    return str(caught.value)


def test_a_stopped_and_resumed_run_ends_like_an_uninterrupted_one(
    finished: Path, mixed: DataSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer._step

    def stopping(self: Trainer, *arguments: Any) -> None:
        if self.state.step == 2:
            self._save_last()
            raise InterruptedRunError("stopped")
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        with pytest.raises(InterruptedRunError):
            start(mixed, tmp_path / "run", load_config(str(finished / "config.yaml")))
    stopped = load_newest(tmp_path / "run" / "checkpoints", "last")
    assert stopped is not None
    assert stopped.step == 2
    resume(mixed, tmp_path / "run")
    whole, parts = (load_newest(run / "checkpoints", "last") for run in (finished, tmp_path / "run"))
    assert whole is not None
    assert parts is not None
    assert all(torch.equal(tensor, parts.tensors[name]) for name, tensor in whole.tensors.items())


def test_synthetic_cases_of_validation_patients_are_not_trained_on(finished: Path) -> None:
    split = read_json(finished / "split.json")
    made = {case_id for case_id in split["train"] if case_id.startswith("synthetic-")}
    assert made
    assert not any(case_id.startswith("synthetic-") for case_id in split["validation"])
    assert not made & {f"synthetic-{case_id}" for case_id in split["validation"]}


def test_folds_only_depend_on_the_real_cases(
    finished: Path, phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", tiny_settings))
    assert read_json(tmp_path / "run/split.json")["validation"] == read_json(finished / "split.json")["validation"]


def test_the_run_records_its_data_sets(finished: Path, halves: tuple[str, str]) -> None:
    facts, split = read_json(finished / "run.json"), read_json(finished / "split.json")
    assert facts["data"] == [*halves, f"synthetic:{halves[0]}"]
    assert [(one["labels"], one["synthetic"]) for one in facts["data_sets"]] == [
        ("brats2021", False),
        ("brats2021", False),
        ("brats2021", True),
    ]
    assert sum(one["cases"] for one in facts["data_sets"]) == len(split["train"]) + len(split["validation"])
    assert read_json(finished / "labels.json")["cases"].keys() == {*split["train"], *split["validation"]}


def test_the_page_and_the_model_card_show_the_data_sets(finished: Path, halves: tuple[str, str]) -> None:
    assert f"train {halves[0]} {halves[1]} synthetic:{halves[0]} NEW_RUN" in render_run(finished)
    described = describe_model(finished)["data"]
    assert described["cases of each data set"][0] == "3"
    assert described["cases of each data set"][2].endswith(" with synthetic images")
    assert described["patches of each data set in every cycle"] == [2, 1, 1]


def test_a_case_whose_label_map_trained_synthetic_images_counts_as_trained_on(finished: Path, tmp_path: Path) -> None:
    made = [case_id for case_id in read_json(finished / "split.json")["train"] if case_id.startswith("synthetic-")]
    (tmp_path / "split.json").write_text(json.dumps({"train": made, "validation": []}))
    assert {case_id.removeprefix("synthetic-") for case_id in made} < set(training_record(tmp_path).trained_on)


def test_recorded_intensities_are_those_of_real_cases(finished: Path) -> None:
    split = read_json(finished / "split.json")
    real = [case_id for case_id in split["train"] if not case_id.startswith("synthetic-")]
    assert read_json(finished / "intensities.json")["cases"] == len(real)


def test_with_only_synthetic_cases_intensities_are_those_of_the_real_images(
    halves: tuple[str, str], tiny_settings: list[str], tmp_path: Path
) -> None:
    config, cases = load_config("laptop", tiny_settings), data_source([f"synthetic:{halves[0]}"]).find_cases()
    facts = {"labels": "brats2021", "spacing_mm": [4.0, 4.0, 4.0]}
    record_intensities(tmp_path, prepare_as_run(list(cases.values()), CaseFolder(tmp_path / "cache"), config, facts))
    assert read_json(tmp_path / "intensities.json")["cases"] == 3


def test_each_data_set_is_prepared_with_its_own_convention(
    render: Call, tiny_settings: list[str], tmp_path: Path
) -> None:
    early, late = render(tmp_path / "early", "2021"), render(tmp_path / "late", "2023 GLI")
    data, config = data_source([str(early.root), str(late.root)]), load_config("laptop", tiny_settings)
    start(data, tmp_path / "run", config, fold="all")
    facts = read_json(tmp_path / "run/run.json")
    assert (facts["labels"], [one["labels"] for one in facts["data_sets"]]) == (
        "brats2021",
        ["brats2021", "brats2023"],
    )
    prepared = prepare_as_run(list(data.find_cases().values()), CaseFolder(tmp_path / "cache"), config, facts)
    for case in prepared:
        expected = {**early.codes, **late.codes}[case.id]
        assert np.bincount(case.codes().ravel())[1:].tolist() == np.bincount(expected.ravel())[1:].tolist()


def test_the_command_takes_several_data_sets_with_weights_and_resumes(
    halves: tuple[str, str], tiny_settings: list[str], tmp_path: Path, znormseg: Call
) -> None:
    run = tmp_path / "run"
    assert znormseg("train", *halves, run, "--weights", "3,1", *options(tiny_settings)).code == 0
    assert load_config(str(run / "config.yaml")).data.weights == (3, 1)
    ended = znormseg("train", *halves, run, "--resume", "--set", "training.steps=5", "--json")
    assert (ended.code, json.loads(ended.out)["steps"]) == (0, 5)


# Refusals


@pytest.mark.parametrize("given", [["B", "A", "synthetic:A"], ["A", "B"], ["A"]])
def test_other_data_sets_or_another_order_cannot_resume_a_run(
    given: list[str], finished: Path, halves: tuple[str, str], tmp_path: Path
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    named = [one.replace("A", halves[0]).replace("B", halves[1]) for one in given]
    message = refused(lambda: resume(data_source(named), run))
    if len(given) < 3:
        assert "but" in message or "cases of the run are missing" in message
    else:
        assert "was started with these data sets in another order, or with other cases" in message


@pytest.mark.parametrize("weights", ["1", "1,2,3"])
def test_the_number_of_weights_must_match_the_data_sets(
    weights: str, halves: tuple[str, str], tmp_path: Path, znormseg: Call
) -> None:
    for command in ("train", "crossval"):
        ended = znormseg(command, *halves, tmp_path / "run", "--weights", weights)
        assert ended.code == 4
        assert "for 2 data sets" in ended.err
        assert "Give one for each, in the same order." in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("weights", ["0,1", "a", "1,", "1.5,1"])
def test_weights_must_be_positive_whole_numbers(weights: str, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("train", tmp_path, tmp_path, tmp_path / "run", "--weights", weights)
    assert ended.code == 2
    assert "--weights takes whole numbers above 0" in ended.err


def test_labels_are_given_once_for_all_data_sets_or_for_each(
    halves: tuple[str, str], tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("train", *halves, tmp_path / "run", "--labels", "msd,msd,msd")
    assert ended.code == 2
    assert "--labels: 3 names for 2 data sets" in ended.err


def test_only_synthetic_cases_cannot_be_split_into_folds(
    halves: tuple[str, str], tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("train", f"synthetic:{halves[0]}", tmp_path / "run")
    assert ended.code == 3
    assert "synthetic cases only train, and there are no others to validate on" in ended.err
    ended = znormseg("crossval", f"synthetic:{halves[0]}", tmp_path / "out")
    assert ended.code == 3
    assert "there are no others to validate on. Add a data set of real cases." in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_split_that_validates_on_a_synthetic_case_is_refused(
    mixed: DataSource, tiny_settings: list[str], tmp_path: Path
) -> None:
    first, second, *_ = (case.id for case in find_cases(mixed.root))
    (tmp_path / "split.json").write_text(json.dumps({"train": [first], "validation": [f"synthetic-{second}"]}))
    config, split = load_config("laptop", tiny_settings), tmp_path / "split.json"
    message = refused(lambda: start(mixed, tmp_path / "run", config, split_file=split))
    assert f"synthetic cases are listed for validation (1): synthetic-{second}." in message


@pytest.mark.parametrize("weights", [[], ["data.weights=[1, 1, 1]"]])
def test_a_data_set_that_the_split_leaves_out_is_refused_with_its_name(
    weights: list[str], mixed: DataSource, tiny_settings: list[str], tmp_path: Path
) -> None:
    ids = [case_id for case_id, case in mixed.find_cases().items() if case.data_set < 2]
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[:-1], "validation": ids[-1:]}))
    config, split = load_config("laptop", [*tiny_settings, *weights]), tmp_path / "split.json"
    message = refused(lambda: start(mixed, tmp_path / "run", config, split_file=split))
    assert f"synthetic:{mixed.root}: none of its cases (such as synthetic-{ids[0]})" in message


def test_resume_refuses_weights_of_a_data_set_that_only_validates_and_leaves_the_run_as_it_was(
    halves: tuple[str, str], tiny_settings: list[str], tmp_path: Path, znormseg: Call
) -> None:
    data, run = data_source(halves), tmp_path / "run"
    ids = [[case_id for case_id, case in data.find_cases().items() if case.data_set == number] for number in (0, 1)]
    (tmp_path / "split.json").write_text(json.dumps({"train": ids[0], "validation": ids[1]}))
    start(data, run, load_config("laptop", tiny_settings), split_file=tmp_path / "split.json")
    before = (run / "config.yaml").read_bytes()
    ended = znormseg(
        "train", *halves, run, "--resume", "--weights=3,1", "--allow=data.weights", "--set=training.steps=9"
    )
    assert ended.code == 3
    assert "is used for training, which data.weights requires. Leave out data.weights or this data set" in ended.err
    assert (run / "config.yaml").read_bytes() == before


@pytest.mark.parametrize("command", ["train", "crossval"])
def test_weights_can_only_be_given_once(command: str, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg(command, tmp_path, tmp_path, tmp_path / "run", "--weights=3,1", "--set=data.weights=[1,1]")
    assert ended.code == 2
    assert "give either --weights or --set data.weights" in ended.err


def test_a_prefix_without_a_path_is_refused(tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("train", "synthetic:", tmp_path, tmp_path / "run")
    assert ended.code == 3
    assert "synthetic: names no data set. Write one directly after the colon, such as synthetic:CASES." in ended.err


# The same scan under two ids


def scan(sha256: str, *, empty: bool = False) -> LabelMap:
    return LabelMap(counts={} if empty else {1: 5}, voxel_um3=1, sha256=sha256, stamp=(0, 0))


def warnings_of(maps: dict[str, LabelMap], split: Split, caplog: pytest.LogCaptureFixture) -> str:
    with caplog.at_level("WARNING"):
        report_same_label_maps(maps, [split])
    return caplog.text


def test_a_scan_under_two_ids_in_training_and_validation_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    maps = {"a": scan("x"), "b": scan("y"), "c": scan("x")}
    message = warnings_of(maps, Split(train=("a", "b"), validation=("c",)), caplog)
    assert "identical label maps, so they are probably the same scan under two ids: a, c." in message
    assert "manifest (column patient)" in message


@pytest.mark.parametrize(
    ("maps", "split"),
    [
        ({"a": scan("x"), "b": scan("x"), "c": scan("y")}, Split(train=("a", "b"), validation=("c",))),
        ({"a": scan("x", empty=True), "c": scan("x", empty=True)}, Split(train=("a",), validation=("c",))),
        ({"a": scan("x"), "synthetic-a": scan("x")}, Split(train=("a", "synthetic-a"), validation=())),
    ],
    ids=["in one part", "empty", "synthetic"],
)
def test_other_identical_label_maps_are_not_reported(
    maps: dict[str, LabelMap], split: Split, caplog: pytest.LogCaptureFixture
) -> None:
    assert warnings_of(maps, split, caplog) == ""


# Cross-validation


def test_copies_of_a_scan_in_several_folds_are_reported(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data, case = Path(shutil.copytree(phantoms, tmp_path / "data")), sorted(phantoms.iterdir())[0]
    for number in range(4):
        for path in case.iterdir():
            (data / f"copy{number}").mkdir(exist_ok=True)
            shutil.copy(path, data / f"copy{number}" / path.name.replace(case.name, f"copy{number}"))
    deal(DataSource(data), tmp_path / "out", load_config("laptop", tiny_settings), folds=2)
    assert f"{case.name}, copy0, copy1, copy2, copy3" in caplog.text


def test_folds_split_real_cases_and_never_train_on_synthetic_ones_of_validation_patients(
    mixed: DataSource, tiny_settings: list[str], tmp_path: Path
) -> None:
    folds = deal(mixed, tmp_path, load_config("laptop", [*tiny_settings, "data.weights=[2, 1, 1]"]), folds=3)
    assert sorted(folds.fold_of()) == [case_id for case_id in folds.cases if not case_id.startswith("synthetic-")]
    for split in folds.splits:
        validating = {folds.cases[case_id].patient for case_id in split.validation}
        assert not validating & {folds.cases[case_id].patient for case_id in split.train}
        assert any(case_id.startswith("synthetic-") for case_id in split.train)


def test_folds_of_several_data_sets_resume_only_with_the_same_ones(
    mixed: DataSource, halves: tuple[str, str], tiny_settings: list[str], tmp_path: Path
) -> None:
    config = load_config("laptop", tiny_settings)
    folds = deal(mixed, tmp_path, config, folds=2)
    require_same(folds)
    again = deal(mixed, tmp_path, config, folds=2)
    require_same(again)
    assert again.splits == folds.splits
    assert read_folds(tmp_path, mixed).splits == folds.splits
    for others in (halves, (halves[1], halves[0], f"synthetic:{halves[0]}")):
        with pytest.raises(DataError, match="Give the same ones in the same order"):
            require_same(deal(data_source(others), tmp_path, config, folds=2))


@pytest.mark.slow
def test_a_cross_validation_of_real_and_synthetic_cases_runs_in_two_processes(
    mixed: DataSource, tiny_settings: list[str], tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg(
        "crossval", *mixed.arguments, tmp_path / "out", "--folds=2", "--jobs=2", "--weights=2,1,1", "--json",
        *options(tiny_settings),
    )  # fmt: skip
    assert ended.code == 0, ended.err
    content = json.loads(ended.out)
    assert sum(fold["cases"] for fold in content["folds"]) == 6
    assert sorted(path.stem for path in (tmp_path / "out/out-of-fold").iterdir()) == [
        case_id for case_id in mixed.find_cases() if not case_id.startswith("synthetic-")
    ]
    assert len(describe_model(tmp_path / "out/ensemble")["data"]["cases of each data set"]) == 3
