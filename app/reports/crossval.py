"""The page of a cross-validation: one self-contained HTML file that needs neither network nor scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, Final

from app.evaluation.metrics import DICE_DEFINITION, HD95_DEFINITION
from app.evaluation.reliability import DEFINITION
from app.experiments.crossval.calibrate import Calibrated
from app.experiments.crossval.run import CrossValidation
from app.experiments.crossval.summary import Summary
from app.experiments.crossval.tune import MARGIN, OBJECTIVE, Tuning
from app.experiments.runs import backends_sentence
from app.html.bands import figures_html
from app.html.elements import document, note, number, section, table_html
from app.html.provenance import made_by
from app.html.scores import REGION_NAMES
from app.inference.calibration import LEVEL, OFFSET_ML, fewest_cases
from data.files import replacing
from data.labels import REGIONS

_WORST: Final = 10
_KEYS: Final = ("mean", *REGIONS, *(f"{region}_hd95_mm" for region in REGIONS))
_HEADS: Final = ("Mean", *REGIONS, *(f"{region} HD95" for region in REGIONS))


def write_crossval_page(outcome: CrossValidation, path: Path | None = None) -> None:
    """Write the page atomically.

    Args:
        outcome: result of the cross-validation.
        path: file to write, default ``outcome.page``; its folder is created if missing.

    Raises:
        OSError: the file cannot be written.
    """
    path = path or outcome.page
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(render_crossval(outcome), encoding="utf-8", errors="replace")


def render_crossval(outcome: CrossValidation) -> str:
    """Render the page as one HTML document; every external string is escaped."""
    raw, tuned, results = outcome.raw, outcome.tuned, outcome.results
    count = len(results)
    dice = raw.spread()["mean"]
    arms = {f"fold {fold}": [records] for fold, records in enumerate(outcome.metrics)}
    sections = [
        section("folds", "Folds", _folds_html(raw, results)),
        section("curves", "Learning curves", figures_html(arms)),
        section("tuning", "Post-processing", _tuning_html(raw, tuned, outcome.tuning)),
        section("calibration", "Calibration", _calibration_html(outcome.calibrated)),
        section("worst", "Worst cases", _worst_html(raw, tuned)),
    ]
    return document(
        title=f"Cross-validation, {count} folds",
        lead=(
            f"{len(raw.cases)} cases, each predicted by the one network of {count} that has not trained on it or any "
            f"other case of its patient: mean Dice {dice.mean:.3f}."
        ),
        facts=(
            ("Dice", DICE_DEFINITION),
            ("HD95", HD95_DEFINITION),
            ("predictions", backends_sentence(outcome.backends)),
            *made_by(outcome.content),
        ),
        sections=sections,
        styles=("page.css", "arms.css"),
    )


def _folds_html(raw: Summary, results: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for fold, result in enumerate(results):
        means = raw.fold_means(fold)
        cases = sum(its_fold == fold for its_fold in raw.fold_of.values())
        rows.append(
            [f"Fold {fold}", str(cases), *_cells(means), f"{result['best_step']:,}", f"{result['seconds']:,.0f}"]
        )
    spread = raw.spread()
    rows.append(["All", str(len(raw.cases)), *_cells({key: spread[key].mean for key in _KEYS}), "", ""])
    rows.append(["SD of cases", "", *_cells({key: spread[key].sd_cases for key in _KEYS}), "", ""])
    rows.append(["SD of folds", "", *_cells({key: spread[key].sd_folds for key in _KEYS}), "", ""])
    regions = ", ".join(f"{region} {name}" for region, name in REGION_NAMES.items())
    return table_html("folds", ["Fold", "Cases", *_HEADS, "Step", "Seconds"], rows) + note(
        f"Dice and HD95 (mm) of cases that the fold's network has not trained on, on each case's own grid; {regions}. "
        "Probabilities are cut at one half, without post-processing. The network is the one of the step with the best "
        "validation Dice of the fold, chosen on these same cases: with several validations in a run the numbers are "
        "a little too good."
    )


def _tuning_html(raw: Summary, tuned: Summary, tuning: Tuning) -> str:
    steps = [
        [escape(step.rule), f"{step.value:g}", f"{step.gain:+.4f}", f"{step.best_candidate_gain:+.4f}"]
        for step in tuning.steps
    ]
    nested = [
        [
            f"Fold {fold}",
            f"{gain:+.4f}",
            *(" / ".join(f"{value:g}" for value in values) for values in (rules.thresholds, rules.smallest_mm3)),
            f"{rules.least_enhancing_mm3:g}",
        ]
        for fold, (rules, gain) in enumerate(zip(tuning.nested, tuning.nested_gains, strict=True))
    ]
    before, after = raw.spread(), tuned.spread()
    scores = [
        [name, *_cells({key: spread[key].mean for key in _KEYS})]
        for name, spread in (("Without", before), ("With", after))
    ]
    return (
        f"<p>Chosen: {escape(tuning.chosen.sentence())}.</p>"
        f"<p>Gain on the cases it was chosen on: {tuning.after - tuning.before:+.4f}. Estimated gain on others: "
        f"{tuning.estimated_gain:+.4f} (chosen without the fold that is scored).</p>"
        + table_html("tuning", ["Rule", "Value", "Gain", "Best candidate"], steps)
        + note(
            f"Objective: {OBJECTIVE}. Rules are chosen one after the other on the out-of-fold probabilities; one is "
            f"kept where it gains {MARGIN:g} or more."
        )
        + "<h3>Chosen without a fold, scored on it</h3>"
        + table_html("tuning", ["Left out", "Gain", "Thresholds", "Smallest, mm3", "Least ET, mm3"], nested)
        + note("Thresholds and smallest components: WT / TC / ET.")
        + "<h3>Scores without and with it</h3>"
        + table_html("tuning", ["Post-processing", *_HEADS], scores)
        + note("The second row is of the cases that the rules were chosen on.")
    )


def _calibration_html(calibrated: Calibrated) -> str:
    probabilities, volumes = [], []
    for region, one in calibrated.regions.items():
        spread = f"{min(one.left_out):.2f} to {max(one.left_out):.2f}"
        numbers = [
            f"{getattr(one.before, name):.4f} / {getattr(one.after, name):.4f}"
            for name in ("ece", "case_ece", "brier", "nll")
        ]
        probabilities.append([region, f"{one.temperature:.2f}", f"{one.fitted:.2f}", spread, *numbers])
        bound, covered = one.log_ratio["postprocessed"], one.coverage
        volumes.append(
            [
                region,
                "none" if bound is None else f"{math.exp(bound):.2f}",
                "not known" if covered is None else f"{covered:.0%}",
            ]
        )
    heads = ["Region", "Temperature", "Fitted", "Without a fold", "ECE", "ECE, mean of cases", "Brier", "NLL"]
    least = fewest_cases(LEVEL)
    return (
        table_html("tuning", heads, probabilities)
        + note(
            "ECE, Brier score and negative log likelihood (NLL): before / after. Logits are divided by the temperature "
            "once masks are cut, so no mask changes. After: each fold's cases under the temperature fitted without "
            "them; the ensemble gets the one fitted on all where ECE and NLL both fall so, else 1. The temperatures "
            f"are of single networks; the mean of several is less sure by itself. ECE and Brier score: {DEFINITION}."
        )
        + f"<h3>Volumes with an interval of {LEVEL:.0%}</h3>"
        + table_html("tuning", ["Region", "Factor", "Covered"], volumes)
        + note(
            f"The true volume plus {OFFSET_ML:g} ml lies between the marked volume plus {OFFSET_ML:g} ml divided by "
            f"the factor and times the factor in {LEVEL:.0%} of cases or more, where new cases are like these "
            f"{calibrated.cases}. Covered: share of cases whose true volume lies in the interval of the other folds. "
            f"An interval needs {least} cases; to know what it covers, each fold needs {least} cases in the others."
        )
    )


def _worst_html(raw: Summary, tuned: Summary) -> str:
    rows = []
    for case_id in raw.worst(_WORST):
        scores = raw.cases[case_id]
        rows.append(
            [
                escape(case_id),
                str(raw.fold_of[case_id]),
                number(raw.dice_of(case_id)),
                number(tuned.dice_of(case_id)),
                *(number(scores[region].dice) for region in REGIONS),
                *(f"{scores[region].hd95_mm:.1f}" for region in REGIONS),
                *(f"{scores[region].volume_ml:.1f} / {scores[region].reference_volume_ml:.1f}" for region in REGIONS),
            ]
        )
    heads = ["Case", "Fold", "Mean", "With", *REGIONS, *(f"{r} HD95" for r in REGIONS), *(f"{r} ml" for r in REGIONS)]
    return table_html("worst", heads, rows) + note(
        "The lowest mean Dice without post-processing; With: mean Dice with it. Volumes: predicted / reference. "
        "Look at these cases first: at the images, at the label maps, at what data check says."
    )


def _cells(values: Mapping[str, float | None]) -> list[str]:
    return [
        f"{value:.1f}" if value is not None and key.endswith("_mm") else number(value)
        for key, value in ((key, values[key]) for key in _KEYS)
    ]
