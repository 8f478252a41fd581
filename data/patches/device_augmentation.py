"""Training augmentation of a patch on a GPU: the same variation as in ``augmentation``, and nothing is read back.

Boolean indexing, as in ``intensity``, makes the host wait until the GPU has finished its queue. These functions compute
everywhere and mask. On a CPU, indexing is cheaper.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from data.patches import intensity
from data.patches.augmentation import Variation, affine_theta
from data.patches.transfer import send


def augment_on_device(variation: Variation, image: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Apply a variation to a patch, as :func:`data.patches.augmentation.apply_augmentation` does, on its device.

    Noise is drawn on the device: on a GPU, the same seed gives other numbers than on a CPU.

    Args:
        variation: the result of :func:`data.patches.augmentation.draw_augmentation`.
        image: float32, shape (contrasts, X, Y, Z), z-scored, 0 outside the brain; the outside stays 0.
        codes: uint8, shape (X, Y, Z).

    Returns:
        new image and codes of the same shapes.
    """
    axes = [axis - 3 for axis, flipped in enumerate(variation.flips) if flipped]
    if axes:
        image, codes = image.flip(axes), codes.flip(axes)
    if variation.matrix is not None:
        image, codes = _transformed(image, codes, variation.matrix)
    return _changed(variation, image), codes.contiguous()


def dense_stretch(values: Tensor, brain: Tensor, factor: float) -> Tensor:
    """:func:`data.patches.intensity.stretch` without reading back."""
    mean, _ = _mean(values, brain)
    low, high = _range(values, brain)
    return torch.where(brain, (mean + (values - mean) * factor).clamp(low, high), 0)


def dense_range_gamma(values: Tensor, brain: Tensor, exponent: float, *, inverted: bool = False) -> Tensor:
    """:func:`data.patches.intensity.range_gamma` without reading back."""
    mean, count = _mean(values, brain)
    low, high = _range(values, brain)
    span = high - low
    share = torch.where(brain, (values - low) / torch.where(span > 0, span, 1), 0)
    bent = 1 - (1 - share).clamp_min(0) ** exponent if inverted else share**exponent
    centre = bent.sum() / count  # 0 outside the brain

    def spread(of: Tensor, around: Tensor) -> Tensor:
        return (torch.where(brain, of - around, 0).square().sum() / count).sqrt()

    scale = spread(values, mean) / spread(bent, centre).clamp_min(1e-6)
    changed = torch.where(brain, mean + (bent - centre) * scale, 0)
    return torch.where(span > 0, changed, values)


def dense_bias_field(values: Tensor, brain: Tensor, waves: Tensor, strength: float) -> Tensor:
    """:func:`data.patches.intensity.bias_field` without reading back."""
    log_field = intensity.log_bias_field(values, waves, strength)
    darkest, _ = _range(values, brain)
    return torch.where(brain, darkest + (values - darkest) * log_field.exp(), 0)


def _transformed(image: Tensor, codes: Tensor, matrix: npt.NDArray[np.float32]) -> tuple[Tensor, Tensor]:
    """Rotate and scale, as ``augmentation._transform`` does."""
    theta = send(affine_theta(matrix, image.shape[1:]), image.device)
    grid = functional.affine_grid(theta, [1, 1, *image.shape[1:]], align_corners=False)
    moved = functional.grid_sample(image[None], grid, mode="bilinear", align_corners=False)
    labels = functional.grid_sample(codes[None, None].float(), grid, mode="nearest", align_corners=False)
    return moved[0], labels[0, 0].to(torch.uint8)


def _changed(variation: Variation, image: Tensor) -> Tensor:
    """Change the intensities, as ``augmentation._change_intensities`` does."""
    brain = image != 0
    for channel, present in enumerate(variation.present):
        if not present:
            brain[channel].fill_(False)
    changed = torch.stack(
        [_scanned(variation, channel, image[channel], brain[channel]) for channel in range(len(image))]
    )
    numbers = [variation.gamma, variation.gain, variation.shift]
    if any(np.any(number != neutral) for number, neutral in zip(numbers, (1, 1, 0), strict=True)):
        gamma, gain, shift = send(np.stack(numbers).astype(np.float32), image.device)[..., None, None, None]
        if np.any(variation.gamma != 1):
            changed = torch.copysign(changed.abs() ** gamma, changed)
        changed = changed * gain + shift
    if variation.noise > 0:
        changed = changed + variation.noise * _noise(variation.noise_seed, image)
    return torch.where(brain, changed, 0)


def _noise(seed: int, like: Tensor) -> Tensor:
    """Standard normal noise; on a CPU it is that of ``augmentation``, which for a GPU would have to be uploaded."""
    if like.device.type == "cpu":
        return torch.from_numpy(np.random.default_rng(seed).standard_normal(tuple(like.shape), dtype=np.float32))
    generator = torch.Generator(like.device)
    generator.manual_seed(seed)
    return torch.randn(like.shape, generator=generator, device=like.device)


def _scanned(variation: Variation, channel: int, values: Tensor, brain: Tensor) -> Tensor:
    """Change one contrast as another scanner might, as ``augmentation._scanned`` does."""
    if not variation.present[channel]:
        return values
    factor, coil = float(variation.stretch[channel]), float(variation.bias_field[channel])
    exponent, inverted = float(variation.range_gamma[channel]), float(variation.inverted_gamma[channel])
    sigma, share = float(variation.blur_voxels[channel]), float(variation.resolution[channel])
    if factor != 1:
        values = dense_stretch(values, brain, factor)
    if inverted != 1:
        values = dense_range_gamma(values, brain, inverted, inverted=True)
    if exponent != 1:
        values = dense_range_gamma(values, brain, exponent)
    if coil != 0:
        values = dense_bias_field(values, brain, send(variation.bias_waves[channel], values.device), coil)
    if sigma != 0:
        values = intensity.blur(values, brain, sigma)
    if share != 1:
        values = intensity.low_resolution(values, brain, share)
    return values


def _mean(values: Tensor, brain: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the brain of values that are 0 outside it, and the number of its voxels, at least 1."""
    count = brain.sum().clamp_min(1)
    return values.sum() / count, count


def _range(values: Tensor, brain: Tensor) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of the brain; infinite if it is empty."""
    return torch.where(brain, values, math.inf).amin(), torch.where(brain, values, -math.inf).amax()
