"""The page of a run: scores of its validation cases, curves, gradients, config and provenance."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from app.errors import RunError
from app.evaluation.metrics import DICE_DEFINITION
from app.html.curves import curves_html, gradients_html
from app.html.distribution import distribution_svg
from app.html.elements import Row, document, listed, number, write_html
from app.html.records import MEASURE_NAMES, Records, mapping, measure_in, number_or_none, outputs_in
from app.html.scores import REGIONS_IN_WORDS
from app.html.templates import fill
from app.runs.folder import read_json, read_metrics
from data.filesystem import why

_BRIER: Final = "Brier score: mean squared difference of probability and truth"


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
        raise RunError(f"{run}: run.json or split.json is damaged: it contains no JSON object.")
    try:
        config = (run / "config.yaml").read_text(encoding="utf-8")
        records = read_metrics(run)
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{run}: missing or damaged ({why(error)}). Is it a run folder?") from error
    best = best_validation(records)
    measure = measure_in(records)
    outputs = outputs_in(records, measure)
    name = MEASURE_NAMES[measure]
    cases = {} if best is None else _by_case(best, outputs)
    body = fill(
        "run.html",
        validated=best is not None,
        rows=_worst_first(cases, outputs),
        chart=distribution_svg(
            {output: [cases[case][output] for case in cases] for output in outputs}, name=name, outputs=outputs
        ),
        measure=name,
        regions=outputs,
        regions_in_words=REGIONS_IN_WORDS if measure == "dice" else ", ".join(outputs),
        step=f"{best['step']:,}" if best else "",
        definition=f"Dice at the spacing of the network; {DICE_DEFINITION}" if measure == "dice" else _BRIER,
        curves=curves_html(records),
        gradients=gradients_html(records),
        config=config,
        command=_command(run, facts),
    )
    return document(
        title=f"Run {run.resolve().name}",
        lead=_lead(records, best, measure),
        facts=_facts(run, facts, split, records),
        body=body,
        styles=("page.css", "report.css"),
    )


def best_validation(records: Records) -> Mapping[str, Any] | None:
    """Return the validation with the best mean score (the first in a tie), whose weights ``predict`` uses, or None.

    Example:
        >>> best_validation([{"kind": "validation", "step": 5, "mean_dice": 0.4}])["step"]
        5
    """
    mean = f"mean_{measure_in(records)}"
    scored = [r for r in records if r.get("kind") == "validation" and number_or_none(r.get(mean)) is not None]
    return max(scored, key=lambda record: float(record[mean]), default=None)


def _worst_first(cases: Mapping[str, Mapping[str, float]], outputs: Sequence[str]) -> list[Row]:
    mean = {case: fmean(scores.values()) for case, scores in cases.items()}
    return [
        [case, number(mean[case]), *(number(cases[case][output]) for output in outputs)]
        for case in sorted(cases, key=lambda case: (mean[case], case))
    ]


def _by_case(best: Mapping[str, Any], outputs: Sequence[str]) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for case, scores in mapping(best.get("cases")).items():
        values = {output: number_or_none(scores.get(output)) for output in outputs}
        scored = {output: value for output, value in values.items() if value is not None}
        if len(scored) == len(outputs):
            found[case] = scored
    return found


def _lead(records: Records, best: Mapping[str, Any] | None, measure: str) -> str:
    steps = max((int(record["step"]) for record in records if record.get("kind") == "train"), default=0)
    lead = f"{steps:,} optimiser steps."
    if best is None:
        return lead
    scores = ", ".join(f"{name} {value:.3f}" for name, value in best.get(measure, {}).items() if value is not None)
    mean = f"mean {MEASURE_NAMES[measure]} {best[f'mean_{measure}']:.3f}"
    return f"{lead} Best validation at step {best['step']:,}: {mean} ({scores})."


def _facts(run: Path, facts: Mapping[str, Any], split: Mapping[str, Any], records: Records) -> list[tuple[str, str]]:
    """Return the provenance of the run, as pairs of name and value."""
    seconds = [s for s in (number_or_none(record.get("seconds")) for record in records) if s is not None]
    spacing = facts.get("spacing_mm")
    weights = sorted(run.glob("checkpoints/best-*.json")) or sorted(run.glob("checkpoints/last-*.json"))
    candidates = [
        ("cases", f"{len(split.get('train', ()))} for training, {len(split.get('validation', ()))} for validation"),
        ("data", ", ".join(_places(facts))),
        ("labels", facts.get("labels")),
        ("spacing, mm", " x ".join(f"{mm:g}" for mm in spacing) if isinstance(spacing, list) else None),
        ("seconds", f"{max(seconds):,.0f}" if seconds else None),
        ("machine", facts.get("machine")),
        ("runtime", "; ".join(map(str, facts.get("runtime") or ()))),
        ("versions", listed(facts.get("versions"))),
        ("weights, SHA-256", _sha256_in(weights)),
        ("label maps, SHA-256", _sha256_in([*run.glob("labels.json")])),
    ]
    return [(name, str(value)) for name, value in candidates if value]


def _places(facts: Mapping[str, Any]) -> list[str]:
    """Return the data sets of the run, as arguments of a command; empty if it does not record them."""
    data = facts.get("data")
    return [str(one) for one in data] if isinstance(data, list) else [str(data)] if data is not None else []


def _sha256_in(paths: Sequence[Path]) -> str:
    """Return the SHA-256 recorded in the last of these JSON files; empty if there is none."""
    return str(mapping(read_json(paths[-1])).get("sha256", "")) if paths else ""


def _command(run: Path, facts: Mapping[str, Any]) -> str:
    fold = facts.get("fold")
    part = ["--split", str(run / "split.json")] if fold is None else ["--fold", str(fold)]
    data = _places(facts) or ["DATA"]
    words = ["znormseg", "train", *data, "NEW_RUN", "--config", str(run / "config.yaml")]
    return shlex.join([*words, *part])
