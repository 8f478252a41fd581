"""Several processes train as one: the same numbers, one writer, one decision, and no process left behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch._C._distributed_c10d import HashStore

from app.config.load import load_config
from app.errors import DeviceError, RunError
from app.runs.folder import read_metrics
from app.training import distributed
from app.training.distributed import ALONE, Launch, World, fresh_store, joined_processes, launched
from app.training.run import resume, start
from app.training.signals import stop_on_signals
from data.datasets.source import DataSource

ROOT = Path(__file__).parents[3]
TOLD = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "a.host",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_RUN_ID": "job-7",
}


def settings_of(steps: int, batch: int, *more: str) -> list[str]:
    """A tiny run in float32, as arguments of the command line."""
    given = (
        "network.channels=[4, 8]",
        "network.residual_units=1",
        "training.patch_voxels=[32, 32, 32]",
        f"training.batch_size={batch}",
        f"training.steps={steps}",
        "training.validations=2",
        "training.learning_rate=1e-2",
        "training.checkpoint_minutes=0.001",
        "runtime.device=cpu",
        "runtime.precision=float32",
        *more,
    )
    return [word for setting in given for word in ("--set", setting)]


class Torchrun(NamedTuple):
    """A launch at work; what it says goes to a file."""

    process: subprocess.Popen[bytes]
    said: Path

    def ended(self, seconds: float = 200) -> tuple[int, str]:
        """Exit status and everything it said; waits for the end."""
        status = self.process.wait(timeout=seconds)
        return status, self.said.read_text(encoding="utf-8")

    def kill(self) -> None:
        """End the launcher and its workers at once, as when a host dies."""
        tree = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        for process in tree:
            process.kill()

    def worker(self, rank: int) -> psutil.Process:
        """The worker of a rank."""
        (found,) = [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.environ().get("RANK") == str(rank)
        ]
        return found


@pytest.fixture
def torchrun(tmp_path: Path) -> Iterator[Callable[..., Torchrun]]:
    """Start ``torchrun`` with options and a command; kill any process that is left at the end."""
    launches: list[Torchrun] = []

    def launch(*arguments: str | Path) -> Torchrun:
        said = tmp_path / f"said-{len(launches)}.txt"
        with said.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)],
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        launches.append(Torchrun(process, said))
        return launches[-1]

    yield launch
    for one in launches:
        if one.process.poll() is None:
            one.kill()
            one.process.wait()


def wait_for_step(run: Path, step: int, launch: Torchrun) -> None:
    """Wait until a step is in the metrics of a run."""
    until = time.monotonic() + 200
    while not any(record["step"] >= step for record in read_metrics(run)):
        assert launch.process.poll() is None, launch.said.read_text(encoding="utf-8")
        assert time.monotonic() < until
        time.sleep(0.02)


def last_step(run: Path) -> int:
    """Of the newest checkpoint to resume from."""
    return max(int(path.stem.partition("-")[2]) for path in (run / "checkpoints").glob("last-*.json"))


def free_port() -> int:
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return int(some.getsockname()[1])


# Launch settings


def test_an_unlaunched_process_is_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TOLD:
        monkeypatch.delenv(name, raising=False)
    with joined_processes() as world:
        assert (world.rank, world.size, world.is_first, world.launch.local_rank) == (0, 1, True, None)
    assert not torch.distributed.is_initialized()


def test_the_settings_of_torchrun_are_used() -> None:
    assert launched(TOLD) == Launch(rank=5, size=8, local_rank=1, local_size=4, restarts=2, job="job-7")


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_an_incomplete_set_of_variables_is_not_a_launch(missing: str) -> None:
    assert launched({name: value for name, value in TOLD.items() if name != missing}) == Launch()


@pytest.mark.parametrize(("name", "value"), [("RANK", "first"), ("WORLD_SIZE", "-2"), ("RANK", "8")])
def test_an_invalid_variable_is_refused_and_named(name: str, value: str) -> None:
    with pytest.raises(DeviceError, match=name):
        launched({**TOLD, name: value})


def test_unnamed_launches_are_distinguished_by_their_launcher() -> None:
    assert launched({**TOLD, "TORCHELASTIC_RUN_ID": "none"}).job.endswith(f":{os.getppid()}")


def test_a_single_process_keeps_its_random_numbers() -> None:
    values = torch.tensor([1.0, 2.0])
    assert ALONE.total(values) is values
    assert (ALONE.means([3.0]), ALONE.largest(4.0), ALONE.seconds(5.0), ALONE.broadcast("x")) == ([3.0], 4.0, 5.0, "x")
    assert ALONE.agree(seconds=1.0, signal_name="SIGINT", save=True) == ("SIGINT", True)
    assert ALONE.rows(2, lambda index: [index, index + 1]) == [[0, 1], [1, 2]]
    assert ALONE.shares([1, 2]) == []


def test_shared_work_is_distributed_without_omissions() -> None:
    worlds = [World(Launch(rank=rank, size=4, local_rank=rank % 2, local_size=2)) for rank in range(4)]
    items = list(range(9))
    assert sorted(item for world in worlds for item in world.shares(items)[0]) == items
    for host in (worlds[:2], worlds[2:]):
        assert sorted(item for world in host for item in world.shares(items)[1]) == items


def test_random_numbers_differ_by_rank_and_step_and_are_reproducible() -> None:
    def drawn(rank: int, step: int) -> float:
        World(Launch(rank=rank, size=3)).seed_step(0, step)
        return float(torch.rand(1))

    with torch.random.fork_rng():
        numbers = [drawn(rank, step) for rank in (1, 2) for step in (0, 1)]
        assert len(set(numbers)) == 4
        assert drawn(1, 0) == numbers[0]


def test_the_first_process_keeps_its_random_numbers() -> None:
    before = torch.get_rng_state()
    World(Launch(size=3)).seed_step(0, 7)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("verb", ["predict", "compare"])
def test_only_train_accepts_several_processes(
    verb: str, znormseg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in TOLD.items():
        monkeypatch.setenv(name, value)
    ended = znormseg(verb, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert ended.code == 2
    assert f"torchrun starts {verb} several times; only train supports that" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_does_not_end_a_process_that_stops_with_others() -> None:
    with stop_on_signals(patient=True) as stop:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert stop.signal_name == "SIGINT"


def test_processes_of_two_kinds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(table: list[Any], own: dict[str, object]) -> None:
        table[:] = [own, {**own, "the precision": torch.bfloat16}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    world = World(Launch(size=2))
    world.require_same({"the device": "cpu", "the precision": torch.bfloat16})
    with pytest.raises(
        DeviceError, match=r"the precision is torch.float32 in process 0 and torch.bfloat16 in process 1"
    ):
        world.require_same({"the device": "cpu", "the precision": torch.float32})


def test_each_start_of_the_processes_has_a_fresh_store() -> None:
    store = HashStore()
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):  # the second meets what the first one left
            meeting = [pool.submit(fresh_store, store, rank=rank, size=3) for rank in (1, 0, 2)]
            places = [one.result(timeout=30) for one in meeting]
            assert not any(place.check(["address"]) for place in places)
            places[0].set("address", "here")
            assert [place.get("address") for place in places] == [b"here"] * 3


class OnGpu:
    """Stands in for a tensor on a GPU; what is pickled would come to every process on that GPU."""

    def detach(self) -> OnGpu:
        return self

    def cpu(self) -> torch.Tensor:
        return torch.ones(1)


def test_a_state_is_passed_to_other_processes_in_ram(monkeypatch: pytest.MonkeyPatch) -> None:
    from app.training import run as train

    monkeypatch.setattr(train, "to_checkpoint", lambda _: ({"weights.a": OnGpu()}, {}))
    state: Any = SimpleNamespace(step=1, seconds=0.0, skipped_before=0)
    assert train._as_checkpoint(state).tensors == {"weights.a": torch.ones(1)}


# After a restart


def restarted(job: str) -> World:
    return World(Launch(local_rank=0, restarts=1, job=job))


def test_a_restarted_job_resumes_its_own_run(phantoms: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    config = load_config("laptop", tiny_settings)
    begun = start(DataSource(phantoms), tmp_path / "run", config, world=World(Launch(local_rank=0, job="7")))
    assert start(DataSource(phantoms), tmp_path / "run", config, world=restarted("7")).steps == begun.steps


def test_a_restarted_job_does_not_touch_the_runs_of_others(
    phantoms: Path, tiny_run: Path, tiny_settings: list[str]
) -> None:
    before = last_step(tiny_run)
    with pytest.raises(RunError, match="not empty"):
        start(DataSource(phantoms), tiny_run, load_config("laptop", tiny_settings), world=restarted("7"))
    assert last_step(tiny_run) == before


def test_a_job_that_was_not_restarted_needs_resume(phantoms: Path, tiny_settings: list[str], tmp_path: Path) -> None:
    config, world = load_config("laptop", tiny_settings), World(Launch(local_rank=0, job="7"))
    start(DataSource(phantoms), tmp_path / "run", config, world=world)
    with pytest.raises(RunError, match="--resume"):
        start(DataSource(phantoms), tmp_path / "run", config, world=world)


def test_a_job_killed_before_its_first_checkpoint_starts_over(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / ".lock").write_text("7")
    (run / "config.yaml").write_text("half")
    assert start(DataSource(phantoms), run, load_config("laptop", tiny_settings), world=restarted("7")).steps == 4


def test_a_run_resumed_with_another_process_count_continues_with_the_next_patch(
    phantoms: Path, tiny_settings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    start(DataSource(phantoms), run, load_config("laptop", tiny_settings))
    path = run / "checkpoints" / "last-000000004.json"
    details = json.loads(path.read_text())
    assert (details["patches"], details["processes"]) == (4, 1)
    del details["json_sha256"]  # as of a version that did not keep it
    path.write_text(json.dumps({**details, "processes": 3}))
    with caplog.at_level("INFO", logger="znormseg"):
        resume(DataSource(phantoms), run)
    assert "world size 1, previously 3" in caplog.text


# Two real processes


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_with_the_combined_batch(
    torchrun: Callable[..., Torchrun], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("distributed_step.py")
    for count in (1, 2):
        status, said = torchrun("--nproc-per-node", count, script, tmp_path / f"{count}.safetensors", 4).ended()
        assert status == 0, said
    one, two = (load_file(tmp_path / f"{count}.safetensors") for count in (1, 2))
    assert one["losses"][0] > one["losses"][-1] + 0.05
    assert {name: float((one[name] - two[name]).abs().max()) for name in one} == pytest.approx(
        dict.fromkeys(one, 0.0), abs=1e-9
    )


@pytest.mark.slow
def test_a_run_of_two_processes_equals_one_process_with_twice_the_batch(
    phantoms: Path, torchrun: Callable[..., Torchrun], tmp_path: Path, znormseg: Callable[..., Any]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert znormseg("train", phantoms, one, *settings_of(8, 4)).code == 0
    launch = torchrun("--nproc-per-node", 2, "-m", "app", "train", phantoms, two, *settings_of(8, 2), "--json")
    status, said = launch.ended()
    assert status == 0, said
    assert said.count('"validation_dice"') == 1
    records = zip(read_metrics(one), read_metrics(two), strict=True)
    for single, double in records:
        if single["kind"] == "train":
            assert double["loss"] == pytest.approx(single["loss"], rel=1e-4)
        else:
            assert double["dice"] == pytest.approx(single["dice"], abs=2e-3)
    assert json.loads((two / "run.json").read_text())["processes"] == 2
    assert len(list((two / "tensorboard").iterdir())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_training_completes_when_a_worker_is_killed(
    rank: int, phantoms: Path, torchrun: Callable[..., Torchrun], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = ("--nproc-per-node", 2, "--max-restarts", 2, "-m", "app")
    launch = torchrun(*options, "train", phantoms, run, *settings_of(40, 2))
    wait_for_step(run, 5, launch)
    launch.worker(rank).kill()
    status, said = launch.ended()
    assert status == 0, said
    assert "resuming at step" in said
    assert [r["step"] for r in read_metrics(run) if r["kind"] == "train"] == list(range(1, 41))


@pytest.mark.slow
def test_sigterm_to_torchrun_stops_all_processes_and_the_run_can_be_resumed(
    phantoms: Path, torchrun: Callable[..., Torchrun], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    launch = torchrun("--nproc-per-node", 2, "-m", "app", "train", phantoms, run, *settings_of(2000, 2))
    wait_for_step(run, 5, launch)
    workers = [launch.worker(rank) for rank in (0, 1)]
    launch.process.send_signal(signal.SIGTERM)
    status, said = launch.ended()
    assert status != 0
    assert "stopped by SIGTERM after step" in said
    assert not any(worker.is_running() for worker in workers)
    stopped_at = last_step(run)
    assert stopped_at == max(record["step"] for record in read_metrics(run)) < 2000
    again = torchrun("--nproc-per-node", 2, "-m", "app", "train", phantoms, run, "--resume")
    wait_for_step(run, stopped_at + 2, again)


def two_hosts(port: int, nodes: str, rank: int) -> tuple[str | int, ...]:
    """Options of two launchers that find each other; the first keeps the store."""
    store = f"is_host={rank == 0},last_call_timeout=5"
    meeting = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "7", "--rdzv-conf", store)
    return ("--nnodes", nodes, "--nproc-per-node", 1, "--max-restarts", 3, *meeting, "-m", "app", "train")


@pytest.mark.slow
def test_two_launchers_train_one_run(phantoms: Path, torchrun: Callable[..., Torchrun], tmp_path: Path) -> None:
    run, port = tmp_path / "run", free_port()
    launches = [torchrun(*two_hosts(port, "2", rank), phantoms, run, *settings_of(10, 2)) for rank in (0, 1)]
    for launch in launches:
        status, said = launch.ended()
        assert status == 0, said
    assert json.loads((run / "run.json").read_text())["processes"] == 2
    assert last_step(run) == 10


@pytest.mark.slow
def test_training_completes_when_one_of_two_launchers_is_killed(
    phantoms: Path, torchrun: Callable[..., Torchrun], tmp_path: Path
) -> None:
    run, port = tmp_path / "run", free_port()
    first, second = (torchrun(*two_hosts(port, "1:2", rank), phantoms, run, *settings_of(60, 2)) for rank in (0, 1))
    wait_for_step(run, 5, first)
    second.kill()
    status, said = first.ended(280)
    assert status == 0, said
    words = (said, second.said.read_text(encoding="utf-8"))
    assert any("2 processes with batches of 2" in text for text in words)
    assert "world size 1, previously 2" in said
    assert last_step(run) == 60


@pytest.mark.slow
def test_a_launcher_that_joins_later_takes_part(
    phantoms: Path, torchrun: Callable[..., Torchrun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # else torchrun of torch 2.13 itself gives up
    run, port = tmp_path / "run", free_port()
    first = torchrun(*two_hosts(port, "1:2", 0), phantoms, run, *settings_of(300, 2))
    wait_for_step(run, 5, first)
    second = torchrun(*two_hosts(port, "1:2", 1), phantoms, run, *settings_of(300, 2))
    said = [launch.ended(280) for launch in (first, second)]
    assert [status for status, _ in said] == [0, 0], said
    assert any("world size 2, previously 1" in text for _, text in said)
    assert last_step(run) == 300


# Timeouts


@pytest.mark.parametrize("gpus", [False, True])
def test_tensor_timeouts_are_minutes_and_control_message_timeouts_are_hours(
    gpus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []

    def note(backend: str, *, timeout: timedelta, **_: Any) -> str:
        asked.append((backend, timeout.total_seconds()))
        return "the group for tensors"

    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([("store", 0, 2)]))
    monkeypatch.setattr(distributed, "fresh_store", lambda store, **_: store)
    monkeypatch.setattr("torch.distributed.init_process_group", note)
    monkeypatch.setattr("torch.distributed.new_group", lambda *, backend, timeout: note(backend, timeout=timeout))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus)
    assert distributed._set_up(Launch(size=2)) == "the group for tensors"
    assert asked == [("gloo", 12 * 3600), ("cpu:gloo,cuda:nccl" if gpus else "gloo", 20 * 60)]
