"""Limits on how often something may be tried, kept in memory."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

_MOST_KEYS = 50_000


@dataclass(kw_only=True)
class Failures:
    """Counts failures by a key, such as an address, in a sliding window."""

    most: int
    """Failures after which nothing more is tried."""
    seconds: float
    """Length of the window."""
    now: Callable[[], float] = time.monotonic
    _seen: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque), repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def wait(self, key: str) -> float:
        """Return how long, in seconds, the owner of a key has to wait; 0 if it may try."""
        with self._lock:
            seen = self._recent(key)
            return max(0.0, seen[0] + self.seconds - self.now()) if len(seen) >= self.most else 0.0

    def add(self, key: str) -> None:
        """Count a failure."""
        with self._lock:
            if len(self._seen) >= _MOST_KEYS:
                self._seen.clear()
            self._recent(key).append(self.now())

    def forget(self, key: str) -> None:
        """Forget the failures of a key, after a success."""
        with self._lock:
            self._seen.pop(key, None)

    def _recent(self, key: str) -> deque[float]:
        seen = self._seen[key]
        while seen and seen[0] <= self.now() - self.seconds:
            seen.popleft()
        return seen
