"""Curves of a comparison: mean and band over seeds, and overlap where it was recorded."""

from __future__ import annotations

from typing import Any

import numpy as np

from app.html.bands import bands, figures_html


def train(*losses: float | None) -> list[dict[str, Any]]:
    return [{"kind": "train", "step": step, "loss": loss} for step, loss in enumerate(losses, 1)]


def overlap(step: int, **cosines: float | None) -> dict[str, Any]:
    junctions = {name: {"cosine": cosine, "ratio": 1.0} for name, cosine in cosines.items()}
    return {"kind": "overlap", "step": step, "junctions": junctions}


def test_the_band_spans_the_lowest_to_the_highest_seed() -> None:
    steps, mean, low, high = bands([{1: 0.0, 2: 4.0}, {1: 2.0, 2: 0.0}, {1: 4.0, 2: 2.0}])
    assert np.array_equal([steps, mean, low, high], [[1, 2], [2, 2], [0, 0], [4, 4]])


def test_steps_missing_for_one_seed_are_left_out() -> None:
    assert bands([{1: 0.0}, {2: 0.0}])[0].size == bands([])[0].size == 0


def test_one_seed_gives_a_line_without_a_band() -> None:
    html = figures_html({"clip": [train(1.0, 0.5)]}, target_dice=0.5)
    assert "line arm0" in html
    assert "band" not in html


def test_two_seeds_give_a_band_behind_the_line() -> None:
    html = figures_html({"clip": [train(1.0, 0.5), train(2.0, 0.5)]}, target_dice=0.5)
    assert html.index("band arm0") < html.index('"line arm0"')


def test_a_non_finite_loss_does_not_break_the_page() -> None:
    assert "nan" not in figures_html({"clip": [train(1.0, None, 0.5)], "none": [train(None)]}, target_dice=0.5)


def test_overlap_is_drawn_only_where_it_was_recorded() -> None:
    without = figures_html({"clip": [train(1.0, 0.5)]}, target_dice=0.5)
    recorded = [*train(1.0, 0.5), overlap(1, a=0.2, b=None), overlap(2, a=0.4, b=0.6)]
    drawn = figures_html({"clip": [recorded]}, target_dice=0.5)
    assert (without.count("<figure"), drawn.count("<figure")) == (2, 4)
    assert "Overlap: cosine" in drawn


def test_damaged_overlap_records_are_skipped() -> None:
    records = [{"kind": "overlap", "step": 1}, {"kind": "overlap", "step": 2, "junctions": {"a": 3}}]
    assert figures_html({"clip": [records]}, target_dice=0.5).count("<figure") == 2
