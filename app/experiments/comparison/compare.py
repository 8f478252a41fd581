"""Compare arms: make the runs, analyse them, write CSV and JSON."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from app.evaluation.metrics import DICE_DEFINITION
from app.experiments.comparison.analysis import Analysis, Records, analyse
from app.experiments.comparison.plan import ComparisonPlan, RunKey
from app.experiments.comparison.run import Results, make_runs
from app.notice import NOTICE
from app.progress import OnProgress, silent
from app.runs.folder import read_metrics, write_json
from app.system.device import machine, versions
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
    """What a comparison made."""

    out: Path
    results: Results
    analysis: Analysis
    metrics: Mapping[RunKey, Records]
    """Records of ``metrics.jsonl`` of the final runs."""
    content: Mapping[str, Any]
    """As in ``compare.json``."""

    @property
    def page(self) -> Path:
        """Where the page goes; :func:`app.reports.comparison.write_comparison_page` writes it."""
        return self.out / "compare.html"


def compare(
    data: Path,
    out: Path,
    plan: ComparisonPlan,
    *,
    fold: int = 0,
    split_file: Path | None = None,
    labels: str | None = None,
    follow_links: bool = False,
    on_progress: OnProgress = silent,
) -> Comparison:
    """Make the runs that are not there yet, and write ``compare.csv`` and ``compare.json``.

    Args:
        data: folder of cases.
        out: folder of the comparison; new, empty, or one where the same comparison was begun.
        plan: what is compared.
        fold: 0 to 4; the fold that tests, the next one validates.
        split_file: JSON with the lists ``train``, ``validation`` and ``test``, instead of a fold.
        labels: name of the label convention, where the data set does not tell.
        follow_links: accept symbolic links that lead out of ``data``.
        on_progress: told how far the whole comparison is.

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
        labels=labels,
        follow_links=follow_links,
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
    """Write the final Dice as CSV, a row for each final run and scored case, in full precision.

    Args:
        path: file to write; there whole or not at all.
        results: with ``dice`` in every final run.
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
