"""Logits of a presence network for a prepared case: of the whole brain, or of each slab of axial slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from app.config.load import RunConfig
from app.system.device import Runtime
from data.patches.transfer import upload

FloatArray = npt.NDArray[np.float64]


def slab_starts(depth: int, slices: int) -> tuple[int, ...]:
    """Return the first slice of each slab: one after the other, the last one moved back so that it fits.

    Args:
        depth: number of axial slices of the brain box.
        slices: number of slices in a slab.

    Example:
        >>> slab_starts(10, 4), slab_starts(3, 4)
        ((0, 4, 6), (0,))
    """
    last = max(depth - slices, 0)
    return tuple(min(start, last) for start in range(0, max(depth, 1), slices))


def seen_parts(image: npt.NDArray[Any], config: RunConfig) -> Iterator[npt.NDArray[np.float32]]:
    """Yield what the network sees of a case: one array for the whole brain, or one for each slab.

    The brain box is padded with 0 to the size of training patches; a larger brain is not cut.

    Args:
        image: shape (contrasts, X, Y, Z).
        config: config of the run.
    """
    patch = config.training.patch_voxels
    if not config.task.by_slab:
        yield _padded(image, patch)
        return
    for start in slab_starts(image.shape[3], patch[2]):
        yield _padded(image[..., start : start + patch[2]], patch)


def case_logits(
    networks: Sequence[nn.Module],
    image: npt.NDArray[Any],
    config: RunConfig,
    runtime: Runtime,
    *,
    between: Callable[[], None] = lambda: None,
) -> FloatArray:
    """Compute the mean logits of networks for a prepared case; a GPU gets each part once and is waited for once.

    Args:
        networks: networks in eval mode, on the device of ``runtime``, that take an image of shape (1, contrasts, X, Y,
            Z).
        image: shape (contrasts, X, Y, Z).
        config: config of the run.
        runtime: device and precision.
        between: called before each forward pass; may raise to stop.

    Returns:
        shape (parts, outputs): one part for the whole brain, or one for each slab, from the feet to the head.
    """
    rows = []
    for part in seen_parts(image, config):
        given = upload(torch.from_numpy(part)[None], runtime.device).contiguous(memory_format=runtime.memory_format)
        for network in networks:
            between()
            with torch.inference_mode(), runtime.autocast():
                rows.append(network(given)[0].double())
    logits: FloatArray = torch.stack(rows).cpu().numpy().reshape(-1, len(networks), len(config.outputs))
    return np.asarray(logits.mean(axis=1))


def _padded(image: npt.NDArray[Any], patch: tuple[int, int, int]) -> npt.NDArray[np.float32]:
    """Pad with 0 to at least the size of a patch, evenly on both sides, as :func:`data.patches.sampler.cut_image`."""
    pads = [(0, 0)]
    for side, wanted in zip(image.shape[1:], patch, strict=True):
        missing = max(0, wanted - side)
        pads.append((missing // 2, missing - missing // 2))
    return np.pad(np.asarray(image, dtype=np.float32), pads)
