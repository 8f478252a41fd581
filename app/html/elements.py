"""Elements of every page: the document, figures, and values as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from app.html.records import mapping
from app.html.templates import fill, policy, source
from data.files import replacing

Row = Sequence[str | None]
"""Cells of a table row: text is escaped, Markup inserted, None shown as a dash."""


def document(
    *,
    title: str,
    lead: str,
    facts: Sequence[tuple[str, str]],
    body: Markup,
    styles: Sequence[str],
    scripts: Sequence[str] = (),
    links: Sequence[tuple[str, str]] = (),
) -> str:
    """Return a page as one self-contained HTML document.

    Args:
        title: heading, and title of the window.
        lead: one sentence on what the page shows.
        facts: pairs of name and value, shown below the lead.
        body: sections of the page, from :func:`app.html.templates.fill`.
        styles: names of style sheets in ``app.html``.
        scripts: names of scripts in ``app.html``; the page runs no others.
        links: links to other pages, shown above the heading: percent-encoded URL and text.
    """
    style = "".join(source(name) for name in styles)
    script = "".join(source(name) for name in scripts)
    return fill(
        "page.html",
        title=title,
        lead=lead,
        facts=facts,
        links=links,
        policy=policy(script),
        # Read from files of this package, so they contain no external text.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        body=body,
    )


def write_html(path: Path, html: str) -> None:
    """Write a page atomically.

    Args:
        path: file to write; its folder is created if missing.
        html: from :func:`document`.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        # A file name that is not valid Unicode contains surrogates, which UTF-8 cannot encode.
        partial.write_text(html, encoding="utf-8", errors="replace")


def figure(charts: Markup, caption: str) -> Markup:
    """Return charts with a caption below."""
    return Markup('<figure class="chart">{}<figcaption>{}</figcaption></figure>').format(charts, caption)


def charts_html(figures: Sequence[Markup]) -> Markup:
    """Return figures in columns."""
    return Markup('<div class="charts">{}</div>').format(Markup("").join(figures))


def listed(values: object) -> str:
    """Return the entries of a JSON object as text, e.g. ``torch 2.13, numpy 2.4``; empty for anything else."""
    return ", ".join(f"{name} {value}" for name, value in mapping(values).items())


def made_by(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return machine and versions as pairs of name and value.

    Args:
        record: JSON with the keys ``machine`` and ``versions``, as recorded at the time.
    """
    machine, versions = record.get("machine"), listed(record.get("versions"))
    return [("machine", str(machine or "not recorded")), ("versions", versions or "not recorded")]


def number(value: float | None) -> str | None:
    """Format a number with three decimals; None stays None, which a table shows as a dash."""
    return None if value is None else f"{value:.3f}"
