"""MindGrab's network for skull stripping, if its files are installed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from app.errors import RunError
from app.runs.published import MODELS, folder_of, is_installed, is_published

if TYPE_CHECKING:
    from data.native_space.mindgrab import Network
    from models.meshnet import MeshNet

_NAME = "mindgrab"


def mindgrab_network() -> Network | None:
    """Return the function that marks the brain in a volume; None if MindGrab is not installed.

    Raises:
        RunError: the installed files are not the published ones.
    """
    return _network(folder_of(_NAME)) if is_installed(_NAME) else None


@cache
def _network(folder: Path) -> Network:
    for file in MODELS[_NAME].files:
        if not is_published(folder / file.name, file):
            raise RunError(
                f"{folder / file.name}: not the published file. Delete {folder}, then run: "
                f"znormseg model download {_NAME}"
            )
    network: MeshNet | None = None

    def mark(values: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
        import torch

        from models.meshnet import read_meshnet

        nonlocal network
        network = network or read_meshnet(folder / "model.json", folder / "model.bin")
        with torch.inference_mode():
            background, brain = network.logits(torch.from_numpy(values))
            mask: npt.NDArray[np.bool_] = (brain > background).numpy()
        return mask

    return mark
