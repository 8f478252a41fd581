"""Failures in a sliding window."""

from __future__ import annotations

import pytest

from app.service.limits import Failures


def test_after_too_many_failures_attempts_wait_until_the_oldest_leaves_the_window() -> None:
    at = [0.0]
    failures = Failures(most=2, seconds=10, now=lambda: at[0])
    for at[0] in (0.0, 4.0):
        assert failures.wait("a") == 0
        failures.add("a")
    assert failures.wait("a") == 6
    assert failures.wait("b") == 0
    at[0] = 10.5
    assert failures.wait("a") == 0


def test_a_success_clears_earlier_failures() -> None:
    failures = Failures(most=1, seconds=10)
    failures.add("a")
    failures.forget("a")
    assert failures.wait("a") == 0


def test_only_keys_with_failures_in_the_window_are_kept() -> None:
    at = [0.0]
    failures = Failures(most=2, seconds=10, now=lambda: at[0])
    failures.wait("a")
    assert failures._seen == {}
    failures.add("a")
    failures.take_back("a")
    assert failures._seen == {}
    failures.add("a")
    at[0] = 10.0
    assert failures.wait("a") == 0
    assert failures._seen == {}


def test_too_many_keys_evict_expired_ones_first_and_then_the_oldest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("app.service.limits._MOST_KEYS", 3)
    at = [0.0]
    failures = Failures(most=1, seconds=10, now=lambda: at[0])
    for at[0], key in ((0.0, "a"), (5.0, "b"), (6.0, "c"), (11.0, "d"), (12.0, "e")):
        failures.add(key)
    assert list(failures._seen) == ["c", "d", "e"]
