"""The pages of predictions: a cohort page and one page per case."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from app.errors import InterruptedRunError
from app.evaluation.evaluate import Evaluation, evaluate
from app.evaluation.metrics import DICE_DEFINITION, HD95_DEFINITION, RegionScores
from app.html.elements import document, listed, write_html
from app.html.overlay import OverlayCase, Picture, overlay_alt, overlay_caption, overlay_picture
from app.html.records import mapping
from app.html.scores import REGION_NAMES
from app.html.templates import fill
from app.html.volume import ViewerCase, grid_for, picture_uri, shrunk, viewer_data
from app.progress import LOG, OnProgress, Progress, silent
from app.reports.predictions import Predicted, find_predictions
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import REGIONS, Contrast, Region, decode
from data.nifti import Volume, grid_difference, in_order_of, read_image, read_label_map, read_volume, reorient

Codes = npt.NDArray[np.uint8]

_FOLDER: Final = "cases"
_CONTRAST_NAMES: Final[Mapping[Contrast, str]] = {"t1": "T1", "t1c": "T1c", "t2": "T2", "flair": "FLAIR"}
#: Contrasts in order of preference: the first available one is the background of the picture, and the viewer shows the
#: first two.
_BEHIND: Final[tuple[Contrast, ...]] = ("flair", "t2", "t1c", "t1")
_IN_VIEWER: Final[tuple[Contrast, ...]] = ("t1c", "flair", "t2", "t1")
_MOST_SHOWN: Final = 2
_PANEL_PX: Final = 300
_THUMBNAIL_PX: Final = 96
#: WebP quality; fine coloured lines need more than scans do.
_LINE_QUALITY: Final = 75
_DISPLAY: Final = "Radiological display: the right side of the patient (R) is on the left of the picture."


@dataclass(frozen=True, kw_only=True)
class CohortPages:
    """The pages that were written."""

    index: Path
    """The cohort page."""
    cases: Mapping[str, Path]
    """Page by case id."""
    failures: Mapping[str, str]
    """Reason why a case has no page, by case id."""


def write_cohort(
    folder: Path,
    out: Path,
    *,
    images: DataSource | None = None,
    references: DataSource | None = None,
    on_progress: OnProgress = silent,
) -> CohortPages:
    """Write ``index.html`` and ``cases/<case>.html``.

    Args:
        folder: folder of predictions, as written by ``znormseg predict``.
        out: folder of the pages, created if missing.
        images: data set with the scans; by default the paths recorded in each case's JSON are used.
        references: data set or folder with expert label maps; without it there are no scores or reference outlines.
        on_progress: called with the current case.

    Raises:
        DataError: no case can be shown, or ``images`` or ``references`` cannot be used.
        OSError: ``out`` cannot be written to.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; the pages written so far are complete.
    """
    cases = None if images is None else images.find_cases()
    predicted, failures = find_predictions(folder, cases)
    truth = None
    if references is not None:
        truth = evaluate(DataSource(folder, follow_links=references.follow_links), references)
    grid_mm = grid_for(len(predicted))
    rows: list[dict[str, Any]] = []
    pages: dict[str, Path] = {}
    try:
        for number, one in enumerate(predicted):
            on_progress(Progress(job="pages", share=number / len(predicted), detail=one.case))
            try:
                shown = _Shown.of(one, truth)
            except DataError as error:
                failures[one.case] = str(error)
                LOG.error("%s", error)
                continue
            page = out / _FOLDER / f"{one.case}.html"
            picture = overlay_picture(shown.overlay(), height_px=_PANEL_PX)
            write_html(page, _case_page(shown, picture, _neighbours(predicted, number), grid_mm))
            pages[one.case] = page
            rows.append(_row(shown, picture))
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"{str(error) or 'interrupted'} with {len(pages)} of {len(predicted)} pages written, all "
            "complete. Run the same command again to start over."
        ) from error
    if not rows:
        raise DataError(f"{folder}: no case can be shown. {' '.join(list(failures.values())[:3])}")
    index = out / "index.html"
    write_html(index, _cohort_page(folder, rows, truth, failures, predicted))
    on_progress(Progress(job="pages", share=1.0, detail=f"{len(rows)} cases"))
    return CohortPages(index=index, cases=pages, failures=failures)


def case_page(predicted: Predicted) -> str:
    """Return the page of one case as HTML, without references and without links to other pages.

    Raises:
        DataError: the label map cannot be read.
    """
    shown = _Shown.of(predicted, None)
    return _case_page(shown, overlay_picture(shown.overlay(), height_px=_PANEL_PX), (), grid_mm=1.0)


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """A case with its voxel arrays, all in canonical voxel order on the label map's grid."""

    predicted: Predicted
    prediction: Codes
    reference: Codes | None
    images: Mapping[Contrast, npt.NDArray[np.float32]]
    uncertainty: npt.NDArray[np.float32] | None
    spacing_mm: tuple[float, float, float]
    scores: Mapping[Region, RegionScores]
    remarks: tuple[str, ...]
    """Reasons why something is not shown."""

    @classmethod
    def of(cls, predicted: Predicted, truth: Evaluation | None) -> _Shown:
        """Read the files of a case; an unreadable file other than the label map becomes a remark.

        Raises:
            DataError: the label map cannot be read or decoded.
        """
        label_map = reorient(read_label_map(predicted.label_map))
        prediction = decode(label_map.voxels, predicted.convention)
        remarks: list[str] = []
        images = _read_images(predicted, label_map, remarks)
        reference, scores = None, {}
        if truth is not None:
            reference = _read_reference(predicted.case, truth, label_map, remarks)
            scores = next((dict(one.regions) for one in truth.cases if one.case == predicted.case), {})
        uncertainty = _read_uncertainty(predicted, label_map, remarks)
        return cls(
            predicted=predicted,
            prediction=prediction,
            reference=reference,
            images=images,
            uncertainty=uncertainty,
            spacing_mm=label_map.spacing_mm,
            scores=scores,
            remarks=tuple(remarks),
        )

    def overlay(self) -> OverlayCase:
        """Return the content of the still picture, which without a scan shows only the tumour."""
        behind = next((contrast for contrast in _BEHIND if contrast in self.images), None)
        return OverlayCase(
            case=self.predicted.case,
            background=np.zeros(self.prediction.shape, dtype=np.float32) if behind is None else self.images[behind],
            background_name="No scan" if behind is None else _CONTRAST_NAMES[behind],
            prediction=self.prediction,
            reference=self.reference,
            spacing_mm=self.spacing_mm,
        )

    def viewer(self, grid_mm: float) -> dict[str, Any] | None:
        """Return the data of the viewer; None without a scan."""
        if not self.images:
            return None
        case = ViewerCase(
            images={_CONTRAST_NAMES[contrast]: image for contrast, image in self.images.items()},
            prediction=self.prediction,
            reference=self.reference,
            uncertainty=self.uncertainty,
            spacing_mm=self.spacing_mm,
        )
        return viewer_data(case, grid_mm=grid_mm)


def _read_images(
    predicted: Predicted, label_map: Volume, remarks: list[str]
) -> dict[Contrast, npt.NDArray[np.float32]]:
    """Read the first two scans that can be shown, in the viewer's order of preference."""
    images: dict[Contrast, npt.NDArray[np.float32]] = {}
    absent = []
    for contrast in _IN_VIEWER:
        if contrast not in predicted.images or len(images) == _MOST_SHOWN:
            continue
        path, name = predicted.images[contrast], _CONTRAST_NAMES[contrast]
        if not path.exists():
            absent.append(name)
            continue
        try:
            volume = reorient(read_image(path, predicted.volumes.get(contrast), nan_to_zero=True))
        except DataError as error:
            remarks.append(f"{name} is not shown: {error}")
            continue
        if difference := grid_difference(volume, label_map):
            remarks.append(f"{name} is not shown, as it is on a different grid than the label map: {difference}.")
        else:
            images[contrast] = volume.voxels
    if absent:
        remarks.append(
            f"No longer at the paths recorded by the prediction: {', '.join(absent)}. Give --images DATA to show them."
        )
    return images


def _read_reference(case: str, truth: Evaluation, label_map: Volume, remarks: list[str]) -> Codes | None:
    if case in truth.failures:
        remarks.append(f"Not scored: {truth.failures[case]}")
        return None
    if case not in truth.folders.expected:
        remarks.append("This case has no reference.")
        return None
    reference = in_order_of(label_map, read_label_map(truth.folders.expected[case]))
    return decode(reference.voxels, truth.folders.reference_convention)


def _read_uncertainty(predicted: Predicted, label_map: Volume, remarks: list[str]) -> npt.NDArray[np.float32] | None:
    """Read the uncertainty map; if it has a volume per region, take the maximum at each voxel."""
    path = predicted.uncertainty
    if path is None:
        return None
    try:
        try:
            parts = [read_volume(path)]
        except DataError:
            parts = [read_volume(path, number) for number in range(len(REGIONS))]
        volumes = [reorient(part) for part in parts]
    except DataError as error:
        remarks.append(f"Uncertainty is not shown: {error}")
        return None
    if difference := grid_difference(volumes[0], label_map):
        remarks.append(f"Uncertainty is not shown, as it is on a different grid: {difference}.")
        return None
    largest: npt.NDArray[np.float32] = np.max([volume.voxels for volume in volumes], axis=0)
    return largest


def _case_page(shown: _Shown, picture: Picture, links: Sequence[tuple[str, str]], grid_mm: float) -> str:
    one = shown.predicted
    data = shown.viewer(grid_mm)
    has_reference = shown.reference is not None
    dice = {region: scores.dice for region, scores in shown.scores.items()}
    still = {
        "picture": picture_uri(picture, quality=_LINE_QUALITY),
        "width": picture.shape[1],
        "height": picture.shape[0],
        "alt": overlay_alt(one.case, dice, has_reference=has_reference),
        "caption": f"{overlay_caption(shown.overlay())} {_DISPLAY}",
        "left": "Reference" if has_reference else "Image",
    }
    body = fill(
        "case.html",
        case=one.case,
        still=still,
        region_names=REGION_NAMES,
        rows=_measures(shown),
        has_scores=bool(shown.scores),
        interval_name=one.interval_name if one.volume_intervals_ml else "",
        has_confidence=bool(one.confidence),
        flags=one.flags,
        model_name=one.model_name,
        model_limits=one.model_limits,
        remarks=shown.remarks,
        viewer=data,
        grid_mm=f"{grid_mm:g}",
        provenance=_provenance(one),
        command=_command(one),
        definitions=(DICE_DEFINITION, HD95_DEFINITION),
    )
    return document(
        title=one.case,
        lead=_lead(one),
        facts=(),
        body=body,
        styles=("page.css", "report.css"),
        scripts=() if data is None else ("viewer.js",),
        links=links,
    )


def _cohort_page(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    truth: Evaluation | None,
    failures: Mapping[str, str],
    predicted: Sequence[Predicted],
) -> str:
    codes = sorted({flag.code for row in rows for flag in row["flags"]})
    flagged = sum(bool(row["flags"]) for row in rows)
    facts = [("cases", str(len(rows))), ("flagged", str(flagged))]
    if truth is not None:
        means = truth.means()
        facts += [(f"mean Dice, {region}", f"{means[region]['dice']:.3f}") for region in REGIONS]
        facts.append(("Dice", DICE_DEFINITION))
    limits = {one.model_name: one.model_limits for one in predicted if one.model_name}
    for name, sentences in sorted(limits.items()):
        facts += [("model", name), *([(f"limits of {name}", " ".join(sentences))] if sentences else [])]
    weights = sorted({str(one.record.get("weights_sha256", "not recorded")) for one in predicted})
    facts.append(("weights, SHA-256", ", ".join(weights[:3]) + (" ..." if len(weights) > 3 else "")))
    body = fill(
        "cohort.html",
        rows=rows,
        regions=REGIONS,
        region_names=REGION_NAMES,
        has_scores=truth is not None,
        codes=codes,
        failures=failures,
        thumbnail_px=_THUMBNAIL_PX,
    )
    return document(
        title=f"{len(rows)} predicted {'case' if len(rows) == 1 else 'cases'}",
        lead=f"Label maps in {folder.name or folder}, by case: volumes, flags{', Dice' if truth else ''}.",
        facts=facts,
        body=body,
        styles=("page.css", "report.css"),
        scripts=("table.js",),
    )


def _row(shown: _Shown, picture: Picture) -> dict[str, Any]:
    """Return the row of a case on the cohort page."""
    one, scores = shown.predicted, shown.scores
    thumbnail = shrunk(np.ascontiguousarray(picture[:_PANEL_PX, -_PANEL_PX:]), _THUMBNAIL_PX)
    return {
        "case": one.case,
        "href": f"{_FOLDER}/{_address(one.case)}.html",
        "thumbnail": picture_uri(thumbnail),
        "volumes_ml": list(one.volumes_ml.values()),
        "dice": [scores[region].dice if region in scores else None for region in REGIONS],
        "flags": one.flags,
    }


def _neighbours(predicted: Sequence[Predicted], number: int) -> list[tuple[str, str]]:
    links = [("../index.html", "All cases")]
    for text, place in (("Previous", number - 1), ("Next", number + 1)):
        if 0 <= place < len(predicted):
            links.append((f"{_address(predicted[place].case)}.html", f"{text}: {predicted[place].case}"))
    return links


def _address(name: str) -> str:
    """Percent-encode a file name for a link, even if it is not valid Unicode."""
    return quote(os.fsencode(name))


def _measures(shown: _Shown) -> list[dict[str, str | None]]:
    """Return the rows of the table of volumes and scores, with None for missing values."""
    one = shown.predicted
    rows = []
    for region in REGIONS:
        scores = shown.scores.get(region)
        ends = one.volume_intervals_ml.get(region)
        rows.append(
            {
                "region": region,
                "dice": None if scores is None else f"{scores.dice:.3f}",
                "hd95": None if scores is None else f"{scores.hd95_mm:.1f}",
                "reference": None if scores is None else f"{scores.reference_volume_ml:.1f}",
                "volume": None if one.volumes_ml[region] is None else f"{one.volumes_ml[region]:.1f}",
                "interval": None if ends is None else f"{ends[0]:.1f} to {ends[1]:.1f}",
                "confidence": f"{one.confidence[region]:.2f}" if region in one.confidence else None,
            }
        )
    return rows


def _lead(one: Predicted) -> str:
    recorded = {region: volume for region, volume in one.volumes_ml.items() if volume is not None}
    if not any(recorded.values()):
        return "No tumour was found."
    return (
        "Predicted: "
        + ", ".join(f"{REGION_NAMES[region]} {volume:.1f} ml" for region, volume in recorded.items())
        + "."
    )


def _provenance(one: Predicted) -> list[tuple[str, str]]:
    """Return the provenance of the label map recorded in the JSON, as pairs of name and value."""
    record = one.record
    facts = [("label map", str(record.get("label_map", one.label_map))), ("labels", listed(record.get("labels")))]
    for key, name in (("weights_sha256", "weights, SHA-256"), ("weights_step", "weights, step")):
        facts.append((name, str(record.get(key, ""))))
    facts += [
        (f"weights of {network.get('network')}, SHA-256", str(network.get("weights_sha256")))
        for network in map(mapping, record.get("ensemble") or ())
    ]
    facts += [(key, listed(record.get(key))) for key in ("versions", "inputs", "seconds", "nan_to_zero")]
    if isinstance(record.get("runtime"), list):
        facts.append(("runtime", "; ".join(map(str, record["runtime"]))))
    return [(name, value) for name, value in facts if value]


def _command(one: Predicted) -> str:
    """Return a command that repeats the prediction, or an empty string.

    This is the recorded command, or else one made from the scans, unless these are volumes of 4D files.
    """
    recorded = one.record.get("command")
    if isinstance(recorded, str) and recorded:
        return recorded
    if isinstance(recorded, list) and recorded:
        return shlex.join(map(str, recorded))
    if one.volumes:
        return ""
    scans = [word for contrast, path in one.images.items() for word in (f"--{contrast}", str(path))]
    return f"znormseg predict RUN OUTPUT {shlex.join(scans)}" if scans else ""
