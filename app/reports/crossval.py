"""The page of a cross-validation: one self-contained HTML file that needs neither network nor scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from app.evaluation.metrics import DICE_DEFINITION, HD95_DEFINITION
from app.evaluation.reliability import DEFINITION
from app.experiments.crossval.calibrate import RegionCalibration
from app.experiments.crossval.run import CrossValidation
from app.experiments.crossval.summary import Summary
from app.experiments.crossval.tune import MARGIN, OBJECTIVE, Tuning
from app.experiments.runs import backends_sentence
from app.html.bands import figures_html
from app.html.elements import Row, document, made_by, number, write_html
from app.html.scores import REGIONS_IN_WORDS
from app.html.templates import fill
from app.inference.calibration import LEVEL, OFFSET_ML, fewest_cases
from data.labels import REGIONS, Region

_WORST: Final = 10
_KEYS: Final = ("mean", *REGIONS, *(f"{region}_hd95_mm" for region in REGIONS))
_HEADS: Final = ["Mean", *REGIONS, *(f"{region} HD95" for region in REGIONS)]


def write_crossval_page(outcome: CrossValidation, path: Path | None = None) -> None:
    """Write the page atomically.

    Args:
        outcome: result of the cross-validation.
        path: file to write, default ``outcome.page``; its folder is created if missing.

    Raises:
        OSError: the file cannot be written.
    """
    write_html(path or outcome.page, render_crossval(outcome))


def render_crossval(outcome: CrossValidation) -> str:
    """Render the page as one HTML document; every external string is escaped."""
    raw, tuned, results = outcome.raw, outcome.tuned, outcome.results
    count = len(results)
    dice = raw.spread()["mean"]
    arms = {f"fold {fold}": [records] for fold, records in enumerate(outcome.metrics)}
    tuning, calibrated = outcome.tuning, outcome.calibrated
    body = fill(
        "crossval.html",
        heads=_HEADS,
        folds=_fold_rows(raw, results),
        regions_in_words=REGIONS_IN_WORDS,
        curves=figures_html(arms),
        tuning=tuning,
        objective=OBJECTIVE,
        margin=f"{MARGIN:g}",
        rules=[
            [step.rule, f"{step.value:g}", f"{step.gain:+.4f}", f"{step.best_candidate_gain:+.4f}"]
            for step in tuning.steps
        ],
        nested=_nested_rows(tuning),
        with_and_without=[["Without", *_means(raw)], ["With", *_means(tuned)]],
        probabilities=[_probabilities_row(region, one) for region, one in calibrated.regions.items()],
        definition=DEFINITION,
        level=f"{LEVEL:.0%}",
        volumes=[_volumes_row(region, one) for region, one in calibrated.regions.items()],
        offset_ml=f"{OFFSET_ML:g}",
        calibrated_cases=calibrated.cases,
        fewest=fewest_cases(LEVEL),
        worst_heads=[
            *("Case", "Fold", "Mean", "With", *REGIONS),
            *(f"{region} {unit}" for unit in ("HD95", "ml") for region in REGIONS),
        ],
        worst=[_worst_row(case_id, raw, tuned) for case_id in raw.worst(_WORST)],
    )
    return document(
        title=f"Cross-validation, {count} folds",
        lead=(
            f"{len(raw.cases)} cases, each predicted by the one network of {count} that was not trained on it or any "
            f"other case of its patient: mean Dice {dice.mean:.3f}."
        ),
        facts=(
            ("Dice", DICE_DEFINITION),
            ("HD95", HD95_DEFINITION),
            ("predictions", backends_sentence(outcome.backends)),
            *made_by(outcome.content),
        ),
        body=body,
        styles=("page.css", "arms.css"),
    )


def _fold_rows(raw: Summary, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for fold, result in enumerate(results):
        cases = sum(its_fold == fold for its_fold in raw.fold_of.values())
        ends = [f"{result['best_step']:,}", f"{result['seconds']:,.0f}"]
        rows.append([f"Fold {fold}", str(cases), *_cells(raw.fold_means(fold)), *ends])
    spread = raw.spread()
    rows.append(["All", str(len(raw.cases)), *_means(raw), "", ""])
    rows.append(["SD of cases", "", *_cells({key: spread[key].sd_cases for key in _KEYS}), "", ""])
    rows.append(["SD of folds", "", *_cells({key: spread[key].sd_folds for key in _KEYS}), "", ""])
    return rows


def _nested_rows(tuning: Tuning) -> list[Row]:
    return [
        [
            f"Fold {fold}",
            f"{gain:+.4f}",
            *(" / ".join(f"{value:g}" for value in values) for values in (rules.thresholds, rules.smallest_mm3)),
            f"{rules.smallest_share:g}",
            "yes" if rules.fill_core else "no",
            f"{rules.least_enhancing_mm3:g}",
        ]
        for fold, (rules, gain) in enumerate(zip(tuning.nested, tuning.nested_gains, strict=True))
    ]


def _probabilities_row(region: Region, one: RegionCalibration) -> Row:
    left_out = f"{min(one.left_out):.2f} to {max(one.left_out):.2f}"
    numbers = [
        f"{getattr(one.before, name):.4f} / {getattr(one.after, name):.4f}"
        for name in ("ece", "case_ece", "brier", "nll")
    ]
    return [region, f"{one.temperature:.2f}", f"{one.fitted:.2f}", left_out, *numbers]


def _volumes_row(region: Region, one: RegionCalibration) -> Row:
    bound, covered = one.log_ratio["postprocessed"], one.coverage
    factor = "none" if bound is None else f"{math.exp(bound):.2f}"
    return [region, factor, "unknown" if covered is None else f"{covered:.0%}"]


def _worst_row(case_id: str, raw: Summary, tuned: Summary) -> Row:
    scores = raw.cases[case_id]
    return [
        case_id,
        str(raw.fold_of[case_id]),
        number(raw.dice_of(case_id)),
        number(tuned.dice_of(case_id)),
        *(number(scores[region].dice) for region in REGIONS),
        *(f"{scores[region].hd95_mm:.1f}" for region in REGIONS),
        *(f"{scores[region].volume_ml:.1f} / {scores[region].reference_volume_ml:.1f}" for region in REGIONS),
    ]


def _means(summary: Summary) -> list[str | None]:
    spread = summary.spread()
    return _cells({key: spread[key].mean for key in _KEYS})


def _cells(values: Mapping[str, float | None]) -> list[str | None]:
    return [
        f"{value:.1f}" if value is not None and key.endswith("_mm") else number(value)
        for key, value in ((key, values[key]) for key in _KEYS)
    ]
