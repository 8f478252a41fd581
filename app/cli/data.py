"""``znormseg data``: check and export data sets, make phantoms; the other subcommands are in separate modules."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import cache, dicom, prepare, terminal
from app.cli.verbs import Verb, quietly, verb

app = typer.Typer(
    help="Check, prepare and export data sets, convert DICOM, make phantoms, manage the cache.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.command(name="prepare", cls=verb(prepare.PANELS))(quietly(prepare.prepare_command))
app.command(name="cache", cls=Verb)(quietly(cache.cache))


@app.command(name="check", cls=Verb)
@quietly
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
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help=terminal.LABELS_HELP)] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside DIR.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on stdout.")] = False,
) -> None:
    """Report what a data set contains and what is wrong with it, case by case.

    If there are problems, the exit code is 3. Notes are only informative.
    """
    from app.errors import EXIT_DATA
    from app.progress import Progress
    from data.datasets.source import DataSource
    from data.quality.check import check as look

    data = DataSource(folder, labels=labels, follow_links=follow_links)
    count = len(data.find_cases())
    done: list[str] = []
    with terminal.watched() as on_progress:

        def ready(case: str) -> None:
            done.append(case)
            on_progress(Progress(job="checking", share=len(done) / count, detail=case))

        found = look(data, on_case=ready)
    if as_json:
        terminal.json_result(found.to_json())
    else:
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
        terminal.result(terminal.table(rows))
        terminal.result(f"{len(found.cases)} cases of {found.patients} patients; labels: {found.convention or 'none'}")
        told = [(finding, case.case) for case in found.cases for finding in case.findings]
        told += [(finding, "data set") for finding in found.findings]
        for severity in ("note", "problem"):  # problems last, where a terminal shows them
            for finding, where in told:
                if finding.severity == severity:
                    terminal.result(f"{severity}, {where}: {finding.kind}: {finding.sentence}")
        terminal.result(
            "nothing wrong found" if found.is_clean else "fix the problems, or leave the cases out with --split"
        )
    if not found.is_clean:
        raise typer.Exit(EXIT_DATA)


@app.command(name="export", cls=Verb)
@quietly
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
    labels: Annotated[str | None, typer.Option("--labels", metavar="NAME", help=terminal.LABELS_HELP)] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside DATA.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Copy a data set into another layout, with grids and voxel values unchanged."""
    from data.datasets.export import export_dataset as write
    from data.datasets.source import DataSource

    with terminal.watched() as on_progress:
        ready = terminal.by_case(on_progress, "exporting")
        data = DataSource(source, labels=labels, follow_links=follow_links)
        done = write(data, out, layout, on_case=ready)
    if as_json:
        terminal.json_result(done.to_json())
        return
    terminal.result(f"{done.cases} cases, {done.labelled} with a label map ({done.labels or 'none'}), in {done.out}")
    for note in done.notes:
        terminal.result(note)


@app.command(name="phantom", cls=Verb)
@quietly
def phantom(
    *,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the cases.")],
    count: Annotated[int, typer.Option("-n", "--count", help="Number of cases.")],
    seed: Annotated[int, typer.Option(help="Random seed; the same seed makes the same cases.")] = 0,
    spacing_mm: Annotated[float, typer.Option(help="Voxel size in mm.")] = 2.0,
    year: Annotated[int, typer.Option(help="File names and labels of BraTS 2021 or 2023.")] = 2021,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Make synthetic glioma cases on the MNI152 anatomy, to try the program without data."""
    from app.progress import Progress
    from data.phantoms import write_phantoms

    done: list[Path] = []
    with terminal.watched() as on_progress:

        def ready(case: Path) -> None:
            done.append(case)
            on_progress(Progress(job="making phantoms", share=len(done) / count, detail=case.name))

        write_phantoms(out, count, seed=seed, spacing_mm=spacing_mm, year=year, on_case=ready)
    if as_json:
        terminal.json_result({"folder": str(out), "cases": [case.name for case in done]})
    else:
        terminal.result(f"{len(done)} cases in {out}")


app.command(name="dicom", cls=Verb)(quietly(dicom.dicom))
app.command(name="dicom-seg", cls=Verb)(quietly(dicom.dicom_seg))
