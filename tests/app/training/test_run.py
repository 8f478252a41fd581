"""Training: what a run writes, which cases it takes, and that an interruption changes nothing."""

from __future__ import annotations

import fcntl
import json
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from app.config.load import load_config
from app.runs.folder import read_metrics
from app.training.run import resume, start
from data.datasets.label_stats import read_label_maps, tumours_of
from data.datasets.layouts import find_cases, patients_of
from data.datasets.source import DataSource
from data.datasets.splits import stratified_split
from data.labels import BRATS2021

Call = Callable[..., Any]


@pytest.fixture
def options(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line."""
    return [word for setting in tiny_settings for word in ("--set", setting)]


@pytest.fixture(scope="session")
def slow_settings(tiny_settings: list[str]) -> list[str]:
    """A run of 20 steps that is slow enough to be interrupted, with random numbers from every source."""
    return [
        *tiny_settings,
        "training.steps=20",
        "training.patch_voxels=[32, 32, 32]",
        "training.batch_size=4",
        "training.validations=4",
        "training.checkpoint_minutes=0.001",
        "network.dropout=0.2",
        "runtime.loader_threads=2",
    ]


@pytest.fixture(scope="session")
def uninterrupted(phantoms: Path, slow_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of ``slow_settings`` without any interruption."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    start(DataSource(phantoms), run, load_config("laptop", slow_settings))
    return run


def ids_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def without_seconds(run: Path) -> list[dict[str, Any]]:
    times = ("seconds", "waited_seconds")
    return [{key: value for key, value in record.items() if key not in times} for record in read_metrics(run)]


def tensors_of(run: Path, kind: str) -> dict[str, torch.Tensor]:
    path = max((run / "checkpoints").glob(f"{kind}-*.safetensors"))
    return load_file(path)


def assert_same_run(run: Path, other: Path) -> None:
    """Weights, optimiser and random state, best weights and metrics of two runs are the same, bit for bit."""
    for kind in ("last", "best"):
        one, two = tensors_of(run, kind), tensors_of(other, kind)
        assert one.keys() == two.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert without_seconds(run) == without_seconds(other)


def signal_at_step(process: subprocess.Popen[str], run: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Wait until a step is in the metrics, send a signal, and give exit status and stderr."""
    until = time.monotonic() + 240
    while not any(record["step"] >= step for record in read_metrics(run)):
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


def copy_of(phantoms: Path, place: Path) -> Path:
    """Copy of the data set that a test may spoil."""
    return Path(shutil.copytree(phantoms, place / "data"))


def one_file(data: Path, ending: str) -> Path:
    """A file of the first case."""
    (path,) = (data / ids_of(data)[0]).glob(f"*_{ending}.nii.gz")
    return path


# Interruption


def test_a_killed_run_resumes_to_the_same_result(
    phantoms: Path, slow_settings: list[str], uninterrupted: Path, tmp_path: Path, znormseg_process: Call
) -> None:
    options = [word for setting in slow_settings for word in ("--set", setting)]
    process = znormseg_process("train", phantoms, tmp_path / "run", *options)
    status, _ = signal_at_step(process, tmp_path / "run", 7, signal.SIGKILL)
    assert status == -signal.SIGKILL
    done = max(record["step"] for record in read_metrics(tmp_path / "run"))
    assert 7 <= done < 20
    resume(DataSource(phantoms), tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_stopped_by_a_signal_says_how_to_resume_and_reaches_the_same_result(
    *,
    number: signal.Signals,
    phantoms: Path,
    slow_settings: list[str],
    uninterrupted: Path,
    tmp_path: Path,
    znormseg_process: Call,
) -> None:
    options = [word for setting in slow_settings for word in ("--set", setting)]
    process = znormseg_process("train", phantoms, tmp_path / "run", *options)
    status, err = signal_at_step(process, tmp_path / "run", 7, number)
    assert status == 130
    assert f"stopped by {number.name} after step" in err
    assert f"znormseg train {phantoms} {tmp_path / 'run'} --resume" in err
    resume(DataSource(phantoms), tmp_path / "run")
    assert_same_run(tmp_path / "run", uninterrupted)


def test_two_runs_of_one_config_are_identical(
    phantoms: Path, slow_settings: list[str], uninterrupted: Path, tmp_path: Path, znormseg: Call
) -> None:
    options = [word for setting in slow_settings for word in ("--set", setting)]
    assert znormseg("train", phantoms, tmp_path / "run", *options).code == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_another_seed_gives_another_run(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, tiny_run: Path
) -> None:
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", [*tiny_settings, "training.seed=1"]))
    assert read_metrics(tmp_path / "run")[0]["loss"] != read_metrics(tiny_run)[0]["loss"]


def test_resuming_a_finished_run_changes_nothing(phantoms: Path, tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    resume(DataSource(phantoms), run)
    assert_same_run(run, tiny_run)


def test_resuming_a_run_that_never_started_is_refused(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("train", phantoms, tmp_path / "run", "--resume")
    assert ended.code == 5
    assert "nothing to resume" in ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ['{"train": ["x"]}', "[]", '{"train": 1, "validation": []}'])
def test_a_run_whose_split_is_damaged_is_refused_with_the_file(
    content: str, phantoms: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "split.json").write_text(content)
    ended = znormseg("train", phantoms, run, "--resume")
    assert ended.code == 5
    assert f"{run / 'split.json'}: damaged" in ended.err


def test_resuming_with_another_config_is_refused_with_the_key(phantoms: Path, tiny_run: Path, znormseg: Call) -> None:
    ended = znormseg(
        "train", phantoms, tiny_run, "--resume", "-c", tiny_run / "config.yaml", "--set", "training.seed=7"
    )
    assert ended.code == 4
    assert "training.seed: 0 -> 7 (needs --allow training.seed)" in ended.err


def test_resuming_with_the_config_of_the_run_is_accepted(
    phantoms: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    assert znormseg("train", phantoms, run, "--resume", "-c", run / "config.yaml").code == 0


def test_resuming_with_data_that_lacks_a_case_is_refused_with_its_id(
    phantoms: Path, tiny_run: Path, tmp_path: Path, znormseg: Call
) -> None:
    data = copy_of(phantoms, tmp_path)
    gone = ids_of(data)[2]
    shutil.rmtree(data / gone)
    ended = znormseg("train", data, tiny_run, "--resume")
    assert ended.code == 3
    assert gone in ended.err


@pytest.mark.parametrize("option", [["--fold", "1"], ["--split", "some.json"]])
def test_a_resumed_run_keeps_its_split(option: list[str], phantoms: Path, tiny_run: Path, znormseg: Call) -> None:
    assert znormseg("train", phantoms, tiny_run, "--resume", *option).code == 2


@pytest.mark.slow
def test_a_killed_run_of_the_laptop_config_resumes_to_the_same_result(
    tmp_path: Path, znormseg_process: Call, shell: Call
) -> None:
    assert shell(["znormseg", "data", "phantom", tmp_path / "data", "-n", "6"]).code == 0
    command = ["train", tmp_path / "data", "--set", "training.steps=20"]
    assert shell(["znormseg", *command, tmp_path / "straight"]).code == 0
    status, _ = signal_at_step(znormseg_process(*command, tmp_path / "run"), tmp_path / "run", 10, signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert shell(["znormseg", "train", tmp_path / "data", tmp_path / "run", "--resume"]).code == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight")


# The run folder


def test_a_non_empty_folder_is_refused(phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call) -> None:
    (tmp_path / "note.txt").touch()
    ended = znormseg("train", phantoms, tmp_path, *options)
    assert ended.code == 5
    assert "is not empty. Resume it with --resume, or give another folder" in ended.err
    assert ids_of(tmp_path) == ["note.txt"]


def test_a_file_instead_of_the_folder_is_refused(
    phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    (tmp_path / "run").touch()
    ended = znormseg("train", phantoms, tmp_path / "run", *options)
    assert ended.code == 5
    assert "is a file; give a folder for the run" in ended.err


def test_an_empty_folder_is_accepted(phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call) -> None:
    assert znormseg("train", phantoms, tmp_path, *options).code == 0


@pytest.mark.parametrize("mode", ["start", "resume"])
def test_a_second_process_is_refused_and_leaves_the_folder_unchanged(
    *, mode: str, phantoms: Path, tiny_run: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run")) if mode == "resume" else tmp_path / "run"
    run.mkdir(exist_ok=True)
    with (run / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = ids_of(run)
        ended = znormseg("train", phantoms, run, *(["--resume"] if mode == "resume" else options))
        assert ended.code == 5
        assert "another process is training in this folder" in ended.err
        assert ids_of(run) == before


def test_a_second_process_during_preparation_leaves_the_folder_unchanged(
    phantoms: Path, tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.errors import RunError

    config, run, find = load_config("laptop", tiny_settings), tmp_path / "run", DataSource.find_cases

    with ExitStack() as stack:

        def find_while_another_starts(data: DataSource) -> Any:
            # The other process took the folder after this one found it free.
            run.mkdir()
            fcntl.flock(stack.enter_context((run / ".lock").open("w")), fcntl.LOCK_EX)
            (run / "config.yaml").touch()
            return find(data)

        monkeypatch.setattr(DataSource, "find_cases", find_while_another_starts)
        with pytest.raises(RunError, match="another process is training in this folder"):
            start(DataSource(phantoms), run, config)
    assert ids_of(run) == [".lock", "config.yaml"]


def test_a_run_contains_exactly_these_files(tiny_run: Path) -> None:
    assert sorted(path.name for path in tiny_run.iterdir() if not path.name.startswith(".")) == [
        "MODEL_CARD.md",
        "SHA256SUMS",
        "checkpoints",
        "config.yaml",
        "intensities.json",
        "labels.json",
        "metrics.jsonl",
        "model.json",
        "run.json",
        "split.json",
        "tensorboard",
    ]


def test_the_config_in_the_run_is_the_resolved_one(tiny_run: Path, tiny_settings: list[str]) -> None:
    asked = load_config("laptop", [*tiny_settings, "training.steps=60", "training.validations=3"])
    assert load_config(str(tiny_run / "config.yaml")) == asked
    assert yaml.safe_load((tiny_run / "config.yaml").read_text())["training"]["momentum"] == 0.9


def test_the_run_records_its_data_and_versions(tiny_run: Path, phantoms: Path) -> None:
    facts = read(tiny_run / "run.json")
    assert facts["data"] == str(phantoms.resolve())
    assert facts["versions"]["torch"] == metadata.version("torch")
    assert facts["contrasts"] == ["t1", "t1c", "t2", "flair"]
    assert facts["regions"] == ["WT", "TC", "ET"]
    assert (facts["labels"], facts["spacing_mm"], facts["fold"]) == ("brats2021", [4.0, 4.0, 4.0], 0)


def test_every_step_and_every_validation_has_a_record(tiny_run: Path) -> None:
    records = read_metrics(tiny_run)
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 61))
    assert [record["step"] for record in records if record["kind"] == "validation"] == [20, 40, 60]
    assert all(set(record["dice"]) == {"WT", "TC", "ET"} for record in records if record["kind"] == "validation")


def test_a_run_writes_tensorboard_events(tiny_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tiny_run / "tensorboard"))
    events.Reload()
    losses = [record["loss"] for record in read_metrics(tiny_run) if record["kind"] == "train"]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses)
    assert len(events.Scalars("validation/mean_dice")) == 3


def test_the_best_weights_are_those_of_the_best_validation(tiny_run: Path) -> None:
    scores = {r["step"]: r["mean_dice"] for r in read_metrics(tiny_run) if r["kind"] == "validation"}
    path = max((tiny_run / "checkpoints").glob("best-*.json"))
    assert read(path)["step"] == max(scores, key=lambda step: scores[step])


def test_the_loss_decreases(tiny_run: Path) -> None:
    losses = [record["loss"] for record in read_metrics(tiny_run) if record["kind"] == "train"]
    assert sum(losses[-15:]) / 15 < 0.9 * sum(losses[:15]) / 15


def test_the_log_states_how_gradients_are_processed(
    phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    ended = znormseg("train", phantoms, tmp_path / "znorm", *options)
    assert "ZNorm (auto: under AdamW" in ended.err
    assert "z-scored: " in ended.err
    assert "model.0.conv.unit0.conv.weight" not in ended.err
    ended = znormseg("--debug", "train", phantoms, tmp_path / "debug", *options)
    assert "model.0.conv.unit0.conv.weight" in ended.err
    ended = znormseg("train", phantoms, tmp_path / "clip", *options, "--set", "gradient.transform=clip")
    assert "gradients clipped to norm 1" in ended.err


# Budget


def test_a_run_with_a_budget_in_hours_ends_on_time(phantoms: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    hours = 0.0005
    config = load_config("laptop", [*tiny_settings, f"training.hours={hours}"])
    began = time.monotonic()
    result = start(DataSource(phantoms), tmp_path / "run", config)
    assert 0.9 * 3600 * hours < result.seconds < time.monotonic() - began + 0.1
    assert result.seconds < 4 * 3600 * hours + 20


def test_accumulation_counts_steps_and_not_passes(phantoms: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    start(DataSource(phantoms), tmp_path / "run", load_config("laptop", [*tiny_settings, "training.accumulate=2"]))
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records if record["kind"] == "train"] == [1, 2, 3, 4]


def test_two_passes_of_one_patch_see_the_same_as_one_pass_of_two(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    losses = []
    for setting in ("training.accumulate=2", "training.batch_size=2"):
        run = tmp_path / setting
        start(DataSource(phantoms), run, load_config("laptop", [*tiny_settings, setting]))
        losses.append(read_metrics(run)[0]["loss"])
    # Dice is taken over a whole batch, so that the losses are close, not equal; other patches differ by more.
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize(
    "settings",
    [
        ["training.optimizer=sgd", "training.schedule=poly"],
        ["network.architecture=unet"],
        ["network.architecture=segresnet", "network.channels=[8, 16]"],
        ["gradient.transform=none", "training.schedule=constant", "training.warmup=0"],
        ["runtime.precision=bfloat16", "runtime.channels_last=false"],
        ["data.spacing_mm=6"],
        ["training.patch_voxels=[64, 48, 64]"],
    ],
    ids=" ".join,
)
def test_every_kind_of_setting_trains(
    settings: list[str], phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    result = start(
        DataSource(phantoms), tmp_path / "run", load_config("laptop", [*tiny_settings, "training.steps=2", *settings])
    )
    assert result.steps == 2
    assert result.loss is not None
    assert result.loss > 0


# Cases


@pytest.mark.parametrize("fold", [None, 0, 3])
def test_a_fold_validates_on_its_own_cases(
    fold: int | None, phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    given = [] if fold is None else ["--fold", str(fold)]
    ended = znormseg("train", phantoms, tmp_path / "run", *options, *given)
    assert ended.code == 0
    cases = {case.id: case for case in find_cases(phantoms)}
    tumours = tumours_of(cases, read_label_maps(cases.values()), BRATS2021)
    expected = stratified_split(tumours, patients_of(cases.values()), fold or 0)
    assert read(tmp_path / "run" / "split.json") == expected.to_json()


def test_training_on_every_case_validates_on_none_and_can_predict(
    phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    ended = znormseg("train", phantoms, tmp_path / "run", *options, "--fold", "all", "--json")
    assert json.loads(ended.out)["validation_dice"] is None
    assert read(tmp_path / "run" / "split.json") == {"train": ids_of(phantoms), "validation": []}
    assert not [record for record in read_metrics(tmp_path / "run") if record["kind"] == "validation"]
    case = ids_of(phantoms)[0]
    assert znormseg("predict", tmp_path / "run", phantoms / case, tmp_path / "out").code == 0


@pytest.mark.parametrize("fold", ["5", "-1", "x", "1.5"])
def test_a_fold_that_does_not_exist_is_refused(
    fold: str, phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    assert znormseg("train", phantoms, tmp_path / "run", *options, f"--fold={fold}").code in (2, 3)
    assert not (tmp_path / "run").exists()


def test_a_split_file_decides_which_cases_are_used(
    phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    names = ids_of(phantoms)
    split = {"train": names[3:5], "validation": names[:1]}
    (tmp_path / "split.json").write_text(json.dumps(split))
    ended = znormseg("train", phantoms, tmp_path / "run", *options, "--split", tmp_path / "split.json")
    assert "2 cases for training, 1 for validation" in ended.err
    assert read(tmp_path / "run" / "split.json") == split
    assert read(tmp_path / "run" / "run.json")["split_file"] == str((tmp_path / "split.json").resolve())


def test_fold_and_split_together_are_refused(phantoms: Path, tmp_path: Path, znormseg: Call) -> None:
    ended = znormseg("train", phantoms, tmp_path / "run", "--fold", "1", "--split", "split.json")
    assert ended.code == 2
    assert "either --fold or --split" in ended.err


def test_missing_label_maps_are_refused_with_the_case_ids(
    phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    data = copy_of(phantoms, tmp_path)
    one_file(data, "seg").unlink()
    ended = znormseg("train", data, tmp_path / "run", *options)
    assert ended.code == 3
    assert f"1 case has no label map (a file that ends in seg): {ids_of(data)[0]}." in ended.err


@pytest.mark.parametrize("ending", ["t1", "seg"])
def test_a_damaged_file_is_named_and_the_command_works_once_it_is_repaired(
    ending: str, phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    data = copy_of(phantoms, tmp_path)
    path = one_file(data, ending)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    ended = znormseg("train", data, tmp_path / "run", *options)
    assert ended.code == 3
    assert str(path) in ended.err
    path.write_bytes(whole)
    assert znormseg("train", data, tmp_path / "run", *options).code == 0


@pytest.mark.parametrize("ending", ["t1", "seg"])
def test_a_damaged_case_outside_the_split_does_no_harm(
    ending: str, phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    data = copy_of(phantoms, tmp_path)
    path = one_file(data, ending)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "split.json").write_text(json.dumps({"train": ids_of(data)[1:4], "validation": ids_of(data)[4:]}))
    ended = znormseg("train", data, tmp_path / "run", *options, "--split", tmp_path / "split.json")
    assert ended.code == 0, ended.err


def test_ctrl_c_before_the_first_step_does_not_prevent_a_new_start(
    phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from app.training import run as train

    def interrupted(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(train, "cache_cases", interrupted)
        assert znormseg("train", phantoms, tmp_path / "run", *options).code == 130
    assert znormseg("train", phantoms, tmp_path / "run", *options).code == 0


# The machine


@contextmanager
def files_of_at_most(kilobytes: int) -> Iterator[None]:
    """Let no file of this process grow larger; a full disk looks the same to those who write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kilobytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(("kilobytes", "what"), [(30, "prepared case"), (1000, "checkpoint")], ids=["case", "weights"])
def test_a_full_disk_is_a_machine_error_that_names_the_path(
    *, kilobytes: int, what: str, phantoms: Path, tmp_path: Path, options: list[str], znormseg: Call
) -> None:
    with files_of_at_most(kilobytes):
        ended = znormseg("train", phantoms, tmp_path / "run", *options, "--set", "network.channels=[64, 128]")
    assert ended.code == 7, f"{what}: {ended.err}"
    assert str(tmp_path / "run") in ended.err.splitlines()[-1]
