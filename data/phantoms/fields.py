"""Smooth random fields, and the sigmoid that turns them into shares."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from data.phantoms.grids import BOX_END_MM, BOX_START_MM, Floats


@dataclass(frozen=True, kw_only=True)
class Field:
    """A smooth random field over the brain's box with unit spread: cubic B-splines on a lattice of normal numbers."""

    lattice: Floats
    pitch_mm: float

    @classmethod
    def draw(cls, rng: np.random.Generator, pitch_mm: float) -> Field:
        """Draw a field whose lattice points are ``pitch_mm`` apart."""
        lengths = zip(BOX_START_MM, BOX_END_MM, strict=True)
        shape = [math.ceil((b - a) / pitch_mm) + 4 for a, b in lengths]
        # A cubic B-spline averages independent numbers; 0.479 is its mean sum of squared weights along one axis.
        return cls(lattice=rng.standard_normal(shape, dtype=np.float32) / np.float32(0.479**1.5), pitch_mm=pitch_mm)

    def on(self, axes_mm: tuple[Floats, ...]) -> Floats:
        """Values at every point of a rectilinear grid."""
        values = self.lattice
        for axis_mm, start_mm in zip(axes_mm, BOX_START_MM, strict=True):
            weights = self._weights((axis_mm - start_mm) / self.pitch_mm, values.shape[0])
            # tensordot moves the processed axis to the end, so three rounds restore the order.
            values = np.tensordot(values, weights, axes=([0], [1]))
        return values

    @staticmethod
    def _weights(positions: Floats, size: int) -> Floats:
        distance = np.abs(positions[:, None] + 1 - np.arange(size, dtype=np.float32))
        near = 2 / 3 - distance**2 + distance**3 / 2
        far = np.clip(2 - distance, 0, None) ** 3 / 6
        return np.where(distance < 1, near, far).astype(np.float32)


def sigmoid(x: Floats) -> Floats:
    """Smooth step from 0 to 1."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * x)), dtype=np.float32)
