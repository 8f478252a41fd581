"""What augmentation does to the intensities of one contrast: pure functions of tensors, on whatever device they are.

Each takes z-scored values, 0 outside the brain, and returns new ones, 0 outside the brain; a brain of no voxel comes
back as it is. The list is that of nnU-Net (Isensee et al., Nature Methods 18, 203, 2021; its class nnUNetTrainer) and
the bias field of a receive coil.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

#: Cosines along each axis that make up a bias field; the first is the constant.
BIAS_WAVES: Final = 3
#: Where the kernel of a blur ends, in standard deviations.
_BLUR_REACH: Final = 4.0
#: Of the brain around a voxel of it, so that nothing is divided by 0.
_LEAST_WEIGHT: Final = 1e-6


def bias_field(values: Tensor, brain: Tensor, waves: Tensor, strength: float) -> Tensor:
    """Multiply by a smooth field, ``exp(strength * f)`` with ``f`` from -1 to 1.

    ``f`` is a sum of low cosines, as in SPM's bias correction (Ashburner and Friston, NeuroImage 26, 839, 2005). A
    scanner's field multiplies the raw signal, which is 0 where there is none; the darkest voxel of the brain stands in
    for that point of a z-scored image: ``darkest + (v - darkest) * field``.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        waves: weight of each cosine, shape (BIAS_WAVES,) * 3; that of the constant is not used.
        strength: the largest absolute logarithm of the field in the patch; 0 leaves all as it is.
    """
    if not brain.any() or strength == 0:
        return values
    weights = waves.to(values).clone()
    weights[0, 0, 0] = 0
    log_field = weights
    for axis, side in enumerate(values.shape):
        log_field = _along(log_field, _cosines(side, values), axis)
    log_field = log_field * (strength / log_field.abs().max().clamp_min(1e-12))
    darkest = values[brain].min()
    return (darkest + (values - darkest) * log_field.exp()) * brain


def stretch(values: Tensor, brain: Tensor, factor: float) -> Tensor:
    """Scale about the brain's mean, ``mean + (v - mean) * factor``, cut to the range the brain had: image contrast.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        factor: above 1 more contrast, below less.
    """
    if not brain.any():
        return values
    inside = values[brain]
    mean = inside.mean()
    return (mean + (values - mean) * factor).clamp(inside.min(), inside.max()) * brain


def range_gamma(values: Tensor, brain: Tensor, exponent: float, *, inverted: bool = False) -> Tensor:
    """Raise the brain's values, scaled to 0..1, to a power; mean and standard deviation stay what they were.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        exponent: above 1 spreads the bright, below 1 the dark.
        inverted: do it to the negative of the image: the other end is spread.
    """
    if not brain.any():
        return values
    inside = values[brain]
    low, span = inside.min(), inside.max() - inside.min()
    if span == 0:
        return values
    share = (inside - low) / span
    bent = 1 - (1 - share).clamp_min(0) ** exponent if inverted else share**exponent
    scale = inside.std(correction=0) / bent.std(correction=0).clamp_min(1e-6)
    changed = torch.zeros_like(values)
    changed[brain] = inside.mean() + (bent - bent.mean()) * scale
    return changed


def blur(values: Tensor, brain: Tensor, sigma_voxels: float) -> Tensor:
    """Smooth with a Gaussian, axis by axis; at the borders of patch and brain the kernel is cut and rescaled.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        sigma_voxels: standard deviation; 0 leaves all as it is.
    """
    if sigma_voxels == 0:
        return values
    smooth, weight = values, brain.to(values)
    for axis, side in enumerate(values.shape):
        matrix = _gaussian(side, sigma_voxels, values)
        smooth, weight = _along(smooth, matrix, axis), _along(weight, matrix, axis)
    return smooth / weight.clamp_min(_LEAST_WEIGHT) * brain


def low_resolution(values: Tensor, brain: Tensor, share: float) -> Tensor:
    """Average the brain over larger voxels, as a coarser scan would, and interpolate linearly back.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        share: of the voxels along each axis that are left, above 0 to 1.
    """
    x, y, z = (max(1, round(side * share)) for side in values.shape)
    if (x, y, z) == tuple(values.shape):
        return values
    averaged = functional.adaptive_avg_pool3d(torch.stack([values, brain.to(values)])[None], (x, y, z))
    back = functional.interpolate(averaged, tuple(values.shape), mode="trilinear", align_corners=False)
    return back[0, 0] / back[0, 1].clamp_min(_LEAST_WEIGHT) * brain


def _along(values: Tensor, matrix: Tensor, axis: int) -> Tensor:
    """Apply a matrix of shape (new side, side) along one axis."""
    return torch.movedim(torch.movedim(values, axis, -1) @ matrix.T, -1, axis)


def _gaussian(side: int, sigma: float, like: Tensor) -> Tensor:
    """Matrix that smooths a line of ``side`` voxels; each row sums to 1."""
    place = torch.arange(side, device=like.device, dtype=like.dtype)
    distance = (place[:, None] - place[None, :]) / sigma
    weights = torch.exp(-0.5 * distance**2) * (distance.abs() <= _BLUR_REACH)
    return weights / weights.sum(dim=1, keepdim=True)


def _cosines(side: int, like: Tensor) -> Tensor:
    """Matrix from the weights of the cosines to the values along an axis."""
    place = (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side
    return torch.cos(math.pi * place[:, None] * torch.arange(BIAS_WAVES, device=like.device, dtype=like.dtype))
