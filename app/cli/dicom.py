"""``znormseg data dicom`` imports a study; ``znormseg data dicom-seg`` writes a label map as a DICOM segmentation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.cli import options, terminal

if TYPE_CHECKING:
    from data.dicom.series_choice import Choice
    from data.dicom.study import Study
    from data.labels import Contrast

_Study = Annotated[
    Path, typer.Argument(metavar="STUDY", help="Folder of DICOM files, .zip of such a folder, or DICOMDIR.")
]
_StudyUid = Annotated[
    str | None, typer.Option("--study", metavar="UID", help="UID of the study, if there are several.")
]
_Series = Annotated[
    str | None,
    typer.Option(metavar="SERIES", help="Series of this contrast, by number or UID, if it is not recognised."),
]


def dicom(
    *,
    study: _Study,
    out: Annotated[
        Path | None, typer.Argument(metavar="OUT", help="Folder for the case; if omitted, the series are only listed.")
    ] = None,
    t1: _Series = None,
    t1c: _Series = None,
    t2: _Series = None,
    flair: _Series = None,
    case_id: Annotated[
        str | None, typer.Option("--id", metavar="ID", help="Case id; default: a hash of the study's UID.")
    ] = None,
    study_uid: _StudyUid = None,
) -> None:
    """Find T1, T1c, T2 and FLAIR in a DICOM study and convert them to NIfTI.

    Each image stays on its own grid.
    """
    from data.dicom.series_choice import choose_series
    from data.dicom.study import open_study, read_chosen, write_dicom_case
    from data.errors import DataError

    chosen = options.given(t1=t1, t1c=t1c, t2=t2, flair=flair)
    with terminal.watched(), open_study(study, study_uid=study_uid) as opened:
        case = opened.case_id if case_id is None else case_id
        choices, problem, folder, images = {}, None, None, None
        try:
            choices = choose_series(opened.series, chosen)
        except DataError as error:
            problem = error
        if not terminal.settings.as_json:
            terminal.result(None, _listed(opened, choices))
        if problem is None and out is not None:
            images = read_chosen(opened, choices)
            folder = write_dicom_case(out, images, case_id=case)
        notes = {} if images is None else images.notes
        lines = []
        if folder is not None:
            for contrast, choice in choices.items():
                new = notes[contrast][len(choice.series.notes) :]  # the list above shows the series' own
                lines += [f"note: {contrast}, series {choice.series.key}: {note}" for note in new]
            lines.append(f"{len(choices)} contrasts in {folder}")
        terminal.result(_content(opened, choices, notes, case=case, folder=folder, problem=problem), *lines)
    if problem is not None:
        raise problem


def dicom_seg(
    *,
    label_map: Annotated[Path, typer.Argument(metavar="LABELMAP", help="NIfTI label map on the grid of the series.")],
    study: _Study,
    out: Annotated[Path, typer.Argument(metavar="OUT.dcm", help="File to write.")],
    reference: Annotated[
        str, typer.Option(metavar="SERIES", help="Source series: t1, t1c, t2, flair, or a number or UID.")
    ] = "t1c",
    study_uid: _StudyUid = None,
) -> None:
    """Convert a label map to a DICOM segmentation (SEG) of its source series."""
    from importlib import metadata

    from data.dicom.segmentation import on_grid_of, write_dicom_seg
    from data.dicom.series_choice import describe_series, series_of
    from data.dicom.study import open_study
    from data.errors import DataError
    from data.labels import decide_convention, decode
    from data.nifti import read_label_map

    if out.exists():
        raise DataError(f"{out}: already exists and is not overwritten. Remove it or choose another name.")
    with terminal.watched():
        labels = read_label_map(label_map)
        with open_study(study, study_uid=study_uid) as opened:
            series = series_of(opened.series, reference)
            ordered = on_grid_of(series, labels)
            codes = decode(ordered, decide_convention(set(ordered.ravel().tolist())))
            write_dicom_seg(out, codes, series, version=metadata.version("znormseg"))
    terminal.result(
        {"file": str(out), "series": series.key, "series_uid": series.uid},
        f"{out}: on series {describe_series(series)}",
    )


def _taken(choices: dict[Contrast, Choice], key: str) -> str:
    return " ".join(contrast for contrast, choice in choices.items() if choice.series.key == key)


def _listed(study: Study, choices: dict[Contrast, Choice]) -> str:
    """Return a table of the series, followed by the reason why each was chosen or not."""
    from data.dicom.series_choice import MOST_VOLUMES, identify

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    rows = [["series", "description", "slices", "spacing mm", "TE", "TR", "TI", "taken as"]]
    reasons = []
    for series in study.series:
        is_one_of_many = series.volumes_in_series > MOST_VOLUMES and not _taken(choices, series.key)
        if is_one_of_many and not series.key.endswith("/1"):
            continue  # time points: list only the first
        acquisition, spacing = series.acquisition, series.spacing_mm
        finding = identify(series)
        rows.append(
            [
                f"{series.key}-{series.volumes_in_series}" if is_one_of_many else series.key,
                acquisition.description or acquisition.protocol or "-",
                str(len(series.frames)),
                "-" if spacing is None else "x".join(f"{mm:.4g}" for mm in spacing),
                *(number(ms) for ms in (acquisition.echo_ms, acquisition.repetition_ms, acquisition.inversion_ms)),
                _taken(choices, series.key) or (f"{finding.contrast}?" if finding.contrast and not choices else "-"),
            ]
        )
        by_hand = [choice.reason for choice in choices.values() if choice.series is series]
        reasons += [f"{series.key}: {(by_hand or [finding.reason])[0]}"]
        reasons += [f"{series.key}: {problem}" for problem in (*series.problems, *series.notes)]
    return "\n".join([terminal.table(rows), "", *reasons, ""])


def _content(
    study: Study,
    choices: dict[Contrast, Choice],
    notes: Mapping[Contrast, tuple[str, ...]],
    *,
    case: str,
    folder: Path | None,
    problem: Exception | None,
) -> dict[str, Any]:
    """Return the findings as plain data."""
    from data.dicom.series_choice import identify, to_json

    return {
        "study": study.uid,
        "case": case,
        "folder": None if folder is None else str(folder),
        "taken": {
            contrast: {
                "series": choice.series.key,
                "reason": choice.reason,
                "notes": list(notes.get(contrast, choice.series.notes)),
            }
            for contrast, choice in choices.items()
        },
        "problem": None if problem is None else str(problem),
        "series": [to_json(series, identify(series)) for series in study.series],
    }
