"""Fine-tuning: a run that starts from the weights of another, and the runs it cannot start from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.config.load import RunConfig, load_config
from app.errors import ConfigError, RunError
from app.training import run as train
from app.training.pretrained import sections_of
from app.training.state import State
from data.datasets.source import DataSource

Call = Callable[..., Any]
MADE_BEFORE = Path(__file__).parents[2] / "system" / "made_before"


@pytest.fixture
def few_steps() -> list[str]:
    """Arguments for a run of two steps that leave the network and its patches to the run it starts from."""
    settings = ["training.steps=2", "training.validations=1", "training.batch_size=1", "runtime.device=cpu"]
    return [word for setting in settings for word in ("--set", setting)]


def best_of(run: Path) -> Path:
    return max((run / "checkpoints").glob("best-*.safetensors"))


def weights_of(run: Path, prefix: str = "weights.") -> dict[str, torch.Tensor]:
    tensors = load_file(best_of(run))
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state_at_step_0(
    data: Path, run: Path, config: RunConfig, init_from: Path, monkeypatch: pytest.MonkeyPatch
) -> State:
    """What a run would begin to train."""
    found: list[State] = []
    with monkeypatch.context() as patch:
        patch.setattr(train, "_train", lambda trainer, _: found.append(trainer.state))
        train.start(DataSource(data), run, config, init_from=init_from)
    return found[0]


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_a_run_starts_from_exactly_the_best_weights_of_the_other(
    *, decay: float, phantoms: Path, tiny_settings: list[str], tiny_run: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    config = load_config("laptop", [*tiny_settings, f"training.ema_decay={decay}", "training.seed=5"])
    state = state_at_step_0(phantoms, tmp_path / "run", config, tiny_run, monkeypatch)
    assert same(state.network.state_dict(), weights_of(tiny_run))
    assert same(state.evaluated.state_dict(), weights_of(tiny_run))
    assert state.optimizer.state_dict()["state"] == {}
    assert state.step == 0


def test_another_run_starts_from_the_averaged_weights(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.start(
        DataSource(phantoms), tmp_path / "first", load_config("laptop", [*tiny_settings, "training.ema_decay=0.9"])
    )
    config = load_config("laptop", tiny_settings)
    state = state_at_step_0(phantoms, tmp_path / "run", config, tmp_path / "first", monkeypatch)
    last = max((tmp_path / "first" / "checkpoints").glob("last-*.safetensors"))
    averaged = {n.removeprefix("average."): t for n, t in load_file(last).items() if n.startswith("average.")}
    assert same(state.network.state_dict(), averaged)


def test_without_a_config_network_and_patches_come_from_the_run(
    phantoms: Path, tiny_run: Path, tmp_path: Path, few_steps: list[str], znormseg: Call
) -> None:
    assert znormseg("train", phantoms, tmp_path / "run", *few_steps, "--init-from", tiny_run).code == 0
    one, other = (load_config(str(run / "config.yaml")) for run in (tiny_run, tmp_path / "run"))
    assert other.network == one.network
    assert other.training.patch_voxels == one.training.patch_voxels
    assert other.training.batch_size == 1
    assert other.augment == load_config("laptop").augment


def test_the_record_states_the_initial_weights(
    phantoms: Path, tiny_run: Path, tmp_path: Path, few_steps: list[str], znormseg: Call
) -> None:
    ended = znormseg("train", phantoms, tmp_path / "run", *few_steps, "--init-from", tiny_run)
    record = json.loads((tmp_path / "run" / "run.json").read_text())["init_from"]
    assert record["sha256"] == sha256(best_of(tiny_run).read_bytes()).hexdigest()
    assert record["run"] == str(tiny_run.resolve())
    assert record["sha256"] in ended.err


def test_the_record_states_when_no_weights_were_given(tiny_run: Path) -> None:
    assert json.loads((tiny_run / "run.json").read_text())["init_from"] is None


def test_a_run_resumes_without_the_run_it_started_from(
    phantoms: Path, tiny_run: Path, tmp_path: Path, few_steps: list[str], znormseg: Call
) -> None:
    first = Path(shutil.copytree(tiny_run, tmp_path / "first"))
    assert znormseg("train", phantoms, tmp_path / "run", *few_steps, "--init-from", first).code == 0
    shutil.rmtree(first)
    assert znormseg("train", phantoms, tmp_path / "run", "--resume").code == 0


def test_a_spacing_that_differs_from_that_of_the_weights_is_reported(
    phantoms: Path, tiny_run: Path, tmp_path: Path, few_steps: list[str], znormseg: Call
) -> None:
    given = [*few_steps, "--set", "data.spacing_mm=6"]
    ended = znormseg("train", phantoms, tmp_path / "run", *given, "--init-from", tiny_run)
    assert "the weights were trained at 4x4x4 mm, but this run works at 6x6x6 mm" in " ".join(ended.err.split())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["network.channels=[4, 16]"], "network.channels: [4, 8] -> [4, 16]"),
        (["network.architecture=unet"], "network.architecture: resunet -> unet"),
        (["augment.contrast_dropout=0.5"], "Set augment.contrast_dropout=0"),
    ],
    ids=["channels", "architecture", "contrasts"],
)
def test_a_network_that_does_not_fit_is_refused_and_leaves_no_run(
    *, settings: list[str], words: str, phantoms: Path, tiny_settings: list[str], tiny_run: Path, tmp_path: Path
) -> None:
    config = load_config("laptop", [*tiny_settings, *settings])
    with pytest.raises(ConfigError) as refused:
        train.start(DataSource(phantoms), tmp_path / "run", config, init_from=tiny_run)
    assert words in str(refused.value)
    assert str(tiny_run) in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_contrast_dropout_must_match_and_the_error_names_the_setting(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    dropping = load_config("laptop", [*tiny_settings, "augment.contrast_dropout=0.5"])
    train.start(DataSource(phantoms), tmp_path / "first", dropping)
    with pytest.raises(ConfigError, match=r"Set augment\.contrast_dropout=0\.5"):
        train.start(
            DataSource(phantoms), tmp_path / "run", load_config("laptop", tiny_settings), init_from=tmp_path / "first"
        )
    assert train.start(DataSource(phantoms), tmp_path / "run", dropping, init_from=tmp_path / "first").steps == 4


@pytest.mark.parametrize("setting", ["network.dropout=0.3", "network.backward_normalization=[auto]"])
def test_a_setting_without_effect_on_the_weights_is_accepted(
    setting: str, phantoms: Path, tiny_settings: list[str], tiny_run: Path, tmp_path: Path
) -> None:
    config = load_config("laptop", [*tiny_settings, setting])
    assert train.start(DataSource(phantoms), tmp_path / "run", config, init_from=tiny_run).steps == 4


@pytest.mark.parametrize("what", ["nothing", "a folder", "weights"])
def test_a_folder_that_is_not_a_run_is_refused_with_an_explanation(
    *, what: str, phantoms: Path, tiny_run: Path, tmp_path: Path, few_steps: list[str], znormseg: Call
) -> None:
    given = {"nothing": tmp_path / "none", "a folder": phantoms, "weights": best_of(tiny_run)}[what]
    ended = znormseg("train", phantoms, tmp_path / "run", *few_steps, "--init-from", given)
    assert ended.code == 5
    assert f"{given}: not the folder of a run" in " ".join(ended.err.split())
    assert not (tmp_path / "run").exists()


def test_an_ensemble_is_refused_with_the_networks_to_start_from(
    phantoms: Path, tmp_path: Path, few_steps: list[str], znormseg: Call
) -> None:
    ended = znormseg("train", phantoms, tmp_path / "run", *few_steps, "--init-from", MADE_BEFORE / "ensemble")
    assert ended.code == 5
    assert "an ensemble of 2 networks, but --init-from takes one" in ended.err
    assert str(MADE_BEFORE / "ensemble" / "fold-1") in ended.err


def test_one_network_of_an_ensemble_can_be_started_from(
    phantoms: Path, tmp_path: Path, few_steps: list[str], znormseg: Call
) -> None:
    network = MADE_BEFORE / "ensemble" / "fold-0"
    ended = znormseg("train", phantoms, tmp_path / "run", *few_steps, "--init-from", network)
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "run" / "run.json").read_text())["init_from"]["run"] == str(network)


def test_modified_weights_are_refused(phantoms: Path, tiny_run: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    first = Path(shutil.copytree(tiny_run, tmp_path / "first"))
    for weights in (first / "checkpoints").glob("best-*.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="SHA-256"):
        train.start(DataSource(phantoms), tmp_path / "run", load_config("laptop", tiny_settings), init_from=first)
    assert not (tmp_path / "run").exists()


def test_resume_and_init_from_together_are_refused(phantoms: Path, tiny_run: Path, znormseg: Call) -> None:
    ended = znormseg("train", phantoms, tiny_run, "--resume", "--init-from", tiny_run)
    assert ended.code == 2
    assert "leave out --init-from" in " ".join(ended.err.split())


def test_a_setting_that_changes_the_network_of_the_run_is_refused(
    phantoms: Path, tiny_run: Path, tmp_path: Path, few_steps: list[str], znormseg: Call
) -> None:
    given = [*few_steps, "--set", "network.channels=[8, 8]", "--init-from", tiny_run]
    ended = znormseg("train", phantoms, tmp_path / "run", *given)
    assert ended.code == 4
    assert "leave out --config and all network settings" in " ".join(ended.err.split())


def test_settings_inherited_from_a_run_are_valid_in_the_new_config(tiny_run: Path) -> None:
    config = load_config("resunet", sections=sections_of(tiny_run))
    assert config.network.channels == (4, 8)
    assert config.training.learning_rate == load_config("resunet").training.learning_rate
