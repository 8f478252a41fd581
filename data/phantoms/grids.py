"""Voxel grids over the brain's box, volumes on them, and smooth random fields."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

#: Field of view of a BraTS volume, and the box around its centre that always contains the brain.
_FIELD_OF_VIEW_MM: Final = (240.0, 240.0, 155.0)
BOX_START_MM: Final = (38.0, 24.0, 1.0)
BOX_END_MM: Final = (202.0, 216.0, 154.0)
#: Spacing of the grid on which tumours grow, independent of the output spacing so that their shape is too.
GROWTH_SPACING_MM: Final = 3.0


@dataclass(frozen=True, kw_only=True)
class PhantomGrid:
    """The part of a voxel grid inside the brain's box."""

    spacing_mm: float
    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    @classmethod
    def of_spacing(cls, spacing_mm: float) -> PhantomGrid:
        """The part of the field of view inside the box, at this spacing."""
        shape = tuple(round(length / spacing_mm) for length in _FIELD_OF_VIEW_MM)
        start = tuple(math.ceil(a / spacing_mm) for a in BOX_START_MM)
        stop = tuple(min(math.floor(b / spacing_mm) + 1, n - 1) for b, n in zip(BOX_END_MM, shape, strict=True))
        return cls(spacing_mm=spacing_mm, shape=shape, start=start, stop=stop)

    @property
    def axes_mm(self) -> tuple[Floats, ...]:
        """Positions of the box's voxels along each axis."""
        pairs = zip(self.start, self.stop, strict=True)
        return tuple((np.arange(a, b) * self.spacing_mm).astype(np.float32) for a, b in pairs)

    def embed(self, volume: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Embed a volume of the box into the whole field of view, 0 outside the box."""
        whole = np.zeros(self.shape, dtype=volume.dtype)
        whole[tuple(slice(a, b) for a, b in zip(self.start, self.stop, strict=True))] = volume
        return whole


def scatter(values: npt.NDArray[Any], inside: Mask, outside: float) -> npt.NDArray[Any]:
    """A volume with ``values`` inside the mask and a constant elsewhere."""
    volume = np.full(inside.shape, outside, dtype=values.dtype)
    volume[inside] = values
    return volume


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
