"""No work is lost to damaged checkpoints, signals, changed configs, losses that are not finite, or full disks."""

from __future__ import annotations

import errno
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.config.load import RunConfig, load_config
from app.errors import ConfigError, InterruptedRunError, RunError
from app.runs.checkpoints import load_newest, save
from app.runs.folder import read_metrics, write_durably
from app.system.disk_full import RetryOnFullDisk
from app.training.config_changes import FIXED, HARMLESS, require_allowed
from app.training.run import resume, start
from app.training.step import QueuedStep, Stepper
from data.datasets.source import DataSource

Call = Callable[..., Any]


@pytest.fixture(scope="session")
def eight_steps(tiny_settings: list[str]) -> list[str]:
    """Eight steps with dropout and a checkpoint at every second step, regardless of the time."""
    return [*tiny_settings, "training.steps=8", "training.validations=4", "network.dropout=0.2"]


@pytest.fixture(scope="session")
def straight(phantoms: Path, eight_steps: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of ``eight_steps`` that nothing happens to."""
    run = tmp_path_factory.mktemp("straight") / "run"
    start(DataSource(phantoms), run, load_config("laptop", eight_steps))
    return run


@pytest.fixture
def copied(straight: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may spoil."""
    return Path(shutil.copytree(straight, tmp_path / "copied"))


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """Gives what the application has said."""
    with caplog.at_level("INFO", logger="znormseg"):
        yield lambda: caplog.messages


def newest(run: Path, kind: str = "last", ending: str = "safetensors") -> Path:
    return max((run / "checkpoints").glob(f"{kind}-*.{ending}"))


def steps_saved(run: Path, kind: str = "last") -> list[int]:
    return sorted(int(path.stem.split("-")[1]) for path in (run / "checkpoints").glob(f"{kind}-*.json"))


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [record for record in read_metrics(run) if record["kind"] == kind]


def assert_same_weights(run: Path, other: Path) -> None:
    """Weights, optimiser and random state of the last checkpoints are the same, bit for bit."""
    one, two = load_file(newest(run)), load_file(newest(other))
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[Stepper], object]) -> None:
    """Have something happen once, in the middle of a step counted from 1."""
    steps = Stepper.queue
    done: list[object] = []

    def acting(self: Stepper, *arguments: Any, **options: Any) -> QueuedStep:
        result = steps(self, *arguments, **options)
        if self.state.step + 1 == step and not done:
            done.append(act(self))
        return result

    monkeypatch.setattr(Stepper, "queue", acting)


def next_batch(stepper: Stepper) -> int:
    """Number of the micro-batch that a step of one micro-batch takes."""
    return stepper.state.patches // stepper.config.training.batch_size


def spoil_batches(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """Have the loss of some micro-batches, chosen by number, be NaN."""
    loss_of = Stepper._loss

    def spoilt(self: Stepper, network: Any, batch: Any) -> torch.Tensor:
        loss = loss_of(self, network, batch)
        return loss * float("nan") if bad(next_batch(self)) else loss

    monkeypatch.setattr(Stepper, "_loss", spoilt)


# Damaged checkpoints


def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_previous_one(
    copied: Path, straight: Path, phantoms: Path, messages: Callable[[], list[str]]
) -> None:
    newest(copied).write_bytes(newest(copied).read_bytes()[:-1])
    assert steps_saved(copied) == [6, 8]
    resume(DataSource(phantoms), copied)
    assert any(
        "last-000000008.safetensors" in line and "using the checkpoint of step 6." in line for line in messages()
    )
    assert_same_weights(copied, straight)
    assert [record["step"] for record in records(copied)] == list(range(1, 9))


def test_predict_falls_back_to_the_previous_best_weights_if_the_newest_are_damaged(
    copied: Path, phantoms: Path, tmp_path: Path, znormseg: Call
) -> None:
    newer = load_newest(copied / "checkpoints", "best")
    assert newer is not None
    details = {key: value for key, value in newer.details.items() if key not in ("kind", "step", "sha256")}
    save(copied / "checkpoints", "best", newer.step + 1, newer.tensors, details)
    newest(copied, "best").write_bytes(b"")
    case = sorted(phantoms.iterdir())[0]
    ended = znormseg("predict", copied, case, tmp_path / "out")
    assert ended.code == 0
    assert f"{newest(copied, 'best')}: its SHA-256" in ended.err
    assert json.loads((tmp_path / "out" / f"{case.name}.json").read_text())["weights_step"] == newer.step


def test_lost_best_weights_are_saved_again(copied: Path, straight: Path, phantoms: Path) -> None:
    for path in (copied / "checkpoints").glob("best-*.safetensors"):
        path.write_bytes(b"")
    resume(DataSource(phantoms), copied, load_config(str(copied / "config.yaml"), ["training.steps=10"]))
    assert max(steps_saved(copied, "best")) > 8


@pytest.mark.parametrize("lose", [Path.unlink, lambda path: path.write_bytes(b"")], ids=["deleted", "damaged"])
def test_a_finished_run_that_lost_all_best_weights_saves_its_last_weights(
    lose: Callable[[Path], object], copied: Path, phantoms: Path
) -> None:
    for path in (copied / "checkpoints").glob("best-*"):
        lose(path)
    assert resume(DataSource(phantoms), copied).best_step == 8
    best = load_newest(copied / "checkpoints", "best")
    assert best is not None
    assert best.step == 8
    assert [record["step"] for record in records(copied, "validation")] == [2, 4, 6, 8]


def test_partial_files_of_a_killed_process_are_removed_at_the_next_start(copied: Path, phantoms: Path) -> None:
    (copied / "checkpoints" / ".partial-1-last-000000009.safetensors").write_bytes(b"half")
    resume(DataSource(phantoms), copied)
    assert [path.name for path in copied.rglob(".partial*")] == []


# Signals


def test_sigusr1_saves_and_the_run_continues_to_the_same_result(
    *,
    phantoms: Path,
    eight_steps: list[str],
    straight: Path,
    tmp_path: Path,
    messages: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at_step(monkeypatch, 3, lambda _: signal.raise_signal(signal.SIGUSR1))
    saved: list[int] = []
    at_step(monkeypatch, 4, lambda _: saved.extend(steps_saved(tmp_path / "run")))
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", eight_steps))
    assert "SIGUSR1: saved step 3; training continues" in messages()
    assert saved == [2, 3]
    assert_same_weights(tmp_path / "run", straight)


def test_sigusr1_during_preparation_does_not_end_the_run(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.training import run as train
    from data.patches.sampler import cache_cases as prepare

    def signalled(*arguments: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return prepare(*arguments, **options)

    monkeypatch.setattr(train, "cache_cases", signalled)
    reached: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: reached.append(number))  # else it would end this process
    try:
        start(DataSource(phantoms), tmp_path / "run", load_config("laptop", tiny_settings))
        assert reached == []
        signal.raise_signal(signal.SIGUSR1)
        assert reached == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_run_stopped_during_validation_resumes_to_the_same_result(
    phantoms: Path, eight_steps: list[str], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.training import segmentation
    from app.training.validation import validation_dice as validate

    def stopped(*arguments: Any, **options: Any) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return validate(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(segmentation, "validation_dice", stopped)
        with pytest.raises(InterruptedRunError, match="stopped by SIGTERM after step 2"):
            start(DataSource(phantoms), tmp_path / "run", load_config("laptop", eight_steps))
    resume(DataSource(phantoms), tmp_path / "run")
    assert_same_weights(tmp_path / "run", straight)
    assert [record["step"] for record in records(tmp_path / "run", "validation")] == [2, 4, 6, 8]


# Another config


def test_a_finished_run_with_a_longer_budget_continues_and_reports_the_learning_rate(
    copied: Path, phantoms: Path, znormseg: Call
) -> None:
    ended = znormseg("train", phantoms, copied, "--resume", "--set", "training.steps=16")
    assert ended.code == 0
    assert "config changed at step 8: training.steps: 8 -> 16" in ended.err
    assert "step 8 is 50 % of the budget (before: 100 %); the learning rate continues at 0.00" in ended.err
    assert [record["step"] for record in records(copied)] == list(range(1, 17))
    assert [record["step"] for record in records(copied, "validation")] == [2, 4, 6, 8, 12, 16]


def test_a_config_change_is_recorded_with_its_step(copied: Path, phantoms: Path) -> None:
    config = load_config(str(copied / "config.yaml"), ["training.learning_rate=0.002", "training.steps=9"])
    resume(DataSource(phantoms), copied, config, allow=["training.learning_rate"])
    assert load_config(str(copied / "config.yaml")) == config
    assert json.loads((copied / "run.json").read_text())["config_changes"] == [
        {"step": 8, "changes": ["training.steps: 8 -> 9", "training.learning_rate: 0.01 -> 0.002"]}
    ]
    resume(DataSource(phantoms), copied, config)
    assert len(json.loads((copied / "run.json").read_text())["config_changes"]) == 1


def test_a_change_of_the_learning_task_is_shown_and_refused_unless_allowed(
    straight: Path, phantoms: Path, znormseg: Call
) -> None:
    changes = ["--set", "training.seed=7", "--set", "training.steps=9"]
    ended = znormseg("train", phantoms, straight, "--resume", *changes)
    assert ended.code == 4
    assert "training.seed: 0 -> 7 (needs --allow training.seed)" in ended.err
    assert "training.steps: 8 -> 9\n" in ended.err


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("network.dropout=0.5", FIXED["network."]),
        ("training.optimizer=sgd", FIXED["training.optimizer"]),
        ("augment.contrast_dropout=0.5", "different input channels"),
        ("data.spacing_mm=3", FIXED["data.spacing_mm"]),
    ],
)
def test_fixed_settings_are_refused_with_the_reason_even_if_allowed(setting: str, reason: str) -> None:
    asked = load_config("laptop", [setting])
    with pytest.raises(ConfigError, match=f"cannot change: .*{reason}"):
        require_allowed(Path("run"), load_config("laptop"), asked, [setting.partition("=")[0]])


def test_every_key_listed_as_harmless_or_fixed_exists() -> None:
    from app.config.load import flat

    for name in (*HARMLESS, *FIXED):
        assert [key for key in flat(RunConfig()) if key == name or key.startswith(name)]


def test_an_unknown_allowed_key_is_refused_with_a_suggestion(straight: Path, phantoms: Path) -> None:
    with pytest.raises(ConfigError, match=r"--allow training\.sed: unknown key; did you mean training\.seed\?"):
        resume(DataSource(phantoms), straight, allow=["training.sed"])


def test_allow_without_resume_is_a_usage_error(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    assert znormseg("train", phantoms, tmp_path / "run", "--allow", "training.seed").code == 2


def test_a_refused_change_leaves_the_run_unchanged(copied: Path, phantoms: Path) -> None:
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError):
        resume(DataSource(phantoms), copied, load_config("laptop"))
    assert {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()} == before


# Non-finite losses


def test_a_non_finite_loss_rolls_the_run_back_and_continues_with_other_patches(
    phantoms: Path,
    eight_steps: list[str],
    tmp_path: Path,
    messages: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    spoil_batches(monkeypatch, lambda number: number == 4)
    result = start(DataSource(phantoms), tmp_path / "run", load_config("laptop", eight_steps))
    assert result.steps == 8
    (line,) = (line for line in messages() if "its loss is nan" in line)
    assert line.startswith("step 5: ")
    assert "Rolling back to the checkpoint of step 4" in line
    assert [record["step"] for record in records(tmp_path / "run")] == list(range(1, 9))
    (back,) = json.loads(newest(tmp_path / "run", ending="json").read_text())["rollbacks"]
    assert (back["step"], back["back_to"]) == (5, 4)
    assert all(case in line for case in back["cases"])


def test_the_batch_of_a_non_finite_loss_is_kept_for_inspection(
    phantoms: Path, eight_steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: dict[int, Any] = {}
    loss_of = Stepper._loss

    def spoilt(self: Stepper, network: Any, batch: Any) -> torch.Tensor:
        batches[next_batch(self)] = batch
        return loss_of(self, network, batch) * (float("inf") if next_batch(self) == 4 else 1.0)

    monkeypatch.setattr(Stepper, "_loss", spoilt)
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", eight_steps))
    kept = tmp_path / "run" / "nonfinite" / "step-000000005.safetensors"
    assert torch.equal(load_file(kept)["image.0"], batches[4].image)
    assert torch.equal(load_file(kept)["masks.0"], batches[4].masks)
    facts = json.loads(kept.with_suffix(".json").read_text())
    assert (facts["loss"], facts["cases"], facts["batch_numbers"]) == ("inf", list(batches[4].cases), [4])


def test_a_rolled_back_run_is_reproducible_even_if_interrupted(
    phantoms: Path, eight_steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("laptop", eight_steps)
    spoil_batches(monkeypatch, lambda number: number == 4)
    start(DataSource(phantoms), tmp_path / "one", config)
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda _: signal.raise_signal(signal.SIGTERM))
        with pytest.raises(InterruptedRunError):
            start(DataSource(phantoms), tmp_path / "two", config)
    resume(DataSource(phantoms), tmp_path / "two")
    assert_same_weights(tmp_path / "one", tmp_path / "two")


def test_a_run_rolled_back_too_often_ends_and_lists_every_time(
    phantoms: Path, eight_steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_batches(monkeypatch, lambda number: number >= 4)
    with pytest.raises(RunError, match=r"step 5: its loss is nan.*rolled back 2 times") as raised:
        start(DataSource(phantoms), tmp_path / "run", load_config("laptop", [*eight_steps, "training.max_rollbacks=2"]))
    assert str(raised.value).count("batch in ") == 3
    assert max(steps_saved(tmp_path / "run")) == 4
    monkeypatch.undo()
    resume(DataSource(phantoms), tmp_path / "run")
    assert max(steps_saved(tmp_path / "run")) == 8


def test_non_finite_weights_are_never_saved(
    phantoms: Path,
    eight_steps: list[str],
    tmp_path: Path,
    messages: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overflow(stepper: Stepper) -> None:
        with torch.no_grad():
            next(stepper.state.network.parameters()).fill_(float("inf"))

    at_step(monkeypatch, 4, overflow)
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", eight_steps))
    assert any("step 4: the weights are not finite" in line for line in messages())
    assert all(bool(torch.isfinite(tensor).all()) for tensor in load_file(newest(tmp_path / "run")).values())


# A full disk; the error is a stand-in, tests/system/test_hostile_machine.py has a disk that is full


def full_for(times: int, write: Callable[..., None]) -> Callable[..., None]:
    """The same with the first calls failing."""
    left = [times]

    def failing(*arguments: Any) -> None:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.ENOSPC, "No space left on device", str(arguments[0]))
        write(*arguments)

    return failing


def test_a_checkpoint_on_a_full_disk_is_saved_once_space_is_available(
    *,
    phantoms: Path,
    eight_steps: list[str],
    straight: Path,
    tmp_path: Path,
    messages: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from app.runs import checkpoints
    from app.system import disk_full

    monkeypatch.setattr(disk_full, "RETRY_SECONDS", 0.01)
    fill = full_for(3, write_durably)
    at_step(monkeypatch, 3, lambda _: monkeypatch.setattr(checkpoints, "write_durably", fill))
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", eight_steps))
    (line,) = (line for line in messages() if "Training waits" in line)
    assert "The checkpoint of step 4 needs 0." in line
    assert_same_weights(tmp_path / "run", straight)


def test_stopping_while_the_disk_is_full_ends_with_the_error_and_the_old_checkpoint(
    phantoms: Path, eight_steps: list[str], straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.runs import checkpoints

    def fill(_: Stepper) -> None:
        monkeypatch.setattr(checkpoints, "write_durably", full_for(10**9, write_durably))
        monkeypatch.setattr("time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))

    at_step(monkeypatch, 3, fill)
    with pytest.raises(OSError, match="No space left"):
        start(DataSource(phantoms), tmp_path / "run", load_config("laptop", eight_steps))
    monkeypatch.undo()
    assert steps_saved(tmp_path / "run") == [0, 2]
    resume(DataSource(phantoms), tmp_path / "run")
    assert_same_weights(tmp_path / "run", straight)


def test_metrics_on_a_full_disk_are_complete_once_space_is_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.runs.folder import MetricsLog
    from app.system import disk_full

    class Full:
        """A file that takes five bytes, then none, then all."""

        def __init__(self, file: Any) -> None:
            self._file, self._calls = file, 0

        def write(self, content: Any) -> int:
            self._calls += 1
            if self._calls == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            return int(self._file.write(content[:5] if self._calls == 1 else content))

        def close(self) -> None:
            self._file.close()

    monkeypatch.setattr(disk_full, "RETRY_SECONDS", 0.01)
    wait = RetryOnFullDisk(stopped=lambda: False)
    log = MetricsLog(
        tmp_path,
        keep_up_to_step=0,
        keep_validations_up_to_step=0,
        patiently=lambda write: wait.write(write, what="a line", needed_bytes=1, folder=tmp_path),
    )
    log._file = Full(log._file)  # type: ignore[assignment]
    log.overlap(step=1, junctions={"a": {"cosine": 0.5}})
    log.close()
    assert read_metrics(tmp_path) == [{"kind": "overlap", "step": 1, "junctions": {"a": {"cosine": 0.5}}}]
    assert wait.waited_seconds > 0


def test_errors_other_than_a_full_disk_are_not_waited_for(tmp_path: Path) -> None:
    def broken() -> None:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        RetryOnFullDisk(stopped=lambda: False).write(broken, what="it", needed_bytes=1, folder=tmp_path)


# Progress


def test_progress_shows_loss_rate_waiting_norm_dice_and_time_left(
    phantoms: Path, eight_steps: list[str], tmp_path: Path
) -> None:
    seen: list[Any] = []
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", eight_steps), on_progress=seen.append)
    last = [progress for progress in seen if progress.job == "training"][-1]
    for part in ("step 8", "loss ", "lr ", "data wait ", "gradient norm ", "Dice WT ", "best Dice "):
        assert part in last.detail
    assert last.eta_seconds == 0


def test_step_records_have_the_waiting_time_and_every_tenth_the_gradient_norm(tiny_run: Path) -> None:
    assert all(record["waited_seconds"] >= 0 for record in records(tiny_run))
    assert [record["step"] for record in records(tiny_run) if "gradient_norm" in record] == [1, 11, 21, 31, 41, 51]


def test_tensorboard_has_the_waiting_fraction_and_a_picture_of_each_validation(tiny_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, SCALARS, EventAccumulator

    events = EventAccumulator(str(tiny_run / "tensorboard"), size_guidance={SCALARS: 0, IMAGES: 0})
    events.Reload()
    assert len(events.Scalars("train/data_wait_share")) == 60
    assert all(0 <= event.value <= 1 for event in events.Scalars("train/data_wait_share"))
    pictures = events.Images("validation/first_case")
    assert [picture.step for picture in pictures] == [20, 40, 60]
    assert pictures[0].encoded_image_string.startswith(b"\x89PNG")


# Twenty kills


def checkpoint_is_being_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".partial-*"))


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_moments_ends_with_the_same_weights(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, znormseg_process: Call
) -> None:
    settings = [*tiny_settings, "training.steps=150", "training.validations=5", "network.dropout=0.2"]
    settings += ["training.checkpoint_minutes=0.001", "network.channels=[8, 16, 32]"]
    start(DataSource(phantoms), tmp_path / "straight", load_config("laptop", settings))
    run, draw = tmp_path / "run", random.Random(20)
    options = [word for setting in settings for word in ("--set", setting)]
    reached, while_writing, kills = 0, 0, 0
    while kills < 20:
        # A run without its first checkpoint cannot be resumed, and starts again in an empty folder.
        has_begun = any((run / "checkpoints").glob("last-*.json"))
        if run.exists() and not has_begun:
            shutil.rmtree(run)
        process: subprocess.Popen[str] = znormseg_process(
            "train", phantoms, run, *(["--resume"] if has_begun else options)
        )
        reached = min(reached + draw.randint(0, 6), 140)
        in_the_middle, delay = draw.random() < 0.5, draw.random() * 0.1
        until = time.monotonic() + 120
        while process.poll() is None and max([r["step"] for r in records(run)], default=0) < reached:
            assert time.monotonic() < until
            time.sleep(0.001)
        time.sleep(delay)
        while process.poll() is None and in_the_middle and not checkpoint_is_being_written(run):
            time.sleep(0.0001)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        while_writing += bool(list((run / "checkpoints").glob(".partial-*")))
        kills += 1
    assert while_writing > 0
    resume(DataSource(phantoms), run)
    assert_same_weights(run, tmp_path / "straight")
    assert [(r["step"], r["loss"]) for r in records(run)] == [
        (r["step"], r["loss"]) for r in records(tmp_path / "straight")
    ]
    best = [load_file(newest(one, "best")) for one in (run, tmp_path / "straight")]
    assert all(torch.equal(best[0][name], best[1][name]) for name in best[1])
