"""What the pages have in common: the document around them, sections, tables, notes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from typing import Final

from app.notice import NOTICE

#: In the place of a number that is not there.
DASH: Final = '<span aria-label="none">&ndash;</span>'
# A page may use what it carries and nothing else, whatever a string in it contains.
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def document(
    *, title: str, lead: str, facts: Sequence[tuple[str, str]], sections: Sequence[str], styles: Sequence[str]
) -> str:
    """A page as one HTML document that needs nothing else.

    Args:
        title: heading, and title of the window.
        lead: one sentence: what this is.
        facts: name and value, told below the lead.
        sections: HTML, as of :func:`section`.
        styles: names of style sheets in ``app.reporting``.
    """
    style = "".join(resources.files("app.reporting").joinpath(name).read_text(encoding="utf-8") for name in styles)
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>\n'
        f'<p class="warning"><strong>{NOTICE}</strong></p>\n{f"<dl>{listed}</dl>" if listed else ""}</header>'
        f"\n<main>\n{''.join(sections)}</main>\n"
        f"<footer><p>{NOTICE}</p></footer>\n</body>\n</html>\n"
    )


def section(name: str, heading: str, body: str) -> str:
    """A section; ``heading`` and ``body`` are HTML."""
    return f'<section aria-labelledby="{name}">\n<h2 id="{name}">{heading}</h2>\n{body}\n</section>\n'


def table(name: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in a container that scrolls by itself; cells are HTML, ``name`` is that of its section."""
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" role="region" aria-labelledby="{name}" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def note(text: str) -> str:
    """A remark in small print."""
    return f'<p class="note">{escape(text)}</p>'


def number(value: float | None) -> str:
    """Three decimals, or a dash."""
    return DASH if value is None else f"{value:.3f}"
