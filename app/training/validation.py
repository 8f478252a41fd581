"""Dice of a network on the whole volumes of the validation cases, predicted by sliding window."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from app.config.inference import InferenceConfig
from app.config.load import RunConfig
from app.evaluation.metrics import dice
from app.inference.device_average import fetch_tensors
from app.inference.sliding_window.grid import Size
from app.inference.sliding_window.torch_blend import sliding_logits
from app.system.device import Runtime
from app.training.distributed import ALONE, World
from data.contrasts import presence_mask
from data.labels import (
    CONTRASTS,
    ENHANCING,
    NECROSIS,
    OEDEMA,
    REGIONS,
    from_regions,
    region_codes,
    to_regions,
)
from data.patches.sampler import CachedCase
from data.patches.transfer import upload
from models import GivenPresence

Codes = npt.NDArray[np.uint8]


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
    on_case: Callable[[CachedCase, Codes], None] = lambda *_: None,
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
    on_gpu = runtime.device.type == "cuda"

    def score(number: int) -> list[float]:
        case = cases[number]
        # Prepared cases are in float16; on a GPU, windows become float32 when they are cut.
        image = case.image() if on_gpu else case.image().astype(np.float32)
        logits = sliding_logits(
            network, image, window=window, overlap=config.overlap, runtime=runtime, between_windows=between_windows
        )
        codes, scores = (scored_on_device if on_gpu else scored)(logits, np.asarray(case.codes()))
        on_case(case, codes)
        return scores

    scores = world.rows(len(cases), score)
    network.train(was_training)
    on_scores({case.id: dict(zip(REGIONS, row, strict=True)) for case, row in zip(cases, scores, strict=True)})
    return {region: float(mean) for region, mean in zip(REGIONS, np.mean(scores, axis=0), strict=True)}


def scored(logits: Tensor, expected: Codes) -> tuple[Codes, list[float]]:
    """Return the label codes that logits of shape (3, X, Y, Z) mean, and the Dice of each region with a label map."""
    codes = from_regions((logits > 0).cpu().numpy())
    pairs = zip(to_regions(codes), to_regions(expected), strict=True)
    return codes, [dice(one, other) for one, other in pairs]


@torch.inference_mode()
def scored_on_device(logits: Tensor, expected: Codes) -> tuple[Codes, list[float]]:
    """Compute what :func:`scored` does on the device of the logits; only label codes and counts are downloaded."""
    whole, core, enhancing = logits > 0
    nested = (whole, whole & core, whole & core & enhancing)
    reference = upload(torch.from_numpy(expected), logits.device)
    codes, counts = torch.zeros_like(reference), []
    for mask, region, code_of_rest in zip(nested, REGIONS, (OEDEMA, NECROSIS, ENHANCING), strict=True):
        truth = torch.stack([reference == code for code in region_codes(region)]).any(dim=0)
        codes.masked_fill_(mask, code_of_rest)
        counts += [torch.count_nonzero(one) for one in (mask & truth, mask, truth)]
    numbers, label_map = fetch_tensors([torch.stack(counts), codes])
    scores = [2 * int(both) / int(one + other) if one + other else 1.0 for both, one, other in numbers.reshape(3, 3)]
    return label_map, scores
