"""The output of ``predict`` and ``evaluate`` for presence runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from app.cli import options, terminal

if TYPE_CHECKING:
    from app.experiments.crossval.presence import PresenceCrossValidation
    from app.system.device import RuntimeConfig
    from data.datasets.layouts import Case


def refuse_for_presence(run: Path, used: Mapping[str, object]) -> None:
    """Refuse options of ``predict`` that a presence run does not have; values are those given, by option."""
    for option, value in used.items():
        given = value is not None and value is not False
        options.refuse(given, f"{option} cannot be used with {run}, which is a presence run")


def show_presence(
    run: Path,
    cases: Sequence[Case],
    output: Path,
    *,
    source: Path | None,
    runtime: RuntimeConfig,
    nan_to_zero: bool,
    overwrite: bool,
) -> None:
    """Predict presence, and print a row for each case; ``source`` is the folder of the cases, if there is one."""
    from app import NOTICE
    from app.evaluation.folders import PREDICTIONS_FILE
    from app.inference.batch.output_folder import require_place_of_its_own
    from app.inference.batch.presence import predict_presence
    from app.inference.tumour_presence.model import load_presence
    from app.runs.training_record import training_record
    from app.system.device import choose_runtime

    if source is not None:
        require_place_of_its_own(output, run=run, source=source, cases=cases)
    with terminal.watched() as on_progress:
        chosen = choose_runtime(runtime)
        model = load_presence(run, chosen)
        outcome = predict_presence(
            model,
            cases,
            output,
            runtime=chosen,
            run=run,
            training=training_record(run),
            nan_to_zero=nan_to_zero,
            overwrite=overwrite,
            on_progress=on_progress,
        )
    rows = [["case", *model.outputs, "present"]]
    for case in outcome.cases:
        present = ", ".join(name for name in model.outputs if case["present"][name])
        rows.append([case["case"], *(f"{case['probability'][name]:.3f}" for name in model.outputs), present or "-"])
    tuned = all(decision.tuned for decision in model.decisions.values())
    how = "calibrated, with thresholds tuned out of fold" if tuned else "not calibrated; present from 0.5 on"
    lines = [terminal.table(rows), f"probabilities ({how}) in {output / PREDICTIONS_FILE}. {NOTICE}"]
    terminal.result(outcome.to_json(), *(lines if outcome.cases else []))
    terminal.name_failed(outcome.failures, done=len(outcome.cases))


def holds_presence(predictions: Path) -> bool:
    """Whether a folder holds the predictions of a presence run."""
    from app.evaluation.folders import PREDICTIONS_FILE

    return (predictions / PREDICTIONS_FILE).is_file()


def show_presence_scores(
    predictions: Path,
    references: Path,
    labels: str | None,
    *,
    follow_links: bool,
    specificity: float | None,
    out: Path | None,
    page: Path | None,
) -> None:
    """Score presence predictions, print the table, and write a CSV file and a page if requested."""
    from app import NOTICE
    from app.evaluation.presence import SPECIFICITY
    from app.evaluation.presence_scores import score_presence
    from app.reports.presence import write_presence_page
    from data.datasets.source import DataSource

    _, of_references = options.conventions(labels)
    expected = DataSource(references, labels=of_references, follow_links=follow_links)
    with terminal.watched():
        scores = score_presence(predictions, expected, specificity=SPECIFICITY if specificity is None else specificity)
    terminal.result(scores.to_json(), terminal.table(scores.rows()), *scores.remarks(), NOTICE)
    if out is not None:
        scores.write_table(out)
    if page is not None:
        write_presence_page(scores, page)
    for note in scores.notes():
        terminal.say(note)


def presence_lines(outcome: PresenceCrossValidation) -> list[str]:
    """Return what ``crossval`` prints about presence."""
    from app.inference.tumour_presence.gate import GATE_SENSITIVITY, GATED

    scores = outcome.scores
    lines = ["cases that a fold's network was not trained on", terminal.table(scores.rows()), *scores.remarks()]
    for name, one in outcome.fitted.items():
        if not one.decision.tuned:
            lines.append(f"{name}: {one.untuned_because}")
            continue
        lines.append(
            f"{name}: with thresholds tuned on the other folds, sensitivity {one.sensitivity:.3f} and specificity "
            f"{one.specificity:.3f}; Brier score {one.brier_before:.4f} -> {one.brier_after:.4f}"
        )
    of_gate = outcome.fitted.get(GATED)
    as_gate = of_gate is not None and (of_gate.gate_sensitivity or 0.0) >= GATE_SENSITIVITY
    use = f"RUN CASES OUTPUT --presence {outcome.ensemble}" if as_gate else f"{outcome.ensemble} CASES OUTPUT"
    if of_gate is not None and of_gate.gate_sensitivity is not None:
        lines.append(
            f"{GATED}: as a gate (predict --presence), with thresholds chosen on the other folds, it keeps "
            f"{of_gate.gate_sensitivity:.3f} of the cases with {GATED} and removes {of_gate.gate_specificity:.3f} of "
            "those without"
            + ("" if as_gate else f"; do not use it so, since a gate must keep {GATE_SENSITIVITY:g} or more")
        )
    return [*lines, f"the page with curves: {outcome.page}", f"next: znormseg predict {use}"]
