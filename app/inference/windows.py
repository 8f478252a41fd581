"""A network over a whole volume: overlapping windows, blended with Gaussian weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from math import ceil
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from app.runtime import Runtime

#: Width of the Gaussian weights as a share of the window, as in nnU-Net and MONAI.
_SIGMA: Final = 0.125
#: Logit of voxels that no window with brain in it covers.
_SURE_BACKGROUND: Final = -30.0

Size = tuple[int, int, int]


@torch.inference_mode()
def sliding_logits(
    network: nn.Module,
    image: Tensor,
    *,
    window: Size,
    overlap: float,
    runtime: Runtime,
    between_windows: Callable[[], None] = lambda: None,
) -> Tensor:
    """Logits of a whole volume.

    Windows are spread evenly, so that neighbours overlap by at least ``overlap``; a volume smaller than the window is
    padded with 0. Windows without any brain (all zero) are not computed.

    Args:
        network: in eval mode, on ``runtime.device``.
        image: float32, shape (contrasts, X, Y, Z), on the CPU.
        window: the size the network was trained on, in voxels.
        overlap: 0 to below 1.
        runtime: device, precision, memory layout.
        between_windows: called before each window; may raise to stop.

    Returns:
        float32 logits of shape (regions, X, Y, Z) on ``runtime.device``; -30 where there is no brain nearby.
    """
    sizes = image.shape[1:]
    padding = [
        (max(0, side - size) // 2, max(0, side - size) - max(0, side - size) // 2)
        for size, side in zip(sizes, window, strict=True)
    ]
    padded = functional.pad(image, [amount for pair in reversed(padding) for amount in pair])
    weights = gaussian_weights(window).to(runtime.device)
    total: Tensor | None = None
    weight_sum = torch.zeros(padded.shape[1:], device=runtime.device)
    for place in window_places((padded.shape[1], padded.shape[2], padded.shape[3]), window, overlap):
        patch = padded[(slice(None), *place)]
        if not patch.any():
            continue
        between_windows()
        batch = patch[None].to(runtime.device).contiguous(memory_format=runtime.memory_format)
        with runtime.autocast():
            logits = network(batch)[0].float()
        if total is None:
            total = torch.zeros((logits.shape[0], *padded.shape[1:]), device=runtime.device)
        total[(slice(None), *place)].addcmul_(logits, weights)
        weight_sum[place] += weights
    if total is None:
        raise ValueError("the volume is zero everywhere")
    total.div_(weight_sum.clamp_min(1e-12))
    total.masked_fill_(weight_sum == 0, _SURE_BACKGROUND)
    inner = tuple(slice(before, before + size) for (before, _), size in zip(padding, sizes, strict=True))
    return total[(slice(None), *inner)]


def window_places(shape: Size, window: Size, overlap: float) -> Iterator[tuple[slice, slice, slice]]:
    """Where the windows lie: evenly spread from border to border along each axis.

    Args:
        shape: of the volume, at least ``window`` along each axis.
        window: size of each window.
        overlap: the least share that neighbours have in common.
    """
    starts = [window_starts(size, side, overlap) for size, side in zip(shape, window, strict=True)]
    for x, y, z in product(*starts):
        yield (slice(x, x + window[0]), slice(y, y + window[1]), slice(z, z + window[2]))


def window_starts(size: int, side: int, overlap: float) -> list[int]:
    """First voxels of the windows along one axis.

    Example:
        >>> window_starts(100, 64, 0.5)
        [0, 18, 36]
    """
    if size <= side:
        return [0]
    steps = ceil((size - side) / max(1, side * (1 - overlap)))
    return [round(step * (size - side) / steps) for step in range(steps + 1)]


def gaussian_weights(window: Size) -> Tensor:
    """Weights that fall from the middle of a window to its borders; the largest is 1, none is 0.

    Source: the sliding window of nnU-Net (Isensee et al. 2021); sigma is 1/8 of each side.
    """
    weights = torch.ones(window)
    for axis, side in enumerate(window):
        distance = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        along = torch.exp(-0.5 * (distance / (_SIGMA * side)) ** 2)
        weights *= along.reshape([-1 if a == axis else 1 for a in range(3)])
    weights /= weights.max()
    # Corners must not vanish, or a voxel that only they cover would be noise divided by noise.
    return weights.clamp_min(1e-3)
