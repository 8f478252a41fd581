"""Voxel grids over the brain's box, and volumes on them."""

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
    """The part of a voxel grid that lies in the brain's box."""

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
