"""The sweep of the reproductions: equal budgets, a record that survives interruption, and the table."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import curves
import pytest
import sweep
import torch
from sweep import RULES, Record, Result, Run
from torch import nn


def run(rule: str = "none", rate: float = 0.1, seed: int = 0, optimizer: str = "sgd") -> Run:
    return Run(network="net", optimizer=optimizer, rule=rule, rate=rate, seed=seed)


def best_at(rate: float, tried: list[float]) -> Callable[[Run], Result]:
    """A training whose score falls with the distance from one rate."""

    def train(run: Run) -> Result:
        tried.append(run.rate)
        return {"validation": 1 - abs(math.log(run.rate / rate)) / 100, "test": 0.5}

    return train


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("best", [1e-4, 1e-2, 1.0])
def test_every_rule_tries_the_same_number_of_rates_and_keeps_the_best(rule: str, best: float, tmp_path: Path) -> None:
    tried: list[float] = []
    record = Record(tmp_path / "runs.jsonl", {})
    chosen = sweep.tune(record, best_at(best, tried), "net", "sgd", rule)
    assert len(set(tried)) == len(tried) == sweep.RATES
    assert chosen == min(tried, key=lambda rate: abs(math.log(rate / best)))


def test_the_rates_move_towards_the_best(tmp_path: Path) -> None:
    tried: list[float] = []
    sweep.tune(Record(tmp_path / "runs.jsonl", {}), best_at(1e-3, tried), "net", "sgd", "none")
    assert tried == [0.1, 0.3, 0.0333, 0.0111]


def test_a_finished_run_is_not_repeated(tmp_path: Path) -> None:
    for _ in range(2):
        tried: list[float] = []
        record = Record(tmp_path / "deep" / "runs.jsonl", {"steps": 3})
        assert record.result(run(), best_at(0.1, tried))["validation"] == 1.0
    assert tried == []


def test_a_truncated_line_is_repeated(tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    record = Record(path, {})
    for seed in range(2):
        record.result(run(seed=seed), best_at(0.1, []))
    path.write_text(path.read_text()[:-9])
    assert list(Record(path, {}).runs()) == [run(seed=0)]
    assert path.read_text().endswith("}\n")


def test_runs_with_other_settings_are_refused(tmp_path: Path) -> None:
    Record(tmp_path / "runs.jsonl", {"steps": 3}).result(run(), best_at(0.1, []))
    with pytest.raises(SystemExit, match=r"its runs have other settings, \{'steps': 3\}; choose another folder"):
        Record(tmp_path / "runs.jsonl", {"steps": 4})


def test_the_table_has_mean_and_spread_at_the_best_rate(tmp_path: Path) -> None:
    record = Record(tmp_path / "runs.jsonl", {})
    for rate, seed, score, steps in ((0.1, 0, 0.3, 40), (0.1, 1, 0.5, None), (0.3, 0, 0.2, 20)):

        def train(_: Run, score: float = score, steps: int | None = steps) -> Result:
            return {"validation": score, "test": score, "steps": steps}

        record.result(run(rate=rate, seed=seed), train)
    table = sweep.table(record.runs(), {"test": "accuracy", "steps": "steps to 0.4"})
    assert table[-1] == "| net | sgd | none | 0.1 | 2 | 2 | 0.400 (SD 0.141) | 40, never |"


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    rates = [sweep.rate_at(step, 100, 1.0) for step in range(101)]
    assert rates[9] == max(rates) == 1.0
    assert rates[0] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("rule", RULES)
def test_each_rule_changes_the_step_in_its_own_way(rule: str, optimizer: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    made = sweep.optimizer_of(run(rule, optimizer=optimizer, rate=0.01), model, ["1"])
    (1e4 * model(torch.randn(5, 4)).square().mean()).backward()
    seen: list[float] = []
    weight = next(model.parameters())
    made.register_step_pre_hook(lambda *_: seen.append(float(torch.as_tensor(weight.grad).norm())))
    made.step()
    expected = {"clip": 1.0, "znorm": 32**0.5, "bgn+znorm": 32**0.5}
    if rule in expected:
        assert seen[0] <= expected[rule] * 1.001
    if rule == "bgn":
        assert seen[0] < 100
    if rule == "none":
        assert seen[0] > 100


def test_the_curves_are_one_picture_with_one_line_per_rule(tmp_path: Path) -> None:
    results: dict[Run, Result] = {
        run(rule, seed=seed, optimizer=optimizer): {"validation": 0.5, "curve": [[10, 0.2], [20, 0.5]]}
        for rule in ("none", "znorm")
        for seed in range(2)
        for optimizer in ("sgd", "adam")
    }
    picture = ElementTree.fromstring(curves.draw(results))
    charts = picture.findall("{http://www.w3.org/2000/svg}svg")
    assert [chart.get("aria-label") for chart in charts] == ["net, sgd", "net, adam"]
    assert all(len(chart.findall(".//*[@class='line arm1']")) == 2 for chart in charts)
