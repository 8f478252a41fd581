"""Make one synthetic case in memory from the case number, the series number and the spacing."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.errors import DataError
from data.labels import Contrast
from data.phantoms.anatomy import draw_head, sample_tissue
from data.phantoms.grids import PhantomGrid, scatter
from data.phantoms.growth import grow
from data.phantoms.lesion import place_lesion
from data.phantoms.lookalikes import draw_confounders
from data.phantoms.sampling import draw_kind, draw_tumour
from data.phantoms.scanner import scan


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """One synthetic case in memory."""

    images: dict[Contrast, npt.NDArray[np.int16]]
    """The four contrasts, each of shape (X, Y, Z); exactly 0 outside the brain and at least 1 inside."""
    codes: npt.NDArray[np.uint8]
    """The program's label codes 0 to 3, shape (X, Y, Z)."""
    affine: npt.NDArray[np.float64]
    """Voxel to world in mm, shape (4, 4): diag(-s, -s, s) with the origin (0, 239, 0) of BraTS."""


def make_phantom(index: int, *, seed: int = 0, spacing_mm: float = 2.0) -> Phantom:
    """Make one case; its voxels depend only on the three arguments.

    Args:
        index: number of the case, 0 to 99999.
        seed: number of the series, 0 or more (default 0); each series has different cases.
        spacing_mm: edge of a voxel, 0.5 to 8 mm (default 2); the field of view is always 240 x 240 x 155 mm.

    Returns:
        the case, with images of shape (round(240 / s), round(240 / s), round(155 / s)).

    Raises:
        DataError: an argument is out of range.

    Example:
        >>> make_phantom(0, spacing_mm=4.0).codes.shape
        (60, 60, 39)
    """
    check_arguments(index=index, seed=seed, spacing_mm=spacing_mm)
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence([seed, index]).spawn(5)]
    head_rng, tumour_rng, confounder_rng, scanner_rng, noise_rng = streams
    head = draw_head(head_rng)
    plan = draw_tumour(tumour_rng, head, draw_kind(index, seed))
    tumour = grow(plan, head)
    grid = PhantomGrid.of_spacing(spacing_mm)
    tissue = sample_tissue(head, plan, grid, fine=spacing_mm < 1.5)
    lesion = place_lesion(tumour, tissue, grid)
    confounders = draw_confounders(confounder_rng, tissue, grid)
    images = scan(scanner_rng, noise_rng, tissue, lesion=lesion, confounders=confounders, grid=grid)
    return Phantom(
        images={c: grid.embed(image) for c, image in images.items()},
        codes=grid.embed(scatter(lesion.codes, tissue.inside, 0)),
        affine=_affine(spacing_mm),
    )


def check_arguments(*, index: int = 0, seed: int = 0, spacing_mm: float = 2.0) -> None:
    """Raise a DataError that states the allowed range if an argument is out of range."""
    if not 0 <= index <= 99_999:
        raise DataError(f"case index is {index}; allowed are 0 to 99999, because case names have five digits.")
    if seed < 0:
        raise DataError(f"seed is {seed}; allowed is 0 or more. Choose a whole number that is not negative.")
    if not 0.5 <= spacing_mm <= 8.0:
        raise DataError(f"spacing_mm is {spacing_mm:g}; allowed are 0.5 to 8 mm. Choose a spacing in that range.")


def _affine(spacing_mm: float) -> npt.NDArray[np.float64]:
    affine = np.diag([-spacing_mm, -spacing_mm, spacing_mm, 1.0])
    affine[1, 3] = 239.0
    return affine
