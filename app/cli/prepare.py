"""``znormseg data prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import options, terminal

if TYPE_CHECKING:
    from data.datasets.layouts import Case
    from data.native_space.to_brats import NativeCase

_preparation = options.panel("Preparation")


def prepare_command(
    *,
    places: Annotated[
        list[Path],
        typer.Argument(
            metavar="[CASE] OUT",
            help="Case folder, folder of cases or DICOM study (folder or .zip); then the output folder.",
        ),
    ],
    t1: options.Image = None,
    t1c: options.T1c = None,
    t2: options.Image = None,
    flair: options.Image = None,
    nan_to_zero: options.NanToZero = False,
    follow_links: options.FollowLinks = False,
    mask: Annotated[
        str, _preparation(help="Brain mask: auto, hd-bet, synthstrip, mindgrab, atlas, none, or a file.")
    ] = "auto",
    n4: Annotated[bool, _preparation("--n4", help="Correct the bias field of each contrast with N4.")] = False,
) -> None:
    """Make BraTS cases from scans: register to T1c, resample to 1 mm, remove the skull.

    Give CASE, or the four files of one case: znormseg data prepare OUT --t1 A --t1c B --t2 C --flair D. In a DICOM
    study the contrasts are recognised automatically; if that fails, use data dicom. Writes OUT/<case>/ with the
    images, the label map if there is one, transforms/ and prepare.json. --mask auto uses the first that is available:
    the zero background of an image without skull, HD-BET, SynthStrip, MindGrab (model download mindgrab), the mask of
    the MNI152 template (coarse).
    """
    files = options.given(t1=t1, t1c=t1c, t2=t2, flair=flair)
    options.refuse(
        len(places) != (1 if files else 2),
        "with --t1, --t1c, --t2 and --flair, give only OUT" if files else "give CASE and OUT",
    )
    from app.inference.batch.prepare import prepare_cases
    from data.datasets.layouts import case_from_files
    from data.native_space.case_files import require_empty
    from data.native_space.config import PrepareConfig

    out, config = places[-1], PrepareConfig(n4=n4, mask=mask)
    require_empty(out)
    options.mask_installed(mask)
    cases = (case_from_files(files),) if files else _found(places[0], follow_links=follow_links)
    with terminal.watched() as on_progress:
        done, failures = prepare_cases(cases, out, config, nan_to_zero=nan_to_zero, on_progress=on_progress)
    rows = [["case", "contrast", "moved mm", "turned deg", "information", "head overlap", "CPU s", "mask"]]
    for one in done:
        for contrast, found in one.registrations.items():
            numbers: list[Any] = [found.shift_mm, found.degrees, found.metric_after, found.overlap, found.cpu_seconds]
            texts = [f"{value:.{places}f}" for value, places in zip(numbers, (1, 1, 3, 3, 1), strict=True)]
            rows.append([one.id, contrast, *texts, f"{one.mask.source}{' (coarse)' if one.mask.coarse else ''}"])
    summary = f"{len(done)} cases in {out}; each has a prepare.json with what was done. Look at the images."
    lines = [terminal.table(rows), summary] if done else []
    terminal.result({"folder": str(out), "cases": [one.record for one in done], "failures": failures}, *lines)
    terminal.name_failed(failures, done=len(done))


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
