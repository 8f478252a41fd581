"""Checks on a label map, against the brain that contains it and the images it was drawn on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from data.nifti import Volume, grid_difference
from data.preprocess import smallest_box
from data.quality.digest import Digest, grid_only, strides
from data.quality.finding import Finding

WHAT: Final = "label map"
#: A label map with more than this share outside the brain is misplaced.
MOST_OUTSIDE: Final = 0.1
#: Tumours with fewer voxels than this in the coarse copy are too small to be judged by intensity.
_LEAST_TUMOUR: Final = 500


@dataclass(frozen=True, kw_only=True)
class LabelDigest:
    """The data kept about a label map."""

    grid: Volume
    """Shape, affine and path, without voxels."""
    values: tuple[int, ...]
    """The distinct values, including 0."""
    box: tuple[slice, slice, slice] | None
    """The smallest box that contains every non-zero voxel; None if there is none."""
    tumour: npt.NDArray[np.bool_]
    """Mask of the non-zero voxels within the box."""
    coarse: npt.NDArray[np.bool_]
    """Mask of the non-zero voxels, subsampled like :attr:`data.quality.digest.Digest.coarse`."""


def digest_labels(label: Volume) -> LabelDigest:
    """Create the digest of a label map (uint8)."""
    marked = label.voxels != 0
    box = smallest_box(marked) if marked.any() else None
    tumour = marked if box is None else marked[box]
    counts = np.bincount(label.voxels[box if box is not None else ...].ravel(order="K"), minlength=1)
    counts[0] += marked.size - tumour.size
    steps = strides(label.voxels.shape, label.spacing_mm)
    return LabelDigest(
        grid=grid_only(label),
        values=tuple(int(value) for value in np.flatnonzero(counts)),
        box=box,
        tumour=np.ascontiguousarray(tumour),
        coarse=np.ascontiguousarray(marked[tuple(slice(None, None, step) for step in steps)]),
    )


def judge_labels(
    label: LabelDigest, brains: Sequence[npt.NDArray[np.bool_]], reference: Volume | None, flair: Digest | None
) -> list[Finding]:
    """All findings on a label map.

    Args:
        label: the label map.
        brains: for each contrast on the reference's grid, the mask of its non-zero voxels.
        reference: the grid of the contrasts; None if no contrast could be read.
        flair: FLAIR, if present and on the same grid.
    """
    difference = None if reference is None else grid_difference(reference, label.grid)
    if reference is not None and difference is not None:
        return [
            Finding(
                kind="another grid",
                severity="problem",
                contrast=WHAT,
                message=f"{difference} (compared with {reference.path.name})",
                action="Register and resample it to the images' grid, or find the right one",
            )
        ]
    if label.box is None:
        message = "every voxel is 0"
        action = "Used as a case without tumour. If the case has a tumour, leave it out with --split"
        return [Finding(kind="empty label map", severity="note", contrast=WHAT, message=message, action=action)]
    findings = outside(label.tumour, [brain[label.box] for brain in brains]) if brains else []
    findings += islands(label.tumour)
    if flair is not None and flair.is_image and not findings_of_place(findings):
        findings += brightness(label.coarse, flair)
    return findings


def findings_of_place(findings: list[Finding]) -> bool:
    """Whether a finding reports that the label map is misplaced."""
    return any(finding.kind == "label outside the brain" for finding in findings)


def outside(tumour: npt.NDArray[np.bool_], brains: Sequence[npt.NDArray[np.bool_]]) -> list[Finding]:
    """A finding if labelled voxels are where every image is 0: a problem if there are many, a note if few.

    Args:
        tumour: mask of the labelled voxels.
        brains: for each image, the mask of its non-zero voxels; same shape.
    """
    stray = tumour.copy()
    for brain in brains:
        stray &= ~brain
    out, size = int(np.count_nonzero(stray)), int(np.count_nonzero(tumour))
    if not out:
        return []
    much = out > MOST_OUTSIDE * size
    return [
        Finding(
            kind="label outside the brain",
            severity="problem" if much else "note",
            contrast=WHAT,
            message=f"{out} of {size} labelled voxels are where every image is 0",
            action=(
                "Is it flipped, shifted, or from another patient? Give the right one"
                if much
                else "They are used as they are. Set them to 0 if they are strays"
            ),
        )
    ]


def islands(tumour: npt.NDArray[np.bool_]) -> list[Finding]:
    """A note on labelled voxels without any labelled voxel among their 26 neighbours."""
    count = lonely(tumour)
    if not count:
        return []
    return [
        Finding(
            kind="one-voxel islands",
            severity="note",
            contrast=WHAT,
            message=f"{count} labelled {'voxel has' if count == 1 else 'voxels have'} no labelled neighbour",
            action="Used as they are; the official lesion-wise scores ignore reference lesions this small",
        )
    ]


def lonely(mask: npt.NDArray[np.bool_]) -> int:
    """Number of marked voxels without a marked neighbour, diagonals included.

    Example:
        >>> mask = np.zeros((3, 3, 3), dtype=bool)
        >>> mask[0, 0, 0] = mask[2, 2, 1] = mask[2, 1, 2] = True
        >>> lonely(mask)
        1
    """
    around = np.pad(mask, 1).astype(np.uint8)
    for axis in range(3):  # sums of three voxels along each axis in turn give the 27 of a cube
        size = around.shape[axis]
        before, here, after = (np.take(around, range(k, size - 2 + k), axis=axis) for k in range(3))
        around = before + here + after
    return int(np.count_nonzero(mask & (around == 1)))


def brightness(coarse: npt.NDArray[np.bool_], flair: Digest) -> list[Finding]:
    """A note if FLAIR is no brighter in the label than in the rest of the brain; in a glioma it is brighter."""
    if coarse.shape != flair.coarse.shape:
        return []
    inside, healthy = flair.coarse[coarse], flair.coarse[(flair.coarse != 0) & ~coarse]
    if inside.size < _LEAST_TUMOUR or not healthy.size or np.median(inside) > np.median(healthy):
        return []
    return [
        Finding(
            kind="misplaced label",
            severity="note",
            contrast=WHAT,
            message="FLAIR is no brighter where it is labelled than in the rest of the brain",
            action="Check that the label map is this patient's and not flipped",
        )
    ]
