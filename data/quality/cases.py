"""Judgements on the cases of a data set together: the same images, or the same patient, under two ids."""

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

#: Pictures of two patients in one atlas correlate by 0.6 to 0.85; the same scan, exported or scaled anew, by 1.
SAME_SCAN: Final = 0.985
#: Distance of the voxels of such a picture.
_PICTURE_MM: Final = 12.0
#: Pictures with fewer voxels that are not 0 say nothing.
_LEAST_VOXELS: Final = 200


@dataclass(frozen=True, kw_only=True)
class Prints:
    """What is kept of a case to find it again."""

    fingerprints: Mapping[Contrast, bytes]
    """Of every contrast that is an image."""
    pictures: Mapping[Contrast, npt.NDArray[np.float32]]
    """A few hundred to thousand voxels of each, of mean 0 and norm 1; 0 stays apart from the brain."""


def prints_of(images: Mapping[Contrast, Digest]) -> Prints:
    """What is kept of a case; of T1 alone, or else of the first contrast there is, a picture is kept."""
    pictures = {}
    for contrast, one in list(images.items())[:1]:
        steps = [max(1, round(_PICTURE_MM / mm)) for mm in one.coarse_spacing_mm]
        picture = one.coarse[tuple(slice(step // 2, None, step) for step in steps)].astype(np.float32)
        if np.count_nonzero(picture) >= _LEAST_VOXELS:
            pictures[contrast] = _unit(picture)
    return Prints(fingerprints={contrast: one.fingerprint for contrast, one in images.items()}, pictures=pictures)


def _unit(picture: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Values scaled over the brain so that its mean is 1 and 0 stays outside; then centred and of norm 1."""
    brain = picture != 0
    values = picture - picture[brain].mean()
    values = np.where(brain, values / max(float(values[brain].std()), 1e-12) + 2, 0)
    values -= values.mean()
    return np.asarray(values / max(float(np.linalg.norm(values)), 1e-12), dtype=np.float32)


def judge_cases(prints: Mapping[str, Prints], patients: Mapping[str, str]) -> dict[str, list[Finding]]:
    """Findings by case id; cases of one patient, by case id in ``patients``, are not compared by their looks."""
    findings: dict[str, list[Finding]] = defaultdict(list)
    same = _same_images(prints)
    for pair, contrasts in same.items():
        for case, other in (pair, pair[::-1]):
            findings[case].append(
                Finding(
                    kind="same image",
                    severity="problem",
                    message=f"{', '.join(contrasts)} holds the same voxels as in case {other}",
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
                    message=f"looks like case {other}: may be the same scan, exported anew",
                    action="If it is, state one patient for both in a manifest's column patient, or keep one of them",
                )
            )
    return findings


def _same_images(prints: Mapping[str, Prints]) -> dict[tuple[str, str], list[Contrast]]:
    """Pairs of cases that share an image, each with the first case that had it."""
    first: dict[bytes, str] = {}
    same: dict[tuple[str, str], list[Contrast]] = defaultdict(list)
    for case, own in prints.items():
        for contrast, fingerprint in own.fingerprints.items():
            original = first.setdefault(fingerprint, case)
            if original != case:
                same[original, case].append(contrast)
    return same


def _alike(prints: Mapping[str, Prints]) -> set[tuple[str, str]]:
    """Pairs of cases whose pictures of one contrast on one shape of grid correlate."""
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
