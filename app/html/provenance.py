"""Provenance of a page's content: machine and versions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def made_by(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return machine and versions as pairs of name and value.

    Args:
        record: JSON with the keys ``machine`` and ``versions``, as recorded at the time.
    """
    held = record.get("versions")
    listed = (
        ", ".join(f"{name} {version}" for name, version in held.items()) if isinstance(held, Mapping) else "not told"
    )
    return [("machine", str(record.get("machine", "not told"))), ("versions", listed)]
