"""The HTML page of a run: one file that opens anywhere, without network and without script."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from app.html.curves import curves_html, gradients_html
from app.html.elements import document, section
from app.html.scores import REGION_NAMES, case_table_html, score, scores_table_html, summary_html
from app.html.templates import fill
from app.html.volume import data_uri
from data.labels import REGIONS, Region
from data.partial import partial_name


@dataclass(frozen=True, kw_only=True)
class PageCase:
    """One case on the page."""

    case: str
    """Case id."""
    scores: Mapping[Region, Mapping[str, float]]
    """By region: ``dice``, ``hd95_mm``, ``volume_ml``, ``reference_volume_ml``; what is missing shows as a dash."""
    overlay: bytes | None
    """PNG file of :func:`app.html.overlay.overlay_png`."""
    overlay_caption: str = ""
    """Sentence of :func:`app.html.overlay.overlay_caption`."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """What the page says, in the order of the page."""

    title: str
    """Heading."""
    lead: str
    """One sentence: what this is."""
    provenance: Sequence[tuple[str, str]]
    """Name and value: version, configuration, seed, machine, seconds."""
    cases: Sequence[PageCase]
    """Cases that were scored."""
    metrics: Sequence[Mapping[str, object]]
    """Records of ``metrics.jsonl``."""
    commands: Sequence[tuple[str, str]]
    """What to do next: what it does, and the command."""


def render(page: Page) -> str:
    """The page as one HTML document; every string from outside is escaped, every picture is inside."""
    scores = [case.scores for case in page.cases]
    gradients = gradients_html(page.metrics)
    sections = [
        section("scores", "Scores", summary_html(scores) + scores_table_html([c.case for c in page.cases], scores)),
        section("curves", "Learning curves", curves_html(page.metrics)),
        section("gradients", "Gradients", gradients) if gradients else "",
        section("cases", "Cases", _cases_html(page.cases)) if page.cases else "",
        section("next", "What next", fill("commands.html", commands=page.commands)) if page.commands else "",
    ]
    return document(title=page.title, lead=page.lead, facts=page.provenance, sections=sections, styles=("page.css",))


def write_page(path: Path, page: Page) -> None:
    """Write the page; a reader of ``path`` sees the old file or the whole new one, never a part.

    Args:
        path: file to write; its folder exists.
        page: what it says.

    Raises:
        OSError: the folder is missing or cannot be written.
    """
    partial = path.with_name(partial_name(f".partial-{os.getpid()}-", path.name))
    try:
        # A file name that is not valid Unicode reaches us with surrogates, which UTF-8 cannot hold.
        partial.write_text(render(page), encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _cases_html(cases: Sequence[PageCase]) -> str:
    cards = [_card(case) for case in cases]
    return fill("cards.html", cards=cards, convention=_convention(), region_names=REGION_NAMES)


def _convention() -> str:
    return (
        "Each picture shows the slices where the tumour is largest: from top to bottom axial, coronal and sagittal, "
        "at one scale. Radiological display: the right side of the patient (R) is on the left of the picture; L left, "
        "A anterior, P posterior, S superior, I inferior. Lines lie beside a border, so equal borders stay visible."
    )


def _card(case: PageCase) -> dict[str, object]:
    """What the template of the cards asks for."""
    shown: dict[str, object] = {
        "case": case.case,
        "picture": None,
        "caption": case.overlay_caption,
        "table": Markup(case_table_html(case.scores)),  # noqa: S704 - numbers alone
    }
    if case.overlay is None:
        return shown
    left = "Reference" if _has_reference(case) else "Image"
    width, height = struct.unpack(">II", case.overlay[16:24])  # of the PNG's IHDR chunk
    picture = data_uri("png", case.overlay)
    return {**shown, "picture": picture, "left": left, "width": width, "height": height, "alt": _alt(case, left)}


def _alt(case: PageCase, left: str) -> str:
    dice = [(region, score(case.scores, region, "dice")) for region in REGIONS]
    said = ", ".join(f"{region} {value:.3f}" for region, value in dice if not math.isnan(value))
    text = f"Case {case.case}: {left.lower()} on the left, predicted outlines on the right, in three planes."
    return text + (f" Dice {said}." if said else "")


def _has_reference(case: PageCase) -> bool:
    keys = ("dice", "reference_volume_ml")
    return any(key in case.scores.get(region, {}) for region in REGIONS for key in keys)
