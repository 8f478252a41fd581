"""Analysis of a comparison: differences, correction over arms, steps to a target Dice, seconds, equal starts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from app.experiments.comparison.analysis import Analysis, ArmSummary, analyse, is_same_start
from app.experiments.comparison.plan import RunKey, plan_comparison
from app.experiments.comparison.run import Results, choose_rates
from app.experiments.comparison.split import ThreeWaySplit

CASES = tuple(f"case{number}" for number in range(8))
START = {"weights_sha256": "w", "batch_sha256": "b"}


def results(gains: Mapping[str, float], *, seeds: int = 3, test: bool = True) -> Results:
    """Arms whose Dice is that of the first one plus a gain; cases and seeds differ as well."""
    plan = plan_comparison(arms=list(gains), seeds=seeds, steps=10, rates=["1e-3,1e-2,1e-1"])
    rates = {("adamw", arm): 1e-2 for arm in gains}
    runs = {}
    for key in {*plan.sweep(), *plan.finals(rates)}:
        dice = {
            case: dict.fromkeys(("WT", "TC", "ET"), 0.5 + 0.01 * number + 0.001 * key.seed + gains[key.arm])
            for number, case in enumerate(CASES)
        }
        runs[key] = {
            "validation_dice": {"WT": 0.5 if key.rate == 1e-2 else 0.4},
            "dice": dice,
            "seconds": 10.0,
            "skipped_steps": 1,
            "start": START,
        }
    parts = ThreeWaySplit(train=("a",), validation=("b",) if test else CASES, test=CASES if test else ())
    return Results(plan=plan, parts=parts, chosen=choose_rates(plan, runs), runs=runs)


def records(*dice: float) -> list[dict[str, Any]]:
    """Steps of 0.25 s, each fifth of them followed by a validation of 5 s."""
    made: list[dict[str, Any]] = []
    seconds = 0.0
    for step in range(1, 5 * len(dice) + 1):
        seconds += 0.25
        made.append({"kind": "train", "step": step, "seconds": seconds})
        if step % 5 == 0:
            seconds += 5
            made.append({"kind": "validation", "step": step, "mean_dice": dice[step // 5 - 1], "seconds": seconds})
    return made


def analysed(given: Results, *dice: float) -> Analysis:
    keys = given.plan.finals(given.chosen)
    return analyse(given, {key: records(*(dice or (0.2, 0.6))) for key in keys})


def arm(analysis: Analysis, name: str) -> ArmSummary:
    return next(summary for summary in analysis.arms if summary.arm == name)


def test_an_arm_that_gains_in_every_case_is_better() -> None:
    analysis = analysed(results({"clip": 0.0, "znorm": 0.05}))
    assert analysis.verdicts()[0].startswith("znorm is better than clip by 0.050 Dice")
    assert arm(analysis, "znorm").dice["mean"] == pytest.approx(0.5 + 0.035 + 0.001 + 0.05)


def test_p_values_are_corrected_for_the_arms_without_the_baseline() -> None:
    analysis = analysed(results({"clip": 0.0, "znorm": 0.05, "none": -0.05}))
    for name in ("znorm", "none"):
        difference = arm(analysis, name).differences["mean"]
        assert difference.p is not None
        assert difference.p_holm == pytest.approx(2 * difference.p)
    assert arm(analysis, "clip").differences == {}


def test_the_usual_target_is_nine_tenths_of_the_last_mean() -> None:
    analysis = analysed(results({"clip": 0.0, "znorm": 0.0}), 0.2, 0.54, 0.6)
    assert analysis.target_dice == 0.54
    assert arm(analysis, "clip").steps_to_target == (10, 10, 10)


def test_if_nothing_was_learnt_no_target_is_reached() -> None:
    assert arm(analysed(results({"clip": 0.0, "znorm": 0.0}), 0.0), "clip").steps_to_target == (None, None, None)


def test_validation_time_does_not_count_as_step_time() -> None:
    summary = arm(analysed(results({"clip": 0.0, "znorm": 0.0})), "clip")
    assert (summary.seconds_per_step, summary.seconds, summary.skipped_steps) == (0.25, 10.0, 3)


def test_scores_of_validation_cases_are_labelled_as_such() -> None:
    analysis = analysed(results({"clip": 0.0, "znorm": 0.1}, test=False))
    assert not analysis.tested
    assert any("No test cases" in caveat for caveat in analysis.caveats)


def test_the_plain_data_is_valid_json_without_nan() -> None:
    plain = analysed(results({"clip": 0.0, "znorm": 0.1}, seeds=1)).to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain


@pytest.mark.parametrize(
    ("other", "same"),
    [(START, True), ({**START, "weights_sha256": "x"}, False), ({**START, "batch_sha256": "x"}, False), (None, False)],
)
def test_the_start_is_the_same_if_both_recorded_hashes_are_equal(other: Any, same: bool) -> None:
    clip, znorm = (RunKey(optimizer="adamw", arm=arm, rate=1e-3, seed=0) for arm in ("clip", "znorm"))
    assert is_same_start({clip: {"start": START}, znorm: {"start": other}}) is same
