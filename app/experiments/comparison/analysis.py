"""Analyse the runs of a comparison: final Dice, differences, steps to a target Dice, seconds and verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import fmean, median
from typing import Any, Final

import numpy as np

from app.evaluation.statistics import (
    Difference,
    FloatArray,
    bootstrap_interval,
    first_step_at,
    holm,
    paired_difference,
    spread,
)
from app.experiments.comparison.plan import ComparisonPlan, RunKey
from app.experiments.comparison.run import Results
from app.experiments.comparison.verdict import caveats, verdict
from app.experiments.runs import backends_sentence, count_backends

#: The measure that verdicts refer to; the others are the regions.
MEAN: Final = "mean"
#: Default target Dice, as a share of the best final mean.
_TARGET_SHARE: Final = 0.9

Records = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ArmSummary:
    """Results of one arm under one optimiser, at its chosen learning rate."""

    optimizer: str
    arm: str
    rate: float
    dice: Mapping[str, float]
    """Final Dice, or 1 - Brier score of a presence network: by output and mean, over seeds and cases."""
    low: float
    """Lower end of the 95 % bootstrap interval of the mean Dice over seeds and cases."""
    high: float
    between_seeds: float | None
    """Standard deviation of the mean Dice between seeds; None for one seed."""
    steps_to_target: tuple[int | None, ...]
    """By seed: the first validated step at or above the target; None if it was not reached."""
    seconds: float
    """Duration of one run, mean over seeds, including preparation and validation."""
    seconds_per_step: float | None
    """Median over the steps of all seeds; None if there are no two consecutive steps."""
    skipped_steps: int
    """Total over all seeds."""
    differences: Mapping[str, Difference]
    """Differences from the baseline, by measure; empty for the baseline itself."""
    verdict: str
    """One sentence; empty for the baseline itself."""


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The complete analysis of a comparison."""

    arms: tuple[ArmSummary, ...]
    target_dice: float
    tested: bool
    """Whether the final Dice is measured on test cases instead of validation cases."""
    same_start: bool
    """Whether the records show the same initial weights and first batch in all runs of each seed."""
    sweep: Mapping[str, Mapping[str, Mapping[float, float]]]
    """Mean validation Dice of the first seed by optimiser, arm and learning rate."""
    caveats: tuple[str, ...]

    def verdicts(self) -> list[str]:
        """Return the verdicts, one sentence per arm."""
        return [summary.verdict for summary in self.arms if summary.verdict]

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "verdicts": self.verdicts(),
            "caveats": list(self.caveats),
            "scored_part": "test" if self.tested else "validation",
            "same_start": self.same_start,
            "target_dice": self.target_dice,
            "arms": [{**asdict(summary), "steps_to_target": list(summary.steps_to_target)} for summary in self.arms],
            "sweep": {
                optimizer: {arm: {f"{rate!r}": dice for rate, dice in rates.items()} for arm, rates in arms.items()}
                for optimizer, arms in self.sweep.items()
            },
        }


def analyse(results: Results, metrics: Mapping[RunKey, Records]) -> Analysis:
    """Analyse a comparison.

    Args:
        results: results of every run.
        metrics: records of ``metrics.jsonl`` of the final runs.
    """
    plan = results.plan
    target = plan.target_dice or _usual_target(results, metrics)
    summaries: list[ArmSummary] = []
    for optimizer in plan.optimizers:
        of_optimizer = [_summary(results, metrics, optimizer, arm, target) for arm in plan.arms]
        summaries += _with_verdicts(plan, of_optimizer)
    same_start = is_same_start(results.runs)
    return Analysis(
        arms=tuple(summaries),
        target_dice=target,
        tested=bool(results.parts.test),
        same_start=same_start,
        sweep=_sweep(results),
        caveats=tuple(
            caveats(
                seeds=plan.seeds,
                cases=len(results.parts.scored),
                tested=bool(results.parts.test),
                at_border=_at_border(results),
                same_start=same_start,
                backends=[backends_sentence([one]) for one in scored_by(results)],
            )
        ),
    )


def is_same_start(runs: Mapping[RunKey, Mapping[str, Any]]) -> bool:
    """Whether initial weights and first batch are recorded for every run, and equal in all runs of one seed."""
    starts: dict[int, list[Any]] = {}
    for key, result in runs.items():
        starts.setdefault(key.seed, []).append(result.get("start"))
    return all(None not in found and found.count(found[0]) == len(found) for found in starts.values())


def scored_by(results: Results) -> list[dict[str, str | int | None]]:
    """Count the backends that computed the scored predictions; see :func:`app.experiments.runs.count_backends`."""
    return count_backends(results.runs[key].get("computed_by") for key in results.plan.finals(results.chosen))


def final_keys(results: Results, optimizer: str, arm: str) -> list[RunKey]:
    """Return the final runs of one arm, in the order of the seeds."""
    return [key for key in results.plan.finals(results.chosen) if (key.optimizer, key.arm) == (optimizer, arm)]


def score_array(results: Results, optimizer: str, arm: str, measure: str) -> FloatArray:
    """Return the final scores of one arm, shape (seeds, cases); ``mean`` is the mean over the outputs of each case."""
    plan = results.plan
    outputs = plan.config.outputs if measure == MEAN else (measure,)
    scores = plan.config.measure.key
    rows = [
        [fmean(float(results.runs[key][scores][case][output]) for output in outputs) for case in results.parts.scored]
        for key in final_keys(results, optimizer, arm)
    ]
    return np.array(rows, dtype=np.float64)


def _summary(
    results: Results, metrics: Mapping[RunKey, Records], optimizer: str, arm: str, target: float
) -> ArmSummary:
    keys = final_keys(results, optimizer, arm)
    arrays = {name: score_array(results, optimizer, arm, name) for name in (MEAN, *results.plan.config.outputs)}
    low, high = bootstrap_interval(arrays[MEAN])
    differences: dict[str, Difference] = {}
    if arm != results.plan.baseline:
        differences = {
            measure: paired_difference(values, score_array(results, optimizer, results.plan.baseline, measure))
            for measure, values in arrays.items()
        }
    validations = [_validations(metrics[key], results.plan.config.measure.key) for key in keys]
    return ArmSummary(
        optimizer=optimizer,
        arm=arm,
        rate=results.chosen[optimizer, arm],
        dice={measure: float(values.mean()) for measure, values in arrays.items()},
        low=low,
        high=high,
        between_seeds=spread(arrays[MEAN].mean(axis=1).tolist()),
        steps_to_target=tuple(
            first_step_at(steps, dice, target) if target > 0 else None for steps, dice in validations
        ),
        seconds=fmean(float(results.runs[key]["seconds"]) for key in keys),
        seconds_per_step=_seconds_per_step([metrics[key] for key in keys]),
        skipped_steps=sum(int(results.runs[key]["skipped_steps"]) for key in keys),
        differences=differences,
        verdict="",
    )


def _with_verdicts(plan: ComparisonPlan, summaries: Sequence[ArmSummary]) -> list[ArmSummary]:
    """Add verdicts, and p values corrected over the arms, to the summaries of one optimiser."""
    others = [summary for summary in summaries if summary.arm != plan.baseline]
    corrected = {
        measure: holm([summary.differences[measure].p for summary in others])
        for measure in (MEAN, *plan.config.outputs)
    }
    judged = [summary for summary in summaries if summary.arm == plan.baseline]
    for place, summary in enumerate(others):
        differences = {
            measure: replace(difference, p_holm=corrected[measure][place])
            for measure, difference in summary.differences.items()
        }
        measure = plan.config.measure.in_words
        words = verdict(summary.arm, plan.baseline, summary.optimizer, differences[MEAN], measure=measure)
        judged.append(replace(summary, differences=differences, verdict=words))
    return sorted(judged, key=lambda summary: plan.arms.index(summary.arm))


def _usual_target(results: Results, metrics: Mapping[RunKey, Records]) -> float:
    """Return a fixed share of the best arm's mean validation Dice at the end of its runs."""
    best, measure = 0.0, results.plan.config.measure.key
    for optimizer, arm in results.chosen:
        ends = [_validations(metrics[key], measure)[1][-1:] for key in final_keys(results, optimizer, arm)]
        if all(ends):
            best = max(best, fmean(end[0] for end in ends))
    return round(_TARGET_SHARE * best, 3)


def _validations(records: Records, measure: str) -> tuple[list[int], list[float]]:
    of_kind = [record for record in records if record.get("kind") == "validation"]
    return [int(record["step"]) for record in of_kind], [float(record[f"mean_{measure}"]) for record in of_kind]


def _seconds_per_step(runs: Sequence[Records]) -> float | None:
    """Return the median time between consecutive steps with no validation in between."""
    gaps = []
    for records in runs:
        kinds = [record for record in records if record.get("kind") in ("train", "validation")]
        gaps += [
            float(after["seconds"]) - float(before["seconds"])
            for before, after in pairwise(kinds)
            if before["kind"] == after["kind"] == "train"
        ]
    return median(gaps) if gaps else None


def _sweep(results: Results) -> dict[str, dict[str, dict[float, float]]]:
    table: dict[str, dict[str, dict[float, float]]] = {}
    for key in results.plan.sweep():
        dice = fmean(results.runs[key][f"validation_{results.plan.config.measure.key}"].values())
        table.setdefault(key.optimizer, {}).setdefault(key.arm, {})[key.rate] = dice
    return table


def _at_border(results: Results) -> list[str]:
    return [
        f"{arm} under {optimizer} ({rate:g})"
        for (optimizer, arm), rate in results.chosen.items()
        if rate in (results.plan.rates[optimizer][0], results.plan.rates[optimizer][-1])
    ]
