"""``znormseg data``: look data sets over, prepare them, make phantoms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from app.cli import prepare, terminal

app = typer.Typer(help="Check and prepare data sets, make phantoms.", no_args_is_help=True, rich_markup_mode=None)
app.command(name="prepare")(prepare.prepare)


@app.command()
def check(
    *,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A case folder or a folder of cases.")],
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that lead out of DIR.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON on stdout.")] = False,
) -> None:
    """Tell what was recognised in a data set and what is wrong with it, case by case."""
    from app.errors import EXIT_DATA  # noqa: PLC0415 - not needed for the help
    from app.progress import Progress  # noqa: PLC0415
    from data.check import check as look  # noqa: PLC0415
    from data.layouts import find_cases  # noqa: PLC0415

    count = len(find_cases(folder, follow_links=follow_links))
    done: list[str] = []
    with terminal.watched() as on_progress:

        def ready(case: str) -> None:
            done.append(case)
            on_progress(Progress(job="checking", share=len(done) / count, detail=case))

        found = look(folder, follow_links=follow_links, on_case=ready)
    if as_json:
        terminal.json_result(found.to_json())
    else:
        rows = [["case", "contrasts", "shape", "spacing mm", "labels", "problems"]]
        rows += [
            [
                case.case,
                " ".join(case.contrasts),
                "-" if case.shape is None else "x".join(str(n) for n in case.shape),
                "-" if case.spacing_mm is None else "x".join(f"{mm:g}" for mm in case.spacing_mm),
                "-" if case.labels is None else " ".join(str(value) for value in case.labels),
                "none" if not case.problems else str(len(case.problems)),
            ]
            for case in found.cases
        ]
        terminal.result(terminal.table(rows))
        terminal.result(f"{len(found.cases)} cases of {found.patients} patients; labels: {found.convention or 'none'}")
        for case in found.cases:
            for problem in case.problems:
                terminal.result(f"{case.case}: {problem}")
        for problem in found.problems:
            terminal.result(f"data set: {problem}")
        terminal.result("nothing wrong found" if found.is_clean else "fix these, or leave the cases out with --split")
    if not found.is_clean:
        raise typer.Exit(EXIT_DATA)


@app.command()
def phantom(
    *,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder for the cases.")],
    count: Annotated[int, typer.Option("-n", "--count", help="How many cases.")],
    seed: Annotated[int, typer.Option(help="Same seed, same cases.")] = 0,
    spacing_mm: Annotated[float, typer.Option(help="Voxel size in mm.")] = 2.0,
    year: Annotated[int, typer.Option(help="File names and labels of BraTS 2021 or 2023.")] = 2021,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Make synthetic glioma cases on the MNI152 anatomy, to try the program without data."""
    from app.progress import Progress  # noqa: PLC0415 - not needed for the help
    from data.phantoms import write_phantoms  # noqa: PLC0415

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
