"""Turn probabilities into masks: thresholds, removal of small components, filled cores, a minimum of enhancing tumour.

The functions take probabilities minus one half ("centred", -0.5 to 0.5), so that rounding moves none across one half.
Sources: every BraTS pipeline removes small components; relabelling very little enhancing tumour as necrosis is from
nnU-Net's BraTS 2020 entry (Isensee et al., arXiv 2011.00848).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from data.labels import REGIONS
from data.nifti import Spacing
from data.preprocess import Box, smallest_box

Masks = npt.NDArray[np.bool_]
ByRegion = tuple[float, float, float]

_CONNECTED: Final = np.ones((3, 3, 3), dtype=bool)
#: Relative tolerance: voxel sizes come from affines and are inexact, so a component this close to the bound counts as
#: large enough.
_TOLERANCE: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class Postprocess:
    """Rules that turn a network's probabilities into masks; the defaults only cut at one half."""

    thresholds: ByRegion = (0.5, 0.5, 0.5)
    """By region: a voxel belongs to the region if its probability is above this."""
    smallest_mm3: ByRegion = (0.0, 0.0, 0.0)
    """By region: 26-connected components with less volume are removed."""
    smallest_share: float = 0.0
    """Components of WT with less than this share of the volume of its largest one are removed."""
    fill_core: bool = False
    """Voxels of WT that TC encloses on all sides belong to TC: an enhancing rim around necrosis that was not marked."""
    least_enhancing_mm3: float = 0.0
    """A case with less enhancing tumour in total gets none: those voxels stay in the core and become necrosis."""

    def __post_init__(self) -> None:
        if not all(0 < threshold < 1 for threshold in self.thresholds):
            raise ValueError(f"thresholds: above 0 and below 1, got {self.thresholds}")
        if not all(0 <= volume < np.inf for volume in (*self.smallest_mm3, self.least_enhancing_mm3)):
            raise ValueError(f"volumes: 0 or more mm3, got {self.smallest_mm3}, {self.least_enhancing_mm3}")
        if not 0 <= self.smallest_share <= 1:
            raise ValueError(f"smallest_share: 0 to 1, got {self.smallest_share}")

    @property
    def changes_nothing(self) -> bool:
        """Whether these are the defaults."""
        return self == Postprocess()

    def cut(self, centred: npt.NDArray[np.float32]) -> Masks:
        """Cut probabilities at the thresholds.

        Args:
            centred: probabilities minus one half, shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`.

        Returns:
            bool, the same shape; not yet nested.
        """
        bounds = np.array(self.thresholds, dtype=np.float64).reshape(3, 1, 1, 1) - 0.5
        return centred > bounds.astype(np.float32)

    def clean(self, masks: Masks, spacing_mm: Spacing) -> Masks:
        """Remove components that are too small, fill the core and nest the masks.

        Regions are cleaned from the largest to the smallest, so TC and ET also lose the voxels that WT loses. The only
        voxels added to ``masks`` are those of ``fill_core``, to TC.

        Args:
            masks: bool, shape (3, X, Y, Z), nested or not; a larger region limits those inside it, as in
                ``data.labels.from_regions``.
            spacing_mm: voxel spacing of the grid.

        Returns:
            bool, the same shape; WT contains TC, and TC contains ET.
        """
        voxel_mm3 = float(np.prod(spacing_mm))
        cleaned = np.zeros_like(masks)
        around = np.ones(masks.shape[1:], dtype=bool)
        for number, smallest_mm3 in enumerate(self.smallest_mm3):
            mask = masks[number] & around
            if REGIONS[number] == "TC" and self.fill_core:
                mask = filled(mask) & around
            share = self.smallest_share if REGIONS[number] == "WT" else 0.0
            around = without_small_components(mask, smallest_mm3 / voxel_mm3, share)
            cleaned[number] = around
        if np.count_nonzero(around) * voxel_mm3 < self.least_enhancing_mm3 * (1 - _TOLERANCE):
            cleaned[-1] = False
        return cleaned

    def to_json(self) -> dict[str, Any]:
        """Return plain data for :func:`postprocess_from_json`."""
        return {
            "thresholds": dict(zip(REGIONS, self.thresholds, strict=True)),
            "smallest_mm3": dict(zip(REGIONS, self.smallest_mm3, strict=True)),
            "smallest_share": self.smallest_share,
            "fill_core": self.fill_core,
            "least_enhancing_mm3": self.least_enhancing_mm3,
        }

    def sentence(self) -> str:
        """Describe the rules that are not at their defaults, in words."""
        cuts = zip(REGIONS, self.thresholds, strict=True)
        sizes = zip(REGIONS, self.smallest_mm3, strict=True)
        parts = [f"{region} above {threshold:g}" for region, threshold in cuts if threshold != 0.5]
        parts += [f"{region} components of {volume:g} mm3 or more" for region, volume in sizes if volume]
        if self.smallest_share:
            parts.append(f"WT components of {self.smallest_share:.0%} of the largest or more")
        if self.fill_core:
            parts.append("what TC encloses is TC")
        if self.least_enhancing_mm3:
            parts.append(f"enhancing tumour below {self.least_enhancing_mm3:g} mm3 is necrosis")
        return "; ".join(parts) or "none: probabilities are cut at one half"


def postprocess_from_json(content: Mapping[str, Any]) -> Postprocess:
    """Return the rules from the output of :meth:`Postprocess.to_json`.

    Raises:
        KeyError, TypeError, ValueError: the content is not valid.
    """
    return Postprocess(
        thresholds=by_region(content["thresholds"]),
        smallest_mm3=by_region(content["smallest_mm3"]),
        # Ensembles of earlier versions lack these two.
        smallest_share=float(content.get("smallest_share", 0.0)),
        fill_core=bool(content.get("fill_core", False)),
        least_enhancing_mm3=float(content["least_enhancing_mm3"]),
    )


def by_region(numbers: Mapping[Any, Any]) -> ByRegion:
    """Return numbers in the order of :data:`data.labels.REGIONS`."""
    whole, core, enhancing = (float(numbers[region]) for region in REGIONS)
    return whole, core, enhancing


def connected_components(mask: Masks) -> tuple[Box, npt.NDArray[Any], npt.NDArray[np.int_]]:
    """Number the 26-connected components of a mask: voxels that share a face, an edge or a corner belong together.

    Returns:
        the bounding box of the mask; the number of the component of each voxel in it, 0 for the background; and the
        number of voxels by component, starting with the background.
    """
    box = smallest_box(mask)
    numbers, _ = ndimage.label(mask[box], structure=_CONNECTED)
    return box, numbers, np.bincount(numbers.ravel())


def without_small_components(mask: Masks, least_voxels: float, least_share: float = 0.0) -> Masks:
    """Remove the 26-connected components of a mask that have too few voxels.

    Args:
        mask: bool, shape (X, Y, Z).
        least_voxels: smallest size that is kept, not necessarily an integer.
        least_share: the same, as a share of the size of the largest component.

    Example:
        >>> without_small_components(np.array([[[True, False, True, True]]]), 2).tolist()
        [[[False, False, True, True]]]
    """
    if (least_voxels * (1 - _TOLERANCE) <= 1 and not least_share) or not mask.any():
        return mask
    box, numbers, sizes = connected_components(mask)
    sizes[0] = 0  # the background
    stays = sizes >= max(least_voxels, least_share * int(sizes.max()), 1) * (1 - _TOLERANCE)
    kept = np.zeros_like(mask)
    kept[box] = stays[numbers]
    return kept


def filled(mask: Masks) -> Masks:
    """Add the voxels that a mask encloses: those from which no path over voxel faces leads out of it.

    Args:
        mask: bool, shape (X, Y, Z).

    Example:
        >>> filled(np.array([[[True, False, True]]])).tolist()
        [[[True, False, True]]]
    """
    if not mask.any():
        return mask
    box = smallest_box(mask)
    whole = mask.copy()
    whole[box] = ndimage.binary_fill_holes(mask[box])
    return whole
