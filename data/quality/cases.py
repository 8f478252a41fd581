"""Checks across the cases of a data set: the same image, or the same patient, under two ids."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from data.labels import Contrast
from data.quality.digest import Digest
from data.quality.finding import Finding

#: Correlation of thumbnails: 0.6 to 0.85 between two patients in one atlas, 1 for the same scan exported or rescaled.
SAME_SCAN: Final = 0.985
#: Voxel spacing of a thumbnail.
_PICTURE_MM: Final = 12.0
#: Thumbnails with fewer non-zero voxels are not compared.
_LEAST_VOXELS: Final = 200


@dataclass(frozen=True, kw_only=True)
class Prints:
    """The data kept about a case to recognise it again."""

    fingerprints: Mapping[Contrast, bytes]
    """Fingerprint of every contrast that is an image."""
    pictures: Mapping[Contrast, npt.NDArray[np.float32]]
    """Thumbnails of a few hundred to thousand voxels with mean 0 and norm 1, in which background differs from brain."""


def prints_of(images: Mapping[Contrast, Digest]) -> Prints:
    """Fingerprints of a case's contrasts, and a thumbnail of T1 or, without one, of the first contrast."""
    pictures = {}
    for contrast, one in list(images.items())[:1]:
        steps = [max(1, round(_PICTURE_MM / mm)) for mm in one.coarse_spacing_mm]
        picture = one.coarse[tuple(slice(step // 2, None, step) for step in steps)].astype(np.float32)
        if np.count_nonzero(picture) >= _LEAST_VOXELS:
            pictures[contrast] = _unit(picture)
    return Prints(fingerprints={contrast: one.fingerprint for contrast, one in images.items()}, pictures=pictures)


def _unit(picture: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Scale the brain to mean 2 and standard deviation 1 on a background of 0, then the image to mean 0 and norm 1."""
    brain = picture != 0
    values = picture - picture[brain].mean()
    values = np.where(brain, values / max(float(values[brain].std()), 1e-12) + 2, 0)
    values -= values.mean()
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-12), dtype=np.float32)


def judge_cases(prints: Mapping[str, Prints], patients: Mapping[str, str]) -> dict[str, list[Finding]]:
    """Findings by case id; cases of one patient (according to ``patients``) are not compared by appearance."""
    findings: dict[str, list[Finding]] = defaultdict(list)
    same = _same_images(prints)
    for pair, contrasts in same.items():
        for case, other in (pair, pair[::-1]):
            findings[case].append(
                Finding(
                    kind="same image",
                    severity="problem",
                    message=f"{', '.join(contrasts)} has the same voxels as in case {other}",
                    action="One patient under two ids leaks from training into validation. Keep one of the cases",
                )
            )
    for pair in sorted(_alike(prints) - set(same)):
        if patients[pair[0]] == patients[pair[1]]:
            continue
        for case, other in (pair, pair[::-1]):
            findings[case].append(
                Finding(
                    kind="same patient",
                    severity="note",
                    message=f"looks like case {other}: it may be the same scan, exported again",
                    action="If so, name one patient for both in a manifest's column patient, or keep one of them",
                )
            )
    return findings


def _same_images(prints: Mapping[str, Prints]) -> dict[tuple[str, str], list[Contrast]]:
    """Contrasts with equal images, by pair of cases; the first case that had an image comes first."""
    first: dict[bytes, str] = {}
    same: dict[tuple[str, str], list[Contrast]] = defaultdict(list)
    for case, own in prints.items():
        for contrast, fingerprint in own.fingerprints.items():
            original = first.setdefault(fingerprint, case)
            if original != case:
                same[original, case].append(contrast)
    return same


def _alike(prints: Mapping[str, Prints]) -> set[tuple[str, str]]:
    """Pairs of cases whose thumbnails, of the same contrast and shape, correlate."""
    groups: dict[tuple[Contrast, tuple[int, ...]], list[str]] = defaultdict(list)
    for case, own in prints.items():
        for contrast, picture in own.pictures.items():
            groups[contrast, picture.shape].append(case)
    pairs: set[tuple[str, str]] = set()
    for (contrast, _), cases in groups.items():
        pairs |= _alike_in(cases, np.stack([prints[case].pictures[contrast].ravel() for case in cases]))
    return pairs


def _alike_in(cases: Sequence[str], pictures: npt.NDArray[np.float32]) -> set[tuple[str, str]]:
    correlation = np.triu(pictures @ pictures.T, k=1)
    return {(cases[a], cases[b]) for a, b in np.argwhere(correlation > SAME_SCAN)}
