"""The head of one person, the plan of a tumour, and the tissue of both on a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from data.phantoms.grids import Field, Floats, Mask, PhantomGrid
from data.phantoms.template import load_anatomy, load_landmarks

_BRAIN_CENTRE_MM: Final = (120.0, 120.0, 69.0)
#: The point of MNI space (right, anterior, superior) mapped to the brain's centre: about the middle of the brain mask.
_TEMPLATE_CENTRE_MM: Final = (0.0, -18.0, 5.0)
#: MNI's average head is larger than BraTS' SRI24 head: 1.88 l of brain instead of about 1.3 l.
_HEAD_SCALE: Final = 0.87


@dataclass(frozen=True, kw_only=True)
class Head:
    """One person: how the template is rotated, scaled, warped and aged."""

    matrix: npt.NDArray[np.float64]
    """Maps mm from the brain's centre (left, posterior, superior) to mm from the template's centre."""
    shift_mm: npt.NDArray[np.float64]
    bends: tuple[tuple[float, tuple[Field, Field, Field]], ...]
    """Amplitude in mm and the three components of each warp."""
    atrophy: float
    """How much fluid is widened at the expense of grey matter."""
    ragged: Field
    """Where the skull stripping cut deeper."""


@dataclass(frozen=True, kw_only=True)
class Focus:
    """One centre of growth."""

    centre_mm: npt.NDArray[np.float64]
    radius_mm: float
    stretch: npt.NDArray[np.float64]
    """Matrix that maps the ellipsoid around the centre to a ball, shape (3, 3)."""


@dataclass(frozen=True, kw_only=True)
class TumourPlan:
    """The properties of a tumour that are drawn before it grows."""

    foci: tuple[Focus, ...]
    core_ml: float
    oedema_ml: float
    rim_share: float
    """Thickness of the enhancing rim relative to the radius; 0 if nothing enhances."""
    mass_effect: float
    contour: tuple[Field, Field]
    """Coarse and fine irregularity of the core's border."""
    rim: tuple[Field, Field, Field]
    """Thickness of the enhancing rim, gaps in it, and enhancing nests inside the core."""
    permeability: Field
    """How easily oedema spreads."""
    core_softness_mm: float
    oedema_softness_mm: float


def draw_head(rng: np.random.Generator) -> Head:
    """Draw one person's head."""
    angles = rng.normal(0, math.radians(2.5), 3)
    stretch = np.diag(np.exp(rng.normal(0, 0.018, 3)) / (_HEAD_SCALE * math.exp(rng.normal(0, 0.012))))
    matrix = rotation(angles) @ stretch @ np.diag([-1.0, -1.0, 1.0])
    scales = ((2.9, 45.0), (1.6, 18.0), (0.9, 9.0))
    bends = tuple((a, (Field.draw(rng, p), Field.draw(rng, p), Field.draw(rng, p))) for a, p in scales)
    return Head(
        matrix=matrix,
        shift_mm=rng.normal(0, 1.5, 3),
        bends=bends,
        atrophy=float(rng.uniform(0.2, 1.0)),
        ragged=Field.draw(rng, 14.0),
    )


def rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Matrix of the rotations about x, y and z, shape (3, 3)."""
    (a, b, c), (u, v, w) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, a, -u], [0, u, a]])
    about_y = np.array([[b, 0, v], [0, 1, 0], [-v, 0, b]])
    about_z = np.array([[c, -w, 0], [w, c, 0], [0, 0, 1]])
    return np.asarray(about_x @ about_y @ about_z, dtype=np.float64)


def template_points(head: Head, axes_mm: tuple[Floats, ...], plan: TumourPlan | None) -> Floats:
    """Positions in MNI space of a grid's points, shape (3, X, Y, Z); a tumour pushes tissue away from its foci."""
    points = np.stack(np.meshgrid(*axes_mm, indexing="ij"))
    if plan is not None:
        _pull_to_foci_(points, plan)
    for amplitude_mm, components in head.bends:
        for axis, field in enumerate(components):
            points[axis] += np.float32(amplitude_mm) * field.on(axes_mm)
    points -= (np.array(_BRAIN_CENTRE_MM) + head.shift_mm).astype(np.float32)[:, None, None, None]
    turned = np.tensordot(head.matrix.astype(np.float32), points, axes=1)
    turned += np.array(_TEMPLATE_CENTRE_MM, dtype=np.float32)[:, None, None, None]
    return turned


def _pull_to_foci_(points: Floats, plan: TumourPlan) -> None:
    """Mass effect: sample tissue nearer to the focus than the point itself, so that it appears pushed outwards."""
    for focus in plan.foci:
        centre = focus.centre_mm.astype(np.float32)[:, None, None, None]
        offset = points - centre
        reach_mm = 2.0 * focus.radius_mm
        pull = plan.mass_effect * np.exp(-np.sum(offset**2, axis=0) / np.float32(reach_mm**2))
        points -= pull * offset


@dataclass(frozen=True, kw_only=True)
class TissueClass:
    """A head on a grid; all fields but ``inside`` are vectors over the brain's voxels."""

    inside: Mask
    """Mask of the brain, shape of the box."""
    white: Floats
    grey: Floats
    fluid: Floats
    detail: Floats
    depth_mm: Floats
    ventricle: Floats
    midline_mm: Floats
    """Distance from the plane between the hemispheres."""


def sample_tissue(head: Head, plan: TumourPlan | None, grid: PhantomGrid, *, fine: bool) -> TissueClass:
    """Sample a head's tissue on a grid, displaced by a planned tumour; ``fine`` uses the 1 mm template."""
    anatomy, landmarks = load_anatomy(1 if fine else 2), load_landmarks()
    points_mm = template_points(head, grid.axes_mm, plan)
    cut = 0.5 + 0.12 * head.ragged.on(grid.axes_mm)
    inside = anatomy.at("brain", points_mm) > np.clip(cut, 0.2, 0.95)
    points_mm = points_mm[:, inside]
    white, grey, fluid = _sharpen(anatomy.at("white", points_mm), anatomy.at("grey", points_mm), head.atrophy)
    return TissueClass(
        inside=inside,
        white=white,
        grey=grey,
        fluid=fluid,
        detail=anatomy.at("detail", points_mm),
        depth_mm=landmarks.at("depth_mm", points_mm),
        ventricle=landmarks.at("ventricle", points_mm),
        midline_mm=np.abs(points_mm[0]),
    )


def _sharpen(white: Floats, grey: Floats, atrophy: float) -> tuple[Floats, Floats, Floats]:
    """Sharpen tissue fractions to those of one person: the template's are averages of 152 people."""
    fluid = np.clip(1 - white - grey, 0, 1) * np.float32(1.2 + atrophy)
    powers = [np.clip(tissue, 1e-4, None) ** np.float32(2.2) for tissue in (white, grey, fluid)]
    total = powers[0] + powers[1] + powers[2]
    return powers[0] / total, powers[1] / total, powers[2] / total
