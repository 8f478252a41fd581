"""The gate in front of a segmentation: the decision of the presence network, and what it removes."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from app.inference.tumour_presence.gate import Gate, GateAnswer, remove_enhancing_
from app.inference.tumour_presence.model import Decision

TUNED = Decision(slope=2.0, intercept=-1.0, threshold=0.8, gate_threshold=0.3, tuned=True)


def gate(logits: Sequence[Sequence[float]], seen: list[tuple[int, ...]] | None = None) -> Gate:
    """A gate at 2 mm whose network gives these logits, and notes the shape of the image that it sees."""

    def answer(image: Any, *_: object) -> Any:
        if seen is not None:
            seen.append(image.shape)
        return np.array(logits)

    model: Any = SimpleNamespace(
        spacing_mm=(2.0, 2.0, 2.0),
        decisions={"ET": TUNED},
        logits=answer,
        probabilities=lambda found: {"ET": TUNED.probability(found[:, 0])},
        origin="RUN2",
        sha256="0",
    )
    none: Any = None
    return Gate(model=model, runtime=none)


def prepared(spacing_mm: float) -> Any:
    side = round(16 / spacing_mm)
    image = np.ones((4, side, side, side), dtype=np.float32)
    return SimpleNamespace(image=image, spacing_mm=(spacing_mm,) * 3, present=("t1", "t1c", "t2", "flair"))


@pytest.mark.parametrize("spacing_mm", [1.0, 2.0, 4.0])
def test_the_network_sees_the_case_at_its_own_spacing(spacing_mm: float) -> None:
    seen: list[tuple[int, ...]] = []
    gate([[0.0]], seen).answer(prepared(spacing_mm))
    assert seen == [(4, 8, 8, 8)]


def test_the_largest_calibrated_probability_of_a_slab_is_compared_with_the_threshold_of_the_gate() -> None:
    answer = gate([[-3.0], [0.25], [-1.0]]).answer(prepared(2.0))
    assert answer.probability == pytest.approx(1 / (1 + np.exp(0.5)))
    assert (answer.threshold, answer.tuned, answer.removes) == (0.3, True, False)


def test_enhancing_tumour_is_removed_below_the_threshold() -> None:
    assert gate([[-3.0], [-0.5]]).answer(prepared(2.0)).removes


def test_a_probability_at_the_threshold_counts_as_present() -> None:
    assert not GateAnswer(probability=0.3, threshold=0.3, tuned=True, run="RUN2", weights_sha256="0").removes


def test_removed_tumour_stays_in_core_and_whole_tumour() -> None:
    masks = np.random.default_rng(0).random((3, 4, 4, 4)) < 0.5
    before = masks.copy()
    assert remove_enhancing_(masks) == before[2].sum() > 0
    assert not masks[2].any()
    assert np.array_equal(masks[:2], before[:2])
