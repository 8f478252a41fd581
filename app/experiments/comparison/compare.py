"""Compare arms: make the runs, analyse them, and write CSV and JSON."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from app import NOTICE
from app.evaluation.metrics import DICE_DEFINITION
from app.experiments.comparison.analysis import Analysis, Records, analyse
from app.experiments.comparison.plan import ComparisonPlan, RunKey
from app.experiments.comparison.run import Results, make_runs
from app.progress import OnProgress, silent
from app.runs.folder import read_metrics, write_json
from app.system.device import machine, versions
from data.datasets.source import DataSource
from data.files import replacing
from data.labels import REGIONS

COLUMNS: Final = (
    "optimizer",
    "arm",
    "learning_rate",
    "seed",
    "part",
    "case",
    *(f"dice_{region}" for region in REGIONS),
    "dice_mean",
    "best_step",
    "run",
)


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
        out: folder of the comparison: new, empty, or holding the same comparison, which is then resumed.
        plan: what to compare.
        fold: the test fold, 0 to 4; the next fold is used for validation.
        split_file: JSON file with the lists ``train``, ``validation`` and ``test``; overrides ``fold``.
        on_progress: called with the progress of the whole comparison.

    Raises:
        DataError, ConfigError, RunError, DeviceError, InterruptedRunError: as
            :func:`app.experiments.comparison.run.make_runs`.
    """
    results = make_runs(
        data,
        out,
        plan,
        fold=fold,
        split_file=split_file,
        on_progress=on_progress,
    )
    metrics: dict[RunKey, Records] = {key: read_metrics(out / "runs" / key.name) for key in plan.finals(results.chosen)}
    analysis = analyse(results, metrics)
    content = {
        **analysis.to_json(),
        "plan": {**plan.to_json(), "parts": results.parts.to_json()},
        "dice": DICE_DEFINITION,
        "versions": versions(),
        "machine": machine(),
        "runs": [dict(result) for result in results.runs.values()],
        "notice": NOTICE,
    }
    write_csv(out / "compare.csv", results)
    write_json(out / "compare.json", content)
    return Comparison(out=out, results=results, analysis=analysis, metrics=metrics, content=content)


def write_csv(path: Path, results: Results) -> None:
    """Write the final Dice as CSV in full precision, one row per final run and scored case.

    Args:
        path: file to write, atomically.
        results: every final run must have ``dice``.
    """
    part = "test" if results.parts.test else "validation"
    with replacing(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for key in results.plan.finals(results.chosen):
            result = results.runs[key]
            for case, dice in result["dice"].items():
                values = [dice[region] for region in REGIONS]
                writer.writerow(
                    [
                        *(key.optimizer, key.arm, key.rate, key.seed, part, case),
                        *(*values, fmean(values), result["best_step"], result["run"]),
                    ]
                )
