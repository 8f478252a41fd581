"""What the pages have in common: the document around them, sections, tables, notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from markupsafe import Markup

from app.html.templates import fill, policy, source

#: In the place of a number that is not there.
DASH: Final = '<span role="img" aria-label="none">&ndash;</span>'


@dataclass(frozen=True, kw_only=True)
class Link:
    """A way to another page."""

    href: str
    """Relative address, percent-encoded."""
    text: str
    """What it says."""


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
    """A page as one HTML document that needs nothing else.

    Args:
        title: heading, and title of the window.
        lead: one sentence: what this is.
        facts: name and value, told below the lead.
        sections: HTML, as of :func:`section`.
        styles: names of style sheets in ``app.reporting``.
        scripts: names of scripts in ``app.reporting``; the page runs no others.
        links: to other pages, above the heading.
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
        # Ours, from files of this package: no text from outside is in them.
        style=Markup(style),  # noqa: S704
        script=Markup(script),  # noqa: S704
        sections=[Markup(one) for one in sections if one],  # noqa: S704
    )


def section(name: str, heading: str, body: str) -> str:
    """A section; ``heading`` and ``body`` are HTML."""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n{body}\n</section>\n'


def table_html(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a container that scrolls by itself; cells are HTML, ``name`` is that of its section."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" role="group" aria-labelledby="{name}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def note(text: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{escape(text)}</p>'


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return DASH if value is None else f"{value:.3f}"
