"""Apply a network to a whole volume in overlapping windows, blended with Gaussian weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from app.inference.sliding_window.grid import SURE_BACKGROUND, Place, Size, gaussian_array, place_windows
from app.system.device import Runtime


@torch.inference_mode()
def sliding_logits(
    network: nn.Module,
    image: Tensor,
    *,
    window: Size,
    overlap: float,
    runtime: Runtime,
    batch: int = 1,
    stitch_on: str | None = None,
    half: bool = False,
    between_windows: Callable[[], None] = lambda: None,
) -> Tensor:
    """Compute the logits of a whole volume.

    Windows are spread evenly, so that neighbours overlap by at least ``overlap``; a volume smaller than the window is
    padded with 0. Windows without any brain (all zero) are skipped.

    Args:
        network: in eval mode, on ``runtime.device``.
        image: float32, shape (contrasts, X, Y, Z), on the CPU.
        window: size that the network was trained on, in voxels.
        overlap: minimum share of a window that its neighbour also covers, from 0 to below 1.
        runtime: device, precision, memory layout.
        batch: windows per forward pass.
        stitch_on: device on which windows are blended; None means the runtime's device.
        half: blend in float16, for half the memory, as
            :func:`app.inference.sliding_window.numpy_blend.stitched_logits` does.
        between_windows: called before each forward pass; may raise to stop.

    Returns:
        logits of shape (regions, X, Y, Z) on ``stitch_on``, float32, or float16 with ``half``; -30 where there is no
        brain nearby.
    """
    array, places, inner = place_windows(image.numpy(), window, overlap)
    padded = torch.from_numpy(array)
    device, stitched = runtime.device, torch.device(stitch_on or runtime.device_name)
    kept = torch.float16 if half else torch.float32
    weights = gaussian_weights(window).to(stitched)
    total: Tensor | None = None
    weight_sum = torch.zeros(padded.shape[1:], device=stitched, dtype=kept)
    for first in range(0, len(places), batch):
        between_windows()
        some = places[first : first + batch]
        patches = _patches(padded, some, device, runtime.memory_format)
        with runtime.autocast():
            answers = network(patches)
        for place, answer in zip(some, answers, strict=True):
            logits = answer.to(stitched, torch.float32)
            if total is None:
                total = torch.zeros((logits.shape[0], *padded.shape[1:]), device=stitched, dtype=kept)
            if half:
                for region, values in zip(total, logits, strict=True):
                    region[place] += (values * weights).to(kept)
            else:
                total[(slice(None), *place)].addcmul_(logits, weights)
            weight_sum[place] += weights.to(kept)
    assert total is not None
    uncovered = weight_sum == 0
    total.div_(weight_sum.masked_fill_(uncovered, 1))
    total.masked_fill_(uncovered, SURE_BACKGROUND)
    return total[inner]


def _patches(image: Tensor, places: list[Place], device: torch.device, layout: torch.memory_format) -> Tensor:
    """Return windows of an image as a batch on the device; a GPU receives them through pinned memory."""
    patches = torch.stack([image[(slice(None), *place)] for place in places])
    if device.type == "cuda":
        patches = patches.pin_memory().to(device, non_blocking=True)
    return patches.contiguous(memory_format=layout)


def gaussian_weights(window: Size) -> Tensor:
    """Return :func:`app.inference.sliding_window.grid.gaussian_array`, computed with torch's exponential function."""
    return torch.from_numpy(gaussian_array(window, exp=lambda values: torch.from_numpy(values).exp().numpy()))
