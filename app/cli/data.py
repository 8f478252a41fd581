"""``znormseg data``: check and export data sets, make phantoms; the other subcommands are in separate modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import cache, dicom, options, prepare, terminal
from app.cli.verbs import verb

app = typer.Typer(
    help="Check, prepare and export data sets, convert DICOM, make phantoms, manage the cache.", no_args_is_help=True
)
verb(app, "prepare")(prepare.prepare_command)
verb(app, "cache")(cache.cache)


@verb(app, "check")
def check_command(
    *,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Case folder, folder of cases (BraTS of any year, UCSF-PDGM), flat folder, MSD or nnU-Net raw data "
            "set, or manifest (.csv: case, t1, t1c, t2, flair, seg).",
        ),
    ],
    labels: options.Labels = None,
    follow_links: options.FollowLinks = False,
) -> None:
    """Report what a data set contains and what is wrong with it, case by case.

    If there are problems, the exit code is 3. Notes are only informative.
    """
    from app.errors import EXIT_DATA
    from data.datasets.source import DataSource
    from data.quality.check import check

    data = DataSource(folder, labels=labels, follow_links=follow_links)
    count = len(data.find_cases())
    with terminal.watched() as on_progress:
        found = check(data, on_case=terminal.case_counter(on_progress, "checking", count))
    rows = [["case", "contrasts", "shape", "spacing mm", "labels", "problems", "notes"]]
    rows += [
        [
            case.case,
            " ".join(case.contrasts),
            "-" if case.shape is None else "x".join(str(n) for n in case.shape),
            "-" if case.spacing_mm is None else "x".join(f"{mm:g}" for mm in case.spacing_mm),
            "-" if case.labels is None else " ".join(str(value) for value in case.labels),
            str(len(case.problems) or "none"),
            str(len(case.notes) or "none"),
        ]
        for case in found.cases
    ]
    findings = [(finding, case.case) for case in found.cases for finding in case.findings]
    findings += [(finding, "data set") for finding in found.findings]
    findings.sort(key=lambda one: one[0].severity == "problem")  # problems last, where a terminal shows them
    terminal.result(
        found.to_json(),
        terminal.table(rows),
        f"{len(found.cases)} cases of {found.patients} patients; labels: {found.convention or 'none'}",
        *(f"{finding.severity}, {where}: {finding.kind}: {finding.sentence}" for finding, where in findings),
        "nothing wrong found" if found.is_clean else "fix the problems, or leave the cases out with --split",
    )
    if not found.is_clean:
        raise typer.Exit(EXIT_DATA)


@verb(app, "export")
def export_command(
    *,
    source: Annotated[Path, typer.Argument(metavar="DATA", help="Data set in any layout that data check recognises.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Output folder; must be empty or not exist yet.")],
    layout: Annotated[
        str,
        typer.Option(
            "--format",
            help="nnunet (OUT/Dataset001_BraTS, for nnU-Net v2), msd (4D files) or csv (files with a manifest.csv).",
        ),
    ],
    labels: options.Labels = None,
    follow_links: options.FollowLinks = False,
) -> None:
    """Copy a data set into another layout, with grids and voxel values unchanged."""
    from data.datasets.export import export_dataset
    from data.datasets.source import DataSource

    data = DataSource(source, labels=labels, follow_links=follow_links)
    with terminal.watched() as on_progress:
        done = export_dataset(data, out, layout, on_case=terminal.by_case(on_progress, "exporting"))
    terminal.result(
        done.to_json(),
        f"{done.cases} cases, {done.labelled} with a label map ({done.labels or 'none'}), in {done.out}",
        *done.notes,
    )


@verb(app, "phantom")
def phantom(
    *,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the cases.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Number of cases.")],
    seed: Annotated[int, typer.Option(help="Random seed; the same seed makes the same cases.")] = 0,
    spacing_mm: Annotated[float, typer.Option(help="Voxel size in mm.")] = 2.0,
    year: Annotated[int, typer.Option(help="File names and labels of BraTS 2021 or 2023.")] = 2021,
) -> None:
    """Make synthetic glioma cases on the MNI152 anatomy, to try the program without data."""
    from data.phantoms import write_phantoms

    with terminal.watched() as on_progress:
        ready = terminal.case_counter(on_progress, "making phantoms", count)
        cases = write_phantoms(
            out, count, seed=seed, spacing_mm=spacing_mm, year=year, on_case=lambda case: ready(case.name)
        )
    terminal.result({"folder": str(out), "cases": [case.name for case in cases]}, f"{len(cases)} cases in {out}")


verb(app, "dicom")(dicom.dicom)
verb(app, "dicom-seg")(dicom.dicom_seg)
