"""Check a data set before it is used: what was recognised and what is wrong, case by case.

Every file is read once; its digest (:mod:`data.quality.digest`) is judged by the rules in :mod:`data.quality`. No more
than :data:`MOST_AT_ONCE` cases are read at a time, large ones one by one, so that memory does not grow with the number
of cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from threading import Lock
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data.datasets.case import Case, missing_problems
from data.datasets.layouts import decide_for, look_like_visits, misnamed_files, patients_of
from data.datasets.patients import grouped_by_words
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import CONTRASTS, Contrast
from data.nifti import Volume, in_order_of, read_grid, read_image, read_label_map
from data.quality.cases import Prints, judge_cases, prints_of
from data.quality.contrasts import judge_contrasts, judge_grids
from data.quality.digest import Digest, digest
from data.quality.finding import Finding, Kind, problem_from
from data.quality.labels import LabelDigest, digest_labels, judge_labels
from data.quality.volume import judge_volume

#: Cases read concurrently; each holds one whole volume (36 MB at 240 x 240 x 155), four masks and four coarse copies.
MOST_AT_ONCE: Final = 8
#: Cases with more voxels than this (512 x 512 x 256) are read one at a time.
LARGE_VOXELS: Final = 2**26


@dataclass(frozen=True, kw_only=True)
class CheckedCase:
    """The result of checking one case."""

    case: str
    patient: str
    contrasts: tuple[str, ...]
    shape: tuple[int, ...] | None
    spacing_mm: tuple[float, float, float] | None
    labels: tuple[int, ...] | None
    """Values in the label map, including 0; None if there is no readable one."""
    findings: tuple[Finding, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """Findings that make the case unusable or wrong, one line each."""
        return tuple(finding.sentence for finding in self.findings if finding.severity == "problem")

    @property
    def notes(self) -> tuple[str, ...]:
        """Findings that are worth knowing, one line each."""
        return tuple(finding.sentence for finding in self.findings if finding.severity == "note")

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        content = asdict(self)
        findings = content.pop("findings")
        return {**content, "problems": list(self.problems), "findings": list(findings)}


@dataclass(frozen=True, kw_only=True)
class CheckedDataSet:
    """The result of checking a data set."""

    root: Path
    cases: tuple[CheckedCase, ...]
    patients: int
    convention: str | None
    """Name of the label convention; None if there is no label map or the label maps contradict each other."""
    findings: tuple[Finding, ...]
    """Findings about the data set as a whole."""

    @property
    def problems(self) -> tuple[str, ...]:
        """Problems of the data set as a whole."""
        return tuple(finding.sentence for finding in self.findings if finding.severity == "problem")

    @property
    def is_clean(self) -> bool:
        """Whether there are no problems anywhere; there may be notes."""
        return not self.problems and not any(case.problems for case in self.cases)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "root": str(self.root),
            "convention": self.convention,
            "patients": self.patients,
            "problems": list(self.problems),
            "findings": [asdict(finding) for finding in self.findings],
            "cases": [case.to_json() for case in self.cases],
        }


def check(source: DataSource, *, on_case: Callable[[str], None] | None = None) -> CheckedDataSet:
    """Read every file of a data set once and report what was found.

    Args:
        source: the data set.
        on_case: called with the id of each case that has been checked.

    Raises:
        DataError: there is no usable data set (no folder, no case, or a duplicate id).
    """
    cases = list(source.find_cases().values())

    large = Lock()

    def look(case: Case) -> tuple[CheckedCase, Prints]:
        with large if _is_large(case) else nullcontext():
            found = _look(case)
        if on_case is not None:
            on_case(case.id)
        return found

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_AT_ONCE)) as pool:
        judged = list(pool.map(look, cases))
    between = judge_cases({case.case: prints for case, prints in judged}, patients_of(cases))
    checked = tuple(replace(case, findings=(*case.findings, *between.get(case.case, ()))) for case, _ in judged)
    values = {case.case: case.labels for case in checked if case.labels is not None}
    convention, findings = None, []
    if values:
        try:
            convention = decide_for(values, cases, labels=source.labels).name
        except DataError as error:
            findings.append(problem_from(str(error), kind="label values"))
    without = [case.id for case in cases if case.label is None]
    if without:
        findings.append(_without_label(without, len(cases)))
    findings += _visits(cases)
    return CheckedDataSet(
        root=source.root,
        cases=checked,
        patients=len({case.patient for case in cases}),
        convention=convention,
        findings=tuple(findings),
    )


def _is_large(case: Case) -> bool:
    """Whether any readable header of the case claims more than :data:`LARGE_VOXELS` voxels."""
    for contrast, path in case.contrasts.items():
        with suppress(DataError):
            if prod(read_grid(path, case.volumes.get(contrast))[0]) > LARGE_VOXELS:
                return True
    return False


def _look(case: Case) -> tuple[CheckedCase, Prints]:
    findings = [problem_from(text, kind=_kind_of(text, case)) for text in case.problems]
    findings += [replace(problem_from(text, kind="names and links"), severity="note") for text in misnamed_files(case)]
    seen, nonzero, unread = _read_contrasts(case)
    findings += unread
    for contrast, one in seen.items():
        findings += judge_volume(one, contrast)
    together = judge_contrasts(seen)
    findings += together
    shared = judge_grids(seen)[1] if seen else {}
    reference = next((one.grid for one in shared.values()), None)
    label, unread = _read_label(case, next(iter(seen.values())).grid if seen else None)
    findings += unread
    if label is not None:
        mixed_up = any(finding.kind in {"swapped contrasts", "another patient", "same image"} for finding in together)
        flair = None if mixed_up else shared.get("flair")
        findings += judge_labels(label, [nonzero[contrast] for contrast in shared], reference, flair)
    images = {contrast: one for contrast, one in seen.items() if one.is_image}
    checked = CheckedCase(
        case=case.id,
        patient=case.patient,
        contrasts=tuple(case.contrasts),
        shape=None if reference is None else reference.voxels.shape,
        spacing_mm=None if reference is None else reference.spacing_mm,
        labels=None if label is None else label.values,
        findings=tuple(findings),
    )
    return checked, prints_of(images)


def _read_contrasts(
    case: Case,
) -> tuple[dict[Contrast, Digest], dict[Contrast, npt.NDArray[np.bool_]], list[Finding]]:
    """Read each contrast once, in the first one's axis order; return digests, masks of non-zero voxels and failures."""
    seen: dict[Contrast, Digest] = {}
    nonzero: dict[Contrast, npt.NDArray[np.bool_]] = {}
    findings = []
    for contrast in CONTRASTS:
        if contrast not in case.contrasts:
            continue
        try:
            volume = read_image(case.contrasts[contrast], case.volumes.get(contrast), nan_to_zero=True)
        except DataError as error:
            findings.append(problem_from(str(error), kind="unreadable", contrast=contrast))
            continue
        if volume.zeroed:
            findings.append(_non_finite(contrast, volume.zeroed))
        if volume.background is not None:
            findings.append(_background(contrast, volume.background))
        volume = _as_first(next(iter(seen.values())).grid if seen else None, volume)
        seen[contrast] = digest(volume)
        nonzero[contrast] = volume.voxels != 0
    return seen, nonzero, findings


def _read_label(case: Case, first: Volume | None) -> tuple[LabelDigest | None, list[Finding]]:
    """Read the label map, if there is one, in the axis order of the first contrast."""
    if case.label is None:
        return None, []
    try:
        label = read_label_map(case.label, log=False)
    except DataError as error:
        return None, [problem_from(str(error), kind="unreadable", contrast="label map")]
    return digest_labels(_as_first(first, label)), [] if label.rounded is None else [_rounded(label.rounded)]


def _as_first(first: Volume | None, volume: Volume) -> Volume:
    """Return the volume in the axis order of another; unchanged if the affines are equal."""
    if first is None or np.array_equal(first.affine, volume.affine):
        return volume
    return in_order_of(first, volume)


def _non_finite(contrast: Contrast, count: int) -> Finding:
    return Finding(
        kind="non-finite voxels",
        severity="problem",
        contrast=contrast,
        message=f"{count} {'voxel is' if count == 1 else 'voxels are'} NaN or infinite",
        action="Repair the file, leave the case out, or set them to 0 with --nan-to-zero",
    )


def _background(contrast: Contrast, message: str) -> Finding:
    """A note on an image whose background was set to 0 before the other checks."""
    action = "Usable; every command sets it to 0. Check that the brain was extracted as intended, or set it to 0"
    return Finding(kind="background", severity="note", contrast=contrast, message=message, action=action)


def _rounded(message: str) -> Finding:
    """A note on a label map saved with a scale by an editor."""
    action = "Usable; every command rounds them. Save the label map as whole numbers (UINT8, slope 1)"
    return Finding(kind="rounded labels", severity="note", contrast="label map", message=message, action=action)


def _without_label(cases: list[str], count: int) -> Finding:
    """A note on cases that can be predicted but not used for training."""
    some = ", ".join(cases[:5]) + (" ..." if len(cases) > 5 else "")
    return Finding(
        kind="no label map",
        severity="note",
        message="no case has a label map"
        if len(cases) == count
        else f"{len(cases)} of {count} have no label map: {some}",
        action="They can be predicted; for training, leave them out with --split or add the label maps",
    )


def _visits(cases: Sequence[Case]) -> list[Finding]:
    """Notes on cases grouped as visits of one patient by words in their ids, and on others that may be visits."""
    findings = []
    by_words = grouped_by_words([case.id for case in cases if case.stated_patient is None])
    if by_words:
        shown = [f"{patient} ({', '.join(ids)})" for patient, ids in by_words.items()]
        findings.append(
            Finding(
                kind="visits",
                severity="note",
                message=f"ids with words or dates for visits are taken as one patient: {_first(shown)}",
                action="They stay in one part of a split. If they are not one patient's, name the patients in a "
                "manifest's column patient",
            )
        )
    maybe = look_like_visits(cases)
    if maybe:
        findings.append(
            Finding(
                kind="possible visits",
                severity="note",
                message="ids look like visits of one patient, but this is uncertain: "
                f"{_first([', '.join(ids) for ids in maybe])}",
                action="They count as different patients, and a split may separate them. If they are one patient's, "
                "name the patient in a manifest's column patient, or keep them together with --split",
            )
        )
    return findings


def _first(groups: Sequence[str]) -> str:
    return "; ".join(groups[:3]) + (f"; and {len(groups) - 3} more" if len(groups) > 3 else "")


def _kind_of(text: str, case: Case) -> Kind:
    """The kind of a problem reported by the case's layout."""
    if text in missing_problems(case.contrasts, case.unrecognised):
        return "missing contrast"
    return "duplicate contrast" if text.startswith("two files for ") else "names and links"
