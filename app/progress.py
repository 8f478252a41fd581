"""Log messages and progress reports of long jobs; the command line displays both."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

#: The logger for all messages of the application; the command line sends it to stderr.
LOG: Final = logging.getLogger("znormseg")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A snapshot of a job's progress."""

    job: str
    """Name of the job, e.g. ``training``."""
    share: float
    """Completed fraction, 0 to 1."""
    detail: str
    """Additional text, such as the loss or a case id."""
    eta_seconds: float | None = None


OnProgress = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Ignore a progress report; the default callback."""
