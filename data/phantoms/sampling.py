"""Draw the plan of a tumour: its kind, size and origin."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.phantoms.anatomy import Focus, Head, TumourPlan, rotation, template_points
from data.phantoms.grids import GROWTH_SPACING_MM, Field, PhantomGrid
from data.phantoms.template import load_anatomy, load_landmarks


@dataclass(frozen=True, kw_only=True)
class Kind:
    """The kind of tumour of a case."""

    enhances: bool
    n_foci: int
    whole_ml: float


def draw_kind(index: int, seed: int) -> Kind:
    """Draw the kind of a case; proportions are fixed and evenly spread, so ten cases in a row have some of each kind.

    Case i takes the i-th point of Richtmyer's additive recurrence, with a start given by the seed. Its steps are badly
    approximable irrational numbers, so short runs of cases do not cluster.
    """
    steps = np.array([(math.sqrt(5) - 1) / 2, math.sqrt(2) - 1, math.sqrt(3) - 1])
    plain, many, size = (np.random.default_rng(seed).random(3) + index * steps) % 1
    return Kind(
        enhances=bool(plain >= 0.2),
        n_foci=1 if many >= 0.25 else 2 if many >= 0.1 else 3,
        whole_ml=math.exp(math.log(12.0) + size * math.log(140.0 / 12.0)),
    )


def draw_tumour(rng: np.random.Generator, head: Head, kind: Kind) -> TumourPlan:
    """Draw all properties of a tumour that are fixed before it grows."""
    core_share = rng.uniform(0.18, 0.65) if kind.enhances else rng.uniform(0.3, 0.75)
    core_ml = kind.whole_ml * core_share
    return TumourPlan(
        foci=_draw_foci(rng, head, core_ml, kind.n_foci),
        core_ml=core_ml,
        oedema_ml=kind.whole_ml - core_ml,
        rim_share=float(rng.uniform(0.15, 0.55)) if kind.enhances else 0.0,
        mass_effect=float(rng.uniform(0.1, 0.4)),
        contour=(Field.draw(rng, 15.0), Field.draw(rng, 6.0)),
        rim=(Field.draw(rng, 6.0), Field.draw(rng, 12.0), Field.draw(rng, 5.0)),
        permeability=Field.draw(rng, 12.0),
        core_softness_mm=float(rng.uniform(0.3, 0.8)),
        oedema_softness_mm=float(rng.uniform(1.0, 3.0)),
    )


def _draw_foci(rng: np.random.Generator, head: Head, core_ml: float, n_foci: int) -> tuple[Focus, ...]:
    """Draw foci in cerebral white matter, apart from each other; their balls add up to the core's volume."""
    candidates_mm = _possible_centres(head)
    shares = rng.uniform(0.35, 1.0, n_foci)
    radii_mm = np.cbrt(shares / shares.sum() * core_ml * 1000 * 3 / (4 * math.pi))
    centres_mm = [candidates_mm[rng.integers(len(candidates_mm))]]
    for radius_mm in radii_mm[1:]:
        tries = candidates_mm[rng.integers(len(candidates_mm), size=64)]
        gaps = [np.linalg.norm(tries - c, axis=1) - r for c, r in zip(centres_mm, radii_mm, strict=False)]
        gap_mm = np.min(gaps, axis=0) - radius_mm
        # Take the nearest candidate with a clear gap: foci of one glioma are seldom at opposite ends of the brain.
        centres_mm.append(tries[np.argmin(np.where(gap_mm > 10, gap_mm, 1000 - gap_mm))])
    return tuple(
        Focus(centre_mm=c, radius_mm=float(r), stretch=_draw_stretch(rng))
        for c, r in zip(centres_mm, radii_mm, strict=True)
    )


def _draw_stretch(rng: np.random.Generator) -> npt.NDArray[np.float64]:
    logs = rng.normal(0, 0.18, 3)
    turn = rotation(rng.uniform(0, 2 * math.pi, 3))
    return turn.T @ np.diag(np.exp(logs - logs.mean())) @ turn


def _possible_centres(head: Head) -> npt.NDArray[np.float64]:
    """Points of the growth grid in cerebral white matter, shape (N, 3) in mm."""
    grid = PhantomGrid.of_spacing(GROWTH_SPACING_MM)
    points_mm = template_points(head, grid.axes_mm, None)
    white = load_anatomy(2).at("white", points_mm)
    landmarks = load_landmarks()
    depth_mm = landmarks.at("depth_mm", points_mm)
    x, y, z = points_mm
    brainstem_or_cerebellum = (z < -5) & (y < -15) & ((np.abs(x) < 25) | (y < -45))
    beside_ventricle = landmarks.at("ventricle", points_mm) > 0.2
    good = (white > 0.6) & (depth_mm > 9) & (z > -30) & (np.abs(x) > 8) & ~brainstem_or_cerebellum & ~beside_ventricle
    voxels = np.argwhere(good) + np.array(grid.start)
    return np.asarray(voxels * GROWTH_SPACING_MM, dtype=np.float64)
