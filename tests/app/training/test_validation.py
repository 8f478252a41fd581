"""Validation: the same scores from tensors on a device as from numpy, and a bound on the time it takes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from app.training.trainer import Trainer
from app.training.validation import scored, scored_on_device


@given(st.integers(0, 2**32 - 1), st.sampled_from([-10.0, -0.5, 0.0, 0.5, 10.0]))
@settings(max_examples=40, derandomize=True, deadline=None)
def test_scores_on_a_device_equal_those_of_numpy(seed: int, shift: float) -> None:
    """The shifts make regions that are empty, full or neither, in the prediction or in the label map."""
    random = np.random.default_rng(seed)
    logits = torch.from_numpy(random.normal(shift, 1, (3, 5, 4, 3)).astype(np.float32))
    expected = random.integers(0, random.integers(1, 5), (5, 4, 3)).astype(np.uint8)
    codes, scores = scored(logits.clone(), expected)
    codes_on_device, scores_on_device = scored_on_device(logits, expected)
    assert np.array_equal(codes_on_device, codes)
    assert codes_on_device.dtype == np.uint8
    assert scores_on_device == scores


def is_due(*, progress: float, done: int, asked: int, share: float, steps: int | None = 1000) -> bool:
    """Whether a validation is due in a run of 100 seconds so far, of which validations took a share."""
    training = SimpleNamespace(validations=asked, steps=steps)
    state = SimpleNamespace(
        step=7, validated_step=3, validations=done, validation_seconds=100 * share / done if done else 0.0
    )
    trainer = SimpleNamespace(
        config=SimpleNamespace(training=training),
        state=state,
        validating=["a case"],
        _progress=lambda: progress,
        seconds=lambda: 100.0,
    )
    return Trainer._validation_is_due(cast(Any, trainer))


@pytest.mark.parametrize("share", [0.01, 0.9])
def test_up_to_ten_validations_of_a_step_budget_are_made_at_any_cost(share: float) -> None:
    assert is_due(progress=0.5, done=4, asked=10, share=share)
    assert not is_due(progress=0.5, done=5, asked=10, share=share)


def test_more_validations_are_made_while_they_are_cheap() -> None:
    assert is_due(progress=0.5, done=24, asked=50, share=0.09)
    assert not is_due(progress=0.5, done=24, asked=50, share=0.11)


def test_ten_of_many_expensive_validations_are_made_at_even_intervals() -> None:
    assert is_due(progress=0.5, done=4, asked=50, share=0.9)
    assert not is_due(progress=0.49, done=4, asked=50, share=0.9)


def test_with_a_budget_in_hours_only_the_first_expensive_validation_is_made() -> None:
    assert is_due(progress=0.5, done=0, asked=10, share=0.0, steps=None)
    assert not is_due(progress=0.5, done=1, asked=10, share=0.11, steps=None)
    assert is_due(progress=0.5, done=1, asked=10, share=0.09, steps=None)
