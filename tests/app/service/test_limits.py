"""Failures in a sliding window."""

from __future__ import annotations

from app.service.limits import Failures


def test_after_some_failures_one_waits_until_the_oldest_has_left_the_window() -> None:
    at = [0.0]
    failures = Failures(most=2, seconds=10, now=lambda: at[0])
    for at[0] in (0.0, 4.0):
        assert failures.wait("a") == 0
        failures.add("a")
    assert failures.wait("a") == 6
    assert failures.wait("b") == 0
    at[0] = 10.5
    assert failures.wait("a") == 0


def test_a_success_forgets() -> None:
    failures = Failures(most=1, seconds=10)
    failures.add("a")
    failures.forget("a")
    assert failures.wait("a") == 0
