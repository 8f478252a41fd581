"""Simulate the four contrasts of a head with its tumour."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from data.labels import CONTRASTS, Contrast
from data.phantoms.anatomy import TissueClass
from data.phantoms.grids import Field, Floats, Mask, PhantomGrid, scatter
from data.phantoms.lesion import Lesion
from data.phantoms.lookalikes import Confounders

#: Intensity of (white matter, grey matter, fluid), relative to white matter on T1.
_TISSUES: Final[dict[Contrast, tuple[float, float, float]]] = {
    "t1": (1.00, 0.76, 0.30),
    "t1c": (0.98, 0.80, 0.28),
    "t2": (0.50, 0.70, 1.75),
    "flair": (0.66, 0.84, 0.22),
}
#: Intensity of (necrosis, oedema, enhancing tumour, core of a non-enhancing tumour).
_LESIONS: Final[dict[Contrast, tuple[float, float, float, float]]] = {
    "t1": (0.58, 0.74, 0.78, 0.62),
    "t1c": (0.52, 0.72, 1.45, 0.60),
    "t2": (1.30, 1.05, 0.88, 1.15),
    "flair": (0.85, 1.25, 1.12, 1.15),
}
#: How strongly the template's own detail, which its tissue maps do not explain, shows on each contrast.
_DETAIL_GAIN: Final[dict[Contrast, float]] = {"t1": 1.0, "t1c": 0.9, "t2": -0.8, "flair": -0.3}
#: Standard deviation of the blur in mm, in plane and across slices; T2 and FLAIR are often scanned in thick slices.
_BLUR_MM: Final[dict[Contrast, tuple[float, float]]] = {
    "t1": (0.5, 0.5),
    "t1c": (0.5, 0.6),
    "t2": (0.5, 0.9),
    "flair": (0.6, 1.1),
}


def scan(
    rng: np.random.Generator,
    noise_rng: np.random.Generator,
    tissue: TissueClass,
    *,
    lesion: Lesion,
    confounders: Confounders,
    grid: PhantomGrid,
) -> dict[Contrast, npt.NDArray[np.int16]]:
    """Render the four contrasts over the box; gain, bias field, blur and noise differ from case to case.

    Only noise is drawn voxel by voxel; it has a separate stream, so that the rest does not depend on the spacing.
    """
    images: dict[Contrast, npt.NDArray[np.int16]] = {}
    patches = Field.draw(rng, 7.0)
    for contrast in CONTRASTS:
        signal = _healthy_signal(rng, contrast, tissue, confounders)
        signal = _add_lesion(rng, contrast, signal, lesion, _mottle(rng, patches, grid, tissue.inside))
        signal *= np.exp(0.13 * Field.draw(rng, 75.0).on(grid.axes_mm)[tissue.inside])
        images[contrast] = _acquire(_draw_scanner(rng, contrast), noise_rng, signal, tissue.inside, grid)
    return images


def _healthy_signal(
    rng: np.random.Generator, contrast: Contrast, tissue: TissueClass, confounders: Confounders
) -> Floats:
    white, grey, fluid = _TISSUES[contrast] * np.exp(rng.normal(0, (0.02, 0.04, 0.08)))
    signal = white * tissue.white + grey * tissue.grey + fluid * _open_fluid(tissue, contrast)
    signal += _DETAIL_GAIN[contrast] * tissue.detail
    if contrast == "t1c":
        signal += rng.uniform(0.5, 1.1) * confounders.vessels
    elif contrast == "t2":
        signal *= 1 - 0.4 * confounders.vessels
        signal += rng.uniform(0.2, 0.4) * confounders.leukoaraiosis
    elif contrast == "flair":
        signal += rng.uniform(0.3, 0.6) * confounders.leukoaraiosis
    return np.asarray(signal, dtype=np.float32)


def _open_fluid(tissue: TissueClass, contrast: Contrast) -> Floats:
    """Fluid as it appears on T2: darker in the thin layer on the brain, half of which skull stripping removes."""
    if contrast != "t2":
        return tissue.fluid
    return tissue.fluid * np.clip(0.35 + 0.65 * tissue.depth_mm / 7, 0, 1)


def _mottle(rng: np.random.Generator, patches: Field, grid: PhantomGrid, inside: Mask) -> Floats:
    """Texture inside a tumour: patches shared by all contrasts, and finer ones specific to each."""
    own = Field.draw(rng, 4.0)
    return (0.7 * patches.on(grid.axes_mm) + 0.7 * own.on(grid.axes_mm))[inside]


def _add_lesion(rng: np.random.Generator, contrast: Contrast, signal: Floats, lesion: Lesion, mottle: Floats) -> Floats:
    """Mix the tumour's tissues into the healthy signal; the underlying anatomy shows through oedema."""
    necrosis, oedema, enhancing, solid = _LESIONS[contrast] * np.exp(rng.normal(0, 0.08, 4))
    inner = necrosis if lesion.enhances else solid
    swollen = signal + 0.85 * lesion.oedema * (oedema * (1 + 0.06 * mottle) - signal)
    core = inner * (1 + 0.13 * mottle) * (1 - lesion.enhancing) + enhancing * (1 + 0.15 * mottle) * lesion.enhancing
    return np.asarray(swollen + 0.93 * lesion.core * (core - swollen), dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class _Scanner:
    """Acquisition parameters of one contrast of one case."""

    gain: float
    """Stored value of a signal of 1."""
    blur_mm: tuple[float, float, float]
    noise: float
    """Standard deviation of the thermal noise, in units of signal."""
    surroundings: float
    """Signal outside the brain during blurring; it is removed afterwards."""


def _draw_scanner(rng: np.random.Generator, contrast: Contrast) -> _Scanner:
    plane_mm, slice_mm = (mm * rng.uniform(0.8, 1.4) for mm in _BLUR_MM[contrast])
    return _Scanner(
        gain=math.exp(rng.uniform(math.log(180.0), math.log(1600.0))),
        blur_mm=(plane_mm, plane_mm, slice_mm),
        noise=float(rng.uniform(0.012, 0.035)),
        surroundings=0.5 * _TISSUES[contrast][2],
    )


def _acquire(
    scanner: _Scanner, noise_rng: np.random.Generator, signal: Floats, inside: Mask, grid: PhantomGrid
) -> npt.NDArray[np.int16]:
    """Apply blur, Rician noise, gain and rounding; 0 outside the brain, at least 1 inside."""
    from scipy import ndimage

    texture, real, imaginary = noise_rng.standard_normal((3, signal.size), dtype=np.float32)
    volume = scatter(signal + np.float32(0.03) * texture, inside, scanner.surroundings)
    sigmas = [mm / grid.spacing_mm for mm in scanner.blur_mm]
    blurred = ndimage.gaussian_filter(volume, sigmas, truncate=3.0)[inside]
    noise = np.float32(scanner.noise)
    counts = np.float32(scanner.gain) * np.hypot(blurred + noise * real, noise * imaginary)
    return scatter(np.clip(np.rint(counts), 1, 32767).astype(np.int16), inside, 0)
