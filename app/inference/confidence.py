"""Confidence of a prediction: nested probabilities, entropy, mean probability, soft volumes, components.

The entropy of the mean probability is the usual measure of a prediction's total uncertainty. The amount by which it
exceeds the mean entropy of the single answers (mutual information) measures how far the answers disagree
(Lakshminarayanan et al., NeurIPS 2017; Wang et al., Neurocomputing 338, 34, 2019). Both are computed by region, as in
the uncertainty task of BraTS (Mehta et al., MELBA 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import entr

from app.config.inference import PredictOptions
from app.inference.postprocess import Masks, connected_components
from data.labels import REGIONS, Region
from data.nifti import SHARE_STEPS, Spacing

Floats = npt.NDArray[np.float32]
ShareSteps = npt.NDArray[np.uint16]
#: Name of an optional file next to the label map: a 4D file with one volume each for WT, TC and ET.
Companion = Literal["probabilities", "uncertainty", "disagreement"]
COMPANIONS: Final[tuple[Companion, ...]] = ("probabilities", "uncertainty", "disagreement")


def nested(centred: Floats) -> Floats:
    """Nest probabilities minus one half, so that none exceeds that of a larger region: WT >= TC >= ET.

    Networks predict each region separately. Enhancing tumour is part of the core, and the core is part of the whole
    tumour, so no region can be more probable than the one that contains it. Cutting the result at one half gives the
    regions of the label map.

    Args:
        centred: shape (3, ...), order of :data:`data.labels.REGIONS`.
    """
    smallest: Floats = np.minimum.accumulate(centred, axis=0)
    return smallest


def entropy_bits(centred: Floats) -> Floats:
    """Return the entropy of belonging to a region, in bits: 0 where the probability is 0 or 1, 1 where it is one half.

    Args:
        centred: probabilities minus one half, any shape.

    Example:
        >>> entropy_bits(np.array([-0.5, 0.0, 0.5], dtype=np.float32)).tolist()
        [0.0, 1.0, 0.0]
    """
    half = np.float32(0.5)
    bits: Floats = np.clip((entr(half + centred) + entr(half - centred)) / np.float32(np.log(2)), 0, 1)
    return bits


def probability_steps(centred: Floats) -> ShareSteps:
    """Quantise probabilities minus one half to 65535ths without moving any across a multiple of 1/256.

    A value above a multiple stays above it, and one at or below a multiple stays at or below it. Cutting the file at
    one of this program's thresholds therefore gives the label map. The error is at most 1/65535.

    Example:
        >>> probability_steps(np.array([-0.5, 0.0, 1e-9, 0.5], dtype=np.float32)).tolist()
        [0, 32767, 32768, 65535]
    """
    # Products and sums of integers below 2^24 are exact in float32.
    steps = np.ceil(centred.astype(np.float32, copy=False) * (SHARE_STEPS + 1)) + SHARE_STEPS // 2
    found: ShareSteps = np.clip(steps, 0, SHARE_STEPS).astype(np.uint16)
    return found


def bit_steps(bits: Floats) -> ShareSteps:
    """Quantise entropies from 0 to 1 to 65535ths, rounding to the nearest."""
    steps: ShareSteps = np.rint(bits * SHARE_STEPS).astype(np.uint16)
    return steps


def companions(centred: Floats, disagreement: Floats | None, options: PredictOptions) -> dict[Companion, ShareSteps]:
    """Return the arrays of the optional files that are requested, in 65535ths.

    Args:
        centred: nested probabilities minus one half, shape (3, ...).
        disagreement: disagreement of several answers, in bits, the same shape; None if it was not computed.
        options: determines which files are requested.
    """
    found: dict[Companion, ShareSteps] = {}
    if options.save_probabilities:
        found["probabilities"] = probability_steps(centred)
    if options.uncertainty:
        found["uncertainty"] = bit_steps(entropy_bits(centred))
        if disagreement is not None:
            found["disagreement"] = bit_steps(disagreement)
    return found


@dataclass(frozen=True, kw_only=True)
class Trust:
    """Measures of how far a prediction's label map can be trusted."""

    volumes_ml: Mapping[Region, float]
    """By region: volume in the label map."""
    confidence: Mapping[Region, float | None]
    """By region: mean probability inside the predicted region; None if the region is empty."""
    soft_volumes_ml: Mapping[Region, float]
    """By region: sum of the probabilities times the volume of a voxel."""
    components: Mapping[Region, int]
    """By region: number of 26-connected components in the label map."""
    largest_component: float
    """Share of the predicted whole tumour that is in its largest component; 0 if there is none."""
    answer_volumes_ml: tuple[Mapping[Region, float], ...]
    """One entry per network and mirrored image: the regions' volumes after thresholds, but no other post-processing."""
    networks: int
    flips: int

    @property
    def volume_range_ml(self) -> dict[Region, tuple[float, float]] | None:
        """Smallest and largest volume over the answers, by region; None for a single answer."""
        if len(self.answer_volumes_ml) < 2:
            return None
        by_region = {region: [volumes[region] for volumes in self.answer_volumes_ml] for region in REGIONS}
        return {region: (min(volumes), max(volumes)) for region, volumes in by_region.items()}

    def to_json(self) -> dict[str, Any]:
        """Return plain data, as written to ``<case>.json``."""
        ranges = self.volume_range_ml
        return {
            "confidence": {r: None if c is None else round(c, 4) for r, c in self.confidence.items()},
            "soft_volumes_ml": {r: round(ml, 3) for r, ml in self.soft_volumes_ml.items()},
            "components": dict(self.components),
            "answers": {
                "networks": self.networks,
                "flips": self.flips,
                "volume_range_ml": ranges and {r: [round(ml, 3) for ml in ends] for r, ends in ranges.items()},
            },
        }


def measure_confidence(
    masks: Masks,
    centred: Floats,
    spacing_mm: Spacing,
    *,
    answer_voxels: Sequence[tuple[int, int, int]],
    answer_spacing_mm: Spacing,
    networks: int,
    flips: int,
) -> Trust:
    """Measure the predicted regions and their probabilities.

    Args:
        masks: nested, after post-processing, shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`.
        centred: nested probabilities minus one half, the same shape; -0.5 outside the brain.
        spacing_mm: spacing of these voxels.
        answer_voxels: one entry per answer, the number of voxels of each region.
        answer_spacing_mm: spacing of the answers' voxels.
        networks: number of networks.
        flips: number of mirrored images per network.
    """
    voxel_ml, answer_ml = (float(np.prod(spacing)) / 1000 for spacing in (spacing_mm, answer_spacing_mm))
    volumes: dict[Region, float] = {}
    confidence: dict[Region, float | None] = {}
    soft: dict[Region, float] = {}
    sizes: dict[Region, npt.NDArray[np.int_]] = {}
    for region, mask, share in zip(REGIONS, masks, centred, strict=True):
        volumes[region] = int(np.count_nonzero(mask)) * voxel_ml
        confidence[region] = float(share[mask].mean(dtype=np.float64)) + 0.5 if mask.any() else None
        soft[region] = float((share + np.float32(0.5)).sum(dtype=np.float64)) * voxel_ml
        sizes[region] = connected_components(mask)[2][1:] if mask.any() else np.zeros(0, dtype=int)
    whole = sizes["WT"]
    return Trust(
        volumes_ml=volumes,
        confidence=confidence,
        soft_volumes_ml=soft,
        components={region: len(found) for region, found in sizes.items()},
        largest_component=float(whole.max() / whole.sum()) if whole.size else 0.0,
        answer_volumes_ml=tuple(
            {region: count * answer_ml for region, count in zip(REGIONS, counts, strict=True)}
            for counts in answer_voxels
        ),
        networks=networks,
        flips=flips,
    )
