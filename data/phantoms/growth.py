"""Grow a planned tumour: the border of its core and the spread of oedema."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.phantoms.anatomy import Head, TissueClass, TumourPlan, sample_tissue
from data.phantoms.grids import GROWTH_SPACING_MM, Floats, Mask, PhantomGrid, scatter


@dataclass(frozen=True, kw_only=True)
class GrownTumour:
    """A grown tumour: where its core ends, and when oedema arrives at each point of the growth grid."""

    plan: TumourPlan
    core_offset_mm: float
    arrival_mm: Floats
    """Distance from the core in mm of white matter, shape of the growth grid's box."""
    oedema_reach_mm: float


def core_depth_mm(plan: TumourPlan, axes_mm: tuple[Floats, ...]) -> Floats:
    """Depth below the core's border, before the border is shifted to enclose the planned volume; negative outside."""
    coarse, fine = (field.on(axes_mm) for field in plan.contour)
    swelling = 1 + np.float32(0.34) * coarse + np.float32(0.14) * fine
    depth_mm = np.full(coarse.shape, -np.inf, dtype=np.float32)
    x, y, z = np.meshgrid(*axes_mm, indexing="ij", sparse=True)
    for focus in plan.foci:
        offset = (x - focus.centre_mm[0], y - focus.centre_mm[1], z - focus.centre_mm[2])
        squares = sum((row[0] * offset[0] + row[1] * offset[1] + row[2] * offset[2]) ** 2 for row in focus.stretch)
        distance_mm = np.sqrt(np.asarray(squares, dtype=np.float32))
        depth_mm = np.maximum(depth_mm, np.float32(focus.radius_mm) * swelling - distance_mm)
    return depth_mm


def grow(plan: TumourPlan, head: Head) -> GrownTumour:
    """Shift the core's border and the oedema's reach until both have their planned volumes."""
    grid = PhantomGrid.of_spacing(GROWTH_SPACING_MM)
    tissue = sample_tissue(head, plan, grid, fine=False)
    voxel_ml = GROWTH_SPACING_MM**3 / 1000
    open_tissue = scatter(tissue.fluid < 0.5, tissue.inside, 0)
    depth_mm = np.where(open_tissue, core_depth_mm(plan, grid.axes_mm), -np.inf).astype(np.float32)
    core_offset_mm = _nth_largest(depth_mm[open_tissue], plan.core_ml / voxel_ml)
    core = depth_mm > core_offset_mm
    cost = scatter(_oedema_cost(tissue), tissue.inside, np.inf)
    cost *= np.exp(0.45 * plan.permeability.on(grid.axes_mm))
    arrival_mm = _arrival(cost, open_tissue, core)
    late_mm = arrival_mm + scatter(cortical_delay_mm(tissue), tissue.inside, 0)
    reach_mm = -_nth_largest(-late_mm[open_tissue & ~core], plan.oedema_ml / voxel_ml)
    return GrownTumour(plan=plan, core_offset_mm=core_offset_mm, arrival_mm=arrival_mm, oedema_reach_mm=reach_mm)


def _nth_largest(values: Floats, n: float) -> float:
    rank = min(max(round(n), 1), values.size - 1)
    return float(np.partition(values, values.size - 1 - rank)[values.size - 1 - rank])


def _oedema_cost(tissue: TissueClass) -> Floats:
    """Resistance of tissue to oedema: the millimetres of white matter equivalent to one millimetre of the tissue."""
    return np.float32(1) / (tissue.white + np.float32(0.12) * tissue.grey + np.float32(0.02))


def cortical_delay_mm(tissue: TissueClass) -> Floats:
    """Extra distance that keeps oedema out of the cortex at a finer scale than the growth grid."""
    return np.float32(6.0) * (1 - tissue.white)


def _arrival(cost: Floats, open_tissue: Mask, core: Mask) -> Floats:
    """Shortest path from the core to every voxel, by Dijkstra over the 26 neighbours; fluid is impassable."""
    from scipy import ndimage, sparse
    from scipy.sparse import csgraph

    number = np.full(cost.shape, -1, dtype=np.int32)
    number[open_tissue] = np.arange(np.count_nonzero(open_tissue), dtype=np.int32)
    edges = [_edges(number, cost, step) for step in np.ndindex(3, 3, 3) if step > (1, 1, 1)]
    first, second, length_mm = (np.concatenate(part) for part in zip(*edges, strict=True))
    size = np.count_nonzero(open_tissue)
    graph = sparse.csr_matrix((length_mm, (first, second)), shape=(size, size))
    found = csgraph.dijkstra(graph, directed=False, indices=number[core & open_tissue], min_only=True)
    reached = np.zeros(cost.shape, dtype=bool)
    reached[open_tissue] = np.isfinite(found)
    arrival_mm = np.zeros(cost.shape, dtype=np.float32)
    arrival_mm[reached] = found[np.isfinite(found)]
    # Unreached voxels take the nearest reached value, so that interpolation next to fluid has no jump.
    nearest = ndimage.distance_transform_edt(~reached, return_distances=False, return_indices=True)
    return np.asarray(arrival_mm[tuple(nearest)], dtype=np.float32)


def _edges(
    number: npt.NDArray[np.int32], cost: Floats, step: tuple[int, ...]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Pairs of open neighbours one step apart (0 to 2 per axis, 1 for no step), and the path length of each pair."""
    offset = [s - 1 for s in step]
    start = tuple(slice(max(0, -o), -o if o > 0 else None) for o in offset)
    end = tuple(slice(max(0, o), o if o < 0 else None) for o in offset)
    both = (number[start] >= 0) & (number[end] >= 0)
    step_mm = GROWTH_SPACING_MM * math.sqrt(sum(o * o for o in offset))
    length_mm = 0.5 * step_mm * (cost[start][both] + cost[end][both]).astype(np.float64)
    return number[start][both], number[end][both], length_mm
