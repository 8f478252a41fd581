"""Limits on how often something may be tried, kept in memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Final

_MOST_KEYS: Final = 50_000


@dataclass(kw_only=True)
class Failures:
    """Counts failures by a key, such as an address, in a sliding window."""

    most: int
    """Failures after which nothing more is tried."""
    seconds: float
    """Length of the window."""
    now: Callable[[], float] = time.monotonic
    _seen: dict[str, deque[float]] = field(default_factory=dict, repr=False)
    _lock: Lock = field(default_factory=Lock, repr=False)

    def wait(self, key: str) -> float:
        """Return how long, in seconds, the owner of a key has to wait; 0 if it may try."""
        with self._lock:
            seen = self._recent(key)
            return max(0.0, seen[0] + self.seconds - self.now()) if len(seen) >= self.most else 0.0

    def add(self, key: str) -> None:
        """Count a failure."""
        with self._lock:
            if key not in self._seen and len(self._seen) >= _MOST_KEYS:
                self._make_room()
            self._seen.setdefault(key, deque()).append(self.now())

    def take_back(self, key: str) -> None:
        """Take back the last failure of a key, which was counted before its success was known."""
        with self._lock:
            seen = self._recent(key)
            if seen:
                seen.pop()
            if not seen:
                self._seen.pop(key, None)

    def forget(self, key: str) -> None:
        """Forget the failures of a key, after a success."""
        with self._lock:
            self._seen.pop(key, None)

    def _recent(self, key: str) -> deque[float]:
        """Return the failures of a key in the window; a key without one is not kept."""
        seen = self._seen.get(key, deque())
        while seen and seen[0] <= self.now() - self.seconds:
            seen.popleft()
        if not seen:
            self._seen.pop(key, None)
        return seen

    def _make_room(self) -> None:
        """Drop the keys whose window has passed, or else the oldest one."""
        for key in list(self._seen):
            self._recent(key)
        if len(self._seen) >= _MOST_KEYS:
            del self._seen[next(iter(self._seen))]
