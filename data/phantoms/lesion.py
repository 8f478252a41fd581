"""A grown tumour on a grid: its labels and the shares of its tissues."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.labels import ENHANCING, NECROSIS, OEDEMA
from data.phantoms.anatomy import TissueClass, TumourPlan
from data.phantoms.grids import GROWTH_SPACING_MM, Floats, Mask, PhantomGrid, sigmoid
from data.phantoms.growth import GrownTumour, core_depth_mm, cortical_delay_mm


@dataclass(frozen=True, kw_only=True)
class Lesion:
    """A tumour on a grid, as vectors over the brain's voxels."""

    codes: npt.NDArray[np.uint8]
    core: Floats
    """Share of tumour core in each voxel, soft at its border."""
    enhancing: Floats
    """Share of the core that enhances."""
    oedema: Floats
    """Strength of oedema; fades outwards, beyond the labelled border."""
    enhances: bool
    """Whether any of the tumour enhances; a core without enhancement looks different from necrosis."""


def place_lesion(tumour: GrownTumour, tissue: TissueClass, grid: PhantomGrid) -> Lesion:
    """Label the tumour on a grid, and soften its borders for the scanner."""
    plan = tumour.plan
    depth_mm = (core_depth_mm(plan, grid.axes_mm) - np.float32(tumour.core_offset_mm))[tissue.inside]
    enhancing_mm = _enhancing_depth_mm(plan, depth_mm, tissue, grid)
    beyond_mm = _arrival_at(tumour, grid, tissue.inside) + cortical_delay_mm(tissue) - tumour.oedema_reach_mm
    open_tissue = tissue.fluid < 0.5
    is_core = open_tissue & (depth_mm > 0)
    codes = np.where(open_tissue & (beyond_mm < 0), OEDEMA, 0).astype(np.uint8)
    codes[is_core] = NECROSIS
    codes[is_core & (enhancing_mm > 0)] = ENHANCING
    reach_mm = max(tumour.oedema_reach_mm, 6.0)
    fade = np.clip(0.7 - 0.3 * beyond_mm / reach_mm, 0, 1)
    softness_mm = np.float32(plan.core_softness_mm)
    return Lesion(
        codes=codes,
        core=sigmoid(depth_mm / softness_mm) * (1 - tissue.fluid),
        enhancing=sigmoid(enhancing_mm / softness_mm),
        oedema=fade * sigmoid(np.float32(0.7) - beyond_mm / np.float32(plan.oedema_softness_mm)) * (1 - tissue.fluid),
        enhances=plan.rim_share > 0,
    )


def _enhancing_depth_mm(plan: TumourPlan, depth_mm: Floats, tissue: TissueClass, grid: PhantomGrid) -> Floats:
    """Depth within the enhancing part of the core (an uneven rim with gaps, and nests); negative elsewhere."""
    if plan.rim_share == 0:
        return np.full(depth_mm.shape, -100.0, dtype=np.float32)
    thickness, gaps, nests = (field.on(grid.axes_mm)[tissue.inside] for field in plan.rim)
    mean_mm = max(plan.rim_share * max(f.radius_mm for f in plan.foci), 2.5)
    in_rim_mm = np.float32(mean_mm) * np.exp(np.float32(0.5) * thickness) - depth_mm
    in_rim_mm[gaps < -1.2] = -100.0
    in_nests_mm = np.float32(3.0) * (nests - np.float32(1.3))
    return np.asarray(np.maximum(in_rim_mm, in_nests_mm), dtype=np.float32)


def _arrival_at(tumour: GrownTumour, grid: PhantomGrid, inside: Mask) -> Floats:
    from scipy import ndimage

    growth = PhantomGrid.of_spacing(GROWTH_SPACING_MM)
    voxels = np.argwhere(inside).T + np.array(grid.start)[:, None]
    voxels = voxels * (grid.spacing_mm / growth.spacing_mm) - np.array(growth.start)[:, None]
    return ndimage.map_coordinates(tumour.arrival_mm, voxels, order=1, output=np.float32, mode="nearest")
