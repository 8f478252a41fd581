"""Durations of jobs, counted in classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Lock
from typing import Final

#: Upper ends of the classes, in seconds.
CLASSES: Final = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 3600.0)


@dataclass
class Durations:
    """How many jobs took at most as long as each class says; its size does not grow with the jobs.

    Example:
        >>> durations = Durations()
        >>> durations.add(7.0)
        >>> durations.counts()[:3], durations.total
        ((0, 0, 1), 7.0)
    """

    total: float = 0.0
    """Sum of all durations, in seconds."""
    _counts: list[int] = field(default_factory=lambda: [0] * (len(CLASSES) + 1))
    _lock: Lock = field(default_factory=Lock, repr=False)

    def add(self, seconds: float) -> None:
        """Count a job."""
        with self._lock:
            self.total += seconds
            for number, end in enumerate((*CLASSES, float("inf"))):
                self._counts[number] += seconds <= end

    def counts(self) -> tuple[int, ...]:
        """Return the number of jobs up to the end of each class, and of all jobs."""
        with self._lock:
            return tuple(self._counts)
