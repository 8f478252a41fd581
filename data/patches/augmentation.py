"""Training augmentation of one patch: all random numbers are drawn first, so that applying them is deterministic."""

from __future__ import annotations

from collections.abc import Sequence
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
    """How strongly training patches are augmented.

    Probabilities of intensity changes apply to each contrast separately, except for noise. A strength or a
    probability of 0 disables an augmentation.
    """

    flip_probability: float = 0.5
    """Probability of mirroring along each axis."""
    affine_probability: float = 0.3
    """Probability of rotating and scaling the patch together."""
    rotation_degrees: float = 20.0
    """Maximum rotation about each axis."""
    scale: float = 0.2
    """Maximum relative change of size under ``affine_probability``."""
    gain: float = 0.3
    """Each contrast is multiplied by a factor from 1 - gain to 1 + gain (brightness)."""
    shift: float = 0.3
    """Each contrast is shifted by up to this many standard deviations of the brain."""
    gamma_probability: float = 0.3
    """Probability of a power law on each contrast's values, symmetric about the brain's mean."""
    gamma: float = 0.5
    """The exponent ranges from 1 / (1 + gamma) to 1 + gamma."""
    noise_probability: float = 0.15
    """Probability of adding Gaussian noise."""
    noise: float = 0.3
    """Maximum standard deviation of the Gaussian noise, in standard deviations of the brain."""
    contrast_dropout: float = 0.0
    """Probability that a patch loses one, two or three contrasts, each of the fourteen subsets being equally likely.
    Above 0 the network is given a mask of the contrasts present, and ``predict`` accepts cases that lack some."""
    rotation_probability: float = 0.0
    """Probability of rotating the patch, independent of ``affine_probability``."""
    scaling_probability: float = 0.0
    """Probability of scaling the patch, independent of ``affine_probability``."""
    scaling: float = 0.4
    """The factor ranges from 1 / (1 + scaling) to 1 + scaling."""
    gain_probability: float = 1.0
    """Probability of ``gain``."""
    shift_probability: float = 1.0
    """Probability of ``shift``."""
    stretch_probability: float = 0.0
    """Probability of stretching the histogram about its mean, clipped to its original range (image contrast)."""
    stretch: float = 0.25
    """The factor ranges from 1 - stretch to 1 + stretch."""
    range_gamma_probability: float = 0.0
    """Probability of raising the brain's values, scaled to 0..1, to a power; mean and spread are preserved."""
    inverted_gamma_probability: float = 0.0
    """Probability of doing the same to the negative of the image, with a separate exponent."""
    range_gamma: float = 0.5
    """The exponent ranges from 1 / (1 + range_gamma) to 1 + range_gamma."""
    bias_field_probability: float = 0.0
    """Probability of multiplying by a smooth field, as an uneven receive coil does."""
    bias_field: float = 0.3
    """Maximum absolute logarithm of the field: 0.3 means factors from 0.74 to 1.35."""
    blur_probability: float = 0.0
    """Probability of smoothing with a Gaussian."""
    blur_voxels: float = 1.0
    """Maximum standard deviation of that Gaussian; the minimum is half of it."""
    low_resolution_probability: float = 0.0
    """Probability of downsampling to larger voxels and back."""
    low_resolution: float = 0.5
    """Maximum share of the voxels along each axis that is lost by downsampling."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value = getattr(self, name)
            if name.endswith(("_probability", "_dropout")):
                if not 0 <= value <= 1:
                    raise ValueError(f"augment.{name}: must be a probability from 0 to 1, got {value}")
            elif not 0 <= value <= _LARGEST[name]:
                raise ValueError(f"augment.{name}: must be from 0 to {_LARGEST[name]:g}, got {value}")


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
    """The augmentation of one patch; arrays have one entry per contrast."""

    flips: tuple[bool, bool, bool]
    matrix: FloatArray | None
    """3x3 map from output to input coordinates; None if the geometry is unchanged."""
    gain: FloatArray
    """Factor."""
    shift: FloatArray
    gamma: FloatArray
    """Exponent; 1 for no change."""
    noise: float
    """Standard deviation; 0 for no noise."""
    noise_seed: int
    present: tuple[bool, ...]
    """Whether each contrast is kept; the others become 0."""
    stretch: FloatArray
    """Factor; 1 for no change."""
    range_gamma: FloatArray
    """Exponent; 1 for no change."""
    inverted_gamma: FloatArray
    """Exponent applied to the negative; 1 for no change."""
    bias_field: FloatArray
    """Maximum absolute logarithm of the field; 0 for no change."""
    bias_waves: FloatArray
    """Weights of the field's cosines, shape (contrasts, 3, 3, 3)."""
    blur_voxels: FloatArray
    """Standard deviation; 0 for no change."""
    resolution: FloatArray
    """Share of the voxels kept along each axis; 1 for no change."""


def draw_augmentation(config: AugmentConfig, contrasts: int, rng: np.random.Generator) -> Variation:
    """Draw a variation; the same generator state gives the same result.

    The number and order of random draws never depend on the config, and augmentations added later draw after older
    ones. Enabling an augmentation therefore changes nothing else about a patch.
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
        variation: the result of :func:`draw_augmentation`.
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


def affine_theta(matrix: FloatArray, shape: Sequence[int]) -> FloatArray:
    """Return a map from output to input coordinates as :func:`torch.nn.functional.affine_grid` takes it.

    Args:
        matrix: 3x3, about the patch's centre, in voxels.
        shape: X, Y, Z of the patch.

    Returns:
        shape (1, 3, 4).
    """
    sides = np.array(shape[::-1], dtype=np.float32)  # grid_sample orders axes Z, Y, X
    # grid_sample scales every side to -1..1, so a rotation must take the sides' lengths into account.
    theta = np.zeros((1, 3, 4), dtype=np.float32)
    theta[0, :, :3] = matrix * sides[None, :] / sides[:, None]
    return theta


def _draw_present(probability: float, contrasts: int, rng: np.random.Generator) -> tuple[bool, ...]:
    """Draw which contrasts a patch keeps; if it loses any, all proper non-empty subsets are equally likely.

    If each contrast were dropped independently, one number would determine both how many patches are incomplete and
    which subsets are rare.
    """
    loses = rng.random() < probability and contrasts > 1
    subset = 1 + int(rng.integers(max(1, 2**contrasts - 2)))  # one bit per contrast, neither none nor all of them
    return tuple(not loses or bool(subset >> number & 1) for number in range(contrasts))


def _change_intensities(variation: Variation, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    brain = image != 0
    brain[~np.array(variation.present)] = False
    changed = np.empty(image.shape, dtype=np.float32)
    for channel, before in enumerate(image):
        values = _scanned(variation, channel, before, brain[channel])
        exponent = variation.gamma[channel]
        # Symmetric about the brain's mean: sign(v) |v|^gamma maps 0 and 1 to themselves.
        bent = values if exponent == 1 else np.copysign(np.abs(values) ** exponent, values)
        np.multiply(bent, variation.gain[channel], out=changed[channel])
        changed[channel] += variation.shift[channel]
    if variation.noise > 0:
        noise = np.random.default_rng(variation.noise_seed).standard_normal(image.shape, dtype=np.float32)
        changed += np.float32(variation.noise) * noise
    changed *= brain
    return changed


def _scanned(variation: Variation, channel: int, values: FloatArray, brain: npt.NDArray[np.bool_]) -> FloatArray:
    """Change one contrast as another scanner might: histogram, coil, then sharpness."""
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
    """Rotate and scale about the patch's centre: linear for the image, nearest neighbour for the label map."""
    theta = torch.from_numpy(affine_theta(matrix, image.shape[1:]))
    grid = functional.affine_grid(theta, [1, 1, *image.shape[1:]], align_corners=False)
    moved = functional.grid_sample(_tensor(image), grid, mode="bilinear", align_corners=False)
    labels = functional.grid_sample(_tensor(codes), grid, mode="nearest", align_corners=False)
    return moved[0].numpy(), labels[0, 0].numpy().astype(np.uint8)


def _tensor(array: npt.NDArray[np.float32] | npt.NDArray[np.uint8]) -> torch.Tensor:
    """Convert an array to a float tensor of shape (1, channels, X, Y, Z)."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).float()
    return tensor[None] if tensor.ndim == 4 else tensor[None, None]


def _rotation(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Matrix of the rotations by three angles in radians about the three axes, multiplied in axis order."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        one, other = [index for index in range(3) if index != axis]
        turn = np.eye(3)
        turn[one, one] = turn[other, other] = np.cos(angle)
        turn[one, other], turn[other, one] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix
