"""Mapping of a volume's slices to the screen: radiological orientation, one scale, square pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage


@dataclass(frozen=True, kw_only=True)
class Plane:
    """One anatomical plane of a volume in canonical LPS voxel order (x to Left, y to Posterior, z to Superior)."""

    name: str
    """Display name."""
    normal: int
    """Axis along which slices are numbered."""
    column_axis: int
    """Axis that runs from left to right on the screen."""
    row_axis: int
    """Axis that runs vertically on the screen."""
    row_sign: int
    """+1 if the voxel index increases downwards on the screen, -1 if upwards."""
    marks: str
    """Sides of the patient at the left, right, top and bottom of the picture."""


#: Radiological display: the patient's right is on the left of the picture; the face points up, or to the left.
PLANES: Final = (
    Plane(name="axial", normal=2, column_axis=0, row_axis=1, row_sign=1, marks="RLAP"),
    Plane(name="coronal", normal=1, column_axis=0, row_axis=2, row_sign=-1, marks="RLSI"),
    Plane(name="sagittal", normal=0, column_axis=1, row_axis=2, row_sign=-1, marks="APSI"),
)


@dataclass(frozen=True, kw_only=True)
class View:
    """The part of space that all panels of a picture show, at one scale, so that sizes are comparable across planes."""

    panel_px: int
    """Side of the square panel."""
    centre_mm: tuple[float, float, float]
    """Centre of the panel, relative to the outer corner of voxel (0, 0, 0)."""
    pixels_per_mm: float
    """Scale, the same in all directions."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along x, y and z."""


def shown_box(shown: npt.NDArray[np.bool_]) -> tuple[slice, ...]:
    """Return the bounding box of a mask; that of the whole volume for an empty mask."""
    found = ndimage.find_objects(shown.astype(np.int8))
    return found[0] if found else tuple(slice(0, size) for size in shown.shape)


def fit_view(
    shown: npt.NDArray[np.bool_], spacing_mm: tuple[float, float, float], *, panel_px: int, margin_px: int
) -> View:
    """Fit the bounding box of everything to be shown into a panel.

    Args:
        shown: mask of shape (X, Y, Z); if it is empty, the whole volume is shown.
        spacing_mm: voxel size.
        panel_px: side of the square panel.
        margin_px: free pixels on each side.

    Returns:
        a view in which the longest side of the box is ``panel_px - 2 * margin_px`` pixels long.
    """
    sides = [(part.start * mm, part.stop * mm) for part, mm in zip(shown_box(shown), spacing_mm, strict=True)]
    x, y, z = ((first + last) / 2 for first, last in sides)
    scale = (panel_px - 2 * margin_px) / max(last - first for first, last in sides)
    return View(panel_px=panel_px, centre_mm=(x, y, z), pixels_per_mm=scale, spacing_mm=spacing_mm)


def largest_slice(mask: npt.NDArray[np.bool_], plane: Plane) -> int:
    """Return the index of the slice with the largest mask area; the first one in a tie."""
    return int(np.argmax(np.count_nonzero(mask, axis=(plane.column_axis, plane.row_axis))))


def sample(
    volume: npt.NDArray[np.generic], plane: Plane, index: int, view: View, *, smooth: bool
) -> npt.NDArray[np.float32]:
    """Sample a volume at the pixel centres of a panel; values beyond the volume are 0.

    Args:
        volume: shape (X, Y, Z).
        plane: plane of the slice.
        index: position along the plane's normal, in voxels from 0.
        view: visible part of the slice.
        smooth: True for linear interpolation (intensities), False for the nearest voxel (labels), whose edges outlines
            follow.

    Returns:
        shape (panel_px, panel_px), row 0 at the top of the screen.
    """
    offset_mm = np.asarray((np.arange(view.panel_px) + 0.5 - view.panel_px / 2) / view.pixels_per_mm, dtype=np.float64)
    columns = _voxel(offset_mm, plane.column_axis, view)
    rows = _voxel(plane.row_sign * offset_mm, plane.row_axis, view)
    # `take` keeps the order of the two remaining axes: the column axis comes before the row axis.
    image = np.take(volume, index, axis=plane.normal).astype(np.float32)
    where = np.stack(np.meshgrid(columns, rows, indexing="xy"))
    sampled = ndimage.map_coordinates(image, where, order=1 if smooth else 0, mode="constant", cval=0.0)
    return np.asarray(sampled, dtype=np.float32)


def _voxel(offset_mm: npt.NDArray[np.float64], axis: int, view: View) -> npt.NDArray[np.float64]:
    """Convert a distance from the panel's centre to a voxel coordinate, 0 at the centre of the first voxel."""
    return np.asarray((view.centre_mm[axis] + offset_mm) / view.spacing_mm[axis] - 0.5, dtype=np.float64)
