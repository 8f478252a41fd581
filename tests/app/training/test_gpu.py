"""Choices for a run on a GPU, and the loop that reads a GPU's losses late; a CPU stands in for the GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from app.config.load import RunConfig, load_config
from app.errors import ConfigError, InterruptedRunError
from app.runs.folder import read_metrics
from app.system.device import Runtime, RuntimeConfig, choose_runtime
from app.training import gpu, trainer
from app.training.gpu import Computation, choose_compile, compile_or_not, prepare_computation, require_deterministic
from app.training.loader import Loader, cases_budget
from app.training.run import start
from app.training.step import Stepper
from app.training.telemetry import Telemetry
from app.training.trainer import Trainer
from data.datasets.source import DataSource
from models import RegionLoss, build_network

GPU = Runtime(device_name="cuda:0", precision_name="bfloat16", channels_last=True, reasons=())
CPU = Runtime(device_name="cpu", precision_name="float32", channels_last=True, reasons=())
TINY = ["network.channels=[4, 8]", "network.residual_units=1", "training.patch_voxels=[16, 16, 16]"]


@pytest.fixture
def lagging(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop reads losses as if the device were a GPU."""
    monkeypatch.setattr(trainer, "_lags_behind", lambda _: True)


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == kind]


def numbers(run: Path) -> list[tuple[int, float, float | None]]:
    """What does not depend on time in the records of steps."""
    return [(record["step"], record["loss"], record.get("gradient_norm")) for record in records(run)]


def train(phantoms: Path, run: Path, tiny: list[str], *settings: str) -> Path:
    more = ["training.steps=23", "training.validations=2", *settings]
    start(DataSource(phantoms), run, load_config("laptop", [*tiny, *more]))
    return run


# The loop


def test_losses_read_late_equal_losses_read_immediately(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    at_once = train(phantoms, tmp_path / "at_once", tiny_settings)
    request.getfixturevalue("lagging")
    late = train(phantoms, tmp_path / "late", tiny_settings)
    assert numbers(late) == numbers(at_once)
    assert [r["step"] for r in records(late, "validation")] == [r["step"] for r in records(at_once, "validation")]


@pytest.mark.usefixtures("lagging")
@pytest.mark.parametrize("has_telemetry", [True, False], ids=["first process", "another"])
def test_losses_are_read_every_ten_steps_and_before_they_are_needed(
    has_telemetry: bool, phantoms: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, steps = Stepper.read, []

    def reading(self: Stepper, *arguments: Any) -> Any:
        steps.append(self.state.step)
        return read(self, *arguments)

    monkeypatch.setattr(Stepper, "read", reading)
    if not has_telemetry:
        monkeypatch.setattr(trainer, "Telemetry", lambda _, *arguments: Telemetry(0, *arguments))
    train(phantoms, tmp_path / "run", tiny_settings, "training.telemetry_steps=9")
    assert steps == [9, 10, 12, 18, 20, 23]  # telemetry, tenth, validation, telemetry, tenth, end


def test_a_non_finite_loss_is_found_late_but_with_its_own_batch(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, lagging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_of = Stepper._loss

    def spoilt(self: Stepper, network: Any, batch: Any) -> torch.Tensor:
        loss = loss_of(self, network, batch)
        return loss * float("nan") if self.state.patches == 4 else loss

    monkeypatch.setattr(Stepper, "_loss", spoilt)
    run = train(phantoms, tmp_path / "run", tiny_settings)
    details = max((run / "checkpoints").glob("last-*.json"))
    (back,) = json.loads(details.read_text(encoding="utf-8"))["rollbacks"]
    assert (back["step"], back["back_to"]) == (5, 0)
    assert [record["step"] for record in records(run)] == list(range(1, 24))


def test_a_signal_is_handled_before_the_next_tenth_step(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, lagging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Stepper.queue

    def signalled(self: Stepper, *arguments: Any, **options: Any) -> Any:
        if self.state.step == 2:
            trainers[0].stop.signal_name = "SIGTERM"
        return queue(self, *arguments, **options)

    trainers: list[Trainer] = []
    begin = Trainer._open_log
    monkeypatch.setattr(Trainer, "_open_log", lambda self: (trainers.append(self), begin(self))[1])
    monkeypatch.setattr(Stepper, "queue", signalled)
    with pytest.raises(InterruptedRunError, match="after step 3"):
        train(phantoms, tmp_path / "run", tiny_settings)


# torch.compile


def config_of(*settings: str) -> RunConfig:
    return load_config("resunet", [*TINY, *settings])


@pytest.mark.parametrize(
    ("settings", "runtime", "processes", "reason"),
    [
        ((), CPU, 1, "a CPU gains less"),
        (("training.steps=100",), GPU, 1, "it pays from 5000 steps or 1 hour on"),
        (("training.hours=0.5",), GPU, 1, "it pays from"),
        (("runtime.deterministic=true",), GPU, 1, "runtime.deterministic"),
        (("training.telemetry_steps=100",), GPU, 1, "training.telemetry_steps"),
        (("network.backward_normalization=[auto]",), GPU, 1, "network.backward_normalization"),
        ((), GPU, 2, "several processes"),
        (("runtime.compile=false",), GPU, 1, "requested"),
    ],
)
def test_compilation_is_skipped_with_a_reason(
    settings: tuple[str, ...], runtime: Runtime, processes: int, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda _: object())
    compiled, why = choose_compile(config_of(*settings), runtime, processes=processes)
    assert not compiled
    assert why.startswith("torch.compile off: ")
    assert reason in why


@pytest.mark.parametrize("settings", [(), ("training.hours=2",), ("training.steps=5000",)])
def test_a_long_run_on_a_gpu_is_compiled_if_triton_is_installed(
    settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    for installed in (True, False):
        monkeypatch.setattr(gpu, "find_spec", lambda _, installed=installed: object() if installed else None)
        assert choose_compile(config_of(*settings), GPU)[0] == installed


def test_requested_compilation_is_refused_with_telemetry_hooks() -> None:
    with pytest.raises(ConfigError, match=r"does not work with training\.telemetry_steps"):
        choose_compile(config_of("runtime.compile=true", "training.telemetry_steps=9"), CPU)


@pytest.mark.parametrize(
    ("config", "benchmark", "reason"),
    [("resunet", True, "all patches have one shape"), ("presence", False, "whole brains differ in shape")],
)
def test_cudnn_benchmarks_algorithms_only_for_fixed_shapes(
    config: str, benchmark: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not benchmark)
    chosen = load_config(config, ["runtime.compile=false"])
    assert reason in prepare_computation(chosen, GPU, nn.Linear(1, 1), RegionLoss()).reasons[0]
    assert torch.backends.cudnn.benchmark == benchmark


def test_a_run_on_a_cpu_computes_the_same_as_before_without_a_message() -> None:
    network, loss = nn.Linear(1, 1), RegionLoss()
    assert prepare_computation(config_of(), CPU, network, loss) == Computation(network=network, loss=loss)


def computation_of(config: RunConfig) -> Computation:
    network = build_network(config.network, in_channels=config.input_channels, out_channels=3)
    return Computation(network=network, loss=RegionLoss(), reasons=("torch.compile on: requested",))


def test_a_compiled_step_equals_an_eager_one() -> None:
    config = config_of("training.batch_size=1")
    torch.manual_seed(0)
    eager = computation_of(config)
    before = torch.get_rng_state()
    compiled = compile_or_not(eager, config, CPU, backend="aot_eager")
    assert "it took" in compiled.reasons[-1]
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in eager.network.parameters())
    image, masks = torch.randn(1, 4, 16, 16, 16), torch.ones(1, 3, 16, 16, 16)
    losses = [made.loss(made.network(image), masks) for made in (eager, compiled)]
    torch.testing.assert_close(losses[0], losses[1])


def test_a_compiler_failure_falls_back_to_eager_with_the_reason() -> None:
    config = config_of("training.batch_size=1")
    eager = computation_of(config)

    def broken(*_: Any) -> Callable[..., Any]:
        raise OSError("no C compiler\nand more")

    made = compile_or_not(eager, config, CPU, backend=broken)  # type: ignore[arg-type]
    assert (made.network, made.loss) == (eager.network, eager.loss)
    assert made.reasons[-1].startswith("torch.compile off: it failed (")
    assert "\n" not in made.reasons[-1]


# Deterministic, float32, memory


@pytest.mark.parametrize(
    ("name", "settings", "why"),
    [
        ("resunet", ["network.architecture=segresnet"], "segresnet .* trilinear upsampling"),
        ("presence", [], "resnet10 .* max pooling"),
    ],
)
def test_a_network_without_deterministic_gpu_training_is_refused(name: str, settings: list[str], why: str) -> None:
    config = load_config(name, [*settings, "runtime.deterministic=true"])
    with pytest.raises(ConfigError, match=rf"runtime\.deterministic: true does not work with .*{why}"):
        require_deterministic(config, GPU)
    require_deterministic(config, CPU)


def test_tf32_follows_the_config() -> None:
    for tf32 in (False, True):
        choose_runtime(RuntimeConfig(device="cpu", tf32=tf32))
        assert torch.backends.cudnn.allow_tf32 == tf32


def test_cases_leave_a_tenth_of_the_gpu_free_and_at_least_two_gigabytes() -> None:
    assert cases_budget(None, 100 * 10**9, 140 * 10**9)[0] == 86 * 10**9
    assert cases_budget(None, 5 * 10**9, 8 * 10**9)[0] == 3 * 10**9
    assert cases_budget(None, 10**9, 8 * 10**9)[0] == 0
    assert cases_budget(1.5, 0, 0) == (1_500_000_000, "runtime.gpu_cases_gb")


def test_a_loader_for_a_cpu_yields_the_batches_of_the_source() -> None:
    from data.patches.sampler import batches

    class Numbers:
        def batch(self, step: int, size: int) -> tuple[int, int]:
            return step, size

    config = config_of("training.batch_size=3")
    source: Any = Numbers()
    made = Loader(source, config, CPU).batches(first=2, every=2)
    expected = batches(source, first=2, size=3, threads=1, every=2)
    assert [next(made) for _ in range(3)] == [next(expected) for _ in range(3)]
    made.close()
    expected.close()
