"""The page of the demo: one self-contained HTML file that needs neither network nor scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from app.experiments.demo import CONFIG, SPACING_MM, DemoResult
from app.html.curves import curves_html, gradients_html
from app.html.elements import document, listed, write_html
from app.html.overlay import OverlayCase, Picture, overlay_alt, overlay_caption, overlay_picture
from app.html.scores import REGION_NAMES, Scores, case_table, score, scores_html
from app.html.templates import fill
from app.html.volume import picture_uri
from app.runs.folder import read_metrics
from app.system.device import machine, versions
from data.datasets.layouts import Case
from data.labels import REGIONS, LabelConvention, decode
from data.nifti import read_image, read_label_map, reorient

#: Suggested next commands, as pairs of purpose and command.
COMMANDS: Final = (
    ("Check your data set", "znormseg data check DATA"),
    ("Train on it, for an hour here or longer on a GPU", "znormseg train DATA RUN --set training.hours=1"),
    ("Segment new cases with the trained network", "znormseg predict RUN NEW_CASES OUTPUT"),
)


@dataclass(frozen=True, kw_only=True)
class PageCase:
    """One case on the page."""

    case: str
    """Case id."""
    scores: Scores
    """By region: ``dice``, ``hd95_mm``, ``volume_ml``, ``reference_volume_ml``; a missing score is shown as a dash."""
    overlay: Picture | None
    """Picture from :func:`app.html.overlay.overlay_picture`."""
    overlay_caption: str = ""
    """Caption from :func:`app.html.overlay.overlay_caption`."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """Content of the page, in the order of the page."""

    title: str
    """Heading."""
    lead: str
    """One sentence on what the page shows."""
    provenance: Sequence[tuple[str, str]]
    """Pairs of name and value: versions, configuration, seed, machine, seconds."""
    cases: Sequence[PageCase]
    """The scored cases."""
    metrics: Sequence[Mapping[str, object]]
    """Records of ``metrics.jsonl``."""
    commands: Sequence[tuple[str, str]]
    """Suggested next commands, as pairs of purpose and command."""


def render(page: Page) -> str:
    """Render the page as one HTML document; every external string is escaped, every picture is embedded."""
    scores = [case.scores for case in page.cases]
    body = fill(
        "demo.html",
        scores=scores_html([case.case for case in page.cases], scores),
        curves=curves_html(page.metrics),
        gradients=gradients_html(page.metrics),
        cards=[_card(case) for case in page.cases],
        region_names=REGION_NAMES,
        commands=page.commands,
    )
    return document(title=page.title, lead=page.lead, facts=page.provenance, body=body, styles=("page.css",))


def write_page(path: Path, page: Page) -> None:
    """Write the page atomically: a reader of ``path`` sees the complete old or new file, never a part.

    Args:
        path: file to write; its folder is created if missing.
        page: content of the page.

    Raises:
        OSError: the file cannot be written.
    """
    write_html(path, render(page))


def write_demo_page(outcome: DemoResult) -> None:
    """Write the page of a demo: scores, curves and a picture of each held-out case.

    Args:
        outcome: result of the demo.

    Raises:
        OSError: the page cannot be written.
    """
    write_page(
        outcome.page,
        Page(
            title="znormseg demo",
            lead=(
                f"A small residual U-Net trained with ZNorm on {outcome.trained_on} synthetic glioma cases at "
                f"{SPACING_MM:g} mm, scored on {len(outcome.unseen)} held-out cases. Phantoms are easier than "
                "patients: these figures show that everything works, not what to expect on real data."
            ),
            provenance=[
                ("config", CONFIG),
                ("seed", str(outcome.config.training.seed)),
                ("machine", machine()),
                ("seconds", ", ".join(f"{stage} {spent:.0f}" for stage, spent in outcome.seconds.items())),
                ("versions", listed(versions())),
                ("weights", outcome.weights_sha256),
            ],
            cases=[_page_case(case, outcome) for case in outcome.unseen],
            metrics=read_metrics(outcome.out / "run"),
            commands=COMMANDS,
        ),
    )


def _page_case(case: Case, outcome: DemoResult) -> PageCase:
    """Collect scores and overlay picture of one held-out case."""
    assert case.label is not None
    folders = outcome.evaluation.folders
    background = reorient(read_image(case.contrasts["flair"], case.volumes.get("flair")))
    overlay = OverlayCase(
        case=case.id,
        background=background.voxels,
        background_name="FLAIR",
        prediction=_codes(folders.predicted[case.id], outcome.convention),
        reference=_codes(case.label, outcome.convention),
        spacing_mm=background.spacing_mm,
    )
    return PageCase(
        case=case.id,
        scores=outcome.evaluation.by_case[case.id],
        overlay=overlay_picture(overlay, height_px=320),
        overlay_caption=overlay_caption(overlay),
    )


def _codes(path: Path, convention: LabelConvention) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return decode(reorient(read_label_map(path)).voxels, convention)


def _card(case: PageCase) -> dict[str, object]:
    """Return the variables of the card template for one case."""
    shown: dict[str, object] = {
        "case": case.case,
        "picture": None,
        "caption": case.overlay_caption,
        "table": case_table(case.scores),
    }
    if case.overlay is None:
        return shown
    keys = ("dice", "reference_volume_ml")
    has_reference = any(key in case.scores.get(region, {}) for region in REGIONS for key in keys)
    scores = ((region, score(case.scores, region, "dice")) for region in REGIONS)
    dice = {region: value for region, value in scores if not math.isnan(value)}
    return {
        **shown,
        "picture": picture_uri(case.overlay, "png"),
        "left": "Reference" if has_reference else "Image",
        "width": case.overlay.shape[1],
        "height": case.overlay.shape[0],
        "alt": overlay_alt(case.case, dice, has_reference=has_reference),
    }
