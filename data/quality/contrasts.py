"""Check the contrasts of one case together: grids, masks, and whether intensities contradict the names.

Tissue is compared after subtracting the local mean, so that bias fields, gains and the fall-off to the brain's rim
cancel. Physics then decides: white matter is brighter than grey matter on T1 and T1c and darker on T2 and FLAIR, so
rank correlation identifies the two pairs; fluid is dark on T1 and FLAIR and bright on T2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from data.labels import CONTRASTS, Contrast
from data.nifti import grid_difference
from data.preprocess import smallest_box
from data.quality.digest import Digest
from data.quality.finding import Finding

#: Approximate edge of the box for the local mean.
_LOCAL_MM: Final = 14.0
#: Coarser voxels, or fewer of them well inside the brain, do not distinguish tissues.
_COARSEST_MM: Final = 6.5
_LEAST_VOXELS: Final = 5000
#: Approximate number of voxels used for rank correlations.
_SAMPLE: Final = 40_000
#: Names are reported as wrong if another pairing exceeds theirs in correlation by more than this. In real cases with
#: correct names, the names' pairing leads by 0.4 to 1.3.
_PAIR_MARGIN: Final = 0.15
#: The same margin for fluid, in spreads of the local contrast. Real cases: 2.2 to 7.
_FLUID_MARGIN: Final = 1.5
#: Share of the voxels assumed to be fluid: the darkest ones of an image on which fluid is dark.
_FLUID_SHARE: Final = 0.03
#: Contrasts count as one patient's if any of three limits is reached. First: the Dice of their brain masks (real cases
#: 1.00, different patients up to 0.95).
SAME_MASK_DICE: Final = 0.97
#: Second: the share of one mask within the other, high if a field of view was cut (different patients up to 0.99).
PART_OF_MASK: Final = 0.997
#: Third: the correlation of their local contrasts (real cases 0.18 to 0.6, different patients up to 0.13).
SAME_ANATOMY: Final = 0.16
#: Minimum skew of the difference T1c - T1. Contrast agent only adds signal: real cases have 1.2 to 2.9.
_AGENT_SKEW: Final = -1.0
#: If a contrast lacks more than this share of the brain that the others show, its field of view counts as cut.
_LACKING: Final = 0.03


@dataclass(frozen=True, kw_only=True)
class Tissue:
    """Local contrast of the four contrasts over voxels well inside the brain."""

    spread: npt.NDArray[np.float32]
    """Shape (contrasts, voxels), in units of spread (half the distance between the quantiles 0.16 and 0.84)."""
    correlation: npt.NDArray[np.float64]
    """Rank correlation, shape (contrasts, contrasts)."""


def judge_contrasts(seen: Mapping[Contrast, Digest]) -> list[Finding]:
    """All findings on the contrasts together; those on another grid are excluded from the comparisons."""
    if not seen:
        return []
    findings, fitting = judge_grids(seen)
    images = {contrast: one for contrast, one in fitting.items() if one.is_image}
    findings += same_voxels(images)
    if any(finding.kind == "same image" for finding in findings) or len(images) < 2:
        return findings
    tissue = compare_tissue(images)
    strangers = other_patients(images, tissue)
    findings += strangers or lacking(images)
    if not strangers and tissue is not None and tuple(images) == CONTRASTS:
        findings += swapped(tissue)
    return findings


def judge_grids(seen: Mapping[Contrast, Digest]) -> tuple[list[Finding], dict[Contrast, Digest]]:
    """Findings on grids, and the contrasts on the most common grid (the first in order on a tie)."""
    groups: list[dict[Contrast, Digest]] = []
    for contrast, one in seen.items():
        for group in groups:
            if grid_difference(next(iter(group.values())).grid, one.grid) is None:
                group[contrast] = one
                break
        else:
            groups.append({contrast: one})
    shared = max(groups, key=len)
    reference = next(iter(shared.values())).grid
    findings = [
        Finding(
            kind="another grid",
            severity="problem",
            contrast=contrast,
            message=f"{grid_difference(reference, one.grid)} (compared with {reference.path.name})",
            action="Register and resample the contrasts to one grid",
        )
        for contrast, one in seen.items()
        if contrast not in shared
    ]
    return findings, shared


def same_voxels(images: Mapping[Contrast, Digest]) -> list[Finding]:
    """A problem for every contrast whose voxels equal those of an earlier one."""
    findings = []
    first: dict[bytes, Contrast] = {}
    for contrast, one in images.items():
        original = first.setdefault(one.fingerprint, contrast)
        if original != contrast:
            message = f"the same voxels as {original}"
            action = "One of the two files is not what its name says. Export it again"
            findings.append(
                Finding(kind="same image", severity="problem", contrast=contrast, message=message, action=action)
            )
    return findings


def compare_tissue(images: Mapping[Contrast, Digest]) -> Tissue | None:
    """Local contrast and its correlations; None if voxels are too coarse or too few."""
    one = next(iter(images.values()))
    if max(one.coarse_spacing_mm) > _COARSEST_MM or len({image.coarse.shape for image in images.values()}) > 1:
        return None
    brain = np.logical_and.reduce([image.coarse != 0 for image in images.values()])
    if np.count_nonzero(brain) < _LEAST_VOXELS:
        return None
    box = smallest_box(brain)
    brain = brain[box]
    widths = [max(3, round(_LOCAL_MM / mm) | 1) for mm in one.coarse_spacing_mm]
    cover = ndimage.uniform_filter(brain.astype(np.float32), widths, mode="constant")
    inside = brain & (cover > 0.9)
    if np.count_nonzero(inside) < _LEAST_VOXELS:
        return None
    local = np.stack([_local_contrast(image.coarse[box], brain, inside, cover, widths) for image in images.values()])
    low, high = np.quantile(local, (0.16, 0.84), axis=1)
    widest = np.maximum((high - low) / 2, np.finfo(np.float32).tiny)
    step = max(1, local.shape[1] // _SAMPLE)
    return Tissue(
        spread=(local / widest[:, None]).astype(np.float32), correlation=np.atleast_2d(_ranks(local[:, ::step]))
    )


def _local_contrast(
    voxels: npt.NDArray[np.float32],
    brain: npt.NDArray[np.bool_],
    inside: npt.NDArray[np.bool_],
    cover: npt.NDArray[np.float32],
    widths: list[int],
) -> npt.NDArray[np.float32]:
    """The voxels marked by ``inside``, each minus the mean of the brain around it."""
    values = np.where(brain, voxels, 0).astype(np.float32)
    values /= max(np.abs(values).max(), np.finfo(np.float32).tiny)
    mean = ndimage.uniform_filter(values, widths, mode="constant")[inside] / cover[inside]
    return np.asarray(values[inside] - mean, dtype=np.float32)


def _ranks(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Spearman's correlation between rows; ties are broken arbitrarily, which does not matter for so many values."""
    ranks = rows.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return np.asarray(np.corrcoef(ranks), dtype=np.float64)


def other_patients(images: Mapping[Contrast, Digest], tissue: Tissue | None) -> list[Finding]:
    """A problem for contrasts whose mask and anatomy match none of the others'."""
    if tissue is None:
        return []
    names = list(images)
    masks = [image.coarse != 0 for image in images.values()]
    sizes = [int(np.count_nonzero(mask)) for mask in masks]
    groups = [{name} for name in names]
    dice: dict[str, float] = dict.fromkeys(names, 0.0)
    for first, second in combinations(range(len(names)), 2):
        common = int(np.count_nonzero(masks[first] & masks[second]))
        overlap = 2 * common / (sizes[first] + sizes[second])
        for name in (names[first], names[second]):
            dice[name] = max(dice[name], overlap)
        one_mask = overlap >= SAME_MASK_DICE or common >= PART_OF_MASK * min(sizes[first], sizes[second])
        if one_mask or abs(tissue.correlation[first, second]) >= SAME_ANATOMY:
            one, other = (next(group for group in groups if names[k] in group) for k in (first, second))
            if one is not other:
                groups.remove(other)
                one |= other
    own = max(groups, key=len)
    return [
        Finding(
            kind="another patient",
            severity="problem",
            contrast=name,
            message=(
                f"shows other anatomy than {', '.join(n for n in names if n in own)}: the brain masks overlap to a "
                f"Dice of {dice[name]:.2f} at most, and tissue does not correlate"
            ),
            action="Is it from another patient, or not registered? Give the right file, or register it",
        )
        for name in names
        if name not in own
    ]


def lacking(images: Mapping[Contrast, Digest]) -> list[Finding]:
    """A note for every contrast that lacks a part of the brain present in the others."""
    masks = {contrast: image.coarse != 0 for contrast, image in images.items()}
    findings = []
    for contrast, mask in masks.items():
        others = [other for name, other in masks.items() if name != contrast]
        common = np.logical_and.reduce(others)
        whole = int(np.count_nonzero(common))
        missing = int(np.count_nonzero(common & ~mask))
        if whole < _LEAST_VOXELS or missing <= _LACKING * whole:
            continue
        findings.append(
            Finding(
                kind="cut field of view",
                severity="note",
                contrast=contrast,
                message=f"0 in {missing / whole:.0%} of the brain that the other contrasts show",
                action="Usable; the network sees only the other contrasts there. Was the field of view smaller?",
            )
        )
    return findings


def swapped(tissue: Tissue) -> list[Finding]:
    """Findings on names contradicted by intensities, for the four contrasts in project order."""
    looks = most_likely(tissue)
    wrong = [(name, look) for name, look in zip(CONTRASTS, looks, strict=True) if look != _weighting(name)]
    if wrong:
        return [
            Finding(
                kind="swapped contrasts",
                severity="problem",
                contrast=name,
                message=f"judging by white matter, grey matter and fluid, it looks like {look}, "
                f"not like {_weighting(name)}",
                action="Look at the images, then rename the files",
            )
            for name, look in wrong
        ]
    difference = tissue.spread[1] - tissue.spread[0]
    centred = difference - difference.mean()
    skew = float((centred**3).mean() / max(float((centred**2).mean()), 1e-12) ** 1.5)
    if skew >= _AGENT_SKEW:
        return []
    message = "some spots are brighter on t1 than on t1c, but a contrast agent only adds signal: the two may be swapped"
    action = "Look for bright vessels and tumour rims, which belong to t1c; rename the files if so"
    return [Finding(kind="swapped contrasts", severity="note", contrast="t1c", message=message, action=action)]


def most_likely(tissue: Tissue) -> tuple[str, str, str, str]:
    """Infer what each of the four contrasts looks like: ``T1 or T1c``, ``T2`` or ``FLAIR``.

    1. Of the three ways to split four into two pairs, choose the one whose pairs correlate most; a pairing other than
       that of the names must win by :data:`_PAIR_MARGIN`.
    2. Of its four readings (which pair is T1-weighted, which of the others is T2), choose the one on which fluid, the
       darkest voxels of either T1-weighted image, is brightest on T2 relative to FLAIR; a reading other than that of
       the names must win by :data:`_FLUID_MARGIN`.
    """
    pairings = (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2)))
    scores = [tissue.correlation[one] + tissue.correlation[other] for one, other in pairings]
    best = int(np.argmax(scores))
    if scores[best] - scores[0] <= _PAIR_MARGIN:
        best = 0
    one, other = pairings[best]
    readings = [(*one, *other), (*one, *other[::-1]), (*other, *one), (*other, *one[::-1])]
    fluids = [_fluid_contrast(tissue.spread, reading) for reading in readings]
    chosen = int(np.argmax(fluids))
    if best == 0 and fluids[chosen] - fluids[0] <= _FLUID_MARGIN:
        chosen = 0
    looks = dict(zip(readings[chosen], ("T1 or T1c", "T1 or T1c", "T2", "FLAIR"), strict=True))
    return (looks[0], looks[1], looks[2], looks[3])


def _fluid_contrast(spread: npt.NDArray[np.float32], reading: tuple[int, ...]) -> float:
    """How much brighter the third image is than the fourth where the first or the second is darkest."""
    first, second, t2, flair = reading
    total = 0.0
    for anchor in (first, second):
        fluid = spread[anchor] < np.quantile(spread[anchor], _FLUID_SHARE)
        if fluid.any():
            total += float(np.median(spread[t2, fluid]) - np.median(spread[flair, fluid]))
    return total / 2


def _weighting(name: Contrast) -> str:
    return {"t1": "T1 or T1c", "t1c": "T1 or T1c", "t2": "T2", "flair": "FLAIR"}[name]
