"""``znormseg evaluate``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from data.datasets.source import DataSource

EXAMPLES = """\
znormseg evaluate PREDICTIONS REFERENCES
znormseg evaluate PREDICTIONS REFERENCES --resample --out scores.csv
znormseg evaluate PREDICTIONS REFERENCES --rules brats2023 --task GLI
znormseg evaluate RUN DATA --contrast-subsets"""

#: Headings of the help, with the options below each.
PANELS = {
    "Label maps": ("resample", "nsd_mm", "labels", "follow_links"),
    "Challenge rules": ("rules", "task"),
    "Missing contrasts": ("contrast_subsets", "cases", "device"),
    "Output": ("out", "as_json"),
}


def evaluate_command(
    *,
    predictions: Annotated[
        Path,
        typer.Argument(
            metavar="PREDICTIONS",
            help="Folder of label maps: <case>.nii.gz, <case>_seg, case folders. With --contrast-subsets: a run.",
        ),
    ],
    references: Annotated[
        Path,
        typer.Argument(
            metavar="REFERENCES",
            help="Folder of expert label maps, named in any of these ways. With --contrast-subsets: a data set.",
        ),
    ],
    resample: Annotated[
        bool, typer.Option("--resample", help="Resample predictions to the grids of their references.")
    ] = False,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels", metavar="NAME[,NAME]", help=f"{terminal.LABELS_HELP} Give two for PREDICTIONS and REFERENCES."
        ),
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside the folders.")
    ] = False,
    nsd_mm: Annotated[
        float | None,
        typer.Option("--nsd-mm", min=0, metavar="MM", help="Tolerance of the surface Dice (nsd).  [default: 1]"),
    ] = None,
    rules: Annotated[
        str | None,
        typer.Option(
            "--rules",
            metavar="YEAR",
            help="Score lesion by lesion, as in a challenge: brats2023, brats2024 or brats2026 (runs brats-evaluate).",
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="With --rules: GLI (default), PED, SSA, MEN, MET, MEN-RT; brats2026 has MEN-PRE and GOAT instead of "
            "SSA and MEN.",
        ),
    ] = None,
    contrast_subsets: Annotated[
        bool,
        typer.Option(
            "--contrast-subsets",
            help="Measure the mean Dice of a run on a data set, from every subset of the contrasts.",
        ),
    ] = False,
    cases: Annotated[
        str | None,
        typer.Option("--cases", help="With --contrast-subsets: unseen (not trained on; default), validation or all."),
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", help="With --contrast-subsets: auto (default), cpu, cuda or cuda:N.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the table to a CSV file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores as JSON on stdout.")] = False,
) -> None:
    """Score predictions against references: Dice, HD95 and more, by region and case.

    Also reports sensitivity, specificity, surface Dice and volumes. To measure what a run loses when contrasts are
    missing: znormseg evaluate RUN DATA --contrast-subsets
    """
    if task is not None and rules is None:
        raise typer.BadParameter("--task goes with --rules")
    chosen = {
        "--resample": resample,
        "--nsd-mm": nsd_mm is not None,
        "--cases": cases is not None,
        "--device": device is not None,
        "--contrast-subsets": contrast_subsets,
    }
    _require_company({option for option, given in chosen.items() if given}, officially=rules is not None)
    from data.datasets.source import DataSource

    if contrast_subsets:
        data = DataSource(references, labels=labels, follow_links=follow_links)
        _subsets(predictions, data, cases, device, out=out, as_json=as_json)
        return
    if nsd_mm is not None and not math.isfinite(nsd_mm):
        raise typer.BadParameter("--nsd-mm is a distance in mm")
    from app.evaluation.evaluate import evaluate as score
    from app.evaluation.evaluate import region_remarks, require_table_place, score_rows, write_score_table
    from app.evaluation.metrics import NSD_MM
    from app.notice import NOTICE

    of_predictions, of_references = terminal.conventions(labels)
    predicted = DataSource(predictions, labels=of_predictions, follow_links=follow_links)
    expected = DataSource(references, labels=of_references, follow_links=follow_links)
    if rules is not None:
        _official(predicted, expected, rules, task or "GLI", out=out, as_json=as_json)
        return
    if out is not None:
        require_table_place(out)
    with terminal.watched() as on_progress:
        scores = score(
            predicted,
            expected,
            resample=resample,
            nsd_mm=NSD_MM if nsd_mm is None else nsd_mm,
            on_case=terminal.by_case(on_progress, "scoring"),
        )
    if as_json:
        terminal.json_result(scores.to_json())
    else:
        terminal.result(terminal.table(score_rows(scores)))
        for sentence in region_remarks(scores):
            terminal.result(sentence)
        terminal.result(NOTICE)
    if out is not None:
        write_score_table(scores, out)
    if scores.made_by_us:
        terminal.say(
            f"znormseg predict wrote references: {_some(scores.made_by_us)}. Are PREDICTIONS and REFERENCES swapped?"
        )
    for case, text in scores.failures.items():
        terminal.say(f"znormseg: {case}: {text}")
    if scores.resampled:
        count = len(scores.resampled)
        what = "prediction was resampled to its" if count == 1 else "predictions were resampled to their"
        terminal.say(f"{count} {what} reference's grid: {_some(scores.resampled)}")
    _end(scores.failures, scores.missing_predictions, scores.missing_references)


def _require_company(given: set[str], *, officially: bool) -> None:
    """Reject combinations of options that make no sense.

    Raises:
        typer.BadParameter: two options cannot be combined, or one is missing.
    """
    apart = sorted(given & {"--resample", "--nsd-mm", "--contrast-subsets"})
    if officially and apart:
        raise typer.BadParameter(f"--rules does not go with {apart[0]}")
    if "--contrast-subsets" not in given:
        for option in sorted(given & {"--cases", "--device"}):
            raise typer.BadParameter(f"{option} goes with --contrast-subsets")
    elif "--resample" in given:
        raise typer.BadParameter("--resample goes with PREDICTIONS; predictions of --contrast-subsets lie on the grid")
    elif "--nsd-mm" in given:
        raise typer.BadParameter("--nsd-mm does not go with --contrast-subsets, which gives Dice")


def _official(
    predictions: DataSource,
    references: DataSource,
    year: str,
    task: str,
    *,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score by the rules of a challenge, for ``--rules``."""
    from app.evaluation.brats.challenge import (
        challenge_remarks,
        challenge_rows,
        challenge_rules,
        evaluate_by_rules,
        write_challenge_table,
    )
    from app.evaluation.evaluate import require_table_place
    from app.notice import NOTICE

    rules = challenge_rules(year, task)
    if out is not None:
        require_table_place(out)
    with terminal.watched() as on_progress:
        ready = terminal.by_case(on_progress, "scoring")
        scores = evaluate_by_rules(predictions, references, rules, on_case=ready)
    if as_json:
        terminal.json_result(scores.to_json())
    else:
        terminal.result(terminal.table(challenge_rows(scores)))
        for sentence in challenge_remarks(scores):
            terminal.result(sentence)
        terminal.result(NOTICE)
    if out is not None:
        write_challenge_table(scores, out)
    folders = scores.folders
    for case, text in scores.failures.items():
        terminal.say(f"znormseg: {case}: {text}")
    _end(scores.failures, folders.missing_predictions, folders.missing_references)


def _end(failures: Mapping[str, str], predictions: tuple[str, ...], references: tuple[str, ...]) -> None:
    """List the cases missing on one side; exit with code 6 if a case failed."""
    for what, ids in (("prediction", predictions), ("reference", references)):
        if ids:
            terminal.say(f"no {what} for {len(ids)} cases: {_some(ids)}")
    if failures:
        from app.errors import EXIT_SOME_FAILED

        raise typer.Exit(EXIT_SOME_FAILED)


def _subsets(
    run: Path,
    data: DataSource,
    which: str | None,
    device: str | None,
    *,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score a run on subsets of the contrasts, for ``--contrast-subsets``."""
    if which not in {None, "unseen", "validation", "all"}:
        raise typer.BadParameter(f"--cases takes unseen, validation or all, got {which!r}")
    from app.errors import EXIT_SOME_FAILED, ConfigError
    from app.evaluation.evaluate import require_table_place
    from app.inference.backends.choose import choose_backend
    from app.inference.ensemble import load_predictor
    from app.inference.subsets import (
        Which,
        choose_cases,
        convention_for,
        score_subsets,
        subset_rows,
        write_subset_table,
    )
    from app.notice import NOTICE
    from app.system.device import RuntimeConfig

    if out is not None:
        require_table_place(out)
    try:
        runtime = choose_backend("auto", RuntimeConfig(device=device or "auto"))
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from error
    with terminal.watched() as on_progress:
        model = load_predictor(run, runtime)
        cases = tuple(data.find_cases().values())
        chosen = choose_cases(run, cases, cast("Which", which or "unseen"))
        table = score_subsets(
            model,
            chosen,
            runtime,
            nan_to_zero=model.config.data.nan_to_zero,
            convention=convention_for(model, cases, labels=data.labels),
            on_progress=on_progress,
        )
    if as_json:
        terminal.json_result(table.to_json())
    else:
        terminal.result(terminal.table(subset_rows(table)))
        terminal.result(NOTICE)
    if out is not None:
        write_subset_table(table, out)
    for case, text in table.failures.items():
        terminal.say(f"znormseg: {case}: {text}")
    if table.failures:
        raise typer.Exit(EXIT_SOME_FAILED)


def _some(ids: tuple[str, ...]) -> str:
    """Join the first few case ids."""
    return ", ".join(ids[:5]) + (" ..." if len(ids) > 5 else "")
