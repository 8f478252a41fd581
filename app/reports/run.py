"""The page of a run: scores of its validation cases, curves, gradients, config and provenance."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from app.errors import RunError
from app.evaluation.metrics import DICE_DEFINITION
from app.html.curves import curves_html, gradients_html
from app.html.distribution import distribution_svg
from app.html.elements import document, listed, note, number, section, table_html, write_html
from app.html.records import Records, mapping, number_or_none
from app.html.scores import REGIONS_IN_WORDS
from app.html.templates import fill
from app.runs.folder import read_json, read_metrics
from data.filesystem import why
from data.labels import REGIONS, Region


def write_run(run: Path, page: Path) -> None:
    """Write the page of a run atomically; the run may still be in progress.

    Args:
        run: run folder, as written by ``train``.
        page: file to write; its folder is created if missing.

    Raises:
        RunError: a file of the run is missing or damaged.
        OSError: ``page`` cannot be written.
    """
    write_html(page, render_run(run))


def render_run(run: Path) -> str:
    """Render the page of a run as one HTML document.

    Raises:
        RunError: a file of the run is missing or damaged.
    """
    facts = read_json(run / "run.json")
    split = read_json(run / "split.json")
    if not isinstance(facts, dict) or not isinstance(split, dict):
        raise RunError(f"{run}: run.json or split.json is damaged, it holds no JSON object.")
    try:
        config = (run / "config.yaml").read_text(encoding="utf-8")
        records = read_metrics(run)
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{run}: missing or damaged ({why(error)}). Is it a run folder?") from error
    best = best_validation(records)
    gradients = gradients_html(records)
    sections = [
        section("scores", "Validation cases", _scores_html(best)),
        section("curves", "Learning curves", curves_html(records)),
        section("gradients", "Gradients", gradients) if gradients else "",
        fill("run.html", config=config, command=_command(run, facts)),
    ]
    return document(
        title=f"Run {run.resolve().name}",
        lead=_lead(records, best),
        facts=_facts(run, facts, split, records),
        sections=sections,
        styles=("page.css", "report.css"),
    )


def best_validation(records: Records) -> Mapping[str, Any] | None:
    """Return the validation with the best mean Dice (the first in a tie), whose weights ``predict`` uses, or None.

    Example:
        >>> best_validation([{"kind": "validation", "step": 5, "mean_dice": 0.4}])["step"]
        5
    """
    scored = [r for r in records if r.get("kind") == "validation" and number_or_none(r.get("mean_dice")) is not None]
    return max(scored, key=lambda record: float(record["mean_dice"]), default=None)


def _scores_html(best: Mapping[str, Any] | None) -> str:
    if best is None:
        return '<p class="empty">No validation was recorded.</p>'
    cases = _by_case(best)
    if not cases:
        return (
            '<p class="empty">Dice by case was not recorded: the run is of an older version. Predict its validation '
            "cases and score them: znormseg predict, znormseg evaluate.</p>"
        )
    worst_first = sorted(cases, key=lambda case: (fmean(cases[case].values()), case))
    rows = [
        [escape(case), number(fmean(cases[case].values())), *(number(cases[case][region]) for region in REGIONS)]
        for case in worst_first
    ]
    chart = distribution_svg({region: [cases[case][region] for case in cases] for region in REGIONS}, name="Dice")
    return (
        f'<figure class="chart alone">{chart}<figcaption>Dice of each validation case by region: '
        f"{REGIONS_IN_WORDS}. Box: quartiles and median.</figcaption></figure>"
        "<h3>Worst cases first</h3>"
        + table_html("scores", ["Case", "Mean", *REGIONS], rows)
        + note(
            f"At step {best['step']:,}, the one with the best mean. Dice at the spacing the network works at; "
            f"{DICE_DEFINITION}. The step was chosen on these same cases, so the numbers are a little too good."
        )
    )


def _by_case(best: Mapping[str, Any]) -> dict[str, dict[Region, float]]:
    found: dict[str, dict[Region, float]] = {}
    for case, scores in mapping(best.get("cases")).items():
        values = {region: number_or_none(scores.get(region)) for region in REGIONS}
        known = {region: value for region, value in values.items() if value is not None}
        if len(known) == len(REGIONS):
            found[case] = known
    return found


def _lead(records: Records, best: Mapping[str, Any] | None) -> str:
    steps = max((int(record["step"]) for record in records if record.get("kind") == "train"), default=0)
    lead = f"{steps:,} optimiser steps."
    if best is None:
        return lead
    dice = ", ".join(f"{region} {value:.3f}" for region, value in best.get("dice", {}).items() if value is not None)
    return f"{lead} Best validation at step {best['step']:,}: mean Dice {best['mean_dice']:.3f} ({dice})."


def _facts(run: Path, facts: Mapping[str, Any], split: Mapping[str, Any], records: Records) -> list[tuple[str, str]]:
    """Return the provenance of the run, as pairs of name and value."""
    seconds = [s for s in (number_or_none(record.get("seconds")) for record in records) if s is not None]
    spacing = facts.get("spacing_mm")
    weights = sorted(run.glob("checkpoints/best-*.json")) or sorted(run.glob("checkpoints/last-*.json"))
    known = [
        ("cases", f"{len(split.get('train', ()))} train, {len(split.get('validation', ()))} validate"),
        ("data", facts.get("data")),
        ("labels", facts.get("labels")),
        ("spacing, mm", " x ".join(f"{mm:g}" for mm in spacing) if isinstance(spacing, list) else None),
        ("seconds", f"{max(seconds):,.0f}" if seconds else None),
        ("machine", facts.get("machine")),
        ("runtime", "; ".join(map(str, facts.get("runtime") or ()))),
        ("versions", listed(facts.get("versions"))),
        ("weights, SHA-256", _sha256_in(weights)),
        ("label maps, SHA-256", _sha256_in([*run.glob("labels.json")])),
    ]
    return [(name, str(value)) for name, value in known if value]


def _sha256_in(paths: Sequence[Path]) -> str:
    """Return the SHA-256 that the last of these JSON files states; empty if it states none."""
    return str(mapping(read_json(paths[-1])).get("sha256", "")) if paths else ""


def _command(run: Path, facts: Mapping[str, Any]) -> str:
    fold = facts.get("fold")
    part = ["--split", str(run / "split.json")] if fold is None else ["--fold", str(fold)]
    words = ["znormseg", "train", str(facts.get("data", "DATA")), "NEW_RUN", "--config", str(run / "config.yaml")]
    return shlex.join([*words, *part])
