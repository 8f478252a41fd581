"""Rebuild the page of a finished comparison from its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from app.config.load import RunConfig, from_plain, load_config
from app.errors import ConfigError, RunError
from app.experiments.comparison.analysis import Records, analyse
from app.experiments.comparison.compare import Comparison
from app.experiments.comparison.plan import ComparisonPlan, RunKey
from app.experiments.comparison.run import Results, choose_rates
from app.experiments.comparison.split import ThreeWaySplit
from app.experiments.runs import json_object
from app.reports.comparison import write_comparison_page
from app.runs.folder import read_json, read_metrics


def rebuild_comparison_report(out: Path, page: Path) -> None:
    """Write the page of a finished comparison atomically, without training or scoring anything.

    Args:
        out: folder of the comparison.
        page: file to write; its folder is created if missing.

    Raises:
        RunError: the comparison is unfinished, or one of its files is missing or damaged.
        OSError: ``page`` cannot be written.
    """
    results = results_of(out)
    metrics: dict[RunKey, Records] = {
        key: read_metrics(out / "runs" / key.name) for key in results.plan.finals(results.chosen)
    }
    recorded = json_object(read_json(out / "compare.json"), out / "compare.json")
    outcome = Comparison(
        out=out, results=results, analysis=analyse(results, metrics), metrics=metrics, content=recorded
    )
    write_comparison_page(outcome, page)


def results_of(out: Path) -> Results:
    """Read the results of a finished comparison.

    Args:
        out: folder of the comparison.

    Raises:
        RunError: the comparison is unfinished, or one of its files is missing or damaged.
    """
    path = out / "plan.json"
    content = json_object(read_json(path), path)
    try:
        plan = _plan(out, content)
        parts = ThreeWaySplit(**{name: tuple(ids) for name, ids in content["parts"].items()})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path}: damaged ({error}).") from error
    runs = {key: _result(out, key) for key in plan.sweep()}
    chosen = choose_rates(plan, runs)
    runs |= {key: _result(out, key) for key in plan.finals(chosen)}
    if not all(plan.config.measure.key in runs[key] for key in plan.finals(chosen)):
        raise _unfinished(out)
    return Results(plan=plan, parts=parts, chosen=chosen, runs=runs)


def _plan(out: Path, content: dict[str, Any]) -> ComparisonPlan:
    plan = ComparisonPlan(
        config=from_plain(content["config"], str(out / "plan.json")),
        arms=tuple(content["arms"]),
        optimizers=tuple(content["optimizers"]),
        seeds=int(content["seeds"]),
        rates={name: tuple(rates) for name, rates in content["learning_rates"].items()},
        baseline=content["baseline"],
        target_dice=content["target_dice"],
        first_seed=int(content.get("first_seed", 0)),
    )
    return replace(plan, variants={name: _config_of(out, plan, name) for name in content.get("variants", {})})


def _config_of(out: Path, plan: ComparisonPlan, arm: str) -> RunConfig:
    """Read the config of a variant from its first run."""
    first = next(key for key in plan.sweep() if key.arm == arm)
    try:
        return load_config(str(out / "runs" / first.name / "config.yaml"), ())
    except (ConfigError, OSError) as error:
        raise RunError(f"{out}: the config of {arm} cannot be read ({error}).") from error


def _result(out: Path, key: RunKey) -> dict[str, Any]:
    path = out / "results" / f"{key.name}.json"
    if not path.exists():
        raise _unfinished(out)
    content = json_object(read_json(path), path)
    if "steps" not in content:
        raise _unfinished(out)
    return content


def _unfinished(out: Path) -> RunError:
    return RunError(f"{out}: the comparison is not finished. Run its command again to resume it.")
