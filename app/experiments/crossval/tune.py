"""Choose post-processing on out-of-fold predictions, and estimate its gain without bias.

The rules are tuned one after the other: threshold of each region, components of WT as a share of the largest, filled
core, smallest component of each region, least enhancing tumour. Each gets the value with the best objective while the
others are held fixed, but only if that gains at least :data:`MARGIN` over its current value. So on the cases it was
chosen on, the result is never worse than no post-processing. The gain on other cases is estimated like the networks'
Dice: rules are chosen on all folds but one and scored on that one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from app.evaluation.metrics import dice
from app.experiments.crossval.out_of_fold import OutOfFoldPrediction, read_prediction
from app.inference.postprocess import Postprocess
from data.labels import REGIONS, to_regions
from data.preprocess import smallest_box

FloatArray = npt.NDArray[np.float64]

#: Whole 256ths, so that they threshold stored bytes exactly.
THRESHOLDS: Final = (0.5, 0.4375, 0.5625, 0.375, 0.625, 0.3125, 0.6875)
SMALLEST_MM3: Final = (0.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
#: No larger share, which would remove the smaller lesions of tumours with several.
SMALLEST_SHARES: Final = (0.0, 0.05, 0.1, 0.2, 0.3)
LEAST_ENHANCING_MM3: Final = (0.0, 50.0, 100.0, 200.0, 300.0, 500.0, 750.0)
#: Minimum gain in the objective for which a value is adopted.
MARGIN: Final = 0.001
OBJECTIVE: Final = "mean Dice over cases and regions; a region empty in both counts 1"


@dataclass(frozen=True, kw_only=True)
class Step:
    """The tuning of one rule."""

    rule: str
    """Name of the rule, such as ``threshold TC``."""
    value: float
    """Its value after tuning."""
    gain: float
    """Gain in the objective over the previous value; 0 if that was kept."""
    best_candidate_gain: float
    """Largest gain among the candidates, adopted or not."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The chosen post-processing, and its gain."""

    chosen: Postprocess
    steps: tuple[Step, ...]
    before: float
    """Objective without post-processing, over all cases."""
    after: float
    """Objective with the chosen rules, on the cases they were chosen on."""
    nested: tuple[Postprocess, ...]
    """By fold: the rules chosen without the fold's cases."""
    nested_gains: tuple[float, ...]
    """By fold: gain of those rules on the fold's cases."""
    estimated_gain: float
    """Mean over all cases of the gain of the rules chosen without their fold."""

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "objective": OBJECTIVE,
            "margin": MARGIN,
            "objective_before": self.before,
            "objective_after": self.after,
            "gain_on_tuning_cases": self.after - self.before,
            "estimated_gain": self.estimated_gain,
            "steps": [asdict(step) for step in self.steps],
            "nested": [
                {"fold": fold, "gain": gain, "postprocess": rules.to_json()}
                for fold, (rules, gain) in enumerate(zip(self.nested, self.nested_gains, strict=True))
            ],
        }


class Scores:
    """Dice of every case under post-processing rules, computed once per set of rules."""

    def __init__(self, files: Mapping[str, Path], *, on_share: Callable[[float], None] = lambda _: None) -> None:
        """Take the files of the cases; scores are computed on demand.

        Args:
            files: files of :mod:`app.experiments.crossval.out_of_fold`, by case id.
            on_share: called after each case with the share done, which rises from 0 to 1 in each pass over the cases.
        """
        self._files = dict(files)
        self._known: dict[Postprocess, FloatArray] = {}
        self._on_share = on_share

    def of(self, candidates: Sequence[Postprocess]) -> list[FloatArray]:
        """Return the Dice under each candidate, shape (cases, 3); one pass over the files computes all new ones.

        Raises:
            RunError: a file is missing or damaged.
        """
        new = [rules for rules in dict.fromkeys(candidates) if rules not in self._known]
        if new:
            rows = []
            with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
                try:
                    for done, row in enumerate(pool.map(lambda file: _dice_under(file, new), self._files.values()), 1):
                        rows.append(row)
                        self._on_share(done / len(self._files))
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
            for rules, dices in zip(new, np.stack(rows, axis=1), strict=True):
                self._known[rules] = dices
        return [self._known[rules] for rules in candidates]


def tune(scores: Scores, fold_of: Sequence[int]) -> Tuning:
    """Choose rules on all cases, and again without each fold.

    Args:
        scores: scores of the cases.
        fold_of: fold of each case, in the order of the scores; from 0, with no empty fold.

    Raises:
        RunError: a file is missing or damaged.
    """
    folds = np.array(fold_of)
    chosen, steps = choose_rules(scores, np.ones(len(folds), dtype=bool))
    nested = [choose_rules(scores, folds != fold)[0] for fold in range(max(fold_of) + 1)]
    plain, tuned, *left_out = (dices.mean(axis=1) for dices in scores.of([Postprocess(), chosen, *nested]))
    gains = np.zeros(len(folds))
    for fold, dices in enumerate(left_out):
        gains[folds == fold] = (dices - plain)[folds == fold]
    return Tuning(
        chosen=chosen,
        steps=steps,
        before=float(plain.mean()),
        after=float(tuned.mean()),
        nested=tuple(nested),
        nested_gains=tuple(float(gains[folds == fold].mean()) for fold in range(len(nested))),
        estimated_gain=float(gains.mean()),
    )


def choose_rules(scores: Scores, used: npt.NDArray[np.bool_]) -> tuple[Postprocess, tuple[Step, ...]]:
    """Choose the rules that are best on some of the cases, one after the other.

    Args:
        scores: scores of all cases.
        used: mask of the cases to choose on, shape (cases,); at least one is True.
    """
    chosen, steps = Postprocess(), []
    for name, values, with_value in _coordinates():
        candidates = [with_value(chosen, value) for value in values]
        found = [float(dices[used].mean()) for dices in scores.of([chosen, *candidates])]
        gains = np.array(found[1:]) - found[0]
        best = int(gains.argmax())  # the first of equal gains, which changes least
        gain, adopted = float(gains[best]), bool(gains[best] >= MARGIN)
        place = best if adopted else candidates.index(chosen)
        steps.append(Step(rule=name, value=values[place], gain=gain if adopted else 0.0, best_candidate_gain=gain))
        chosen = candidates[place]
    return chosen, tuple(steps)


def _coordinates() -> list[tuple[str, tuple[float, ...], Callable[[Postprocess, float], Postprocess]]]:
    """Return the rules in tuning order: the name, the candidate values, and a function that sets one."""
    return [
        *((f"threshold {region}", THRESHOLDS, partial(_with, "thresholds", n)) for n, region in enumerate(REGIONS)),
        (
            "smallest component WT, share of the largest",
            SMALLEST_SHARES,
            lambda rules, value: replace(rules, smallest_share=value),
        ),
        ("fill TC (1: yes)", (0.0, 1.0), lambda rules, value: replace(rules, fill_core=bool(value))),
        *(
            (f"smallest component {region}, mm3", SMALLEST_MM3, partial(_with, "smallest_mm3", n))
            for n, region in enumerate(REGIONS)
        ),
        (
            "least enhancing tumour, mm3",
            LEAST_ENHANCING_MM3,
            lambda rules, value: replace(rules, least_enhancing_mm3=value),
        ),
    ]


def _with(name: str, number: int, rules: Postprocess, value: float) -> Postprocess:
    values = list(getattr(rules, name))
    values[number] = value
    changes: dict[str, Any] = {name: tuple(values)}
    return replace(rules, **changes)


def _dice_under(file: Path, candidates: Sequence[Postprocess]) -> FloatArray:
    """Return the Dice of one case under each candidate, shape (candidates, 3)."""
    prediction = cropped(read_prediction(file))
    expected = to_regions(prediction.reference)
    rows = []
    for rules in candidates:
        masks = rules.clean(prediction.cut(rules), prediction.spacing_mm)
        rows.append([dice(one, other) for one, other in zip(masks, expected, strict=True)])
    return np.array(rows, dtype=np.float64)


def cropped(prediction: OutOfFoldPrediction) -> OutOfFoldPrediction:
    """Crop a prediction to the box of the tumour in the reference and under all candidates; Dice needs no more."""
    may_be = (prediction.answers >= min(THRESHOLDS) * 256).any(axis=0) | (prediction.reference != 0)
    if not may_be.any():
        may_be[0, 0, 0] = True
    box = smallest_box(may_be)
    return replace(prediction, answers=prediction.answers[:, *box], reference=prediction.reference[box])
