"""Copies from the CPU to a GPU for which the host does not wait."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(values: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; a GPU receives it from pinned memory, so that the host does not wait."""
    if device.type != "cuda" or values.device.type == "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def send(array: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """Copy an array to a device, as :func:`upload` does; on the CPU, the tensor shares the array's memory."""
    return upload(torch.from_numpy(array), device)
