"""Apply a network to a whole volume in overlapping windows, blended with Gaussian weights.

On a GPU the volume is uploaded once. Windows are cut from it and blended there, and the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

from app.inference.sliding_window.grid import (
    LEAST_WEIGHT,
    SURE_BACKGROUND,
    Place,
    Size,
    Windows,
    gaussian_exponents,
    place_windows,
)
from app.system.device import Runtime
from data.patches.transfer import upload


def sliding_logits(
    network: nn.Module,
    image: npt.NDArray[np.floating],
    *,
    window: Size,
    overlap: float,
    runtime: Runtime,
    between_windows: Callable[[], None] = lambda: None,
) -> Tensor:
    """Compute the logits of a whole volume that is in CPU memory, blended on the runtime's device.

    Windows are spread evenly, so that neighbours overlap by at least ``overlap``; a volume smaller than the window is
    padded with 0. Windows without any brain (all zero) are skipped.

    Args:
        network: in eval mode, on ``runtime.device``.
        image: float32 or float16, shape (contrasts, X, Y, Z).
        window: size that the network was trained on, in voxels.
        overlap: minimum share of a window that its neighbour also covers, from 0 to below 1.
        runtime: device, precision, memory layout.
        between_windows: called before each forward pass; may raise to stop.

    Returns:
        float32 logits of shape (regions, X, Y, Z) on ``runtime.device``; -30 where there is no brain nearby.
    """
    return window_logits(
        network,
        upload(torch.from_numpy(image), runtime.device),
        place_windows(image, window, overlap),
        runtime=runtime,
        between_windows=between_windows,
    )


@torch.no_grad()  # autocast keeps no copies of weights in inference mode
def window_logits(
    network: nn.Module,
    image: Tensor,
    windows: Windows,
    *,
    runtime: Runtime,
    batch: int = 1,
    half: bool = False,
    between_windows: Callable[[], None] = lambda: None,
) -> Tensor:
    """Compute the logits of a whole volume in given windows, which are blended on the device of the image.

    Args:
        network: in eval mode, on ``runtime.device``.
        image: float32 or float16, shape (contrasts, X, Y, Z), on the CPU or on ``runtime.device``.
        windows: windows on the image.
        runtime: see :func:`sliding_logits`.
        batch: windows per forward pass.
        half: blend in float16, for half the memory, as
            :func:`app.inference.sliding_window.numpy_blend.stitched_logits` does.
        between_windows: see :func:`sliding_logits`.

    Returns:
        logits as :func:`sliding_logits` returns them, on the device of the image; float16 with ``half``.
    """
    stitched = image.device
    padded = _padded(image, windows)
    kept = torch.float16 if half else torch.float32
    weights = gaussian_weights(windows.size, stitched)
    total: Tensor | None = None
    weight_sum = torch.zeros(padded.shape[1:], device=stitched, dtype=kept)
    with _weights_cast_once(network, runtime):
        for first in range(0, len(windows.places), batch):
            between_windows()
            some = windows.places[first : first + batch]
            patches = _patches(padded, some, runtime)
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
    return total[windows.inner]


@contextmanager
def _weights_cast_once(network: nn.Module, runtime: Runtime) -> Iterator[None]:
    """Context in which autocast casts each weight once, and not in every forward pass.

    Autocast keeps the copies until the outermost of its blocks ends, and only those of weights that require a gradient.
    """
    frozen = [one for one in network.parameters() if one.is_floating_point() and not one.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.autocast(runtime.device.type, enabled=False):
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _padded(image: Tensor, windows: Windows) -> Tensor:
    if not any(map(any, windows.padding)):
        return image
    x, y, z = windows.padding
    return functional.pad(image, [*z, *y, *x])


def _patches(image: Tensor, places: Sequence[Place], runtime: Runtime) -> Tensor:
    """Return windows of an image as a float32 batch on the runtime's device, in its memory format."""
    device = runtime.device
    on = device if image.device.type == device.type else image.device
    sides = [part.stop - part.start for part in places[0]]
    patches = torch.empty(
        (len(places), image.shape[0], *sides), dtype=torch.float32, device=on, memory_format=runtime.memory_format
    )
    for patch, place in zip(patches, places, strict=True):
        patch.copy_(image[(slice(None), *place)])
    return upload(patches, device)


def gaussian_weights(window: Size, device: torch.device | None = None) -> Tensor:
    """Return :func:`app.inference.sliding_window.grid.gaussian_array`, computed with torch's exponential function.

    Args:
        window: size of the window, in voxels.
        device: device of the weights; only as many numbers as the window has along its sides are uploaded.
    """
    exponents = torch.cat([torch.from_numpy(along) for along in gaussian_exponents(window)]).exp()
    x, y, z = upload(exponents, device or torch.device("cpu")).split(list(window))
    weights: Tensor = x[:, None, None] * y[None, :, None] * z[None, None, :]
    return weights.div_(weights.max()).clamp_(min=LEAST_WEIGHT)
