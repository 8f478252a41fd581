"""Prepared cases shared by runs: each is made once, their folder is reported, and an unusable folder stops no run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.config.load import load_config
from app.errors import ConfigError
from app.runs import case_cache
from app.training.run import start
from data.datasets.source import DataSource
from data.nifti import read_label_map, write_label_map
from data.patches import sampler
from data.preprocess import prepare

Call = Callable[..., Any]


@pytest.fixture
def options(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line."""
    return [word for setting in tiny_settings for word in ("--set", setting)]


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache only for this test, not created yet."""
    monkeypatch.setenv("ZNORMSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of the cases that were prepared for training, in turn."""
    ids: list[str] = []
    monkeypatch.setattr(sampler, "prepare", lambda case, **others: (ids.append(case.id), prepare(case, **others))[1])
    return ids


def test_the_tests_do_not_use_the_users_cache(cache_folder: Path) -> None:
    assert case_cache.cache_folder() == cache_folder


def test_the_cache_is_where_the_environment_variables_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("ZNORMSEG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert case_cache.cache_folder() == tmp_path / "znormseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert case_cache.cache_folder() in (tmp_path / ".cache" / "znormseg", tmp_path / "Library/Caches/znormseg")


@pytest.mark.parametrize("text", ["much", "0", "-1", "nan", "inf"])
def test_an_invalid_size_limit_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZNORMSEG_CACHE_GB", text)
    with pytest.raises(ConfigError, match=f"ZNORMSEG_CACHE_GB: expected a number of gigabytes above 0, got '{text}'"):
        case_cache.cache_bytes()


def test_a_second_run_prepares_nothing(
    phantoms: Path, tmp_path: Path, tiny_settings: list[str], own_cache: Path, prepared: list[str]
) -> None:
    config = load_config("laptop", tiny_settings)
    start(DataSource(phantoms), tmp_path / "one", config)
    assert len(prepared) == 6
    start(DataSource(phantoms), tmp_path / "other", config, fold=1)
    assert len(prepared) == 6
    assert not (tmp_path / "one" / "cache").exists()
    assert [*own_cache.glob(".partial*"), *(own_cache / ".users").iterdir()] == []


def test_an_unusable_cache_is_reported_and_the_run_stores_its_own_cases(
    phantoms: Path, tmp_path: Path, options: list[str], own_cache: Path, znormseg: Call
) -> None:
    own_cache.write_text("a file")
    ended = znormseg("train", phantoms, tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    assert (
        f"prepared cases are stored in {tmp_path / 'run' / 'cache'}, as the cache cannot be used: {own_cache}"
        in ended.err
    )
    assert not (tmp_path / "run" / "cache").exists()


def test_cases_that_do_not_fit_are_stored_by_the_run_and_reported(
    *,
    phantoms: Path,
    tmp_path: Path,
    options: list[str],
    own_cache: Path,
    znormseg: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ZNORMSEG_CACHE_GB", "0.001")
    ended = znormseg("train", phantoms, tmp_path / "run", *options)
    assert ended.code == 0, ended.err
    assert "some prepared cases are stored in the run folder" in ended.err
    assert sum(path.stat().st_size for path in own_cache.glob("[!.]*/*")) <= 1e6


def test_the_cache_can_be_inspected_and_cleared_by_command(
    phantoms: Path, tmp_path: Path, tiny_settings: list[str], own_cache: Path, znormseg: Call
) -> None:
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", tiny_settings))
    told = json.loads(znormseg("data", "cache", "--info", "--json").out)
    assert (told["folder"], told["entries"], told["in_use"]) == (str(own_cache), 6, 0)
    assert told["bytes"] == sum(path.stat().st_size for path in own_cache.glob("[!.]*/*")) <= told["limit_bytes"]
    assert "6 prepared cases" in znormseg("data", "cache").out
    cleared = json.loads(znormseg("data", "cache", "--clear", "--json").out)
    assert (cleared["entries"], cleared["freed_bytes"]) == (0, told["bytes"])
    assert znormseg("data", "cache", "--info", "--clear").code == 2


@pytest.mark.parametrize("usable", [True, False])
def test_a_comparison_prepares_each_case_once(
    *, usable: bool, phantoms: Path, tmp_path: Path, tiny_settings: list[str], own_cache: Path, prepared: list[str]
) -> None:
    from app.experiments.comparison.compare import compare
    from app.experiments.comparison.plan import plan_comparison

    if not usable:
        own_cache.write_text("a file")
    shared = [one for one in tiny_settings if not one.startswith(("training.steps", "training.learning_rate"))]
    plan = plan_comparison(arms=["clip", "znorm"], seeds=1, steps=1, rates=["1e-3"], overrides=shared)
    compare(DataSource(phantoms), tmp_path / "out", plan)
    assert len(prepared) == len(set(prepared)) > 0
    assert not (tmp_path / "out" / "cache").exists()


# Recorded data


def test_a_run_with_a_changed_label_map_is_not_resumed_and_the_error_names_it(
    phantoms: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    data, run = shutil.copytree(phantoms, tmp_path / "data"), shutil.copytree(tiny_run, tmp_path / "run")
    assert znormseg("train", data, run, "--resume").code == 0
    path = next(data.glob("BraTS2021_00002/*_seg.nii.gz"))
    write_label_map(path, np.roll(read_label_map(path).voxels, 1, axis=0), path)
    ended = znormseg("train", data, run, "--resume")
    assert ended.code == 3
    assert "the label maps of 1 cases have changed since the run began: BraTS2021_00002. Restore" in ended.err


def test_a_run_of_an_older_version_without_a_record_is_resumed(
    phantoms: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "labels.json").unlink()
    assert znormseg("train", phantoms, run, "--resume").code == 0


@pytest.mark.parametrize("content", ["{}", "[]", '{"cases": {"a": 1}}', "{"])
def test_a_damaged_record_is_reported(
    content: str, phantoms: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "labels.json").write_text(content)
    ended = znormseg("train", phantoms, run, "--resume")
    assert (ended.code, "labels.json" in ended.err) == (5, True)
