"""Output that nobody reads any more: closed pipes, closed terminals, and streams closed from the start.

Real processes, pipes and pseudo-terminals.
"""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.training.signals import stop_on_signals

Call = Callable[..., Any]

SCRIPT = Path(sys.executable).with_name("znormseg")


@pytest.fixture
def options(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line, with a checkpoint at the start and the end only."""
    settings = [*tiny_settings, "training.steps=30", "training.checkpoint_minutes=30"]
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture
def long_options(options: list[str]) -> list[str]:
    """The same for a run that somebody has to stop."""
    return [*options, "--set", "training.steps=100000"]


def steps_of(run: Path) -> list[int]:
    """Steps on record."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [record["step"] for record in map(json.loads, filter(lambda line: line.endswith("}"), lines))]


def last_saved(run: Path) -> int:
    """The step of the newest checkpoint to go on from."""
    return max(int(path.stem.split("-")[1]) for path in (run / "checkpoints").glob("last-*.json"))


def wait_until(seen: Callable[[], object], process: subprocess.Popen[Any]) -> None:
    until = time.monotonic() + 200
    while not seen():
        assert process.poll() is None, process.returncode
        assert time.monotonic() < until
        time.sleep(0.01)


def started(*words: str | Path, **how: Any) -> subprocess.Popen[Any]:
    return subprocess.Popen([SCRIPT, *map(str, words)], stdin=subprocess.DEVNULL, **how)


def test_training_completes_when_the_reader_of_its_messages_leaves(
    phantoms: Path, tmp_path: Path, options: list[str]
) -> None:
    process = started("train", phantoms, tmp_path / "run", *options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.readline()  # as `2>&1 | head -1` does
    process.stdout.close()
    assert process.wait(200) == 0
    assert max(steps_of(tmp_path / "run")) == 30
    assert last_saved(tmp_path / "run") == 30


@pytest.mark.slow
def test_training_completes_when_its_terminal_disappears_without_a_signal(
    phantoms: Path, tmp_path: Path, options: list[str]
) -> None:
    ours, theirs = pty.openpty()
    process = started("train", phantoms, tmp_path / "run", *options, stdout=theirs, stderr=theirs)
    os.close(theirs)
    wait_until((tmp_path / "run" / "run.json").exists, process)
    os.close(ours)  # writes now fail with EIO
    assert process.wait(200) == 0
    assert last_saved(tmp_path / "run") == 30


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_training_completes_when_its_log_file_is_on_a_full_disk(
    phantoms: Path, tmp_path: Path, options: list[str]
) -> None:
    with Path("/dev/full").open("w") as full:
        assert started("train", phantoms, tmp_path / "run", *options, stderr=full).wait(200) == 0
    assert last_saved(tmp_path / "run") == 30


@pytest.mark.slow
def test_no_file_gets_the_descriptor_of_a_closed_standard_stream(
    phantoms: Path, tmp_path: Path, options: list[str]
) -> None:
    words = ["sh", "-c", '"$@" <&- >&- 2>&-', "sh", SCRIPT, "train", phantoms, tmp_path / "run", *options]
    assert subprocess.run([*map(str, words)], check=False).returncode == 0
    assert len(steps_of(tmp_path / "run")) == len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_closing_the_terminal_saves_and_ends_a_run_like_sigterm(
    *, times: int, phantoms: Path, tmp_path: Path, long_options: list[str]
) -> None:
    process = started("train", phantoms, tmp_path / "run", *long_options, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: max(steps_of(tmp_path / "run"), default=0) >= 3, process)
    for _ in range(times):  # one from the kernel, one from the shell
        process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "SIGHUP" in err
    assert "--resume" in err
    assert last_saved(tmp_path / "run") == max(steps_of(tmp_path / "run"))


@pytest.mark.slow
def test_a_run_in_a_terminal_that_closes_is_saved(phantoms: Path, tmp_path: Path, long_options: list[str]) -> None:
    child, terminal = pty.fork()
    if child == 0:  # the session's leader, as a command over ssh -t
        os.execv(SCRIPT, [str(SCRIPT), "train", str(phantoms), str(tmp_path / "run"), *long_options])
    until = time.monotonic() + 200
    os.set_blocking(terminal, False)
    while max(steps_of(tmp_path / "run"), default=0) < 3:
        assert time.monotonic() < until
        try:
            os.read(terminal, 4096)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert last_saved(tmp_path / "run") == max(steps_of(tmp_path / "run"))


@pytest.mark.slow
def test_closing_the_terminal_under_nohup_stops_nothing(phantoms: Path, tmp_path: Path, options: list[str]) -> None:
    words = ["nohup", SCRIPT, "train", phantoms, tmp_path / "run", *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen([*map(str, words)], **quiet)  # type: ignore[call-overload]
    wait_until(lambda: steps_of(tmp_path / "run"), process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(200) == 0
    assert last_saved(tmp_path / "run") == 30


def test_an_ignored_sighup_stays_ignored_while_a_run_handles_signals() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            signal.raise_signal(signal.SIGHUP)
            assert request.signal_name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_predicting_a_cohort_completes_when_the_reader_of_its_messages_leaves(
    tiny_run: Path, phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started("predict", tiny_run, phantoms, out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(200) == 0
    assert len(list(out.glob("*.nii.gz"))) == 6


def test_predict_leaves_no_partial_files_when_its_terminal_closes(
    tiny_run: Path, phantoms: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = started("predict", tiny_run, phantoms, out, stderr=subprocess.PIPE, text=True)
    wait_until(out.is_dir, process)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 130, err
    assert "of 6 label maps are in" in err
    assert [path.name for path in out.rglob(".partial*")] == []


@pytest.mark.slow
def test_crossval_with_workers_completes_when_the_reader_of_its_messages_leaves(
    phantoms: Path, tmp_path: Path, options: list[str]
) -> None:
    words: list[str | Path] = ["crossval", phantoms, tmp_path / "cv", "--folds", "2", "--jobs", "2", *options]
    process = started(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(400) == 0
    assert (tmp_path / "cv" / "crossval.json").exists()


@pytest.mark.slow
def test_compare_completes_when_the_reader_of_its_messages_leaves(
    phantoms: Path, tmp_path: Path, tiny_settings: list[str]
) -> None:
    taken = ("training.steps", "training.learning_rate")  # a comparison sets these itself
    settings = [word for one in tiny_settings if not one.startswith(taken) for word in ("--set", one)]
    plan = ["--arms=clip,znorm", "--seeds=1", "--steps=4", "--learning-rates=1e-3"]
    words: list[str | Path] = ["compare", phantoms, tmp_path / "out", *plan, *settings]
    process = started(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(500) == 0
    assert (tmp_path / "out" / "compare.json").exists()


def test_a_result_that_is_not_read_to_the_end_is_not_an_error(phantoms: Path) -> None:
    process = started(
        "evaluate", phantoms, phantoms, "--json", stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()  # as `| head -0` does
    process.stdout = None
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert "roken pipe" not in err
    assert "Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_result_that_does_not_fit_on_the_disk_is_an_error_that_names_it(phantoms: Path) -> None:
    with Path("/dev/full").open("w") as full:
        process = started("evaluate", phantoms, phantoms, "--json", stdout=full, stderr=subprocess.PIPE, text=True)
        _, err = process.communicate(timeout=200)
    assert process.returncode == 7, err
    assert "standard output: cannot be written: No space left on device. Free some space" in err
    assert "Exception ignored" not in err
