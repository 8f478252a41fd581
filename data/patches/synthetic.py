"""Synthetic images of a patch: its tissues with random contrasts, as SynthSeg makes them.

A network that learns from such images must rely on shape, as no contrast is ever the same (Billot et al., Medical
Image Analysis 86, 102789, 2023, doi 10.1016/j.media.2023.102789). SynthSeg has label maps of all structures of the
brain. Here only the tumour is labelled, so the rest of the brain is divided by the intensities of a real contrast.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from data.patches import intensity

#: Smallest and largest number of classes into which the brain outside the tumour is divided.
CLASSES: Final = (3, 6)
#: Ranges of the mean and the standard deviation of a class: the defaults of SynthSeg's program (model_inputs.py).
_MEAN: Final = (25.0, 225.0)
_SPREAD: Final = (5.0, 25.0)
#: Range of the standard deviation of the blur, in voxels: less than a voxel, for partial volumes.
_BLUR_VOXELS: Final = (0.3, 0.9)
#: Share of the contrasts that have a bias field, and its largest absolute logarithm.
_UNEVEN: Final = 0.5
_BIAS_FIELD: Final = 0.5
#: Share of the contrasts that have a lower resolution, and the smallest share of the voxels kept along an axis.
_COARSE: Final = 0.5
_LEAST_RESOLUTION: Final = 0.4

FloatArray = npt.NDArray[np.float32]


def synthetic_image(image: FloatArray, codes: npt.NDArray[np.uint8], rng: np.random.Generator) -> FloatArray:
    """Generate new images for a patch: each contrast shows the same tissues with a different random appearance.

    Each contrast is ``mean[class] + spread[class] * noise``, with random means and spreads, and is slightly blurred;
    some get a bias field, some a lower resolution. Each is then z-scored over the patch's brain.

    Args:
        image: the real image, shape (contrasts, X, Y, Z), z-scored, 0 outside the brain.
        codes: the program's label codes, shape (X, Y, Z).
        rng: supplies all random numbers, so the same state gives the same image.

    Returns:
        float32, shape of ``image``; 0 outside the brain and, in contrasts that the patch lacks, everywhere.
    """
    brain, present = (np.asarray(image.any(axis=axes)) for axes in (0, (1, 2, 3)))
    if not brain.any():
        return np.zeros_like(image)
    guide = image[rng.choice(np.flatnonzero(present))]
    classes = tissue_classes(guide, codes, brain, int(rng.integers(CLASSES[0], CLASSES[1] + 1)))
    each = (len(image), int(classes.max()) + 1)
    means, spreads = (rng.uniform(*bounds, each).astype(np.float32) for bounds in (_MEAN, _SPREAD))
    values = rng.standard_normal(image.shape, dtype=np.float32)
    values *= spreads[:, classes]
    values += means[:, classes]
    values *= brain
    inside = torch.from_numpy(brain)
    blurred = intensity.blur(torch.from_numpy(values), inside, rng.uniform(*_BLUR_VOXELS))
    made: FloatArray = torch.stack([_scanned(contrast, inside, rng) for contrast in blurred]).numpy()
    made[~present] = 0
    return made


def tissue_classes(
    values: FloatArray, codes: npt.NDArray[np.uint8], brain: npt.NDArray[np.bool_], count: int
) -> npt.NDArray[np.intp]:
    """Divide a patch into tissues: the brain by intensity, and each tissue of the tumour as a class.

    Args:
        values: one contrast, shape (X, Y, Z).
        codes: label codes, same shape.
        brain: mask, same shape.
        count: number of equally large classes outside the tumour.

    Returns:
        class of each voxel: 0 to ``count - 1``, and ``count - 1 + code`` in the tumour.

    Example:
        >>> values = np.array([1, 2, 3, 4, 9], dtype=np.float32)
        >>> tissue_classes(values, np.array([0, 0, 0, 0, 3], dtype=np.uint8), values > 0, 2).tolist()
        [0, 0, 1, 1, 4]
    """
    healthy = values[brain & (codes == 0)]
    inner = np.linspace(0, 1, count + 1)[1:-1]
    bounds = np.quantile(healthy, inner) if healthy.size else np.zeros(count - 1)
    return np.where(codes > 0, count - 1 + codes, np.searchsorted(bounds, values, side="right"))


def _scanned(values: torch.Tensor, brain: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Apply random scanner effects (uneven coil, large voxels) to one contrast, and z-score it over the brain."""
    waves = torch.from_numpy(rng.standard_normal((intensity.BIAS_WAVES,) * 3, dtype=np.float32))
    strength, resolution = rng.uniform(0, _BIAS_FIELD), rng.uniform(_LEAST_RESOLUTION, 1)
    is_uneven, is_coarse = rng.random(2) < (_UNEVEN, _COARSE)
    if is_uneven:
        values = intensity.bias_field(values, brain, waves, strength)
    if is_coarse:
        values = intensity.low_resolution(values, brain, resolution)
    within = values[brain]
    return (values - within.mean()) / within.std(correction=0).clamp_min(1e-6) * brain
