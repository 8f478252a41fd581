"""Model folders: cards, checksums, and the detection of a changed byte."""

from __future__ import annotations

import functools
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import RunError
from app.runs.model_card import (
    CARD_FILE,
    CHOSEN_LIMIT,
    INPUT_LIMIT,
    SUMS_FILE,
    TESTED_LIMIT,
    card,
    describe_model,
    seal,
    verify,
)
from data.datasets.source import DataSource

Call = Callable[..., Any]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the tiny run that a test may change."""
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def weights_of(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("best-*.safetensors"))[-1]


def test_training_ends_with_checksums_that_sha256sum_accepts(tiny_run: Path) -> None:
    checked = subprocess.run(["sha256sum", "-c", SUMS_FILE], cwd=tiny_run, capture_output=True, text=True, check=False)
    assert checked.returncode == 0
    assert f"checkpoints/{weights_of(tiny_run).name}: OK" in checked.stdout


def test_a_changed_byte_is_refused_with_the_name_of_the_file(run: Path, znormseg: Call) -> None:
    content = bytearray(weights_of(run).read_bytes())
    content[-1] ^= 1
    weights_of(run).write_bytes(content)
    ended = znormseg("model", "verify", run)
    assert ended.code == 5
    assert f"checkpoints/{weights_of(run).name} was changed" in ended.err


def test_each_file_in_the_checksums_is_verified(run: Path) -> None:
    for name in verify(run):
        before = (run / name).read_bytes()
        (run / name).write_bytes(before + b" ")
        with pytest.raises(RunError, match=f"{name} was changed"):
            verify(run)
        (run / name).write_bytes(before)


def test_a_missing_file_is_named(run: Path) -> None:
    (run / "split.json").unlink()
    with pytest.raises(RunError, match=r"split\.json is missing"):
        verify(run)


def test_a_folder_without_checksums_is_not_reported_as_intact(run: Path, znormseg: Call) -> None:
    (run / SUMS_FILE).unlink()
    ended = znormseg("model", "verify", run)
    assert ended.code == 5
    assert "contains no SHA256SUMS" in ended.err


@pytest.fixture
def ensemble(tiny_run: Path, tmp_path: Path) -> Path:
    """An ensemble of two copies of the tiny run's network, sealed."""
    folder = tmp_path / "ensemble"
    for name in ("fold-0", "fold-1"):
        shutil.copytree(tiny_run / "checkpoints", folder / name / "checkpoints")
        shutil.copy(tiny_run / "intensities.json", folder / name)
    sha256 = json.loads(weights_of(tiny_run).with_suffix(".json").read_text())["sha256"]
    networks = [{"network": f"fold-{k}", "out_of_fold_dice": 0.5, "weights_sha256": sha256} for k in (0, 1)]
    (folder / "ensemble.json").write_text(json.dumps({"networks": networks}))
    seal(folder)
    return folder


def test_intensities_of_a_fold_belong_to_the_ensemble(ensemble: Path) -> None:
    (ensemble / "fold-0" / "intensities.json").write_text("{}")
    (ensemble / "fold-1" / "intensities.json").unlink()
    with pytest.raises(RunError, match=r"fold-1/intensities\.json is missing; fold-0/intensities\.json was changed"):
        verify(ensemble)


def test_a_fold_with_older_weights_next_to_the_best_is_listed_once(ensemble: Path) -> None:
    for ending in (".json", ".safetensors"):
        newest = weights_of(ensemble / "fold-0").with_suffix(ending)
        shutil.copy(newest, newest.with_name(f"best-000000000{ending}"))
    seal(ensemble)
    lines = (ensemble / SUMS_FILE).read_text().splitlines()
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("text", ["", "nonsense\n", f"{'0' * 64}  ../elsewhere\n", f"{'0' * 64}  /etc/hostname\n"])
def test_damaged_checksums_are_refused(run: Path, text: str) -> None:
    (run / SUMS_FILE).write_text(text)
    with pytest.raises(RunError, match="damaged"):
        verify(run)


def test_the_card_states_what_the_run_records(tiny_run: Path, znormseg: Call) -> None:
    split = json.loads((tiny_run / "split.json").read_text())
    best = json.loads(weights_of(tiny_run).with_suffix(".json").read_text())
    said = json.loads(znormseg("model", "info", tiny_run, "--json").out)
    assert said["data"]["training cases"] == len(split["train"])
    assert said["metrics"] == {f"validation Dice {region}": round(dice, 4) for region, dice in best["dice"].items()}
    assert said["weights"]["sha256"] == best["sha256"]


@pytest.mark.parametrize(
    ("validations", "dice", "imported", "limits"),
    [
        (2, {"WT": 0.5}, None, [INPUT_LIMIT, TESTED_LIMIT, CHOSEN_LIMIT.format("Dice")]),
        (1, {"WT": 0.5}, None, [INPUT_LIMIT, TESTED_LIMIT]),
        (2, None, None, [INPUT_LIMIT, TESTED_LIMIT]),
        (2, None, {"name": "n", "description": "d"}, [INPUT_LIMIT]),
    ],
)
def test_a_card_lists_the_limitations_that_apply(
    *, validations: int, dice: Any, imported: Any, limits: list[str], run: Path
) -> None:
    path = weights_of(run).with_suffix(".json")
    content = json.loads(path.read_text())
    content["config"]["training"]["validations"] = validations
    path.write_text(json.dumps({**content, "dice": dice, "imported": imported}))
    assert describe_model(run)["limits"] == limits


def test_model_info_shows_the_card_in_the_folder(tiny_run: Path, znormseg: Call) -> None:
    shown = znormseg("model", "info", tiny_run).out
    assert shown == (tiny_run / CARD_FILE).read_text()
    assert "Research use only; not a medical device." in shown


def test_a_card_names_no_path_of_the_machine(tiny_run: Path) -> None:
    assert str(tiny_run.parent) not in card(describe_model(tiny_run))


def test_a_resumed_run_has_no_checksums_until_it_ends(
    run: Path, phantoms: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.config.load import load_config
    from app.training import run as train

    monkeypatch.setattr(train, "seal", lambda folder: None)
    train.resume(
        DataSource(phantoms),
        run,
        load_config("laptop", [*tiny_settings, "training.steps=61", "training.validations=3"]),
    )
    assert not (run / SUMS_FILE).exists()


def test_info_of_a_folder_without_a_model_is_an_error(tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("model", "info", tmp_path)
    assert ended.code == 5
    assert "contains no model" in ended.err


def _deep(depth: int) -> Any:
    empty: list[Any] = []
    return functools.reduce(lambda inner, _: [inner], range(depth), empty)


@pytest.mark.parametrize(
    "content",
    [
        [],
        "a model",
        {"licence": "MIT"},
        {"name": "n", "summary": "s", "notice": "n", "limits": 1, "licence": "l"},
        {"name": "n", "summary": "s", "notice": "n", "limits": [], "licence": "l", "data": ["BraTS"]},
        {"name": "n", "summary": "s", "notice": "n", "limits": [], "licence": "l", "data": {"a": _deep(500)}},
    ],
    ids=["a list", "a text", "keys missing", "limits that are a number", "data that are a list", "too deep"],
)
def test_info_of_another_programs_model_json_is_an_error(content: Any, tmp_path: Path, znormseg: Call) -> None:
    (tmp_path / "model.json").write_text(json.dumps(content))
    ended = znormseg("model", "info", tmp_path)
    assert ended.code == 5
    assert "damaged, or of another version" in ended.err


def test_sealing_twice_changes_nothing(run: Path) -> None:
    seal(run)
    before = (run / SUMS_FILE).read_bytes()
    seal(run)
    assert (run / SUMS_FILE).read_bytes() == before


class _Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.place),)


def test_predict_never_loads_a_pickle(run: Path, phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    from hashlib import sha256

    content = pickle.dumps(_Malicious(tmp_path / "was executed"))
    path = weights_of(run).with_suffix(".json")
    details = json.loads(path.read_text())
    details.pop("json_sha256")
    for pair in (run / "checkpoints").glob("best-*"):
        pair.unlink()
    path.with_suffix(".safetensors").write_bytes(content)
    path.write_text(json.dumps({**details, "sha256": sha256(content).hexdigest()}))
    ended = znormseg("predict", run, phantoms, tmp_path / "out")
    assert ended.code == 5
    assert "not a safetensors file" in ended.err
    assert not (tmp_path / "was executed").exists()
