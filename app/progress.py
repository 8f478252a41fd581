"""How long jobs tell whoever started them what they are doing; the command line draws it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: Everything the application has to say goes through this logger; the command line sends it to stderr.
LOG: Final = logging.getLogger("znormseg")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a job is."""

    job: str
    """What is being done, e.g. ``training``."""
    share: float
    """0 to 1."""
    detail: str
    """Loss, case id, and the like."""
    eta_seconds: float | None = None


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Tell nobody."""
