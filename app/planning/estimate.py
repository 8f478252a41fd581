"""Estimate the memory of a training step without computing it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Final

import torch
from torch import Tensor

from app.config.load import RunConfig
from data.labels import CONTRASTS, REGIONS
from models import DeepLoss, RegionLoss, build_network

#: Factor for the kernels' scratch space and for memory that allocators keep: on a CPU, runs of `laptop` with patches of
#: 56 and 96 voxels, batches of 3 and 6, in float32 and bfloat16 took 1.28 to 1.36 times the computed amount.
_MORE: Final = 1.3
#: Batches in memory: those that ``data.patches.sampler.batches`` makes ahead, and the one in use.
_BATCHES: Final = 5


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of a training process in addition to program and libraries, in bytes."""

    host: int
    """RAM."""
    gpu: int
    """GPU memory; 0 without a GPU."""


def estimate(config: RunConfig, *, half: bool, gpu: bool) -> Estimate:
    """Estimate the memory of a run.

    Args:
        config: network, patch and batch.
        half: whether activations are bfloat16 or float16.
        gpu: whether steps run on a GPU; then only batches are in RAM.
    """
    settings = config.training
    voxels = prod(settings.patch_voxels) * settings.batch_size
    batches = voxels * 4 * (len(CONTRASTS) + len(REGIONS)) * max(_BATCHES, config.runtime.loader_threads + 1)
    step = step_bytes(config, half=half)
    if gpu:
        return Estimate(host=int(_MORE * batches), gpu=int(_MORE * step))
    return Estimate(host=int(_MORE * (batches + step)), gpu=0)


def step_bytes(config: RunConfig, *, half: bool) -> int:
    """Return the peak bytes of a step in addition to the program: saved activations, weights, gradients, moments.

    The network runs on torch's meta device, which tracks shapes but holds no numbers. The tensors that autograd would
    save for the backward pass are added up, counting each storage once. Scratch space of the kernels is not included.

    Args:
        config: network, patch and batch.
        half: whether activations are bfloat16 or float16 (autocast); weights and their moments are always float32.
    """
    settings = config.training
    with torch.device("meta"):
        network = build_network(config.network, in_channels=config.input_channels, out_channels=len(REGIONS))
        image = torch.empty((settings.batch_size, config.input_channels, *settings.patch_voxels))
        masks = torch.empty((settings.batch_size, len(REGIONS), *settings.patch_voxels))
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    saved: dict[int, tuple[Any, int]] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            _, before = saved.get(storage._cdata, (None, 0))  # an earlier view of it may be smaller
            saved[storage._cdata] = (storage, max(before, tensor.numel() * tensor.element_size()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logits: Tensor | list[Tensor] = network(image)
        activations = _sum(saved) // (2 if half else 1)
        saved.clear()
        loss = DeepLoss(RegionLoss())(logits, masks)
    outputs = [logits] if isinstance(logits, Tensor) else logits  # several with deep supervision
    held = activations + _sum(saved) + sum(t.numel() * t.element_size() for t in (image, masks, *outputs))
    del loss
    moments = 2 if settings.optimizer == "adamw" else 1
    return held + (2 + moments) * sum(p.numel() * p.element_size() for p in network.parameters())


def _sum(saved: dict[int, tuple[Any, int]]) -> int:
    return sum(size for _, size in saved.values())
