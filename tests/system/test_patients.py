"""Patients and names in the commands: a manifest's patients count, begun splits stay, a bad name affects one case."""

from __future__ import annotations

import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from app.config.load import load_config
from app.errors import RunError
from app.experiments.comparison.split import deal_parts, fold_parts
from app.experiments.crossval.plan import deal, require_same
from app.training.run import resume, start
from data.datasets.layouts import find_cases, patients_of
from data.datasets.patients import patient_by_older_versions
from data.datasets.source import DataSource
from data.errors import DataError

Call = Callable[..., Any]


@pytest.fixture
def options(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line."""
    return [word for setting in tiny_settings for word in ("--set", setting)]


def manifest(path: Path, phantoms: Path, ids: Sequence[str], patients: Sequence[str] = ()) -> Path:
    """A table that gives the phantoms other ids, and patients where some are given."""
    cases = find_cases(phantoms)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["case", "t1", "t1c", "t2", "flair", "seg", *(["patient"] if patients else [])])
        for number, (case_id, case) in enumerate(zip(ids, cases, strict=True)):
            writer.writerow([case_id, *case.contrasts.values(), case.label, *patients[number : number + 1]])
    return path


def split_of(run: Path) -> tuple[set[str], set[str]]:
    content = json.loads((run / "split.json").read_text(encoding="utf-8"))
    return set(content["train"]), set(content["validation"])


def test_train_keeps_patients_stated_in_a_manifest_together(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    data = manifest(tmp_path / "m.csv", phantoms, "abcdef", "112233")
    ended = znormseg("train", data, tmp_path / "run", "--follow-links", *options)
    assert ended.code == 0, ended.err
    train, validation = split_of(tmp_path / "run")
    assert validation in ({"a", "b"}, {"c", "d"}, {"e", "f"})
    assert train == set("abcdef") - validation


def test_check_counts_patients_by_column_and_by_visits(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    stated = manifest(tmp_path / "m.csv", phantoms, "abcdef", "112233")
    visits = manifest(tmp_path / "v.csv", phantoms, [f"sub-{n}_ses-{v}" for n in "123" for v in "12"])
    for data in (stated, visits):
        ended = znormseg("data", "check", data, "--follow-links", "--json")
        assert (ended.code, json.loads(ended.out)["patients"]) == (0, 3)


def test_train_warns_when_it_separates_ids_that_look_like_visits(
    phantoms: Path, options: list[str], tmp_path: Path, znormseg: Call
) -> None:
    data = manifest(tmp_path / "m.csv", phantoms, [f"P0{n}_{v}" for n in "123" for v in "12"])
    split = tmp_path / "split.json"
    split.write_text('{"train": ["P01_1", "P02_1", "P02_2"], "validation": ["P01_2"]}')
    ended = znormseg("train", data, tmp_path / "run", "--follow-links", "--split", split, *options)
    assert (ended.code, "look like visits of the same patient" in ended.err) == (0, True)
    assert "P01_1, P01_2. If they are" in ended.err


def test_a_split_that_separates_a_stated_patient_is_refused_with_both_cases(phantoms: Path, tmp_path: Path) -> None:
    data = manifest(tmp_path / "m.csv", phantoms, "abcdef", "112233")
    (tmp_path / "split.json").write_text('{"train": ["a", "c"], "validation": ["d"]}')
    with pytest.raises(DataError, match=r"patient 2 is in train and in validation \(case c, case d\)"):
        start(
            DataSource(data, follow_links=True),
            tmp_path / "run",
            load_config("laptop"),
            split_file=tmp_path / "split.json",
        )


def test_the_split_of_an_older_run_is_kept_with_a_warning(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"sub-{n}_ses-{v}" for n in "123" for v in "12"]
    data, run = manifest(tmp_path / "m.csv", phantoms, ids), tmp_path / "run"
    start(DataSource(data, follow_links=True), run, load_config("laptop", tiny_settings))
    before = {"train": ids[:-1], "validation": ids[-1:]}
    (run / "split.json").write_text(json.dumps(before))
    resume(DataSource(data, follow_links=True), run, load_config("laptop", [*tiny_settings, "training.steps=5"]))
    assert json.loads((run / "split.json").read_text()) == before
    assert "has cases of the same patient in several parts" in caplog.text
    assert "sub-3_ses-1, sub-3_ses-2" in caplog.text


def test_every_fold_of_a_cross_validation_keeps_patients_together(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    data = manifest(tmp_path / "m.csv", phantoms, "abcdef", "112233")
    folds = deal(DataSource(data, follow_links=True), tmp_path, load_config("laptop", tiny_settings), folds=3)
    assert sorted(split.validation for split in folds.splits) == [("a", "b"), ("c", "d"), ("e", "f")]


def test_a_started_cross_validation_keeps_its_folds_and_warns(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ids = [f"sub-{n}_ses-{v}" for n in "123" for v in "12"]
    data, config = manifest(tmp_path / "m.csv", phantoms, ids), load_config("laptop", tiny_settings)
    folds = deal(DataSource(data, follow_links=True), tmp_path, config, folds=3)
    require_same(folds)
    content = json.loads((tmp_path / "folds.json").read_text())
    content["folds"] = [[ids[0], ids[3]], [ids[1], ids[4]], [ids[2], ids[5]]]
    (tmp_path / "folds.json").write_text(json.dumps(content))
    again = deal(DataSource(data, follow_links=True), tmp_path, config, folds=3)
    require_same(again)
    assert [list(split.validation) for split in again.splits] == content["folds"]
    assert "the recorded split has cases of the same patient in several parts" in caplog.text


def test_a_damaged_folds_file_is_refused_with_its_path(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    (tmp_path / "folds.json").write_text('{"folds": 3}')
    with pytest.raises(RunError, match=r"folds\.json: damaged"):
        deal(DataSource(phantoms), tmp_path, load_config("laptop", tiny_settings), folds=3)


def test_a_comparison_of_an_older_version_keeps_its_parts(phantoms: Path, tmp_path: Path) -> None:
    ids = [f"sub-{n}_ses-{v}" for n in "123" for v in "12"]
    data = DataSource(manifest(tmp_path / "m.csv", phantoms, ids), labels="brats2021", follow_links=True)
    cases = data.find_cases()
    before = fold_parts({case_id: patient_by_older_versions(case_id) for case_id in ids}, 1)
    assert before != fold_parts(patients_of(cases.values()), 1)
    assert deal_parts(data, cases, 1, recorded=before.to_json()) == before
    assert deal_parts(data, cases, 0, recorded=before.to_json()) != before


def test_a_split_may_name_cases_in_another_unicode_form(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    composed = ["Zo\u00eb1", "Zo\u00eb2", "c", "d", "e", "f"]
    data = manifest(tmp_path / "m.csv", phantoms, composed)
    parts = {"train": [unicodedata.normalize("NFD", composed[0]), "c"], "validation": [composed[1]]}
    (tmp_path / "split.json").write_text(json.dumps(parts))
    config = load_config("laptop", tiny_settings)
    start(DataSource(data, follow_links=True), tmp_path / "run", config, split_file=tmp_path / "split.json")
    assert split_of(tmp_path / "run") == ({composed[0], "c"}, {composed[1]})


@pytest.fixture
def odd(phantoms: Path, tmp_path: Path) -> Path:
    """A usual case, one with a name that is no UTF-8, one in the form of macOS, one with a name as long as can be."""
    names = [b"usual", b"caf\xe9", "Zoe\u0308".encode(), b"x" * 240]
    for case, name in zip(find_cases(phantoms), names, strict=False):
        folder = tmp_path / "odd" / os.fsdecode(name)
        folder.mkdir(parents=True)
        for path in case.folder.iterdir():
            shutil.copy(path, folder / f"{folder.name}{path.name.removeprefix(case.id)}")
    return tmp_path / "odd"


def test_an_unusable_name_affects_only_its_own_case(odd: Path, tiny_run: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("predict", tiny_run, odd, tmp_path / "out")
    assert ended.code == 6
    assert "is not valid UTF-8" in ended.err
    written = {path.name for path in (tmp_path / "out").glob("*.nii.gz")}
    assert written == {"usual.nii.gz", "Zo\u00eb.nii.gz", f"{'x' * 240}.nii.gz"}


def test_a_file_name_that_would_be_too_long_is_refused_with_a_clear_message(
    odd: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", tiny_run, odd, tmp_path / "out", "--save-probabilities")
    assert ended.code == 6
    assert "..._probabilities.nii.gz would have 261 bytes" in ended.err
    assert (tmp_path / "out" / "usual_probabilities.nii.gz").exists()


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict"])
def test_a_terminal_that_cannot_show_a_name_causes_no_failure(
    odd: Path, znormseg_process: Call, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    process = znormseg_process("data", "check", odd)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, "Traceback" in err, "fault" in err) == (3, False, False)
    assert "4 cases of 4 patients" in out


def test_scores_of_names_that_are_not_utf8_are_written(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    names = [b"caf\xe9", "Zoe\u0308".encode()]
    for folder, name in ((folder, name) for folder in ("predicted", "expected") for name in names):
        (tmp_path / folder).mkdir(exist_ok=True)
        form = name if folder == "predicted" else os.fsencode(unicodedata.normalize("NFC", os.fsdecode(name)))
        label = find_cases(phantoms)[names.index(name)].label
        assert label is not None
        shutil.copy(os.fsencode(label), os.fsencode(tmp_path / folder) + b"/" + form + b".nii.gz")
    table = tmp_path / "scores.csv"
    ended = znormseg("evaluate", tmp_path / "predicted", tmp_path / "expected", "--labels", "brats2021", "-o", table)
    assert ended.code == 0, ended.err
    assert [row[0] for row in csv.reader(table.read_text(encoding="utf-8").splitlines())][1:3] == [
        "Zo\u00eb",
        "caf\\udce9",
    ]
