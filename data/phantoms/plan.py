"""The properties of a tumour that are drawn before it grows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.phantoms.fields import Field


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
