"""The page of a comparison: one self-contained HTML file that needs neither network nor scripts."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from markupsafe import Markup

from app.evaluation.metrics import DICE_DEFINITION
from app.evaluation.presence import BRIER_DEFINITION
from app.experiments.comparison.analysis import Analysis, ArmSummary, final_keys, scored_by
from app.experiments.comparison.compare import Comparison
from app.experiments.comparison.run import Results
from app.experiments.runs import backends_sentence
from app.html.bands import figures_html
from app.html.elements import Row, document, made_by, number, write_html
from app.html.scores import REGIONS_IN_WORDS
from app.html.templates import fill


def write_comparison_page(outcome: Comparison, path: Path | None = None) -> None:
    """Write the page atomically.

    Args:
        outcome: result of the comparison.
        path: file to write, default ``outcome.page``; its folder is created if missing.

    Raises:
        OSError: the file cannot be written.
    """
    write_html(path or outcome.page, render_comparison(outcome))


def render_comparison(outcome: Comparison) -> str:
    """Render the page as one HTML document; every external string is escaped."""
    results, analysis, metrics = outcome.results, outcome.analysis, outcome.metrics
    plan = results.plan
    is_presence = plan.config.task.name == "presence"
    curves = {
        optimizer: figures_html(
            {arm: [metrics[key] for key in final_keys(results, optimizer, arm)] for arm in plan.arms},
            target_dice=analysis.target_dice,
        )
        for optimizer in plan.optimizers
    }
    body = fill(
        "comparison.html",
        verdicts=analysis.verdicts(),
        limits=analysis.caveats,
        measure=plan.config.measure.in_words,
        regions=list(plan.config.outputs),
        regions_in_words=", ".join(plan.config.outputs) if is_presence else REGIONS_IN_WORDS,
        dice=[_dice_row(arm) for arm in analysis.arms],
        scored=len(results.parts.scored),
        tested=analysis.tested,
        baseline=plan.baseline,
        differences=[row for arm in analysis.arms for row in _difference_rows(arm)],
        no_tests=sorted({d.no_test for arm in analysis.arms for d in arm.differences.values() if d.no_test}),
        curves=curves,
        target_dice=analysis.target_dice,
        target_given=bool(plan.target_dice),
        validations=plan.config.training.validations,
        seeds=[f"Seed {seed}" for seed in range(plan.seeds)],
        steps=[_steps_row(arm) for arm in analysis.arms],
        sweep=[_sweep(optimizer, results, analysis) for optimizer in analysis.sweep],
        seconds=[_seconds_row(arm) for arm in analysis.arms],
    )
    lead = (
        f"{len(results.runs)} runs of {plan.config.training.steps} steps: all arms have the same cases, the same "
        "initial weights and batches for each seed, and the same number of learning rates to choose from."
    )
    return document(
        title=f"{', '.join(plan.arms)}: a comparison",
        lead=lead,
        facts=[*_facts(results, analysis), *made_by(outcome.content)],
        body=body,
        styles=("page.css", "arms.css"),
    )


def _facts(results: Results, analysis: Analysis) -> list[tuple[str, str]]:
    plan, parts = results.plan, results.parts
    measure = plan.config.measure
    return [
        ("optimizers", ", ".join(plan.optimizers)),
        ("seeds", f"{plan.seeds}, from {plan.first_seed}"),
        (
            "cases",
            f"{len(parts.train)} for training, {len(parts.validation)} for validation, {len(parts.test)} for test",
        ),
        *((name, "; ".join(plan.settings_of(name))) for name in plan.variants),
        ("same start in every arm", "recorded (SHA-256)" if analysis.same_start else "not recorded for every run"),
        (measure.in_words, DICE_DEFINITION if measure.key == "dice" else BRIER_DEFINITION),
        ("predictions", backends_sentence(scored_by(results))),
    ]


def _dice_row(arm: ArmSummary) -> Row:
    return [
        _name(arm),
        f"{arm.rate:g}",
        f"{arm.dice['mean']:.3f}",
        f"{arm.low:.3f} to {arm.high:.3f}",
        number(arm.between_seeds),
        *(f"{value:.3f}" for name, value in arm.dice.items() if name != "mean"),
    ]


def _difference_rows(arm: ArmSummary) -> list[Row]:
    return [
        [
            _name(arm),
            measure,
            f"{difference.mean:+.3f}",
            f"{difference.low:+.3f} to {difference.high:+.3f}",
            number(difference.p),
            number(difference.p_holm),
        ]
        for measure, difference in arm.differences.items()
    ]


def _steps_row(arm: ArmSummary) -> Row:
    reached = [step for step in arm.steps_to_target if step is not None]
    count = len(arm.steps_to_target)
    return [
        _name(arm),
        *(None if step is None else f"{step:,}" for step in arm.steps_to_target),
        f"{len(reached)} of {count}",
        f"{fmean(reached):,.0f}" if len(reached) == count else None,
    ]


def _sweep(optimizer: str, results: Results, analysis: Analysis) -> tuple[str, list[str], list[Row]]:
    """Return an optimiser, its rates, and a row per arm with the Dice at each rate."""
    rates = results.plan.rates[optimizer]
    rows: list[Row] = [
        [arm, *(_marked(f"{dice[rate]:.3f}", chosen=rate == results.chosen[optimizer, arm]) for rate in rates)]
        for arm, dice in analysis.sweep[optimizer].items()
    ]
    return optimizer, [f"{rate:g}" for rate in rates], rows


def _seconds_row(arm: ArmSummary) -> Row:
    step_ms = None if arm.seconds_per_step is None else f"{1000 * arm.seconds_per_step:.0f}"
    return [_name(arm), f"{arm.seconds:.1f}", step_ms, str(arm.skipped_steps)]


def _name(arm: ArmSummary) -> Markup:
    return Markup("{} <small>{}</small>").format(arm.arm, arm.optimizer)


def _marked(dice: str, *, chosen: bool) -> str:
    return Markup('<span class="best" role="img" aria-label="chosen">▲</span>') + dice if chosen else dice
