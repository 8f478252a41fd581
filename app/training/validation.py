"""Dice of a network on the whole volumes of the validation cases, predicted by sliding window."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from app.config.inference import InferenceConfig
from app.config.load import RunConfig
from app.evaluation.metrics import dice
from app.inference.sliding_window.grid import Size
from app.inference.sliding_window.torch_blend import sliding_logits
from app.system.device import Runtime
from app.training.distributed import ALONE, World
from data.contrasts import presence_mask
from data.labels import CONTRASTS, REGIONS, from_regions, to_regions
from data.patches.sampler import CachedCase
from models import GivenPresence


def on_contrasts(network: nn.Module, config: RunConfig) -> nn.Module:
    """Return the network, wrapped if needed, so that it takes only the contrasts, all of them present."""
    return GivenPresence(network, presence_mask(CONTRASTS)) if config.takes_missing_contrasts else network


def validation_dice(
    network: nn.Module,
    cases: Sequence[CachedCase],
    *,
    window: Size,
    config: InferenceConfig,
    runtime: Runtime,
    world: World = ALONE,
    between_windows: Callable[[], None] = lambda: None,
    on_case: Callable[[CachedCase, npt.NDArray[np.uint8]], None] = lambda *_: None,
    on_scores: Callable[[dict[str, dict[str, float]]], None] = lambda _: None,
) -> dict[str, float]:
    """Return the mean Dice by region over cases, at the network's spacing; a region empty in both masks scores 1.

    Args:
        network: a network in any mode; it is set to eval mode and restored afterwards.
        cases: prepared cases with label maps, at least one.
        window: window size in voxels.
        config: supplies the overlap.
        runtime: device and precision.
        world: the processes among which the cases are divided.
        between_windows: called before each window; may raise to stop.
        on_case: called with each case of this process and its prediction, label codes of shape (X, Y, Z).
        on_scores: called in every process with the Dice by region of all cases, keyed by case id.
    """
    was_training = network.training
    network.eval()

    def score(number: int) -> list[float]:
        case = cases[number]
        image = torch.from_numpy(case.image().astype(np.float32))
        logits = sliding_logits(
            network, image, window=window, overlap=config.overlap, runtime=runtime, between_windows=between_windows
        )
        codes = from_regions((logits > 0).cpu().numpy())
        on_case(case, codes)
        predicted = to_regions(codes)
        expected = to_regions(np.asarray(case.codes()))
        return [dice(one, other) for one, other in zip(predicted, expected, strict=True)]

    scores = world.rows(len(cases), score)
    network.train(was_training)
    on_scores({case.id: dict(zip(REGIONS, row, strict=True)) for case, row in zip(cases, scores, strict=True)})
    return {region: float(mean) for region, mean in zip(REGIONS, np.mean(scores, axis=0), strict=True)}
