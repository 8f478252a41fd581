"""HTML from the templates of this package; every value is escaped unless it is :class:`markupsafe.Markup`."""

from __future__ import annotations

import base64
import functools
import hashlib
from importlib import resources
from typing import Final

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from app import NOTICE

# A page may load nothing from outside, whatever its text contains.
_POLICY: Final = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def fill(template: str, **values: object) -> Markup:
    """Render a template.

    Args:
        template: name of an HTML file of this package.
        values: variables of the template; text is escaped, :class:`markupsafe.Markup` is inserted as HTML.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    html = _environment().get_template(template).render(research_only=NOTICE, **values)
    return Markup(html)  # noqa: S704 - the templates escape their values


def source(name: str) -> str:
    """Return the text of a style sheet, script or template of this package."""
    return resources.files("app.html").joinpath(name).read_text(encoding="utf-8")


def policy(script: str) -> str:
    """Return the page's Content-Security-Policy: nothing from outside, and no script except this one.

    Args:
        script: the exact text of the page's script; empty allows no script.
    """
    if not script:
        return _POLICY
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return f"{_POLICY}; script-src 'sha256-{digest}'"


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FunctionLoader(source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
