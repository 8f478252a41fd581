"""Training augmentation of one patch: all randomness is drawn first, applying it is deterministic."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from data.patches import intensity


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How strongly training patches are varied.

    Probabilities of what changes intensities count for each contrast by itself, but for noise. A strength or a
    probability of 0 switches off.
    """

    flip_probability: float = 0.5
    """Chance of mirroring along each axis."""
    affine_probability: float = 0.3
    """Chance of rotating and scaling the patch, both at once."""
    rotation_degrees: float = 20.0
    """Largest rotation about each axis."""
    scale: float = 0.2
    """Largest relative change of size that goes with ``affine_probability``."""
    gain: float = 0.3
    """Each contrast is multiplied by a factor from 1 - gain to 1 + gain (brightness)."""
    shift: float = 0.3
    """Each contrast is shifted by up to this many standard deviations of the brain."""
    gamma_probability: float = 0.3
    """Chance of bending each contrast's histogram about the brain's mean, alike on both sides."""
    gamma: float = 0.5
    """Bent by an exponent from 1 / (1 + gamma) to 1 + gamma."""
    noise_probability: float = 0.15
    """Chance of adding Gaussian noise."""
    noise: float = 0.3
    """Largest standard deviation of the Gaussian noise, in standard deviations of the brain."""
    contrast_dropout: float = 0.0
    """Chance that a patch loses contrasts: one, two or three of them, each of the fourteen subsets equally often. Above
    0 the network is told which contrasts are there, and ``predict`` takes cases that lack some."""
    rotation_probability: float = 0.0
    """Chance of rotating the patch, whatever ``affine_probability`` does."""
    scaling_probability: float = 0.0
    """Chance of scaling the patch, whatever ``affine_probability`` does."""
    scaling: float = 0.4
    """Scaled by a factor from 1 / (1 + scaling) to 1 + scaling."""
    gain_probability: float = 1.0
    """Chance of ``gain``."""
    shift_probability: float = 1.0
    """Chance of ``shift``."""
    stretch_probability: float = 0.0
    """Chance of stretching the histogram about its mean, within the range it had (image contrast)."""
    stretch: float = 0.25
    """Stretched by a factor from 1 - stretch to 1 + stretch."""
    range_gamma_probability: float = 0.0
    """Chance of raising the brain's values, scaled to 0..1, to a power; mean and spread are kept."""
    inverted_gamma_probability: float = 0.0
    """Chance of doing so to the negative of the image, with an exponent of its own."""
    range_gamma: float = 0.5
    """By an exponent from 1 / (1 + range_gamma) to 1 + range_gamma."""
    bias_field_probability: float = 0.0
    """Chance of multiplying by a smooth field, as an uneven coil does."""
    bias_field: float = 0.3
    """Largest logarithm of the field: 0.3 brightens to 1.35 times and darkens to 0.74 times at most."""
    blur_probability: float = 0.0
    """Chance of smoothing with a Gaussian."""
    blur_voxels: float = 1.0
    """Standard deviation of that Gaussian, from half of this to this."""
    low_resolution_probability: float = 0.0
    """Chance of going to larger voxels and back."""
    low_resolution: float = 0.5
    """Largest share of the voxels along each axis that is lost on the way."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name.endswith(("_probability", "_dropout")):
                if not 0 <= value <= 1:
                    raise ValueError(f"augment.{name}: a probability from 0 to 1, got {value}")
            elif not 0 <= value <= _LARGEST[name]:
                raise ValueError(f"augment.{name}: from 0 to {_LARGEST[name]:g}, got {value}")


_LARGEST: Final = {
    "rotation_degrees": 180.0,
    "scale": 0.9,
    "gain": 1.0,
    "shift": 10.0,
    "gamma": 10.0,
    "noise": 10.0,
    "scaling": 4.0,
    "stretch": 1.0,
    "range_gamma": 10.0,
    "bias_field": 2.0,
    "blur_voxels": 10.0,
    "low_resolution": 0.9,
}

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Variation:
    """What is done to one patch; arrays have one entry a contrast."""

    flips: tuple[bool, bool, bool]
    matrix: FloatArray | None
    """3x3 map from output to input coordinates, None where the patch keeps its geometry."""
    gain: FloatArray
    """Factor."""
    shift: FloatArray
    gamma: FloatArray
    """Exponent; 1 leaves it."""
    noise: float
    """Standard deviation; 0 adds none."""
    noise_seed: int
    present: tuple[bool, ...]
    """What is not there becomes 0."""
    stretch: FloatArray
    """Factor; 1 leaves it."""
    range_gamma: FloatArray
    """Exponent; 1 leaves it."""
    inverted_gamma: FloatArray
    """Exponent on the negative; 1 leaves it."""
    bias_field: FloatArray
    """Largest logarithm of the field; 0 leaves it."""
    bias_waves: FloatArray
    """Weights of the field's cosines, shape (contrasts, 3, 3, 3)."""
    blur_voxels: FloatArray
    """Standard deviation; 0 leaves it."""
    resolution: FloatArray
    """Share of the voxels along each axis that is left; 1 leaves it."""


def draw_augmentation(config: AugmentConfig, contrasts: int, rng: np.random.Generator) -> Variation:
    """Draw a variation; the same generator state gives the same one.

    As many numbers are drawn whatever the config, in an order that stays: what is newer comes later. So switching
    something on changes nothing else about a patch.
    """
    flips = rng.random(3) < config.flip_probability
    moved = rng.random() < config.affine_probability
    angles = np.deg2rad(rng.uniform(-config.rotation_degrees, config.rotation_degrees, 3))
    size = rng.uniform(1 - config.scale, 1 + config.scale)
    log_gamma = np.log1p(config.gamma)
    bent = rng.random(contrasts) < config.gamma_probability
    noisy = rng.random() < config.noise_probability
    gain = rng.uniform(1 - config.gain, 1 + config.gain, contrasts)
    shift = rng.uniform(-config.shift, config.shift, contrasts)
    gamma = np.exp(rng.uniform(-log_gamma, log_gamma, contrasts) * bent)
    noise = float(rng.uniform(0, config.noise)) * noisy
    noise_seed = int(rng.integers(2**63))
    present = _draw_present(config.contrast_dropout, contrasts, rng)

    matrices = [_rotation(angles) / size] if moved else []
    turned = rng.random() < config.rotation_probability
    angles = np.deg2rad(rng.uniform(-config.rotation_degrees, config.rotation_degrees, 3))
    scaled = rng.random() < config.scaling_probability
    size = np.exp(rng.uniform(-1, 1) * np.log1p(config.scaling))
    matrices += [_rotation(angles)] * turned + [np.eye(3) / size] * scaled

    def chosen(probability: float, low: float, high: float, otherwise: float) -> FloatArray:
        hit, value = rng.random(contrasts) < probability, rng.uniform(low, high, contrasts)
        return np.where(hit, value, otherwise).astype(np.float32)

    log_range = float(np.log1p(config.range_gamma))
    return Variation(
        flips=(bool(flips[0]), bool(flips[1]), bool(flips[2])),
        matrix=reduce(np.matmul, matrices).astype(np.float32) if matrices else None,
        gain=np.where(rng.random(contrasts) < config.gain_probability, gain, 1).astype(np.float32),
        shift=np.where(rng.random(contrasts) < config.shift_probability, shift, 0).astype(np.float32),
        gamma=gamma.astype(np.float32),
        noise=noise,
        noise_seed=noise_seed,
        present=present,
        stretch=chosen(config.stretch_probability, 1 - config.stretch, 1 + config.stretch, 1),
        range_gamma=np.exp(chosen(config.range_gamma_probability, -log_range, log_range, 0)),
        inverted_gamma=np.exp(chosen(config.inverted_gamma_probability, -log_range, log_range, 0)),
        bias_field=chosen(config.bias_field_probability, 0, config.bias_field, 0),
        bias_waves=rng.standard_normal((contrasts, *(intensity.BIAS_WAVES,) * 3), dtype=np.float32),
        blur_voxels=chosen(config.blur_probability, config.blur_voxels / 2, config.blur_voxels, 0),
        resolution=chosen(config.low_resolution_probability, 1 - config.low_resolution, 1, 1),
    )


def apply_augmentation(
    variation: Variation, image: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Apply a variation to a patch.

    Args:
        variation: from :func:`draw_augmentation`.
        image: shape (contrasts, X, Y, Z), z-scored, 0 outside the brain; the outside stays 0.
        codes: shape (X, Y, Z).

    Returns:
        new image and codes of the same shapes.
    """
    axes = tuple(axis for axis, flipped in enumerate(variation.flips) if flipped)
    image, codes = np.flip(image, tuple(axis + 1 for axis in axes)), np.flip(codes, axes)
    if variation.matrix is not None:
        image, codes = _transform(image, codes, variation.matrix)
    return _change_intensities(variation, image), np.ascontiguousarray(codes)


def _draw_present(probability: float, contrasts: int, rng: np.random.Generator) -> tuple[bool, ...]:
    """Which contrasts a patch keeps; a loss leaves each proper subset equally likely.

    Were each dropped by itself, one number would decide both how many patches are incomplete and which subsets are
    rare.
    """
    loses = rng.random() < probability and contrasts > 1
    subset = 1 + int(rng.integers(max(1, 2**contrasts - 2)))  # one bit a contrast, neither none nor all of them
    return tuple(not loses or bool(subset >> number & 1) for number in range(contrasts))


def _change_intensities(variation: Variation, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    brain = image != 0
    brain[~np.array(variation.present)] = False
    changed = np.empty(image.shape, dtype=np.float32)
    for channel, before in enumerate(image):
        values = _scanned(variation, channel, before, brain[channel])
        exponent = variation.gamma[channel]
        # Bent about the brain's mean: sign(v) |v|^gamma keeps 0 and 1 where they are.
        bent = values if exponent == 1 else np.copysign(np.abs(values) ** exponent, values)
        np.multiply(bent, variation.gain[channel], out=changed[channel])
        changed[channel] += variation.shift[channel]
    if variation.noise > 0:
        noise = np.random.default_rng(variation.noise_seed).standard_normal(image.shape, dtype=np.float32)
        changed += np.float32(variation.noise) * noise
    changed *= brain
    return changed


def _scanned(variation: Variation, channel: int, values: FloatArray, brain: npt.NDArray[np.bool_]) -> FloatArray:
    """One contrast as another scanner might have given it: histogram, coil, then sharpness."""
    if not brain.any():
        return values
    given, inside = torch.from_numpy(np.ascontiguousarray(values)), torch.from_numpy(brain)
    factor, coil = float(variation.stretch[channel]), float(variation.bias_field[channel])
    exponent, inverted = float(variation.range_gamma[channel]), float(variation.inverted_gamma[channel])
    sigma, share = float(variation.blur_voxels[channel]), float(variation.resolution[channel])
    changed = given
    if factor != 1:
        changed = intensity.stretch(changed, inside, factor)
    if inverted != 1:
        changed = intensity.range_gamma(changed, inside, inverted, inverted=True)
    if exponent != 1:
        changed = intensity.range_gamma(changed, inside, exponent)
    if coil != 0:
        changed = intensity.bias_field(changed, inside, torch.from_numpy(variation.bias_waves[channel]), coil)
    if sigma != 0:
        changed = intensity.blur(changed, inside, sigma)
    if share != 1:
        changed = intensity.low_resolution(changed, inside, share)
    return values if changed is given else changed.numpy()


def _transform(
    image: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8], matrix: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Rotate and scale about the patch's centre: the image linearly, the label map by nearest neighbour."""
    sides = np.array(image.shape[:0:-1], dtype=np.float32)  # grid_sample counts Z, Y, X
    # In grid_sample's coordinates every side runs from -1 to 1, so a rotation must know the sides' lengths.
    theta = np.zeros((1, 3, 4), dtype=np.float32)
    theta[0, :, :3] = matrix * sides[None, :] / sides[:, None]
    grid = functional.affine_grid(torch.from_numpy(theta), [1, 1, *image.shape[1:]], align_corners=False)
    moved = functional.grid_sample(_tensor(image), grid, mode="bilinear", align_corners=False)
    labels = functional.grid_sample(_tensor(codes), grid, mode="nearest", align_corners=False)
    return moved[0].numpy(), labels[0, 0].numpy().astype(np.uint8)


def _tensor(array: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> torch.Tensor:
    """Float tensor of shape (1, channels, X, Y, Z)."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).float()
    return tensor[None] if tensor.ndim == 4 else tensor[None, None]


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rotation by three angles in radians, about the axes in turn."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        one, other = [index for index in range(3) if index != axis]
        turn = np.eye(3)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix
