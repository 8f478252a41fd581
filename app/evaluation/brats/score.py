"""Scores of one case by the rules of a challenge: each region as a whole, and lesion by lesion.

Everything is computed in the joint box of all tissues plus the dilation, and distances in the joint box of the masks
that are compared. This does not change any score, since everything outside is background.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from app.evaluation.brats.lesions import (
    Lesions,
    Mask,
    Numbers,
    components,
    counted,
    joined_by,
    joined_components,
    without_small_lesions,
)
from app.evaluation.brats.rules import RegionRule, Rules
from app.evaluation.surfaces import Spacing, corner_codes, robust_distance_mm, surface_areas_mm2
from data.labels import CYST
from data.preprocess import smallest_box

Tissues = npt.NDArray[np.uint8]
Box = tuple[slice, slice, slice]


@dataclass(frozen=True, kw_only=True)
class OfficialScores:
    """One row of the table of a challenge's script."""

    lesion_dice: float
    """Mean Dice over reference lesions above the threshold and spurious lesions, which score 0."""
    lesion_hd95_mm: float
    """Mean HD95 in mm over the same lesions, with the rules' penalty for missed and spurious ones."""
    dice: float
    """Dice of the whole region ("legacy")."""
    hd95_mm: float
    """HD95 of the whole region in mm ("legacy")."""
    sensitivity: float
    """Sensitivity of the whole region; from 2024 on computed from lesion numbers, not voxels."""
    specificity: float
    """Specificity, computed in the same way."""
    true_positives: int
    """Number of reference lesions above the threshold that a predicted lesion reaches."""
    false_positives: int
    """Number of predicted lesions that reach no reference lesion of any size."""
    false_negatives: int
    """Number of reference lesions above the threshold that no predicted lesion reaches."""
    reference_volume_mm3: float
    """Volume of the region in the reference in mm^3."""
    nsd_05: float | None = None
    """Normalised surface Dice of the whole region at 0.5 mm; None for 2023, whose script has none."""
    nsd_10: float | None = None
    """The same at 1 mm."""
    lesion_nsd_05: float | None = None
    """Mean surface Dice at 0.5 mm over the same lesions as :attr:`lesion_dice`."""
    lesion_nsd_10: float | None = None
    """The same at 1 mm."""


@dataclass(frozen=True, kw_only=True)
class _Overlap:
    """How well a predicted lesion or region agrees with its reference."""

    dice: float
    hd95_mm: float
    nsd: tuple[float, ...]
    """Empty for rules without surface Dice."""


#: Tolerances in mm of the scripts' surface Dice.
TOLERANCES_MM = (0.5, 1.0)


def official_scores(
    prediction: Tissues, reference: Tissues, spacing_mm: Spacing, rules: Rules
) -> Mapping[str, OfficialScores]:
    """Score one case as the script of a challenge does.

    Args:
        prediction: codes of ``data.labels.decode_tissues``, shape (X, Y, Z), in the voxel order of the reference's
            file, which determines the numbering of lesions.
        reference: the same for the reference, on the same grid.
        spacing_mm: voxel edge lengths in mm along X, Y, Z; they are rounded to single precision, because the scripts
            read them from the header in that precision.
        rules: rules from :func:`app.evaluation.brats.rules.rules_for`.

    Returns:
        scores by region name, in the order of the script's table.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"the prediction has shape {prediction.shape}, the reference {reference.shape}")
    x, y, z = (float(np.float32(edge)) for edge in spacing_mm)
    case = _Case(prediction=prediction, reference=reference, spacing_mm=(x, y, z), rules=rules)
    return {rule.name: case.scores(rule) for rule in rules.scored}


class _Case:
    """Both label maps of a case, cropped, and the lesions of their regions."""

    def __init__(self, *, prediction: Tissues, reference: Tissues, spacing_mm: Spacing, rules: Rules) -> None:
        self.rules, self.spacing_mm, self.voxels, self.shape = rules, spacing_mm, reference.size, reference.shape
        self.voxel_mm3 = math.prod(spacing_mm)
        self.areas_mm2 = surface_areas_mm2(spacing_mm)
        margin = max(rule.dilation for rule in rules.regions) + 1
        box = _grown_box((prediction > 0) | (reference > 0), margin)
        pair = np.ascontiguousarray(prediction[box]), np.ascontiguousarray(reference[box])
        masks = {rule.name: _region_masks(pair, rule) for rule in rules.regions}
        if not any(rule.joins for rule in rules.regions):  # otherwise regions are compared and need the same box
            masks = {rule.name: _cropped(masks[rule.name], rule.dilation + 1) for rule in rules.regions}
        found = [
            {rule.name: self._lesions(masks[rule.name][side], rule, side) for rule in rules.regions} for side in (0, 1)
        ]
        joined = [{rule.name: _joined(rule, side) for rule in rules.scored} for side in found]
        self.masks, self.predicted, self.expected = masks, joined[0], joined[1]

    def _lesions(self, mask: Mask, rule: RegionRule, side: int) -> Lesions:
        predicted = side == 0
        if predicted and not self.rules.joined_predictions:
            return components(mask)
        lesions = joined_components(mask, rule.dilation)
        if not predicted:
            return lesions
        least = rule.threshold_mm3 / self.voxel_mm3 if self.rules.least_in_mm3 else rule.threshold_mm3
        return without_small_lesions(lesions, least)

    @property
    def penalty_mm(self) -> float:
        """HD95 if one side is empty."""
        return math.hypot(*self.shape) if self.rules.penalty_mm is None else self.rules.penalty_mm

    def scores(self, rule: RegionRule) -> OfficialScores:
        predicted, expected = self.predicted[rule.name], self.expected[rule.name]
        matches, overlap = _matches(predicted, expected), _overlaps(predicted, expected)
        present = np.flatnonzero(overlap.sum(axis=0))
        invented = len(set(present[present > 0].tolist()) - set().union(*matches.values()))
        large = overlap.sum(axis=1) * self.voxel_mm3 > rule.threshold_mm3
        counting = [number for number in range(1, expected.most + 1) if large[number]]
        lesions = [self._lesion(number, predicted, expected, matches[number], overlap) for number in counting]
        missed = sum(not matches[number] for number in counting)
        false = invented if self.rules.counts_invented else 0
        labels, whole = self._whole(rule, predicted, expected)
        sensitivity, specificity = self._shares(*labels)
        lesion_nsd = [_mean([lesion.nsd[k] for lesion in lesions], false, 0.0, 1.0) for k in range(len(whole.nsd))]
        return OfficialScores(
            lesion_dice=_mean([lesion.dice for lesion in lesions], false, 0.0, 1.0),
            lesion_hd95_mm=_mean([lesion.hd95_mm for lesion in lesions], false, self.penalty_mm, 0.0),
            dice=whole.dice,
            hd95_mm=whole.hd95_mm,
            sensitivity=sensitivity,
            specificity=specificity,
            true_positives=len(counting) - missed,
            false_positives=invented,
            false_negatives=missed,
            reference_volume_mm3=int(np.count_nonzero(expected.numbers)) * self.voxel_mm3,
            **dict(zip(("nsd_05", "nsd_10"), whole.nsd, strict=False)),
            **dict(zip(("lesion_nsd_05", "lesion_nsd_10"), lesion_nsd, strict=False)),
        )

    def _one_empty(self) -> _Overlap:
        """Return the scores of a region that is empty on exactly one side, or of a missed lesion."""
        return _Overlap(dice=0.0, hd95_mm=self.penalty_mm, nsd=self._nsd_for_all(0.0))

    def _nsd_for_all(self, value: float) -> tuple[float, ...]:
        return (value,) * len(TOLERANCES_MM) if self.rules.surface_dice else ()

    def _lesion(
        self, number: int, predicted: Lesions, expected: Lesions, match: set[int], overlap: npt.NDArray[np.int64]
    ) -> _Overlap:
        """Score a reference lesion against the predicted lesions that reach it."""
        if not match:
            return self._one_empty()
        chosen = sorted(match)
        marked = int(overlap[:, chosen].sum()) + int(overlap[number].sum())
        in_match = np.zeros(predicted.most + 1, dtype=np.bool_)
        in_match[chosen] = True
        mask, reference = in_match[predicted.numbers], expected.numbers == number
        box = smallest_box(mask | reference)
        mask, reference = mask[box], reference[box]
        return _Overlap(
            dice=2.0 * int(overlap[number, chosen].sum()) / marked,
            hd95_mm=self._hd95_mm(mask, reference),
            nsd=self._nsd(mask, reference),
        )

    def _hd95_mm(self, prediction: Mask | Tissues, reference: Mask | Tissues) -> float:
        codes = corner_codes(prediction), corner_codes(reference)
        found = robust_distance_mm(*codes, self.spacing_mm, self.areas_mm2, may_search=True)
        return found if math.isfinite(found) else self.penalty_mm

    def _nsd(self, prediction: Mask, reference: Mask) -> tuple[float, ...]:
        if not self.rules.surface_dice:
            return ()
        return border_dice(prediction, reference, self.spacing_mm, TOLERANCES_MM)

    def _whole(
        self, rule: RegionRule, predicted: Lesions, expected: Lesions
    ) -> tuple[tuple[Numbers, Numbers], _Overlap]:
        """Return the numbered label maps that the script compares, and the scores of the whole region."""
        if self.rules.joined_predictions:
            labels = predicted.numbers, expected.numbers
        else:
            first, second = self.masks[rule.name]
            labels = first.astype(np.int32), second.astype(np.int32)
        mask, reference = (side > 0 for side in labels)
        marked = int(np.count_nonzero(mask)), int(np.count_nonzero(reference))
        if not any(marked):
            return labels, _Overlap(dice=1.0, hd95_mm=0.0, nsd=self._nsd_for_all(1.0))
        if not all(marked):
            return labels, self._one_empty()
        box = smallest_box(mask | reference)
        as_bytes = [side[box].astype(np.uint8) for side in labels]
        return labels, _Overlap(
            dice=2.0 * int(np.count_nonzero(mask & reference)) / sum(marked),
            hd95_mm=self._hd95_mm(*as_bytes),
            nsd=self._nsd(mask[box], reference[box]),
        )

    def _shares(self, prediction: Numbers, reference: Numbers) -> tuple[float, float]:
        """Return sensitivity and specificity; a voxel of lesion n counts n times, as in the scripts of 2024."""
        marked, expected = int(prediction.sum(dtype=np.int64)), int(reference.sum(dtype=np.int64))
        both = int(np.count_nonzero((prediction == 1) & (reference == 1)))
        neither = self.voxels - int(np.count_nonzero((prediction == 1) | (reference == 1)))
        least = self.rules.least_denominator
        specificity = neither / (neither + (marked - both) + least)
        return (1.0 if not marked and not expected else both / (expected + least)), specificity


def _mean(values: list[float], invented: int, of_invented: float, of_none: float) -> float:
    """Return the mean over reference and spurious lesions; ``of_none`` if there are neither."""
    count = len(values) + invented
    return (math.fsum(values) + invented * of_invented) / count if count else of_none


def border_dice(
    prediction: Mask, reference: Mask, spacing_mm: Spacing, tolerances_mm: tuple[float, ...]
) -> tuple[float, ...]:
    """Compute the normalised surface Dice of nnU-Net and MedPy, in which every border voxel has the same weight.

    A voxel is on the border if one of its six neighbours is outside the mask. This differs from the area-weighted
    surface Dice of ``surface-distance``.

    Args:
        prediction: shape (X, Y, Z), not empty.
        reference: same shape, not empty.
        spacing_mm: voxel edge lengths in mm.
        tolerances_mm: distances up to which borders agree; one result each.

    Returns:
        for each tolerance a value from 0 to 1 - 5e-9, since the original adds 1e-8 to the denominator.
    """
    reach = [(math.floor(max(tolerances_mm) / edge),) * 2 for edge in spacing_mm]
    first, second = (np.pad(_border(mask), reach) for mask in (prediction, reference))
    sizes = np.count_nonzero(first), np.count_nonzero(second)
    found = []
    for tolerance_mm in tolerances_mm:
        pairs = (first, _within(second, spacing_mm, tolerance_mm)), (second, _within(first, spacing_mm, tolerance_mm))
        shares = [np.count_nonzero(border & near) / size for (border, near), size in zip(pairs, sizes, strict=True)]
        found.append(float(sum(shares) / (2 + 1e-8)))
    return tuple(found)


def _border(mask: Mask) -> Mask:
    """Return the voxels of a mask with one of their six neighbours outside; beyond the grid counts as outside."""
    border: Mask = mask ^ ndimage.binary_erosion(mask)
    return border


def _within(border: Mask, spacing_mm: Spacing, tolerance_mm: float) -> Mask:
    """Return the voxels within a tolerance of a border, which must be at least that far from the edge of the array."""
    close = border.copy()
    reach = [math.floor(tolerance_mm / edge) for edge in spacing_mm]
    for step in itertools.product(*(range(-voxels, voxels + 1) for voxels in reach)):
        if math.sqrt(sum((n * edge) ** 2 for n, edge in zip(step, spacing_mm, strict=True))) <= tolerance_mm:
            close |= np.roll(border, step, axis=(0, 1, 2))
    return close


def _region_masks(pair: tuple[Tissues, Tissues], rule: RegionRule) -> tuple[Mask, Mask]:
    inside = np.zeros(CYST + 1, dtype=np.bool_)
    inside[list(rule.tissues)] = True
    return inside[pair[0]], inside[pair[1]]


def _cropped(masks: tuple[Mask, Mask], margin: int) -> tuple[Mask, Mask]:
    """Crop both masks to their joint box plus a margin in voxels."""
    box = _grown_box(masks[0] | masks[1], margin)
    return np.ascontiguousarray(masks[0][box]), np.ascontiguousarray(masks[1][box])


def _grown_box(mask: Mask, margin: int) -> Box:
    """Return the box of a mask plus a margin in voxels; a single voxel for an empty mask."""
    if not mask.any():
        return (slice(0, 1),) * 3
    x, y, z = (
        slice(max(0, part.start - margin), min(size, part.stop + margin))
        for part, size in zip(smallest_box(mask), mask.shape, strict=True)
    )
    return x, y, z


def _joined(rule: RegionRule, found: Mapping[str, Lesions]) -> Lesions:
    """Merge the lesions of a region that touch the same lesion of another region, by its rule."""
    lesions = found[rule.name]
    for other in rule.joins:
        lesions = joined_by(lesions, found[other])
    return counted(lesions) if rule.joins else lesions


def _matches(predicted: Lesions, expected: Lesions) -> dict[int, set[int]]:
    """Return the predicted lesions that reach each dilated reference lesion, by its number."""
    both = (expected.grown > 0) & (predicted.numbers > 0)
    pairs = set(zip(expected.grown[both].tolist(), predicted.numbers[both].tolist(), strict=True))
    return {n: {p for e, p in pairs if e == n} for n in range(expected.most + 1)}


def _overlaps(predicted: Lesions, expected: Lesions) -> npt.NDArray[np.int64]:
    """Count the voxels of each pair of lesion numbers except (0, 0), shape (expected.most + 1, predicted.most + 1)."""
    width = predicted.most + 1
    marked = (expected.numbers | predicted.numbers) != 0
    both = np.bincount(expected.numbers[marked].astype(np.int64) * width + predicted.numbers[marked], minlength=width)
    full = np.zeros((expected.most + 1) * width, dtype=np.int64)
    full[: len(both)] = both
    return full.reshape(-1, width)
