"""The running mean of the answers of several networks, and of one network for several mirrored images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from app.inference.confidence import entropy_bits
from app.inference.postprocess import ByRegion

A = TypeVar("A")
Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanAnswer:
    """The mean of answers over the brain box."""

    centred: Array
    """Mean probability minus one half, shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`; -0.5 outside the
    brain. Float32, or float16 if memory is short."""
    disagreement: npt.NDArray[np.float32] | None
    """Entropy of the mean minus the mean of the answers' entropies, in bits from 0 to 1, the same shape; None if it was
    not requested, or for a single answer."""
    volumes_voxels: tuple[tuple[int, int, int], ...]
    """One entry per answer: voxels of each region, after thresholds and nesting but no other post-processing."""


class AnswerMean(ABC, Generic[A]):
    """The mean of the answers so far; memory holds only one answer in addition to it.

    The mean of equal answers is exactly their value.

    Args:
        brain: shape (X, Y, Z); voxels outside it count as certain background.
        thresholds: for the volumes of each answer.
        uncertainty: whether the disagreement is computed, which takes two more arrays.
    """

    def __init__(self, brain: npt.NDArray[np.bool_], thresholds: ByRegion, *, uncertainty: bool) -> None:
        self.brain, self.thresholds, self.uncertainty = brain, thresholds, uncertainty
        self.count = 0
        self.mean: A | None = None
        self.entropy: A | None = None

    @abstractmethod
    def add(self, answer: A) -> None:
        """Take in probabilities minus one half, shape (3, X, Y, Z); overwrites them."""

    @abstractmethod
    def on_cpu(self) -> ArrayMean:
        """Return the mean so far in numpy, to which answers from the CPU can be added."""

    @abstractmethod
    def result(self) -> MeanAnswer:
        """Return the mean of the answers, of which there is at least one; nothing can be added afterwards."""


class ArrayMean(AnswerMean[Array]):
    """A mean in numpy."""

    def __init__(self, brain: npt.NDArray[np.bool_], thresholds: ByRegion, *, uncertainty: bool) -> None:
        super().__init__(brain, thresholds, uncertainty=uncertainty)
        self.volumes: list[tuple[int, int, int]] = []

    def add(self, answer: Array) -> None:
        """See :meth:`AnswerMean.add`."""
        self.count += 1
        self.volumes.append(_volumes(answer, self.brain, self.thresholds))
        if self.uncertainty:
            own = entropy_bits(answer)
            self.entropy = own if self.entropy is None else _towards(self.entropy, own, self.count)
        self.mean = answer if self.mean is None else _towards(self.mean, answer, self.count)

    def on_cpu(self) -> ArrayMean:
        """See :meth:`AnswerMean.on_cpu`."""
        return self

    def result(self) -> MeanAnswer:
        """See :meth:`AnswerMean.result`."""
        assert self.mean is not None
        spread: npt.NDArray[np.float32] | None = None
        if self.entropy is not None and self.count > 1:
            spread = np.clip(entropy_bits(self.mean) - self.entropy, 0, 1).astype(np.float32, copy=False)
            np.copyto(spread, np.float32(0), where=~self.brain)
        np.copyto(self.mean, self.mean.dtype.type(-0.5), where=~self.brain)
        return MeanAnswer(centred=self.mean, disagreement=spread, volumes_voxels=tuple(self.volumes))


def _towards(mean: Array, value: Array, count: int) -> Array:
    """Update the mean of ``count - 1`` values in place to that of ``count`` values; overwrites ``value``."""
    value = value.astype(mean.dtype, copy=False)
    value -= mean
    value /= value.dtype.type(count)
    mean += value
    return mean


def _volumes(centred: Array, brain: npt.NDArray[np.bool_], thresholds: ByRegion) -> tuple[int, int, int]:
    """Count the voxels of each region in one answer: above the threshold, nested, inside the brain."""
    counts = []
    inside = brain
    for share, threshold in zip(centred, thresholds, strict=True):
        inside = inside & (share > share.dtype.type(threshold - 0.5))
        counts.append(int(np.count_nonzero(inside)))
    return (counts[0], counts[1], counts[2])
