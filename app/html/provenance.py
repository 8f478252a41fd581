"""Which machine and which versions made what a page shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def made_by(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Machine and versions, name and value.

    Args:
        record: JSON with ``machine`` and ``versions`` of the time.
    """
    held = record.get("versions")
    listed = (
        ", ".join(f"{name} {version}" for name, version in held.items()) if isinstance(held, Mapping) else "not told"
    )
    return [("machine", str(record.get("machine", "not told"))), ("versions", listed)]
