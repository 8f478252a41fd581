"""Print the tables of docs/evidence.md in Markdown, from comparisons made by ``znormseg compare``.

    python bench/evidence_tables.py OUT [OUT ...]

The tables of each folder show the final Dice by arm with its difference from the best arm of that optimiser, the
validation Dice at equal learning rates, and, if telemetry was on, the overlap of gradients at the junctions. All
figures are derived from files of the comparison.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from app.evaluation.statistics import FloatArray, paired_difference
from app.runs.folder import read_metrics

Content = Mapping[str, Any]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        content = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
        print(f"\n### {folder.name}\n")
        print("\n".join([*final_table(content), "", *sweep_table(content), "", *overlap_table(content, folder)]))


def final_table(content: Content) -> Iterator[str]:
    """Yield the table of final Dice by arm; the last column is the paired difference from the optimiser's best arm."""
    yield "| optimizer | arm | rate | WT | TC | ET | mean | SD of seeds | steps to target by seed | minus the best |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for optimizer in content["plan"]["optimizers"]:
        arms = [arm for arm in content["arms"] if arm["optimizer"] == optimizer]
        best = max(arms, key=lambda arm: arm["dice"]["mean"])
        for arm in arms:
            spread = "-" if arm["between_seeds"] is None else f"{arm['between_seeds']:.3f}"
            steps = ", ".join("never" if step is None else str(step) for step in arm["steps_to_target"])
            yield (
                f"| {optimizer} | {arm['arm']} | {arm['rate']:g} | "
                + " | ".join(f"{arm['dice'][measure]:.3f}" for measure in ("WT", "TC", "ET", "mean"))
                + f" | {spread} | {steps} | {'best' if arm is best else minus(content, arm, best)} |"
            )


def minus(content: Content, arm: Content, other: Content) -> str:
    """Format the paired difference of the mean Dice of two arms, with its 95 % interval."""
    difference = paired_difference(dice_of(content, arm), dice_of(content, other))
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def dice_of(content: Content, arm: Content) -> FloatArray:
    """Return the mean Dice over regions of an arm, shape (seeds, cases)."""
    runs = [run for run in content["runs"] if is_final(run, arm)]
    return np.array([[fmean(case.values()) for case in run["dice"].values()] for run in runs], dtype=np.float64)


def is_final(run: Content, arm: Content) -> bool:
    """Whether a run is a final run of the arm, at its chosen rate."""
    return "dice" in run and (run["optimizer"], run["arm"], run["learning_rate"]) == (
        arm["optimizer"],
        arm["arm"],
        arm["rate"],
    )


def sweep_table(content: Content) -> Iterator[str]:
    """Yield the table of best validation Dice of the first seed at equal settings."""
    for optimizer, arms in content["sweep"].items():
        rates = list(next(iter(arms.values())))
        yield f"| {optimizer}, learning rate | " + " | ".join(f"{float(rate):g}" for rate in rates) + " |"
        yield "|---" * (len(rates) + 1) + "|"
        for arm, dice in arms.items():
            yield f"| {arm} | " + " | ".join(f"{dice[rate]:.3f}" for rate in rates) + " |"
        yield ""


def overlap_table(content: Content, folder: Path) -> Iterator[str]:
    """Yield the table of cosine and ||a + b|| / (||a|| + ||b||) of the two gradients at a junction, averaged."""
    rows = []
    for arm in content["arms"]:
        found: list[Mapping[str, float]] = []
        for run in (run for run in content["runs"] if is_final(run, arm)):
            for record in read_metrics(folder / run["run"]):
                if record["kind"] == "overlap":
                    found += record["junctions"].values()
        if found:
            cosine, ratio = (fmean(junction[name] for junction in found) for name in ("cosine", "ratio"))
            rows.append(f"| {arm['optimizer']} | {arm['arm']} | {cosine:.3f} | {ratio:.3f} |")
    if rows:
        yield "| optimizer | arm | cosine | overlap ratio |"
        yield "|---|---|---|---|"
        yield from rows


if __name__ == "__main__":
    main()
