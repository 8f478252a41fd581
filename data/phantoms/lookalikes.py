"""Structures that are bright on a contrast but are not tumour."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.phantoms.anatomy import TissueClass
from data.phantoms.grids import Field, Floats, PhantomGrid, sigmoid


@dataclass(frozen=True, kw_only=True)
class Confounders:
    """Bright structures other than tumour, as strengths from 0 to 1 over the brain's voxels."""

    leukoaraiosis: Floats
    """White-matter hyperintensities of ageing: bright on FLAIR and T2, never labelled."""
    vessels: Floats
    """Blood that takes up contrast agent: bright only on T1c, dark on T2."""


def draw_confounders(rng: np.random.Generator, tissue: TissueClass, grid: PhantomGrid) -> Confounders:
    """Draw how aged the white matter is and where vessels run."""
    age = rng.beta(1.2, 1.5)
    patches, spots, one, other = (Field.draw(rng, pitch).on(grid.axes_mm)[tissue.inside] for pitch in (9, 5, 9, 9))
    caps = sigmoid(np.float32(8) * (tissue.ventricle + np.float32(0.25) * patches + np.float32(0.5 * age - 1.05)))
    spotted = sigmoid(np.float32(6) * (np.float32(0.7) * spots + np.float32(0.5) * patches - np.float32(2.6 - age)))
    leukoaraiosis = age * np.maximum(caps, spotted * (tissue.depth_mm > 8)) * tissue.white**2
    # The zero sets of two fields are sheets that intersect in a line: a tube around it winds like a vessel.
    width = np.float32(0.16)
    tubes = np.exp(-(one**2 + other**2) / (2 * width**2)) * np.clip(tissue.fluid + 0.6 * (tissue.depth_mm < 12), 0, 1)
    sinus = sigmoid(2 * (2.5 - tissue.midline_mm)) * sigmoid(1.5 * (3.5 - tissue.depth_mm))
    plexus = tissue.fluid * (tissue.ventricle > 0.5) * sigmoid(6 * (patches - 1.0))
    vessels = np.clip(tubes + sinus + 0.7 * plexus, 0, 1)
    return Confounders(leukoaraiosis=leukoaraiosis.astype(np.float32), vessels=vessels.astype(np.float32))
