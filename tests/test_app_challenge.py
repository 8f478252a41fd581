"""``znormseg predict --challenge``: as BraTS runs containers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.inference.challenge import deliver
from app.inference.cohort import Prediction
from data.errors import DataError
from data.layouts import find_cases

Call = Callable[..., Any]


def test_the_output_holds_a_label_map_a_case_and_nothing_else(
    tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    ended = znormseg("predict", "--challenge", tiny_run, phantoms, tmp_path / "output")
    assert ended.code == 0, ended.err
    wanted = sorted(f"{case.name}.nii.gz" for case in phantoms.iterdir())
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == wanted


def test_the_label_maps_are_those_of_predict(tiny_run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    case = sorted(phantoms.iterdir())[0]
    znormseg("predict", tiny_run, case, tmp_path / "plain")
    znormseg("predict", "--challenge", tiny_run, case, tmp_path / "challenge")
    name = f"{case.name}.nii.gz"
    assert (tmp_path / "challenge" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_without_folders_those_of_the_container_are_taken(znormseg: Call) -> None:
    ended = znormseg("predict", "--challenge")
    assert ended.code in (3, 5)
    assert "/input" in ended.err or "/model" in ended.err


@pytest.mark.parametrize("words", [["a", "b"], ["a", "b", "c", "--uncertainty"], ["a", "b", "--t1", "x"]], ids=" ".join)
def test_what_does_not_go_with_it_is_refused(words: list[str], znormseg: Call) -> None:
    ended = znormseg("predict", "--challenge", *words)
    assert ended.code == 2
    assert "--challenge" in ended.err


def test_a_file_of_a_case_is_not_replaced(phantoms: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sorted(phantoms.iterdir())[0], tmp_path / "case")
    (case,) = find_cases(folder)
    before = case.contrasts["t1"].read_bytes()
    label_map = tmp_path / case.contrasts["t1"].name
    label_map.write_bytes(b"another")
    with pytest.raises(DataError, match="would replace its own file"):
        deliver([Prediction(case=case.id, label_map=label_map, content={})], [case], folder)
    assert case.contrasts["t1"].read_bytes() == before
