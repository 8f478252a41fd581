"""Probabilities of the regions for a prepared case: the mean over networks and, where asked for, over mirrored images.

Test-time augmentation over the eight ways to mirror a volume is what nnU-Net does (Isensee et al., Nature Methods 18,
203, 2021). That the answers differ tells how uncertain they are: over mirrored images Wang et al., Neurocomputing 338,
34, 2019; over networks Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from app.inference.model import Model, Predictor
from app.inference.postprocess import ByRegion
from app.inference.windows import sliding_logits
from app.runtime import Runtime
from data.labels import from_regions
from data.nifti import canonical_spacing
from data.preprocess import Prepared, to_native_grid

#: The axes of the brain box (after that of contrasts or regions) that are mirrored, of every answer; the first of none.
FLIPS: Final[tuple[tuple[int, ...], ...]] = tuple(axes for count in range(4) for axes in combinations((1, 2, 3), count))


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What the answers of networks come to for a prepared case, over the brain box, at the files' own spacing."""

    centred: npt.NDArray[np.float32]
    """Mean probability less one half, shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`; -0.5 outside of the
    brain."""
    disagreement: npt.NDArray[np.float32] | None
    """Same shape: entropy of the mean less the mean of the answers' entropies, in bits, 0 to 1; None if not asked for,
    or of one answer."""
    volumes_voxels: tuple[tuple[int, int, int], ...]
    """By answer: voxels of each region, cut at the thresholds and nested, without further post-processing."""
    networks: int
    flips: int
    """Mirrored images that each network saw, the image as it is among them: 1 or 8."""


def predict_codes(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.uint8]:
    """Label map of a prepared case, in the program's codes, on the case's own grid and voxel order."""
    return to_native_grid(
        from_regions(predict_masks(model, prepared, predict_centred(model, prepared, runtime))), prepared
    )


def predict_masks(model: Predictor, prepared: Prepared, centred: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Nested masks of the brain box: probabilities less one half, cut and cleaned by the model's rules."""
    return model.postprocess.clean(model.postprocess.cut(centred), canonical_spacing(prepared.native_affine))


def on_canonical_grid(values: npt.NDArray[np.float32], prepared: Prepared) -> npt.NDArray[np.float32]:
    """Values of the brain box, shape (n, X, Y, Z), in the whole canonical (LPS) volume; 0 around."""
    whole = np.zeros((values.shape[0], *prepared.canonical_shape), dtype=np.float32)
    whole[:, *prepared.box] = values
    return whole


def predict_centred(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.float32]:
    """Probabilities less one half over the brain box, at the files' own spacing; the mean over the networks.

    Returns:
        float32, shape (3, X, Y, Z) of the box, order of :data:`data.labels.REGIONS`; -0.5 outside of the brain.
    """
    return predict_answer(model, prepared, runtime).centred


@torch.inference_mode()
def predict_answer(
    model: Predictor, prepared: Prepared, runtime: Runtime, *, tta: bool = False, disagreement: bool = False
) -> Answer:
    """Ask every network, with ``tta`` eight times each, and take the mean.

    The mean runs along, so that memory holds one answer beside it; and that of equal answers is exactly theirs.

    Args:
        model: the networks.
        prepared: the case.
        runtime: as the model was loaded for.
        tta: whether each network sees the image mirrored along every subset of the three axes, its answer mirrored
            back.
        disagreement: whether to tell where answers differ; holds two arrays more.
    """
    brain = torch.from_numpy(prepared.brain).to(runtime.device)
    mean: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    volumes: list[tuple[int, int, int]] = []
    for answer in _answers(model, prepared, runtime, FLIPS if tta else FLIPS[:1]):
        volumes.append(_volumes(answer, brain, model.postprocess.thresholds))
        if disagreement:
            own = _entropy_bits(answer)
            entropy = own if entropy is None else entropy.add_(own.sub_(entropy).div_(len(volumes)))
        mean = answer if mean is None else mean.add_(answer.sub_(mean).div_(len(volumes)))
        del answer
    assert mean is not None
    spread: npt.NDArray[np.float32] | None = None
    if entropy is not None and len(volumes) > 1:
        spread = _entropy_bits(mean).sub_(entropy).clamp_(0, 1).masked_fill_(~brain, 0).cpu().numpy()
    flips = len(FLIPS) if tta else 1
    return Answer(
        centred=mean.masked_fill_(~brain, -0.5).cpu().numpy(),
        disagreement=spread,
        volumes_voxels=tuple(volumes),
        networks=len(volumes) // flips,
        flips=flips,
    )


def _answers(
    model: Predictor, prepared: Prepared, runtime: Runtime, flips: tuple[tuple[int, ...], ...]
) -> Iterator[torch.Tensor]:
    """Probabilities less one half of every network for every mirrored image, mirrored back; one after the other."""
    for member in model.members():
        for axes in flips:
            seen = prepared if not axes else _mirrored(prepared, axes)
            # The sigmoid less one half; unlike it, it does not round a small logit to one half.
            answer = _box_logits(member, seen, runtime).mul(0.5).tanh_().mul_(0.5)
            del seen
            if axes:
                answer = answer.flip(axes)
            yield answer
            del answer
        del member


def _mirrored(prepared: Prepared, axes: tuple[int, ...]) -> Prepared:
    """A prepared case whose image is mirrored inside its box."""
    return replace(
        prepared,
        image=np.ascontiguousarray(np.flip(prepared.image, axes)),
        brain=np.ascontiguousarray(np.flip(prepared.brain, tuple(axis - 1 for axis in axes))),
    )


def _entropy_bits(centred: torch.Tensor) -> torch.Tensor:
    """Entropy of region or not, in bits, of probabilities less one half."""
    bits: torch.Tensor = torch.special.entr(0.5 + centred).add_(torch.special.entr(0.5 - centred))
    return bits.div_(math.log(2))


def _volumes(centred: torch.Tensor, brain: torch.Tensor, thresholds: ByRegion) -> tuple[int, int, int]:
    """Voxels of the regions in one answer: above the threshold, nested, in the brain."""
    counts = []
    inside = brain
    for share, threshold in zip(centred, thresholds, strict=True):
        inside = inside & (share > threshold - 0.5)
        counts.append(int(torch.count_nonzero(inside)))
    return (counts[0], counts[1], counts[2])


def _box_logits(model: Model, prepared: Prepared, runtime: Runtime) -> torch.Tensor:
    """Logits of shape (regions, X, Y, Z) over the brain box, at the files' own spacing."""
    logits = sliding_logits(
        model.given(prepared.present),
        torch.from_numpy(prepared.image),
        window=model.config.training.patch_voxels,
        overlap=model.config.inference.overlap,
        runtime=runtime,
    )
    if tuple(logits.shape[1:]) != prepared.box_shape:
        # Logits, not labels, go to the finer grid: borders stay smooth.
        logits = functional.interpolate(logits[None], prepared.box_shape, mode="trilinear", align_corners=False)[0]
    return logits
