"""``znormseg data prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import terminal

if TYPE_CHECKING:
    from data.datasets.layouts import Case
    from data.labels import Contrast
    from data.native_space.to_brats import BratsCase, NativeCase

#: Headings of the help, with the options below each.
PANELS = {
    "Input": ("t1", "t1c", "t2", "flair", "nan_to_zero", "follow_links"),
    "Preparation": ("mask", "n4"),
    "Output": ("as_json",),
}

_CONTRAST_HELP = "Image of this contrast, instead of CASE."


def prepare_command(
    *,
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="[CASE] OUT",
            help="Case folder, folder of cases or DICOM study (folder or .zip); then the output folder.",
        ),
    ],
    t1: Annotated[Path | None, typer.Option("--t1", help=_CONTRAST_HELP)] = None,
    t1c: Annotated[Path | None, typer.Option("--t1c", "--t1ce", help=_CONTRAST_HELP)] = None,
    t2: Annotated[Path | None, typer.Option("--t2", help=_CONTRAST_HELP)] = None,
    flair: Annotated[Path | None, typer.Option("--flair", help=_CONTRAST_HELP)] = None,
    mask: Annotated[
        str, typer.Option("--mask", help="Brain mask: auto, hd-bet, synthstrip, atlas, none, or a file.")
    ] = "auto",
    n4: Annotated[bool, typer.Option("--n4", help="Correct the bias field of each contrast with N4.")] = False,
    nan_to_zero: Annotated[
        bool,
        typer.Option("--nan-to-zero", help="Replace NaN and infinite voxels with 0 instead of rejecting the case."),
    ] = False,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Accept symbolic links that point outside CASE.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Make BraTS cases from scans: register to T1c, resample to 1 mm, remove the skull.

    Give CASE, or the four files of one case: znormseg data prepare OUT --t1 A --t1c B --t2 C --flair D. In a DICOM
    study the contrasts are recognised automatically; if that fails, use data dicom. Writes OUT/<case>/ with the
    images, the label map if there is one, transforms/ and prepare.json. --mask auto uses the first that is available:
    the zero background of an image without skull, HD-BET, SynthStrip, the mask of the MNI152 template (coarse).
    """
    given: dict[Contrast, Path | None] = {"t1": t1, "t1c": t1c, "t2": t2, "flair": flair}
    files = {contrast: path for contrast, path in given.items() if path is not None}
    if len(places) != (1 if files else 2):
        raise typer.BadParameter("with --t1, --t1c, --t2 and --flair give OUT alone" if files else "give CASE and OUT")
    from app.errors import EXIT_DATA, EXIT_SOME_FAILED
    from app.inference.batch.prepare import prepare_cases
    from data.datasets.layouts import case_from_files
    from data.native_space.case_files import require_empty
    from data.native_space.config import PrepareConfig

    out, config = places[-1], PrepareConfig(n4=n4, mask=mask)
    require_empty(out)
    cases = (case_from_files(files),) if files else _found(places[0], follow_links=follow_links)
    with terminal.watched() as on_progress:
        done, failures = prepare_cases(cases, out, config, nan_to_zero=nan_to_zero, on_progress=on_progress)
    if as_json:
        terminal.json_result({"folder": str(out), "cases": [case.record for case in done], "failures": failures})
    elif done:
        _show(done, out)
    if failures:
        terminal.say(f"znormseg: {len(failures)} of {len(cases)} cases failed: {', '.join(failures)}")
        raise typer.Exit(EXIT_SOME_FAILED if done else EXIT_DATA)


def _found(place: Path, *, follow_links: bool) -> tuple[Case | NativeCase, ...]:
    """Return the NIfTI cases or, if the path is a DICOM study, its one case."""
    from data.datasets.layouts import find_cases
    from data.dicom.files import is_study
    from data.dicom.study import read_study
    from data.native_space.to_brats import NativeCase

    if not is_study(place):
        return find_cases(place, follow_links=follow_links)
    images = read_study(place)
    warnings = tuple(f"{contrast}: {note}" for contrast, notes in images.notes.items() for note in notes)
    return (NativeCase(id=images.case_id, images=images.images, warnings=warnings),)


def _show(done: list[BratsCase], out: Path) -> None:
    rows = [["case", "contrast", "moved mm", "turned deg", "information", "head overlap", "CPU s", "mask"]]
    for case in done:
        for contrast, found in case.registrations.items():
            numbers: list[Any] = [found.shift_mm, found.degrees, found.metric_after, found.overlap, found.cpu_seconds]
            texts = [f"{value:.{places}f}" for value, places in zip(numbers, (1, 1, 3, 3, 1), strict=True)]
            rows.append([case.id, contrast, *texts, f"{case.mask.source}{' (coarse)' if case.mask.coarse else ''}"])
    terminal.result(terminal.table(rows))
    terminal.result(f"{len(done)} cases in {out}; what was done is in prepare.json of each. Look at the images.")
