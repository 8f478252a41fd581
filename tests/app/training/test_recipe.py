"""Averaged weights, early stopping, float16 with a scaled loss, deep supervision: what each does to a run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from app.config.load import load_config
from app.errors import InterruptedRunError
from app.inference.model import load_model
from app.runs.folder import read_metrics
from app.system.device import RuntimeConfig, choose_runtime
from app.training import gradient, segmentation, trainer
from app.training.ema import WeightAverage
from app.training.run import TrainResult, resume, start
from app.training.state import State, new_state
from app.training.step import Stepper
from app.training.telemetry import Telemetry
from app.training.trainer import Trainer
from data.datasets.source import DataSource
from data.patches.sampler import Batch
from models import RegionLoss

Train = Callable[..., TrainResult]
RESENC = ("network.architecture=resenc", "network.blocks=[1, 1]", "network.deep_supervision=true")


@pytest.fixture
def train(phantoms: Path, tiny_settings: list[str], tmp_path: Path) -> Train:
    """Train a few steps of the tiny settings under a name."""

    def call(name: str, *settings: str, **more: Any) -> TrainResult:
        return start(DataSource(phantoms), tmp_path / name, load_config("laptop", [*tiny_settings, *settings]), **more)

    return call


def tensors_of(run: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(max((run / "checkpoints").glob(f"{kind}-*.safetensors")))


def details_of(run: Path, kind: str) -> Any:
    path = max((run / "checkpoints").glob(f"{kind}-*.json"))
    return json.loads(path.read_text(encoding="utf-8"))


def section(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses_of(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run) if record["kind"] == "train"]


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ask a run to stop as a signal does, after a step."""
    perform = Trainer._step

    def stopped(self: Trainer, *arguments: Any) -> None:
        perform(self, *arguments)
        if self.state.step == step:
            self.stop.signal_name = "SIGTERM"

    monkeypatch.setattr(Trainer, "_step", stopped)


def score(monkeypatch: pytest.MonkeyPatch, values: Iterable[float]) -> None:
    """Make validations return these Dice scores regardless of the prediction."""
    from app.training.validation import validation_dice as validate

    given = iter(values)

    def validation_dice(*arguments: Any, **options: Any) -> dict[str, float]:
        validate(*arguments, **options)
        return {"WT": next(given)}

    monkeypatch.setattr(segmentation, "validation_dice", validation_dice)


# Averaged weights


def a_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), nn.Conv3d(3, 1, 1))


def test_the_average_of_constant_weights_is_the_weights() -> None:
    network = a_network()
    average = WeightAverage(network, 0.999)
    for step in range(1, 30):
        average.update(network, step)
    assert same(dict(average.network.named_parameters()), dict(network.named_parameters()))


def test_the_average_equals_a_hand_computed_one() -> None:
    network = a_network()
    average = WeightAverage(network, 0.5)
    expected = network[0].weight.detach().double().clone()  # type: ignore[index]
    for step in range(1, 20):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(network, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * network[0].weight.detach().double()  # type: ignore[index]
    torch.testing.assert_close(average.network[0].weight.double(), expected, rtol=1e-5, atol=1e-6)  # type: ignore[index]


def test_buffers_are_copied_and_the_network_is_unchanged() -> None:
    network = a_network()
    average = WeightAverage(network, 0.9)
    network(torch.randn(2, 2, 5, 5, 5))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    average.update(network, 1)
    assert same(network.state_dict(), before)
    assert same(dict(average.network.named_buffers()), dict(network.named_buffers()))


def test_averaging_changes_the_saved_weights_and_not_the_training(train: Train, tmp_path: Path) -> None:
    train("plain")
    train("averaged", "training.ema_decay=0.9")
    plain, averaged = (tensors_of(tmp_path / name, "last") for name in ("plain", "averaged"))
    assert same(plain, {name: tensor for name, tensor in averaged.items() if not name.startswith("average.")})
    kept = section(tensors_of(tmp_path / "averaged", "best"), "weights.")
    assert same(kept, section(averaged, "average."))
    assert not same(kept, section(averaged, "weights."))


@pytest.mark.parametrize("more", [RESENC, ("runtime.precision=float16",)], ids=["resenc", "float16"])
def test_a_stopped_run_with_averaged_weights_resumes_to_the_same_result(
    more: tuple[str, ...], train: Train, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("training.ema_decay=0.9", "training.steps=6", "training.validations=2", *more)
    train("straight", *settings)
    with monkeypatch.context() as patch:
        stop_at(4, patch)
        with pytest.raises(InterruptedRunError):
            train("stopped", *settings)
    resume(DataSource(phantoms), tmp_path / "stopped")
    for kind in ("last", "best"):
        assert same(tensors_of(tmp_path / "stopped", kind), tensors_of(tmp_path / "straight", kind))
    scaler = [details_of(tmp_path / name, "last")["scaler"] for name in ("stopped", "straight")]
    assert scaler[0] == scaler[1]
    assert losses_of(tmp_path / "stopped") == losses_of(tmp_path / "straight")


# Early stopping


def test_a_run_ends_after_patience_validations_without_improvement(
    train: Train, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(monkeypatch, [0.3, 0.5, 0.5, 0.4, 0.9])
    settings = ("training.steps=20", "training.validations=10", "training.patience=2")
    outcome = train("run", *settings)
    assert (outcome.steps, outcome.best_step, outcome.stopped_early) == (8, 4, True)
    assert outcome.to_json()["stopped_early"] is True
    again = resume(DataSource(phantoms), tmp_path / "run")
    assert (again.steps, again.stopped_early) == (8, True)


def test_patience_does_not_change_the_steps_before_the_stop(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(monkeypatch, repeat(0.5))
    for name, patience in (("patient", "null"), ("impatient", "1")):
        train(name, "training.steps=8", "training.validations=4", f"training.patience={patience}")
    patient, impatient = (losses_of(tmp_path / name) for name in ("patient", "impatient"))
    assert len(patient) == 8
    assert impatient == patient[:4]


def test_after_an_early_stop_lost_best_weights_are_replaced_by_the_last_ones(
    train: Train, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score(monkeypatch, [0.5, 0.4, 0.4])
    train("run", "training.steps=8", "training.validations=4", "training.patience=1")
    for path in (tmp_path / "run" / "checkpoints").glob("best-*"):
        path.unlink()
    for _ in range(2):
        again = resume(DataSource(phantoms), tmp_path / "run")
        assert (again.steps, again.best_step, again.stopped_early) == (4, 4, True)


@pytest.mark.parametrize(
    ("more", "validated"),
    [
        (("training.steps=16", "training.validations=16"), 9),
        (("training.steps=32",), 16),
    ],
)
def test_patience_keeps_counting_if_the_budget_is_changed(
    *,
    more: tuple[str, ...],
    validated: int,
    train: Train,
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    score(monkeypatch, [0.1, 0.5, *repeat(0.4, 20)])
    monkeypatch.setattr(trainer, "_VALIDATION_SHARE", math.inf)  # more than ten would depend on the machine's speed
    train("run", "training.steps=8", "training.validations=4", "training.patience=3")  # two wasted
    resume(DataSource(phantoms), tmp_path / "run", load_config(str(tmp_path / "run" / "config.yaml"), more))
    records = read_metrics(tmp_path / "run")
    assert [one["step"] for one in records if one["kind"] == "validation"] == [2, 4, 6, 8, validated]


def test_a_run_that_uses_its_whole_budget_did_not_stop_early(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    score(monkeypatch, repeat(0.5))
    assert not train("run", "training.validations=2", "training.patience=1").stopped_early


def test_patience_without_validation_cases_is_refused_before_a_folder_is_created(
    phantoms: Path, tmp_path: Path, tiny_settings: list[str], znormseg: Callable[..., Any]
) -> None:
    options = [word for setting in (*tiny_settings, "training.patience=2") for word in ("--set", setting)]
    ended = znormseg("train", phantoms, tmp_path / "run", *options, "--fold", "all")
    assert ended.code == 4
    assert "training.patience: needs validation cases" in ended.err
    assert not (tmp_path / "run").exists()


# float16 with a scaled loss


def after_a_step(loss_factor: float, tiny: list[str]) -> tuple[State, dict[str, torch.Tensor], int]:
    """One float16 step with a loss times a factor: the state after it, the weights before, and steps skipped."""
    config = load_config("laptop", [*tiny, "runtime.precision=float16", "gradient.transform=clip"])
    runtime = choose_runtime(config.runtime)
    state = new_state(config, runtime)
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    rule = gradient.attach_transform(config.gradient, state.optimizer, state.network)
    stepper = Stepper(
        config=config,
        runtime=runtime,
        state=state,
        telemetry=Telemetry(0, state.network, state.optimizer),
        loss_of=lambda logits, masks: loss_factor * RegionLoss()(logits, masks),
    )
    stepper.step(iter([noise_batch()]), 1e-2)
    return state, before, rule.skipped_steps()


def noise_batch() -> Batch:
    image = torch.randn(1, 4, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    masks = (image[:, :3] > 1).float()
    return Batch(image=image, masks=masks, present=torch.ones(1, 4, dtype=torch.bool), cases=("one",))


def norm_with_backward_normalization(tiny: list[str], precision: str, accumulate: int) -> float:
    """Norm of the unscaled gradient of a step over copies of one batch."""
    changes = [f"runtime.precision={precision}", f"training.accumulate={accumulate}"]
    config = load_config("laptop", [*tiny, *changes, "network.backward_normalization=[auto]"])
    runtime = choose_runtime(config.runtime)
    torch.manual_seed(0)
    state = new_state(config, runtime)
    # The gradients of a place are larger than the loss's: with the usual scale the first steps overflow.
    state.scaler = torch.amp.GradScaler("cpu", init_scale=16.0, enabled=runtime.scales_gradients)
    telemetry = Telemetry(0, state.network, state.optimizer)
    stepper = Stepper(config=config, runtime=runtime, state=state, telemetry=telemetry, loss_of=RegionLoss())
    return stepper.step(iter([noise_batch()] * accumulate), 1e-2, with_norm=True).gradient_norm or 0.0


@pytest.mark.parametrize(("precision", "accumulate"), [("float16", 1), ("float32", 2), ("float16", 2)])
def test_backward_normalization_ignores_loss_scale_and_micro_batch_count(
    precision: str, accumulate: int, tiny_settings: list[str]
) -> None:
    expected = norm_with_backward_normalization(tiny_settings, "float32", 1)
    found = norm_with_backward_normalization(tiny_settings, precision, accumulate)
    assert found == pytest.approx(expected, rel=0.05)


def test_the_rule_sees_unscaled_gradients(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    norms: dict[str, float] = {}
    for precision in ("float32", "float16"):

        def look(config: Any, optimizer: Any, model: Any, precision: str = precision) -> gradient.AttachedTransform:
            def hook(*_: Any) -> None:
                grads = [p.grad for p in model.parameters() if p.grad is not None]
                norms.setdefault(precision, float(torch.nn.utils.get_total_norm(grads)))

            optimizer.register_step_pre_hook(hook)
            return gradient.AttachedTransform(report="", skipped_steps=lambda: 0, skipped=lambda: 0)

        monkeypatch.setattr("app.training.trainer.gradient.attach_transform", look)
        train(precision, f"runtime.precision={precision}", "training.steps=1")
    assert norms["float16"] == pytest.approx(norms["float32"], rel=0.05)


def test_a_step_that_overflows_changes_nothing_is_counted_and_halves_the_scale(tiny_settings: list[str]) -> None:
    state, before, skipped = after_a_step(1e20, tiny_settings)
    assert skipped == 1
    assert same(state.network.state_dict(), before)
    assert state.scaler.state_dict()["scale"] == 2.0**15


def test_a_step_that_does_not_overflow_moves_the_weights_and_keeps_the_scale(tiny_settings: list[str]) -> None:
    state, before, skipped = after_a_step(1.0, tiny_settings)
    assert skipped == 0
    assert not same(state.network.state_dict(), before)
    assert state.scaler.state_dict()["scale"] == 2.0**16


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_other_precisions_do_not_scale_the_loss(precision: str) -> None:
    assert not choose_runtime(RuntimeConfig(device="cpu", precision=precision)).scales_gradients  # type: ignore[arg-type]


# Deep supervision


def test_a_run_with_deep_supervision_predicts_with_the_finest_logits(train: Train, tmp_path: Path) -> None:
    train("run", *RESENC)
    model = load_model(tmp_path / "run", choose_runtime(RuntimeConfig(device="cpu")))
    with torch.no_grad():
        assert model.network(torch.zeros(1, 4, 16, 16, 16)).shape == (1, 3, 16, 16, 16)


def test_deep_supervision_trains_every_head(train: Train, tmp_path: Path) -> None:
    train("run", *RESENC, "training.steps=1", "training.warmup=0")
    trained = section(tensors_of(tmp_path / "run", "last"), "optimizer.")
    moments = [tensor for name, tensor in trained.items() if name.endswith("exp_avg_sq")]
    names = section(tensors_of(tmp_path / "run", "last"), "weights.")
    assert sum(name.startswith("heads.") for name in names) == 4
    assert len(moments) == len(names)
    assert all(bool(tensor.any()) for tensor in moments)
