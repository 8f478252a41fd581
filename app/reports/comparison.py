"""The page of a comparison: one self-contained HTML file that needs neither network nor scripts."""

from __future__ import annotations

from html import escape
from pathlib import Path
from statistics import fmean

from app.evaluation.metrics import DICE_DEFINITION
from app.experiments.comparison.analysis import MEASURES, Analysis, ArmSummary, final_keys, scored_by
from app.experiments.comparison.compare import Comparison
from app.experiments.comparison.run import Results
from app.experiments.runs import backends_sentence
from app.html.bands import figures_html
from app.html.elements import DASH, document, made_by, note, number, section, table_html, write_html
from app.html.scores import REGIONS_IN_WORDS


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
    curves = "".join(
        f"<h3>{optimizer}</h3>"
        + figures_html(
            {arm: [metrics[key] for key in final_keys(results, optimizer, arm)] for arm in plan.arms},
            target_dice=analysis.target_dice,
        )
        for optimizer in plan.optimizers
    )
    sections = [
        section("verdict", "Verdict", _verdict_html(analysis)),
        section("dice", "Final Dice", _dice_html(results, analysis)),
        section("differences", f"Differences from {plan.baseline}", _differences_html(analysis)),
        section("curves", "Learning curves", curves),
        section("steps", f"Steps to a validation Dice of {analysis.target_dice:.3f}", _steps_html(results, analysis)),
        section("sweep", "Learning rates", _sweep_html(results, analysis)),
        section("seconds", "Seconds", _seconds_html(analysis)),
    ]
    lead = (
        f"{len(results.runs)} runs of {plan.config.training.steps} steps: the same cases, and for each seed the same "
        "initial weights and batches in every arm; every arm had as many learning rates to choose from."
    )
    return document(
        title=f"{', '.join(plan.arms)}: a comparison",
        lead=lead,
        facts=[*_facts(results, analysis), *made_by(outcome.content)],
        sections=sections,
        styles=("page.css", "arms.css"),
    )


def _facts(results: Results, analysis: Analysis) -> list[tuple[str, str]]:
    plan, parts = results.plan, results.parts
    return [
        ("optimizers", ", ".join(plan.optimizers)),
        ("seeds", f"{plan.seeds}, from {plan.first_seed}"),
        ("cases", f"{len(parts.train)} train, {len(parts.validation)} validate, {len(parts.test)} test"),
        *((name, "; ".join(plan.settings_of(name))) for name in plan.variants),
        ("same start in every arm", "on record (SHA-256)" if analysis.same_start else "not on record for every run"),
        ("Dice", DICE_DEFINITION),
        ("predictions", backends_sentence(scored_by(results))),
    ]


def _verdict_html(analysis: Analysis) -> str:
    verdicts = "".join(f"<li>{escape(sentence)}</li>" for sentence in analysis.verdicts())
    limits = "".join(f"<li>{escape(sentence)}</li>" for sentence in analysis.caveats)
    return f'<ul class="verdicts">{verdicts}</ul>' + (
        f'<p class="note">What limits this:</p><ul class="note">{limits}</ul>' if limits else ""
    )


def _dice_html(results: Results, analysis: Analysis) -> str:
    heads = ["Arm", "Rate", "Mean", "95 % interval", "SD of seeds", *MEASURES[1:]]
    rows = [
        [
            _name(arm),
            f"{arm.rate:g}",
            f"{arm.dice['mean']:.3f}",
            f"{arm.low:.3f} to {arm.high:.3f}",
            number(arm.between_seeds),
            *(f"{arm.dice[region]:.3f}" for region in MEASURES[1:]),
        ]
        for arm in analysis.arms
    ]
    scored = len(results.parts.scored)
    part = "test cases, on which nothing was chosen" if analysis.tested else "validation cases; there is no third part"
    return table_html("dice", heads, rows) + note(
        f"Dice of {scored} {part}, by the weights that were best on validation, on each case's own grid; mean over "
        f"regions ({REGIONS_IN_WORDS}), seeds and cases. Interval: bootstrap over seeds and cases; it includes the "
        "differences between cases, which the paired differences below do not."
    )


def _differences_html(analysis: Analysis) -> str:
    heads = ["Arm", "Measure", "Difference", "95 % interval", "p", "p, Holm"]
    rows = [
        [
            _name(arm),
            measure,
            f"{difference.mean:+.3f}",
            f"{difference.low:+.3f} to {difference.high:+.3f}",
            number(difference.p),
            number(difference.p_holm),
        ]
        for arm in analysis.arms
        for measure, difference in arm.differences.items()
    ]
    why = sorted({d.no_test for arm in analysis.arms for d in arm.differences.values() if d.no_test})
    missing = f" {DASH}: {escape('; '.join(why))}." if why else ""
    return table_html("differences", heads, rows) + (
        '<p class="note">Positive: the arm has the higher Dice. Pairs of one seed and one case; interval: percentile '
        "bootstrap, seeds and cases drawn each with replacement, 10,000 times. p: Wilcoxon signed-rank test over cases "
        f"after the mean over seeds; Holm's correction over the arms of one optimizer.{missing}</p>"
    )


def _steps_html(results: Results, analysis: Analysis) -> str:
    seeds = range(results.plan.seeds)
    heads = ["Arm", *(f"Seed {seed}" for seed in seeds), "Reached", "Mean"]
    rows = []
    for arm in analysis.arms:
        reached = [step for step in arm.steps_to_target if step is not None]
        rows.append(
            [
                _name(arm),
                *(DASH if step is None else f"{step:,}" for step in arm.steps_to_target),
                f"{len(reached)} of {len(arm.steps_to_target)}",
                f"{fmean(reached):,.0f}" if len(reached) == len(seeds) else DASH,
            ]
        )
    how = "the one given" if results.plan.target_dice else "90 % of the best arm's last mean"
    return table_html("steps", heads, rows) + note(
        f"First validation whose mean Dice is at or above the target ({how}). There are "
        f"{results.plan.config.training.validations} validations in a run; between them nothing is seen. "
        "A mean stands there where every seed reached the target."
    )


def _sweep_html(results: Results, analysis: Analysis) -> str:
    parts = []
    for optimizer, arms in analysis.sweep.items():
        rates = results.plan.rates[optimizer]
        rows = [
            [arm, *(_chosen(dice[rate], rate == results.chosen[optimizer, arm]) for rate in rates)]
            for arm, dice in arms.items()
        ]
        parts.append(f"<h3>{optimizer}</h3>" + table_html("sweep", ["Arm", *(f"{rate:g}" for rate in rates)], rows))
    return "".join(parts) + note(
        "Best mean validation Dice of the first seed by peak learning rate; ▲ was chosen, of equals the lowest. The "
        "other seeds ran at that rate alone."
    )


def _seconds_html(analysis: Analysis) -> str:
    heads = ["Arm", "Seconds a run", "Milliseconds a step", "Steps skipped"]
    rows = [
        [
            _name(arm),
            f"{arm.seconds:.1f}",
            DASH if arm.seconds_per_step is None else f"{1000 * arm.seconds_per_step:.0f}",
            str(arm.skipped_steps),
        ]
        for arm in analysis.arms
    ]
    return table_html("seconds", heads, rows) + note(
        "A run: mean over seeds, preparation and validation included. A step: median over all steps of all seeds. "
        "Other work on the machine slows arms down as it comes. A step is skipped when a gradient is not finite."
    )


def _name(arm: ArmSummary) -> str:
    return f"{arm.arm} <small>{arm.optimizer}</small>"


def _chosen(dice: float, chosen: bool) -> str:
    return f'<span class="best" role="img" aria-label="chosen">▲</span>{dice:.3f}' if chosen else f"{dice:.3f}"
