"""Telemetry of a run: what is recorded when, and that the run is the same with and without it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from app.config.load import load_config
from app.errors import ConfigError
from app.runs.folder import MetricsLog, read_metrics
from app.training.run import resume, start
from app.training.telemetry import Telemetry
from data.datasets.source import DataSource

Train = Callable[..., Path]


@pytest.fixture
def train(phantoms: Path, tiny_settings: list[str], tmp_path: Path) -> Train:
    """Train six steps of the tiny settings under a name."""

    def call(name: str, *settings: str) -> Path:
        run = tmp_path / name
        start(DataSource(phantoms), run, load_config("laptop", [*tiny_settings, "training.steps=6", *settings]))
        return run

    return call


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == kind]


def weights(run: Path) -> dict[str, torch.Tensor]:
    path = max((run / "checkpoints").glob("last-*.safetensors"))
    return load_file(path)


def hooks_of(network: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())
    return on_modules + len(optimizer._optimizer_step_pre_hooks)


def test_interval_3_measures_steps_3_and_6(train: Train) -> None:
    run = train("run", "training.telemetry_steps=3")
    for kind in ("gradients", "overlap"):
        assert [record["step"] for record in records(run, kind)] == [3, 6]
    assert [record["step"] for record in records(run, "train")] == [1, 2, 3, 4, 5, 6]


def test_nothing_is_measured_by_default(tiny_run: Path) -> None:
    assert {record["kind"] for record in read_metrics(tiny_run)} == {"train", "validation"}


def test_every_layer_and_junction_is_recorded(train: Train) -> None:
    run = train("run", "training.telemetry_steps=6")
    (gradients,), (overlap,) = records(run, "gradients"), records(run, "overlap")
    names = [name.removeprefix("weight/") for name in weights(run)]
    assert len(gradients["layers"]) > 5
    assert all(any(name.endswith(layer) for name in names) for layer in gradients["layers"])
    numbers = {f"{name}_{when}" for name in ("mean", "std", "norm") for when in ("before", "after")}
    assert all(set(layer) == numbers for layer in gradients["layers"].values())
    assert list(overlap["junctions"]) == ["model.1", "model.1.submodule", "model.2.1"]
    assert all(set(j) == {"cosine", "ratio", "norm_skip", "norm_transformation"} for j in overlap["junctions"].values())


def test_znorm_is_visible_only_in_the_layers_that_it_changes(train: Train) -> None:
    (record,) = records(train("run", "training.telemetry_steps=6"), "gradients")
    changed = record["layers"]["model.0.conv.unit0.conv.weight"]
    assert (changed["mean_after"], changed["std_after"]) == pytest.approx((0, 1), abs=1e-5)
    assert changed["std_before"] != pytest.approx(1, abs=0.1)
    kept = record["layers"]["model.2.0.conv.weight"]
    assert kept["norm_before"] == kept["norm_after"]


@pytest.mark.parametrize("settings", [["training.accumulate=2"], ["runtime.precision=bfloat16"], []], ids=" ".join)
def test_a_run_is_the_same_with_and_without_telemetry_bit_for_bit(settings: list[str], train: Train) -> None:
    runs = [train(f"run{every}", f"training.telemetry_steps={every}", *settings) for every in (0, 2)]
    one, two = map(weights, runs)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []
    losses = [[record["loss"] for record in records(run, "train")] for run in runs]
    assert losses[0] == losses[1]


def test_the_overlap_is_that_of_the_last_micro_batch(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[bool] = []
    plain = Telemetry.backward

    def noting(self: Telemetry, *, measured: bool, seen: list[bool] = measured) -> Any:
        seen.append(measured)
        return plain(self, measured=measured)

    monkeypatch.setattr(Telemetry, "backward", noting)
    train("run", "training.telemetry_steps=2", "training.accumulate=3", "training.steps=2")
    assert measured == [False, False, False, False, False, True]


def test_a_resumed_run_has_the_records_of_an_uninterrupted_one(
    phantoms: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.telemetry_steps=2", "training.validations=3")
    whole = train("whole", *settings)
    write = Telemetry.write

    def crash(self: Telemetry, log: MetricsLog, *, step: int, skipped_steps: int) -> None:
        write(self, log, step=step, skipped_steps=skipped_steps)
        if step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Telemetry, "write", crash)
        with pytest.raises(KeyboardInterrupt):
            train("broken", *settings)
    broken = whole.with_name("broken")
    assert [record["step"] for record in records(broken, "gradients")] == [2, 4]
    resume(DataSource(phantoms), broken)
    for kind in ("gradients", "overlap"):
        assert records(broken, kind) == records(whole, kind)
    assert all(
        torch.equal(one, two) for one, two in zip(weights(broken).values(), weights(whole).values(), strict=True)
    )


def test_a_run_from_before_telemetry_can_be_resumed(phantoms: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"  telemetry_steps: 0\n", "", config))
    assert "telemetry" not in (run / "config.yaml").read_text()
    resume(DataSource(phantoms), run)


def test_a_skipped_step_is_visible_in_its_record(tmp_path: Path) -> None:
    import znorm

    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = znorm.attach(optimizer, model)
    telemetry = Telemetry(1, model, optimizer)
    log = MetricsLog(tmp_path, keep_up_to_step=0, keep_validations_up_to_step=0)
    model(torch.tensor([[math.inf, 1.0]])).sum().backward()
    with telemetry.step(measured=telemetry.is_due(1)):
        optimizer.step()
    telemetry.write(log, step=1, skipped_steps=handle.skipped_steps)
    telemetry.write(log, step=2, skipped_steps=handle.skipped_steps)
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)
    assert (record["kind"], record["step"], record["skipped_steps"]) == ("gradients", 1, 1)
    assert record["layers"]["0.weight"]["norm_before"] is None
    assert {layer["norm_after"] for layer in record["layers"].values()} == {None}


@pytest.mark.parametrize("every", [0, 2])
def test_an_unmeasured_step_installs_no_hook(every: int) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    telemetry = Telemetry(every, model, optimizer)
    measured = telemetry.is_due(1)
    with telemetry.backward(measured=measured), telemetry.step(measured=measured):
        assert hooks_of(model, optimizer) == 0


def test_no_hook_is_left_after_a_measured_step() -> None:
    from models import NetworkConfig, build_network

    model = build_network(NetworkConfig(channels=(8, 8)), in_channels=4, out_channels=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    telemetry = Telemetry(2, model, optimizer)
    with telemetry.backward(measured=telemetry.is_due(2)):
        assert hooks_of(model, optimizer) > 0
        model(torch.ones(1, 4, 8, 8, 8)).sum().backward()
    with telemetry.step(measured=True):
        optimizer.step()
    assert hooks_of(model, optimizer) == 0


def test_tensorboard_has_a_curve_for_each_number(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("run", "training.telemetry_steps=3")
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    first, last = records(run, "gradients"), records(run, "overlap")
    norms = [record["layers"]["model.0.conv.unit0.conv.weight"]["norm_before"] for record in first]
    found = events.Scalars("gradients/model.0.conv.unit0.conv.weight/norm_before")
    assert [event.value for event in found] == pytest.approx(norms)
    cosines = [record["junctions"]["model.1"]["cosine"] for record in last]
    assert [event.value for event in events.Scalars("overlap/model.1/cosine")] == pytest.approx(cosines)
    assert [event.step for event in events.Scalars("overlap/model.2.1/ratio")] == [3, 6]


@pytest.mark.parametrize("value", ["-1", "1.5", "true", "null"])
def test_an_interval_that_is_not_a_number_of_steps_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.telemetry_steps"):
        load_config("laptop", [f"training.telemetry_steps={value}"])
