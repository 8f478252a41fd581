"""A picture of each case: outlines of reference and prediction side by side, in three planes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.html.planes import PLANES, Plane, fit_view, largest_slice, sample
from data.labels import REGIONS, Region, to_regions

Picture = npt.NDArray[np.uint8]

#: Outline colours on grey tissue, repeated in page.css. Blue and yellow are from Okabe and Ito (2008); their vermilion
#: is replaced with this red, whose CIE76 colour difference from the other two and from every grey is at least 25 in
#: simulated protanopia, deuteranopia and tritanopia (Machado et al. 2009).
OUTLINE_COLOURS: Final[dict[Region, tuple[int, int, int]]] = {
    "WT": (86, 180, 233),
    "TC": (240, 228, 66),
    "ET": (255, 77, 77),
}
#: Pixels between the panels of a picture.
GAP_PX: Final = 4

_LEAST_PANEL_PX: Final = 64
_MARK_GREY: Final = 190
_GAP_GREY: Final = 60
#: Bitmaps of the letters for the patient's sides, 5 by 7 pixels, rows from top to bottom.
_LETTERS: Final[dict[str, str]] = {
    "R": "####. #...# #...# ####. #.#.. #..#. #...#",
    "L": "#.... #.... #.... #.... #.... #.... #####",
    "A": ".###. #...# #...# ##### #...# #...# #...#",
    "P": "####. #...# #...# ####. #.... #.... #....",
    "S": ".#### #.... #.... .###. ....# ....# ####.",
    "I": ".###. ..#.. ..#.. ..#.. ..#.. ..#.. .###.",
}


@dataclass(frozen=True, kw_only=True)
class OverlayCase:
    """Content of one picture; arrays are in canonical LPS voxel order (x to Left, y to Posterior, z to Superior)."""

    case: str
    """Case id."""
    background: npt.NDArray[np.float32]
    """Contrast behind the outlines, shape (X, Y, Z), of any intensity scale, 0 outside the brain."""
    background_name: str
    """Name of that contrast for the caption, e.g. ``FLAIR``."""
    prediction: npt.NDArray[np.uint8]
    """Predicted label codes 0 to 3, shape (X, Y, Z)."""
    reference: npt.NDArray[np.uint8] | None
    """Expert label map in the same codes, or None if there is none."""
    spacing_mm: tuple[float, float, float]
    """Voxel size along x, y and z."""

    def __post_init__(self) -> None:
        """Reject arrays of different shapes and invalid voxel sizes."""
        label_maps = [self.prediction] if self.reference is None else [self.prediction, self.reference]
        shapes = [self.background.shape, *(label_map.shape for label_map in label_maps)]
        if len(shapes[0]) != 3 or len(set(shapes)) != 1:
            raise ValueError(
                f"case {self.case}: background and label maps must have the same shape (X, Y, Z), not {shapes}"
            )
        if not all(math.isfinite(size) and size > 0 for size in self.spacing_mm):
            raise ValueError(f"case {self.case}: spacing_mm must be three positive numbers, not {self.spacing_mm}")


def overlay_picture(case: OverlayCase, *, height_px: int) -> Picture:
    """Draw a case: rows axial, coronal and sagittal; reference in the left column, prediction in the right.

    Each plane shows the slice where the reference's tumour is largest (the prediction's if the reference is missing or
    empty). Every panel is a square of ``height_px``, all at the same scale in pixels per mm. Without a reference the
    left column shows the plain image. Lines run along the outside of WT and TC and along the inside of ET, so that
    coinciding borders of two regions appear side by side.

    Args:
        case: arrays and spacing.
        height_px: side of one panel in pixels, 64 or more.

    Returns:
        uint8, shape (``3 * height_px + 2 * GAP_PX``, ``2 * height_px + GAP_PX``, 3).

    Raises:
        ValueError: ``height_px`` below 64.
    """
    return _join(_rows(case, PLANES, height_px), axis=0)


def axial_picture(case: OverlayCase) -> Picture:
    """Draw only the axial row of :func:`overlay_picture`, as an array."""
    return _rows(case, PLANES[:1], height_px=220)[0]


def shown_slices(case: OverlayCase) -> tuple[int, int, int]:
    """Return the voxel index of the axial (z), coronal (y) and sagittal (x) slice with the largest tumour area.

    Example: a tumour whose largest axial area is at z = 40 gives 40 first.
    """
    mask = np.ones(case.background.shape, dtype=np.bool_)
    for array in (case.background, case.prediction, case.reference):  # the last non-empty one wins
        if array is not None and np.any(array):
            mask = np.not_equal(array, 0)
    axial, coronal, sagittal = (largest_slice(mask, plane) for plane in PLANES)
    return axial, coronal, sagittal


def overlay_caption(case: OverlayCase) -> str:
    """Return the caption of the picture: contrast and slices, e.g. "FLAIR; axial slice z = 40, ..."."""
    axial, coronal, sagittal = shown_slices(case)
    where = f"axial slice z = {axial}, coronal y = {coronal}, sagittal x = {sagittal}"
    return f"{case.background_name}; {where} (voxel index from 0)."


def overlay_alt(case: str, dice: Mapping[Region, float], *, has_reference: bool) -> str:
    """Return the picture's alternative text, for people who cannot see it.

    Args:
        case: case id.
        dice: Dice by region, for the regions that have one.
        has_reference: whether the left column shows the outlines of a reference; else it shows the plain image.
    """
    text = (
        f"Case {case}: {'reference outlines' if has_reference else 'the image'} on the left, predicted outlines on the "
        "right, in three planes where the tumour is largest."
    )
    scores = ", ".join(f"{region} {value:.3f}" for region, value in dice.items())
    return f"{text} Dice {scores}." if scores else text


def _rows(case: OverlayCase, planes: Sequence[Plane], height_px: int) -> list[Picture]:
    """Draw a row for each plane: reference (or plain image) and prediction; ``planes`` is a prefix of PLANES."""
    if height_px < _LEAST_PANEL_PX:
        raise ValueError(f"height_px is {height_px}; a readable panel needs {_LEAST_PANEL_PX} pixels or more")
    grey = to_grey(case.background)
    margin_px = 8 * _letter_scale(height_px) + 2
    view = fit_view(_shown(case), case.spacing_mm, panel_px=height_px, margin_px=margin_px)
    rows = []
    for plane, index in zip(planes, shown_slices(case), strict=False):
        bare = _marked(sample(grey, plane, index, view, smooth=True), plane.marks)
        columns = [
            bare if codes is None else _outlined(bare, sample(codes, plane, index, view, smooth=False))
            for codes in (case.reference, case.prediction)
        ]
        rows.append(_join(columns, axis=1))
    return rows


def _shown(case: OverlayCase) -> npt.NDArray[np.bool_]:
    """Return the mask of everything that must be visible: the brain and both label maps."""
    shown = (case.background != 0) | (case.prediction != 0)
    return np.asarray(shown if case.reference is None else shown | (case.reference != 0), dtype=np.bool_)


def to_grey(background: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Window a contrast to grey between the 1st and 99.5th percentile of the brain; outside the brain it is 0.

    The brain uses 20 to 210 of 0..255, so that its darkest part differs from the black outside, and its brightest
    part from a yellow line.
    """
    values = np.nan_to_num(background, nan=0.0, posinf=0.0, neginf=0.0)
    brain = values != 0
    if not brain.any():
        return np.zeros(values.shape, dtype=np.float32)
    low, high = np.percentile(values[brain], (1.0, 99.5))
    share = np.clip((values - low) / max(high - low, 1e-12), 0, 1)
    return np.where(brain, 20 + 190 * share, 0).astype(np.float32)


def _marked(grey: npt.NDArray[np.float32], marks: str) -> Picture:
    """Return an RGB panel, with the letters of the patient's sides at the left, right, top and bottom."""
    panel = np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=2)
    side, scale = len(panel), _letter_scale(len(panel))
    height, width = 7 * scale, 5 * scale
    middle, centre = (side - height) // 2, (side - width) // 2
    corners = [(middle, scale), (middle, side - width - scale), (scale, centre), (side - height - scale, centre)]
    for mark, (row, column) in zip(marks, corners, strict=True):
        panel[row : row + height, column : column + width][_letter(mark, scale)] = _MARK_GREY
    return panel


def _letter(mark: str, scale: int) -> npt.NDArray[np.bool_]:
    small = np.array([[dot == "#" for dot in row] for row in _LETTERS[mark].split()])
    return small.repeat(scale, axis=0).repeat(scale, axis=1)


def _letter_scale(panel_px: int) -> int:
    return max(1, panel_px // 110)


def _outlined(panel: Picture, codes: npt.NDArray[np.float32]) -> Picture:
    """Return a copy of a panel with the outlines of the regions of a label map, sampled at its pixels."""
    lines = _lines(to_regions(codes.astype(np.uint8)), width_px=max(1, len(panel) // 150))
    outlined = panel.copy()
    for region, line in zip(REGIONS, lines, strict=True):
        outlined[line] = OUTLINE_COLOURS[region]
    return outlined


def _lines(masks: npt.NDArray[np.bool_], *, width_px: int) -> tuple[npt.NDArray[np.bool_], ...]:
    """Return the line of each region: WT outside the line of TC, TC outside its border, ET inside its border."""
    whole, core, enhancing = masks
    inner = ndimage.binary_erosion(enhancing, iterations=width_px)
    return (
        _grown(whole, 2 * width_px) & ~_grown(whole, width_px),
        _grown(core, width_px) & ~core,
        enhancing & ~inner,
    )


def _grown(mask: npt.NDArray[np.bool_], pixels: int) -> npt.NDArray[np.bool_]:
    return np.asarray(ndimage.binary_dilation(mask, iterations=pixels), dtype=np.bool_)


def _join(panels: list[Picture], *, axis: int) -> Picture:
    """Join panels side by side (axis 1) or one below the other (axis 0), with a grey gap between them."""
    shape = list(panels[0].shape)
    shape[axis] = GAP_PX
    gap = np.full(shape, _GAP_GREY, dtype=np.uint8)
    parts = [part for panel in panels for part in (panel, gap)]
    return np.concatenate(parts[:-1], axis=axis)
