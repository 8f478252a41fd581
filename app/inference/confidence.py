"""What an answer tells of how far to trust it: nested probabilities, entropy, confidence, soft volumes, components.

Entropy of the mean probability is the usual measure of all uncertainty of a prediction, and the part of it by which
single answers are surer than their mean (mutual information) is the disagreement of the answers (Lakshminarayanan et
al., NeurIPS 2017; Wang et al., Neurocomputing 338, 34, 2019). By region, as in the uncertainty task of BraTS (Mehta et
al., MELBA 2022).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.special import entr

from app.config.inference import PredictOptions
from data.labels import REGIONS, Region
from data.nifti import SHARE_STEPS, Spacing
from data.preprocess import smallest_box

Floats = npt.NDArray[np.float32]
Masks = npt.NDArray[np.bool_]
ShareSteps = npt.NDArray[np.uint16]
#: A file beside the label map, as it is named: WT, TC and ET as volumes of one 4D file.
Companion = Literal["probabilities", "uncertainty", "disagreement"]
COMPANIONS: Final[tuple[Companion, ...]] = ("probabilities", "uncertainty", "disagreement")

#: Voxels that share a face, an edge or a corner are of one component.
_CONNECTED: Final = np.ones((3, 3, 3), dtype=bool)


def nested(centred: Floats) -> Floats:
    """Probabilities less one half of which none is above that of a larger region: WT >= TC >= ET.

    Networks answer for each region by itself; enhancing tumour is part of the core, and that of the whole tumour, so no
    probability can be larger than that of what holds it. Cut at one half, the regions are those of the label map.

    Args:
        centred: shape (3, ...), order of :data:`data.labels.REGIONS`.
    """
    smallest: Floats = np.minimum.accumulate(centred, axis=0)
    return smallest


def entropy_bits(centred: Floats) -> Floats:
    """Entropy of being in a region or not: 0 where the probability is 0 or 1, 1 where it is one half.

    Args:
        centred: probabilities less one half, any shape.

    Example:
        >>> entropy_bits(np.array([-0.5, 0.0, 0.5], dtype=np.float32)).tolist()
        [0.0, 1.0, 0.0]
    """
    half = np.float32(0.5)
    bits: Floats = np.clip((entr(half + centred) + entr(half - centred)) / np.float32(np.log(2)), 0, 1)
    return bits


def probability_steps(centred: Floats) -> ShareSteps:
    """Probabilities less one half in 65535ths; one above a whole 256th stays above it, one at or below stays so.

    So that a file cut at a threshold of this program gives the label map. The error is at most 1/65535.

    Example:
        >>> probability_steps(np.array([-0.5, 0.0, 1e-9, 0.5], dtype=np.float32)).tolist()
        [0, 32767, 32768, 65535]
    """
    # Products and sums of whole numbers below 2^24 are exact in float32.
    steps = np.ceil(centred.astype(np.float32, copy=False) * (SHARE_STEPS + 1)) + SHARE_STEPS // 2
    found: ShareSteps = np.clip(steps, 0, SHARE_STEPS).astype(np.uint16)
    return found


def bit_steps(bits: Floats) -> ShareSteps:
    """Entropies of 0 to 1 in 65535ths, rounded."""
    steps: ShareSteps = np.rint(bits * SHARE_STEPS).astype(np.uint16)
    return steps


def companions(centred: Floats, disagreement: Floats | None, options: PredictOptions) -> dict[Companion, ShareSteps]:
    """The arrays of the files that are asked for beside a label map, in 65535ths.

    Args:
        centred: nested probabilities less one half, shape (3, ...).
        disagreement: of several answers, in bits, the same shape.
        options: what is asked for.
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
    """What is known of an answer beside its label map."""

    volumes_ml: Mapping[Region, float]
    """By region: what is marked."""
    confidence: Mapping[Region, float | None]
    """By region: mean probability in the region as it is marked; None where nothing is."""
    soft_volumes_ml: Mapping[Region, float]
    """By region: sum of the probabilities times the volume of a voxel."""
    components: Mapping[Region, int]
    """By region: 26-connected components that are marked."""
    largest_component: float
    """Share of the marked whole tumour that lies in its largest component; 0 where nothing is marked."""
    answer_volumes_ml: tuple[Mapping[Region, float], ...]
    """By answer of a network for a mirrored image: the regions' volumes without post-processing beyond thresholds."""
    networks: int
    flips: int

    @property
    def volume_range_ml(self) -> dict[Region, tuple[float, float]] | None:
        """By region: least and largest volume over the answers; None of one answer."""
        if len(self.answer_volumes_ml) < 2:
            return None
        by_region = {region: [volumes[region] for volumes in self.answer_volumes_ml] for region in REGIONS}
        return {region: (min(volumes), max(volumes)) for region, volumes in by_region.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data, as it stands in ``<case>.json``."""
        spread = self.volume_range_ml
        return {
            "confidence": {r: None if c is None else round(c, 4) for r, c in self.confidence.items()},
            "soft_volumes_ml": {r: round(ml, 3) for r, ml in self.soft_volumes_ml.items()},
            "components": dict(self.components),
            "answers": {
                "networks": self.networks,
                "flips": self.flips,
                "volume_range_ml": None
                if spread is None
                else {region: [round(ml, 3) for ml in ends] for region, ends in spread.items()},
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
    """What marked regions and their probabilities tell.

    Args:
        masks: nested, after post-processing, shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`.
        centred: nested probabilities less one half, the same shape; -0.5 outside of the brain.
        spacing_mm: of these voxels.
        answer_voxels: by answer: voxels of each region.
        answer_spacing_mm: of those.
        networks: that answered.
        flips: mirrored images each answered for.
    """
    voxel_ml, answer_ml = (float(np.prod(spacing)) / 1000 for spacing in (spacing_mm, answer_spacing_mm))
    volumes: dict[Region, float] = {}
    confidence: dict[Region, float | None] = {}
    soft: dict[Region, float] = {}
    components: dict[Region, int] = {}
    for region, mask, share in zip(REGIONS, masks, centred, strict=True):
        volumes[region] = int(np.count_nonzero(mask)) * voxel_ml
        confidence[region] = float(share[mask].mean(dtype=np.float64)) + 0.5 if mask.any() else None
        soft[region] = float((share + np.float32(0.5)).sum(dtype=np.float64)) * voxel_ml
        components[region] = len(_component_sizes(mask))
    sizes = _component_sizes(masks[0])
    return Trust(
        volumes_ml=volumes,
        confidence=confidence,
        soft_volumes_ml=soft,
        components=components,
        largest_component=float(sizes.max() / sizes.sum()) if sizes.size else 0.0,
        answer_volumes_ml=tuple(
            {region: count * answer_ml for region, count in zip(REGIONS, counts, strict=True)}
            for counts in answer_voxels
        ),
        networks=networks,
        flips=flips,
    )


def _component_sizes(mask: Masks) -> npt.NDArray[np.int_]:
    """Voxels of each component, in no order."""
    if not mask.any():
        return np.zeros(0, dtype=int)
    numbers, _ = ndimage.label(mask[smallest_box(mask)], structure=_CONNECTED)
    return np.bincount(numbers.ravel())[1:]
