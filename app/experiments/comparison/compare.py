"""Compare gradient rules: make the runs, analyse them, and write CSV and JSON."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from app import NOTICE
from app.config.load import from_plain
from app.evaluation.metrics import DICE_DEFINITION
from app.evaluation.presence import BRIER_DEFINITION
from app.evaluation.tables import write_csv
from app.experiments.comparison.analysis import Analysis, Records, analyse
from app.experiments.comparison.plan import ComparisonPlan, RunKey, shared_settings
from app.experiments.comparison.run import ComparisonRuns, Results
from app.experiments.comparison.split import deal_parts, read_parts
from app.experiments.runs import JobProgress, differences, json_object, require_place, require_unchanged, resumable
from app.progress import OnProgress, silent
from app.runs.case_cache import prepared_cases
from app.runs.folder import locked, read_json, read_metrics, write_json
from app.system.device import machine, versions
from app.training.cases import report_misnamed_files, report_visits, require_labels
from data.datasets.layouts import patients_of
from data.datasets.source import DataSource
from data.labels import convention_named

#: Name of the file that describes the comparison.
PLAN_FILE: Final = "plan.json"
_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Results of a comparison."""

    out: Path
    results: Results
    analysis: Analysis
    metrics: Mapping[RunKey, Records]
    """Records of ``metrics.jsonl`` of the final runs."""
    content: Mapping[str, Any]
    """Content of ``compare.json``."""

    @property
    def page(self) -> Path:
        """Path of the page that :func:`app.reports.comparison.write_comparison_page` writes."""
        return self.out / "compare.html"


def compare(
    data: DataSource,
    out: Path,
    plan: ComparisonPlan,
    *,
    fold: int = 0,
    split_file: Path | None = None,
    on_progress: OnProgress = silent,
) -> Comparison:
    """Make the missing runs of a comparison, and write ``compare.csv`` and ``compare.json``.

    Args:
        data: the data set.
        out: folder of the comparison: new, empty, or with the same comparison, which is then resumed.
        plan: what to compare.
        fold: the test fold, 0 to 4; the next fold is used for validation.
        split_file: JSON file with the lists ``train``, ``validation`` and ``test``; overrides ``fold``.
        on_progress: called with the progress of the whole comparison.

    Raises:
        DataError: the data cannot be used, or has too few patients.
        ConfigError: ``out`` contains a different comparison.
        RunError: ``out`` is a file, contains something else, or is in use by another process.
        DeviceError: the requested device is not available.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; everything is saved.
    """
    cases = data.find_cases()
    parts = None if split_file is None else read_parts(split_file, patients_of(cases.values()))
    used = [cases[case_id].require() for case_id in (cases if parts is None else parts.cases)]
    require_labels(used)
    require_place(out, PLAN_FILE, "comparison")
    recorded = json_object(read_json(out / PLAN_FILE), out / PLAN_FILE) if (out / PLAN_FILE).exists() else None
    if parts is None:
        parts = deal_parts(data, cases, fold, recorded=recorded and recorded.get("parts"))
    report_visits(cases.values(), (parts.train, parts.validation, parts.test))
    report_misnamed_files(used)
    with locked(out), prepared_cases(out / "cache") as store:
        labels = {} if data.labels is None else {"labels": convention_named(data.labels).name}
        _record_plan(out, {"version": _VERSION, **plan.to_json(), "parts": parts.to_json(), **labels})
        write_json(out / "split.json", parts.split.to_json())
        progress = JobProgress(job="comparing", parts=plan.count(), on_progress=on_progress)
        runs = ComparisonRuns(data=data, out=out, plan=plan, parts=parts, cases=cases, store=store, progress=progress)
        with resumable(out, runs.position):
            results = runs.make()
        shutil.rmtree(out / "cache", ignore_errors=True)
    metrics: dict[RunKey, Records] = {key: read_metrics(out / "runs" / key.name) for key in plan.finals(results.chosen)}
    analysis = analyse(results, metrics)
    content = {
        **analysis.to_json(),
        "plan": {**plan.to_json(), "parts": results.parts.to_json()},
        "measure": plan.config.measure.key,
        plan.config.measure.key: DICE_DEFINITION if plan.config.measure.key == "dice" else BRIER_DEFINITION,
        "versions": versions(),
        "machine": machine(),
        "runs": [dict(result) for result in results.runs.values()],
        "notice": NOTICE,
    }
    write_comparison_table(out / "compare.csv", results)
    write_json(out / "compare.json", content)
    return Comparison(out=out, results=results, analysis=analysis, metrics=metrics, content=content)


def _record_plan(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or require that an existing one is the same."""
    path = out / PLAN_FILE
    if not path.exists():
        write_json(path, plan)
        return
    # Keys that later versions added get their defaults.
    recorded = {"variants": {}, "first_seed": 0, **json_object(read_json(path), path)}
    recorded["config"] = shared_settings(from_plain(recorded.get("config", {}), str(path)))
    require_unchanged(out, "comparison", differences(recorded, plan))


def write_comparison_table(path: Path, results: Results) -> None:
    """Write the final scores as CSV in full precision, one row per final run and scored case.

    Args:
        path: file to write, atomically.
        results: every final run must have scores by case.
    """
    part = "test" if results.parts.test else "validation"
    measure, outputs = results.plan.config.measure.key, results.plan.config.outputs
    scores = (f"{measure}_{name}" for name in (*outputs, "mean"))
    rows: list[Sequence[object]] = [
        ["optimizer", "arm", "learning_rate", "seed", "part", "case", *scores, "best_step", "run"]
    ]
    for key in results.plan.finals(results.chosen):
        result = results.runs[key]
        for case, dice in result[measure].items():
            values = [dice[name] for name in outputs]
            run = (key.optimizer, key.arm, key.rate, key.seed, part, case)
            rows.append([*run, *values, fmean(values), result["best_step"], result["run"]])
    write_csv(path, rows)
