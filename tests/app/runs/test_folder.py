"""The run folder's records."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import pytest

from app.errors import RunError
from app.runs.folder import MetricsLog, job_of, locked, read_json, read_metrics


def write_steps(run: Path, first: int, last: int, *, keep: int = 0, loss: float = 0.5) -> None:
    log = MetricsLog(run, keep_up_to_step=keep, keep_validations_up_to_step=keep)
    for step in range(first, last + 1):
        spent = {"waited_seconds": 0.1, "step_seconds": 0.4}
        log.train(step=step, loss=loss, learning_rate=0.1, seconds=1.0, skipped_steps=0, **spent)
    log.close()


def test_records_of_repeated_steps_are_dropped(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 5)
    write_steps(tmp_path, 4, 6, keep=3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_log_opened_without_writing_leaves_the_run_unchanged(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    log = MetricsLog(tmp_path, keep_up_to_step=0, keep_validations_up_to_step=0, writes=False)
    log.train(step=3, loss=0.5, learning_rate=0.1, seconds=1.0, skipped_steps=0, waited_seconds=0.0, step_seconds=1.0)
    log.validation(step=3, measure="dice", by_output={"WT": 0.5}, mean=0.5, seconds=1.0, cases={"a": {"WT": 0.5}})
    log.picture(step=3, rgb=np.zeros((2, 2, 3), dtype=np.uint8))
    log.go_back(step=1, validated_step=0)
    log.sync()
    log.gradients(step=3, layers={"a.weight": {"norm_before": 1.0}}, skipped_steps=0)
    log.close()
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_run_folder_records_the_last_job_that_locked_it(tmp_path: Path) -> None:
    assert job_of(tmp_path) == ""
    with locked(tmp_path, job="a longer name"):
        pass
    with locked(tmp_path, job="7"):
        assert job_of(tmp_path) == "7"
    assert job_of(tmp_path) == "7"


def test_acquiring_a_lock_waits_for_its_release(tmp_path: Path) -> None:
    held, let_go = Event(), Event()

    def hold() -> None:
        with locked(tmp_path):
            held.set()
            let_go.wait(20)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        assert held.wait(20)
        with pytest.raises(RunError, match="another process"), locked(tmp_path, wait_seconds=0.3):
            pass
        let_go.set()
        with locked(tmp_path, wait_seconds=20):
            pass


def write_telemetry(run: Path, steps: list[int], *, keep: int = 0, keep_validations: int = 0) -> None:
    log = MetricsLog(run, keep_up_to_step=keep, keep_validations_up_to_step=keep_validations)
    for step in steps:
        log.gradients(step=step, layers={"a.weight": {"norm_before": math.inf, "norm_after": 2.0}}, skipped_steps=0)
        log.overlap(step=step, junctions={"model.1": {"cosine": math.nan, "ratio": 0.5}})
    log.close()


def test_telemetry_of_repeated_steps_is_dropped_regardless_of_validation(tmp_path: Path) -> None:
    write_telemetry(tmp_path, [2, 4])
    write_telemetry(tmp_path, [4, 6], keep=3)
    steps = [(record["kind"], record["step"]) for record in read_metrics(tmp_path)]
    assert steps == [(kind, step) for step in (2, 4, 6) for kind in ("gradients", "overlap")]


def test_non_finite_telemetry_is_written_as_null(tmp_path: Path) -> None:
    write_telemetry(tmp_path, [1])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    gradients, overlap = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert gradients["layers"] == {"a.weight": {"norm_before": None, "norm_after": 2.0}}
    assert overlap["junctions"] == {"model.1": {"cosine": None, "ratio": 0.5}}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_non_finite_loss_is_written_as_null(tmp_path: Path, loss: float) -> None:
    write_steps(tmp_path, 1, 1, loss=loss)
    assert json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None


def test_a_line_truncated_by_a_crash_is_left_out(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_json_file_of_a_run_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunError, match=r"run\.json: missing or damaged"):
        read_json(tmp_path / "run.json")
