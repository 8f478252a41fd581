"""Random pairs of label maps with several lesions, for testing scorers: a reference and a faulty prediction."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint8]
_MOST_LESIONS = 7


def lesion_pair(
    seed: int, shape: tuple[int, int, int] = (64, 64, 48), labels: tuple[int, ...] = (1, 2, 3), size: float = 1.0
) -> tuple[Labels, Labels]:
    """Draw a prediction and its reference.

    The reference has 0 to 7 lesions made of nested ellipsoids, some close to each other, some only a few voxels large.
    The prediction misses some, shifts and scales the others, mixes up labels and adds lesions, including single voxels.

    Args:
        seed: the same seed gives the same pair.
        shape: shape of the grid.
        labels: the label numbers to use.
        size: factor applied to all radii.

    Returns:
        prediction and reference, uint8, of ``shape``.
    """
    # Use only ``random``: its stream is the same in every version of numpy.
    rng = np.random.default_rng(seed)
    reference, prediction = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.uint8)
    centres: list[npt.NDArray[np.float64]] = []
    for _ in range(int(rng.random() * (_MOST_LESIONS + 1))):
        near, away = rng.random() < 0.4 and centres, (rng.random(3) - 0.5) * 24
        centre = centres[int(rng.random() * len(centres))] + away if near else rng.random(3) * shape
        centres.append(centre)
        radii = (0.6 + 6.5 * rng.random(3) * rng.random()) * size
        order = _drawn(labels, rng)
        _paint(reference, centre, radii, order)
        if rng.random() < 0.2:
            continue
        shift, scale = (rng.random(3) - 0.5) * 5, 0.6 + 0.8 * rng.random()
        _paint(prediction, centre + shift, radii * scale, order if rng.random() < 0.8 else _drawn(labels, rng))
    for _ in range(int(rng.random() * 4)):
        radii = (0.4 + 3 * rng.random(3) * rng.random()) * size
        _paint(prediction, np.floor(rng.random(3) * shape), radii, _drawn(labels, rng))
    return prediction, reference


def _drawn(labels: tuple[int, ...], rng: np.random.Generator) -> list[int]:
    """Draw one to three labels, ordered from the outside to the inside."""
    order = sorted(labels, key=lambda _: rng.random())
    return order[: 1 + int(rng.random() * 3)]


def _paint(voxels: Labels, centre: npt.NDArray[np.float64], radii: npt.NDArray[np.float64], order: list[int]) -> None:
    low = np.clip(np.floor(centre - radii), 0, voxels.shape).astype(int)
    high = np.clip(np.ceil(centre + radii) + 1, low, voxels.shape).astype(int)
    inside = voxels[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    grid = np.indices(inside.shape).reshape(3, -1).T + low
    distance = np.sqrt((((grid - centre) / radii) ** 2).sum(axis=1)).reshape(inside.shape)
    for place, label in enumerate(order):
        inside[distance <= 1 - place / len(order)] = label
