"""``znormseg evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, cast

import typer

from app.cli import terminal

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
    if contrast_subsets:
        _subsets(
            predictions, references, cases, device, labels=labels, follow_links=follow_links, out=out, as_json=as_json
        )
        return
    if nsd_mm is not None and not math.isfinite(nsd_mm):
        raise typer.BadParameter("--nsd-mm is a distance in mm")
    from app.evaluation.brats.challenge import challenge_rules, evaluate_by_rules
    from app.evaluation.evaluate import evaluate as score
    from app.evaluation.metrics import NSD_MM
    from app.evaluation.tables import FolderScores, require_table_place
    from app.notice import NOTICE

    conventions = terminal.conventions(labels)
    challenge = None if rules is None else challenge_rules(rules, task or "GLI")
    if out is not None:
        require_table_place(out)
    with terminal.watched() as on_progress:
        ready = terminal.by_case(on_progress, "scoring")
        scores: FolderScores
        if challenge is None:
            scores = score(
                predictions,
                references,
                resample=resample,
                nsd_mm=NSD_MM if nsd_mm is None else nsd_mm,
                labels=conventions,
                follow_links=follow_links,
                on_case=ready,
            )
        else:
            scores = evaluate_by_rules(
                predictions, references, challenge, labels=conventions, follow_links=follow_links, on_case=ready
            )
    if as_json:
        terminal.json_result(scores.to_json())
    else:
        terminal.result(terminal.table(scores.rows()))
        for sentence in (*scores.remarks(), NOTICE):
            terminal.result(sentence)
    if out is not None:
        scores.write_table(out)
    for sentence in scores.notes():
        terminal.say(sentence)
    if scores.failures:
        from app.errors import EXIT_SOME_FAILED

        raise typer.Exit(EXIT_SOME_FAILED)


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


def _subsets(
    run: Path,
    data: Path,
    which: str | None,
    device: str | None,
    *,
    labels: str | None,
    follow_links: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Score a run on subsets of the contrasts, for ``--contrast-subsets``."""
    if which not in {None, "unseen", "validation", "all"}:
        raise typer.BadParameter(f"--cases takes unseen, validation or all, got {which!r}")
    from app.errors import EXIT_SOME_FAILED, ConfigError
    from app.evaluation.tables import require_table_place
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
    from data.datasets.layouts import find_cases

    if out is not None:
        require_table_place(out)
    try:
        runtime = choose_backend("auto", RuntimeConfig(device=device or "auto"))
    except ValueError as error:
        raise ConfigError(f"--device: {error}") from error
    with terminal.watched() as on_progress:
        model = load_predictor(run, runtime)
        cases = find_cases(data, follow_links=follow_links)
        chosen = choose_cases(run, cases, cast("Which", which or "unseen"))
        table = score_subsets(
            model,
            chosen,
            runtime,
            nan_to_zero=model.config.data.nan_to_zero,
            convention=convention_for(model, cases, labels=labels),
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
