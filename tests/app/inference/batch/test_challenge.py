"""``znormseg predict --challenge``, called as BraTS runs containers."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.inference.batch.challenge import Delivery
from app.inference.batch.pipeline import InThisProcess
from data.datasets.layouts import find_cases
from data.errors import DataError

Call = Callable[..., Any]


def test_the_output_contains_exactly_one_label_map_per_case(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", "--challenge", tiny_run, phantoms, tmp_path / "output")
    assert ended.code == 0, ended.err
    wanted = sorted(f"{case.name}.nii.gz" for case in phantoms.iterdir())
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == wanted


def test_the_label_maps_equal_those_of_predict(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = sorted(phantoms.iterdir())[0]
    znormseg("predict", tiny_run, case, tmp_path / "plain")
    znormseg("predict", "--challenge", tiny_run, case, tmp_path / "challenge")
    name = f"{case.name}.nii.gz"
    assert (tmp_path / "challenge" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_the_folders_default_to_those_of_the_container(znormseg: Call) -> None:
    ended = znormseg("predict", "--challenge")
    assert ended.code in (3, 5)
    assert "/input" in ended.err or "/model" in ended.err


@pytest.mark.parametrize("words", [["a", "b"], ["a", "b", "c", "--uncertainty"], ["a", "b", "--t1", "x"]], ids=" ".join)
def test_incompatible_options_are_refused(words: list[str], znormseg: Call) -> None:
    ended = znormseg("predict", "--challenge", *words)
    assert ended.code == 2
    assert "--challenge" in ended.err


@pytest.mark.parametrize("place", ["run", "cases", "case"])
def test_label_maps_are_not_written_among_scans_or_into_the_run(
    place: str, tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    run, cases = shutil.copytree(tiny_run, tmp_path / "run"), shutil.copytree(phantoms, tmp_path / "cases")
    output = {"run": run, "cases": cases, "case": sorted(cases.iterdir())[0]}[place]
    before = sorted(output.iterdir())
    ended = znormseg("predict", run, cases, output)
    assert (ended.code, "Give another OUTPUT" in ended.err) == (3, True)
    assert sorted(output.iterdir()) == before


def test_the_ray_engine_is_refused(znormseg: Call) -> None:
    ended = znormseg("predict", "--challenge", "a", "b", "c", "--engine", "ray")
    assert (ended.code, "one host" in ended.err) == (2, True)


def test_a_file_of_a_case_is_not_replaced(phantoms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sorted(phantoms.iterdir())[0], tmp_path / "case")
    (case,) = find_cases(folder)
    renamed = dataclasses.replace(case, id=case.contrasts["t1"].name.removesuffix(".nii.gz"))
    with pytest.raises(DataError, match="would replace its own file"):
        Delivery(output=folder).create_folder([renamed])


def test_an_output_that_is_a_file_is_refused_before_any_work(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InThisProcess, "work", lambda *_: pytest.fail("a case was begun"))
    (tmp_path / "output").touch()
    ended = znormseg("predict", "--challenge", tiny_run, phantoms, tmp_path / "output")
    assert (ended.code, "is a file" in ended.err) == (3, True)


def test_label_maps_finished_before_a_stop_are_delivered_and_the_message_says_where(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = InThisProcess.work

    def stopped(engine: Any, cases: Any, told: Any, **more: Any) -> None:
        whole(engine, list(cases)[:1], told, **more)
        raise KeyboardInterrupt

    monkeypatch.setattr(InThisProcess, "work", stopped)
    ended = znormseg("predict", "--challenge", tiny_run, phantoms, tmp_path / "output")
    first = sorted(case.name for case in phantoms.iterdir())[0]
    assert [path.name for path in (tmp_path / "output").iterdir()] == [f"{first}.nii.gz"]
    assert f"are in {tmp_path / 'output'}" in ended.err


def test_the_json_lists_the_existing_files(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = sorted(phantoms.iterdir())[0]
    ended = znormseg("predict", "--challenge", "--json", tiny_run, case, tmp_path / "output")
    content = json.loads(ended.out)
    assert Path(content["cases"][0]["label_map"]).is_file()
    assert content["manifest"] is None
