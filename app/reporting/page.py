"""The HTML page of a run: one file that opens anywhere, without network and without script."""

from __future__ import annotations

import base64
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from app.reporting.curves import curves_html, gradients_html
from app.reporting.parts import document, section
from app.reporting.scores import REGION_NAMES, case_table_html, score, scores_table_html, summary_html
from data.labels import REGIONS, Region


@dataclass(frozen=True, kw_only=True)
class PageCase:
    """One case on the page."""

    case: str
    """Case id."""
    scores: Mapping[Region, Mapping[str, float]]
    """By region: ``dice``, ``hd95_mm``, ``volume_ml``, ``reference_volume_ml``; what is missing shows as a dash."""
    overlay: bytes | None
    """PNG file of :func:`app.reporting.overlay.overlay_png`."""
    overlay_caption: str = ""
    """Sentence of :func:`app.reporting.overlay.overlay_caption`."""


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
        section("next", "What next", _commands_html(page.commands)) if page.commands else "",
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # A file name that is not valid Unicode reaches us with surrogates, which UTF-8 cannot hold.
        partial.write_text(render(page), encoding="utf-8", errors="replace")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _cases_html(cases: Sequence[PageCase]) -> str:
    cards = "".join(_card(number, case) for number, case in enumerate(cases, 1))
    return f'<p class="note">{_convention()}</p>\n<div class="cards">{cards}</div>'


def _convention() -> str:
    return (
        "Each picture shows the slices where the tumour is largest: from top to bottom axial, coronal and sagittal, "
        "at one scale. Radiological display: the right side of the patient (R) is on the left of the picture; L left, "
        "A anterior, P posterior, S superior, I inferior. Lines lie beside a border, so equal borders stay visible."
    )


def _card(number: int, case: PageCase) -> str:
    return (
        f'<article id="case-{number}" class="card"><h3>{escape(case.case)}</h3>\n'
        f"{_overlay_html(case)}{case_table_html(case.scores)}</article>\n"
    )


def _overlay_html(case: PageCase) -> str:
    if case.overlay is None:
        return '<p class="empty">No picture of this case.</p>'
    left = "Reference" if _has_reference(case) else "Image"
    width, height = struct.unpack(">II", case.overlay[16:24])  # of the PNG's IHDR chunk
    legend = "".join(f'<li class="{r.lower()}">{r} <small>{REGION_NAMES[r]}</small></li>' for r in REGIONS)
    planes = "".join(f"<span>{plane}</span>" for plane in ("axial", "coronal", "sagittal"))
    data = base64.b64encode(case.overlay).decode("ascii")
    caption = f"<figcaption>{escape(case.overlay_caption)}</figcaption>" if case.overlay_caption else ""
    return (
        f'<figure class="overlay"><div class="viewer"><ul class="legend">{legend}</ul>'
        f'<div class="sides"><span>{left}</span><span>Prediction</span></div>'
        f'<div class="picture" style="max-width:{width}px">'
        f'<img width="{width}" height="{height}" alt="{_alt(case, left)}" src="data:image/png;base64,{data}">'
        f'<div class="planes" aria-hidden="true">{planes}</div></div></div>'
        f"{caption}</figure>"
    )


def _alt(case: PageCase, left: str) -> str:
    dice = [(region, score(case.scores, region, "dice")) for region in REGIONS]
    said = ", ".join(f"{region} {value:.3f}" for region, value in dice if not math.isnan(value))
    text = f"Case {case.case}: {left.lower()} on the left, predicted outlines on the right, in three planes."
    return escape(text + (f" Dice {said}." if said else ""))


def _has_reference(case: PageCase) -> bool:
    keys = ("dice", "reference_volume_ml")
    return any(key in case.scores.get(region, {}) for region in REGIONS for key in keys)


def _commands_html(commands: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<li><p>{escape(what)}</p><pre><code>{escape(line)}</code></pre></li>" for what, line in commands)
    return f'<ol class="commands">{items}</ol>'
