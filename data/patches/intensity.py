"""Intensity augmentation of one contrast: pure functions of tensors.

Each takes z-scored values, 0 outside the brain, and returns new ones, 0 outside the brain; an empty brain is returned
unchanged. ``bias_field``, ``stretch`` and ``range_gamma`` pick out the brain's voxels, which makes the host wait for a
GPU; ``device_augmentation`` has versions that do not. The selection follows nnU-Net (Isensee et al., Nature Methods 18,
203, 2021; its class nnUNetTrainer), plus the bias field of a receive coil.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

#: Number of cosines along each axis in a bias field; the first is the constant.
BIAS_WAVES: Final = 3
#: Radius of a blur's kernel in standard deviations.
_BLUR_REACH: Final = 4.0
#: Lower bound of the brain's weight around a voxel, to avoid division by 0.
_LEAST_WEIGHT: Final = 1e-6


def bias_field(values: Tensor, brain: Tensor, waves: Tensor, strength: float) -> Tensor:
    """Multiply by a smooth field, ``exp(strength * f)`` with ``f`` from -1 to 1.

    ``f`` is a sum of low-frequency cosines, as in SPM's bias correction (Ashburner and Friston, NeuroImage 26, 839,
    2005). A scanner's field multiplies the raw signal, whose zero is unknown in a z-scored image; the darkest voxel of
    the brain is used instead: ``darkest + (v - darkest) * field``.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        waves: weight of each cosine, shape (BIAS_WAVES,) * 3; the weight of the constant is ignored.
        strength: maximum absolute logarithm of the field in the patch; 0 for no change.
    """
    if not brain.any() or strength == 0:
        return values
    log_field = log_bias_field(values, waves, strength)
    darkest = values[brain].min()
    return (darkest + (values - darkest) * log_field.exp()) * brain


def log_bias_field(values: Tensor, waves: Tensor, strength: float) -> Tensor:
    """Return the logarithm of the field of :func:`bias_field`, from -strength to strength, shape (X, Y, Z)."""
    weights = waves.to(values).clone()
    weights[0, 0, 0].zero_()  # an assignment would copy the 0 to a GPU, and wait
    log_field = weights
    for axis, side in enumerate(values.shape):
        log_field = _along(log_field, _cosines(side, values), axis)
    return log_field * (strength / log_field.abs().max().clamp_min(1e-12))


def stretch(values: Tensor, brain: Tensor, factor: float) -> Tensor:
    """Change image contrast: ``mean + (v - mean) * factor`` about the brain's mean, clipped to the original range.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        factor: above 1 increases contrast, below 1 reduces it.
    """
    if not brain.any():
        return values
    inside = values[brain]
    mean = inside.mean()
    return (mean + (values - mean) * factor).clamp(inside.min(), inside.max()) * brain


def range_gamma(values: Tensor, brain: Tensor, exponent: float, *, inverted: bool = False) -> Tensor:
    """Raise the brain's values, scaled to 0..1, to a power; mean and standard deviation are preserved.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        exponent: above 1 spreads the bright values, below 1 the dark ones.
        inverted: apply it to the negative of the image, so that the other end is spread.
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
    """Smooth with a Gaussian, axis by axis; at the borders of patch and brain the kernel is truncated and rescaled.

    Args:
        values: shape (..., X, Y, Z).
        brain: bool, shape (X, Y, Z).
        sigma_voxels: standard deviation; 0 for no change.
    """
    if sigma_voxels == 0:
        return values
    smooth, weight = values, brain.to(values)
    for axis in (-3, -2, -1):
        matrix = _gaussian(values.shape[axis], sigma_voxels, values)
        smooth, weight = _along(smooth, matrix, axis), _along(weight, matrix, axis)
    return smooth / weight.clamp_min(_LEAST_WEIGHT) * brain


def low_resolution(values: Tensor, brain: Tensor, share: float) -> Tensor:
    """Average the brain over larger voxels, as in a coarser scan, and interpolate linearly back.

    Args:
        values: shape (X, Y, Z).
        brain: bool, same shape.
        share: share of the voxels kept along each axis, above 0 and up to 1.
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
    """Matrix that smooths a row of ``side`` voxels; each of its rows sums to 1."""
    place = torch.arange(side, device=like.device, dtype=like.dtype)
    distance = (place[:, None] - place[None, :]) / sigma
    weights = torch.exp(-0.5 * distance**2) * (distance.abs() <= _BLUR_REACH)
    return weights / weights.sum(dim=1, keepdim=True)


def _cosines(side: int, like: Tensor) -> Tensor:
    """Matrix that maps weights of the cosines to values along an axis."""
    place = (torch.arange(side, device=like.device, dtype=like.dtype) + 0.5) / side
    return torch.cos(math.pi * place[:, None] * torch.arange(BIAS_WAVES, device=like.device, dtype=like.dtype))
