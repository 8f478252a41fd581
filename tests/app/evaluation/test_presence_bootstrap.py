"""Measures of many bootstrap samples at once: those of scikit-learn on each sample by itself."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.evaluation.presence import BINS_OF_CASES, presence_measures
from app.evaluation.presence_bootstrap import measures_of_samples

# Few distinct values, so that equal probabilities and values at the threshold and at the edges of bins occur.
EXAMPLES = st.lists(
    st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.5001, 0.9, 1.0]), st.integers(0, 3)),
    min_size=1,
    max_size=12,
).filter(lambda examples: any(count for _, _, count in examples))


@given(EXAMPLES, st.sampled_from([0.1, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_a_bootstrap_sample_has_the_metrics_of_its_repeated_examples(
    examples: list[tuple[float, float, int]], threshold: float, specificity: float
) -> None:
    truth, probability, counts = (np.array(column) for column in zip(*examples, strict=True))
    rows = np.repeat(np.arange(len(examples)), counts)
    expected = presence_measures(truth[rows], probability[rows], threshold=threshold, specificity=specificity)
    found = measures_of_samples(
        truth,
        probability,
        counts[None].astype(float),
        threshold=threshold,
        specificity=specificity,
        bins=BINS_OF_CASES,
    )
    assert {name: None if np.isnan(value[0]) else value[0] for name, value in found.items()} == {
        name: None if value is None else pytest.approx(value, abs=1e-12) for name, value in expected.items()
    }
