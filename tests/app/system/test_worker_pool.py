"""The pool of worker processes: every task is done once, lost workers are replaced, errors keep their type."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from app.errors import RunError
from app.system.worker_pool import TaskAttempt, WorkerPool, worker_environment
from data.errors import DataError


@dataclass
class Seen:
    """What the callbacks of a pool got."""

    done: dict[str, int] = field(default_factory=dict)
    """By task: process id of the worker."""
    attempts: dict[str, int] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)
    progress: list[str] = field(default_factory=list)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Seen]:
    """Run tasks, each named after what it does, in two workers."""
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")

    def call(*contents: str, reuse: bool = True, max_attempts: int = 3, first: str = "") -> Seen:
        seen = Seen()

        def done(attempt: TaskAttempt, result: int) -> None:
            seen.done[attempt.task] = result
            seen.attempts[attempt.task] = attempt.number

        WorkerPool(
            module="pool_worker",
            job=lambda worker, device: {"mark": str(tmp_path / "mark"), "first": first},
            tasks={f"{content} {number}": content for number, content in enumerate(contents)},
            devices=(None, None),
            logs=tmp_path / "logs",
            on_progress=lambda task, what: seen.progress.append(f"{task} {what}"),
            on_done=done,
            on_lost=lambda attempt, how, log: seen.lost.update({attempt.task: f"{how} {attempt.number}"}),
            max_attempts=max_attempts,
            reuse=reuse,
        ).run()
        return seen

    return call


def test_every_task_is_done_once_by_one_of_the_workers(run: Callable[..., Seen]) -> None:
    seen = run(*"abcdef")
    assert sorted(seen.done) == ["a 0", "b 1", "c 2", "d 3", "e 4", "f 5"]
    assert sorted(seen.progress) == [f"{task} half" for task in sorted(seen.done)]
    assert len(set(seen.done.values())) <= 2
    assert set(seen.attempts.values()) == {1}


def test_each_task_gets_its_own_process_unless_workers_are_reused(
    run: Callable[..., Seen], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="znormseg"):
        seen = run("a", "warn", "c", reuse=False)
    assert len(set(seen.done.values())) == 3
    assert "warn 1: careful" in caplog.messages


def test_a_task_that_kills_its_workers_is_abandoned_and_the_others_finish(run: Callable[..., Seen]) -> None:
    seen = run("a", "die", "c", "d")
    assert seen.lost == {"die 1": "was killed by SIGKILL 3"}
    assert sorted(seen.done) == ["a 0", "c 2", "d 3"]


def test_a_task_whose_worker_was_lost_is_taken_over_by_another(run: Callable[..., Seen]) -> None:
    seen = run("die once", "b")
    assert seen.attempts["die once 0"] == 2
    assert seen.lost == {}


@pytest.mark.parametrize(("reuse", "who"), [(True, "worker-[12]"), (False, "fail 1")])
def test_the_error_of_a_worker_keeps_its_type_and_stops_the_others(
    run: Callable[..., Seen], *, reuse: bool, who: str
) -> None:
    with pytest.raises(RunError, match=f"{who}: no weights"):
        run("wait", "fail", "fail", reuse=reuse)  # the first worker may hold two tasks


def test_workers_that_cannot_start_report_the_reason(run: Callable[..., Seen]) -> None:
    with pytest.raises(DataError, match=r"worker-[12]: no such run"):
        run("a", "b", first="refuse")


@pytest.fixture
def begun() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a worker that has begun a task."""
    processes: list[subprocess.Popen[str]] = []

    def start(task: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-P", str(Path(__file__).with_name("pool_worker.py"))]
        environment = worker_environment(None, 1, given=dict(os.environ))
        worker = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        processes.append(worker)
        assert worker.stdin
        assert worker.stdout
        lines = [{"job": {"mark": "", "first": ""}}, {"task": "0", "content": task}]
        worker.stdin.write("".join(json.dumps(line) + "\n" for line in lines))
        worker.stdin.flush()
        assert any("half" in line for line in worker.stdout)
        return worker

    yield start
    for worker in processes:
        worker.kill()
        worker.communicate()


@pytest.mark.parametrize(
    ("task", "error"),
    [("wait", "InterruptedRunError"), ("save", "RunError"), ("train to the end", "InterruptedRunError")],
)
def test_a_worker_whose_parent_is_gone_saves_and_stops(
    task: str, error: str, begun: Callable[[str], subprocess.Popen[str]]
) -> None:
    worker = begun(task)
    out, _ = worker.communicate(timeout=30)
    assert worker.returncode == 1
    assert f'"error": "{error}"' in out


def test_a_signal_that_arrives_in_a_finalizer_stops_the_worker(begun: Callable[[str], subprocess.Popen[str]]) -> None:
    assert begun("signal in a finalizer").wait(timeout=30) == 1


@pytest.mark.parametrize(
    ("ahead", "tasks", "held"),
    [(1, 20, [2, 2]), (4, 20, [5, 5]), (4, 4, [2, 2]), (4, 1, [1, 0])],
    ids=["one", "four", "few tasks are left for the others", "a single task"],
)
def test_a_worker_receives_several_tasks_early_if_there_are_enough(
    ahead: int, tasks: int, held: list[int], tmp_path: Path
) -> None:
    slots = [SimpleNamespace(ready=False, held=[], send=lambda _: None) for _ in held]
    pool = WorkerPool(
        module="",
        job=lambda *_: {},
        tasks={str(number): number for number in range(tasks)},
        devices=(None, None),
        logs=tmp_path,
        on_progress=lambda *_: None,
        on_done=lambda *_: None,
        on_lost=lambda *_: None,
        reuse=True,
    )
    pool._waiting, pool._attempts, pool._slots = deque(pool.tasks), Counter(), cast(Any, slots)
    for slot in slots:
        pool._handle(cast(Any, slot), {"ready": "cuda:0", "ahead": ahead})
    assert [len(slot.held) for slot in slots] == held
