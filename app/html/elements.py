"""HTML elements shared by all pages: document, section, table and note."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup

from app.html.records import mapping
from app.html.templates import fill, policy, source
from data.files import replacing

#: Placeholder for a missing number.
DASH: Final = '<span role="img" aria-label="none">&ndash;</span>'


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link to another page."""

    href: str
    """Relative URL, percent-encoded."""
    text: str
    """Text of the link."""


def document(
    *,
    title: str,
    lead: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[str],
    styles: Sequence[str],
    scripts: Sequence[str] = (),
    links: Sequence[Link] = (),
) -> str:
    """Return a page as one self-contained HTML document.

    Args:
        title: heading, and title of the window.
        lead: one sentence that says what the page shows.
        facts: pairs of name and value, shown below the lead.
        sections: HTML, as from :func:`section`.
        styles: names of style sheets in ``app.html``.
        scripts: names of scripts in ``app.html``; the page runs no others.
        links: links to other pages, shown above the heading.
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
        sections=[Markup(one) for one in sections if one],  # noqa: S704
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


def section(name: str, heading: str, body: str) -> str:
    """Return a section; ``heading`` and ``body`` are HTML."""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n{body}\n</section>\n'


def table_html(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in its own scrolling container; cells are HTML, and ``name`` is the id of the section."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" role="group" aria-labelledby="{name}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(charts: str, caption: str) -> str:
    """Return charts with a caption below; both are HTML."""
    return f'<figure class="chart">{charts}<figcaption>{caption}</figcaption></figure>'


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


def note(text: str) -> str:
    """Return a remark in small print; the text is escaped."""
    return f'<p class="note">{escape(text)}</p>'


def number(value: float | None) -> str:
    """Format a number with three decimals, or as a dash if it is None."""
    return DASH if value is None else f"{value:.3f}"
