"""Training augmentation of one patch: all randomness is drawn first, applying it is deterministic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

_PROBABILITIES: Final = ("flip_probability", "affine_probability", "gamma_probability", "noise_probability")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """How strongly training patches are varied."""

    flip_probability: float = 0.5
    """Chance of mirroring along each axis."""
    affine_probability: float = 0.3
    """Chance of rotating and scaling the patch."""
    rotation_degrees: float = 20.0
    """Largest rotation about each axis."""
    scale: float = 0.2
    """Largest relative change of size."""
    gain: float = 0.3
    """Each contrast is multiplied by a factor from 1 - gain to 1 + gain."""
    shift: float = 0.3
    """Each contrast is shifted by up to this many standard deviations of the brain."""
    gamma_probability: float = 0.3
    """Chance of bending each contrast's histogram."""
    gamma: float = 0.5
    """Bent by an exponent from 1 / (1 + gamma) to 1 + gamma."""
    noise_probability: float = 0.15
    """Chance of adding Gaussian noise."""
    noise: float = 0.3
    """Largest standard deviation of the Gaussian noise, in standard deviations of the brain."""
    contrast_dropout: float = 0.0
    """Chance that a patch loses contrasts: one, two or three of them, each of the fourteen subsets equally often. Above
    0 the network is told which contrasts are there, and ``predict`` takes cases that lack some."""

    def __post_init__(self) -> None:
        for name in (*_PROBABILITIES, "contrast_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augment.{name}: a probability from 0 to 1, got {getattr(self, name)}")
        if not 0 <= self.rotation_degrees <= 180:
            raise ValueError(f"augment.rotation_degrees: from 0 to 180, got {self.rotation_degrees}")
        for name, largest in (("scale", 0.9), ("gain", 1.0), ("shift", 10.0), ("gamma", 10.0), ("noise", 10.0)):
            if not 0 <= getattr(self, name) <= largest:
                raise ValueError(f"augment.{name}: from 0 to {largest:g}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Variation:
    """What is done to one patch."""

    flips: tuple[bool, bool, bool]
    matrix: npt.NDArray[np.float32] | None
    """3x3 map from output to input coordinates, None where the patch keeps its geometry."""
    gain: npt.NDArray[np.float32]
    """One factor a contrast."""
    shift: npt.NDArray[np.float32]
    gamma: npt.NDArray[np.float32]
    """One exponent a contrast; 1 leaves it."""
    noise: float
    """Standard deviation; 0 adds none."""
    noise_seed: int
    present: tuple[bool, ...]
    """One truth value a contrast; those that are not there become 0."""


def draw(config: AugmentConfig, contrasts: int, rng: np.random.Generator) -> Variation:
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
    return Variation(
        flips=(bool(flips[0]), bool(flips[1]), bool(flips[2])),
        matrix=(_rotation(angles) / size).astype(np.float32) if moved else None,
        gain=rng.uniform(1 - config.gain, 1 + config.gain, contrasts).astype(np.float32),
        shift=rng.uniform(-config.shift, config.shift, contrasts).astype(np.float32),
        gamma=np.exp(rng.uniform(-log_gamma, log_gamma, contrasts) * bent).astype(np.float32),
        noise=float(rng.uniform(0, config.noise)) * noisy,
        noise_seed=int(rng.integers(2**63)),
        present=_draw_present(config.contrast_dropout, contrasts, rng),
    )


def apply(
    variation: Variation, image: npt.NDArray[np.float32], codes: npt.NDArray[np.uint8]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8]]:
    """Apply a variation to a patch.

    Args:
        variation: from :func:`draw`.
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

    Dropping each contrast by itself would make single contrasts rare, or losses of one, as the chance goes; cases come
    with any.
    """
    loses = rng.random() < probability and contrasts > 1
    subset = 1 + int(rng.integers(max(1, 2**contrasts - 2)))  # one bit a contrast, neither none nor all of them
    return tuple(not loses or bool(subset >> number & 1) for number in range(contrasts))


def _change_intensities(variation: Variation, image: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    brain = image != 0
    brain[~np.array(variation.present)] = False
    changed = np.empty(image.shape, dtype=np.float32)
    for channel, values in enumerate(image):
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
