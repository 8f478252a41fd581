"""Probabilities of the regions for a prepared case: one network or the mean of several, over the brain box."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from app.inference.model import Model, Predictor
from app.inference.windows import sliding_logits
from app.runtime import Runtime
from data.labels import REGIONS, from_regions
from data.nifti import canonical_spacing
from data.preprocess import Prepared, to_native_grid


def predict_codes(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.uint8]:
    """Label map of a prepared case, in the program's codes, on the case's own grid and voxel order."""
    masks = model.postprocess.cut(predict_centred(model, prepared, runtime))
    cleaned = model.postprocess.clean(masks, canonical_spacing(prepared.native_affine))
    return to_native_grid(from_regions(cleaned), prepared)


def predict_shares(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.float32]:
    """Probabilities of the regions of a prepared case, in canonical (LPS) voxel order, before post-processing.

    Returns:
        float32, shape (3, X, Y, Z) of the whole canonical volume, order of :data:`data.labels.REGIONS`; 0 outside of
        the brain.
    """
    shares = np.zeros((len(REGIONS), *prepared.canonical_shape), dtype=np.float32)
    shares[:, *prepared.box] = predict_centred(model, prepared, runtime) + np.float32(0.5)
    return shares


@torch.inference_mode()
def predict_centred(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.float32]:
    """Probabilities less one half over the brain box, at the files' own spacing; the mean over the networks.

    The mean runs along, so that memory holds one answer beside it; and that of equal answers is exactly theirs.

    Returns:
        float32, shape (3, X, Y, Z) of the box, order of :data:`data.labels.REGIONS`; -0.5 outside of the brain.
    """
    mean: torch.Tensor | None = None
    for number, member in enumerate(model.members(), 1):
        # The sigmoid less one half; unlike it, it does not round a small logit to one half.
        answer = _box_logits(member, prepared, runtime).mul(0.5).tanh_().mul_(0.5)
        mean = answer if mean is None else mean.add_(answer.sub_(mean).div_(number))
        del member, answer
    assert mean is not None
    centred: npt.NDArray[np.float32] = mean.cpu().numpy()
    return np.where(prepared.brain, centred, np.float32(-0.5))


def _box_logits(model: Model, prepared: Prepared, runtime: Runtime) -> torch.Tensor:
    """Logits of shape (regions, X, Y, Z) over the brain box, at the files' own spacing."""
    image = torch.from_numpy(prepared.image)
    inner: tuple[slice, ...] = ()
    if not model.config.inference.crop:
        image, inner = in_whole_volume(image, prepared)
    logits = sliding_logits(
        model.given(prepared.present),
        image,
        window=model.config.training.patch_voxels,
        overlap=model.config.inference.overlap,
        runtime=runtime,
    )[inner]
    if tuple(logits.shape[1:]) != prepared.box_shape:
        # Logits, not labels, go to the finer grid: borders stay smooth.
        logits = functional.interpolate(logits[None], prepared.box_shape, mode="trilinear", align_corners=False)[0]
    return logits


def in_whole_volume(image: torch.Tensor, prepared: Prepared) -> tuple[torch.Tensor, tuple[slice, ...]]:
    """Put the brain box back into the empty space it was cut from.

    Args:
        image: shape (contrasts, X, Y, Z), of the box, at the network's spacing.
        prepared: where the box lies.

    Returns:
        the canonical volume at the network's spacing, 0 around the box; and where the box lies in it, as an index of
        any array (channels, X, Y, Z) of the volume. At the files' own spacing the place is exact, else to a voxel.
    """
    shape, places = [], [slice(None)]
    for side, part, whole in zip(image.shape[1:], prepared.box, prepared.canonical_shape, strict=True):
        scale = side / (part.stop - part.start)
        start = round(part.start * scale)
        shape.append(max(start + side, round(whole * scale)))
        places.append(slice(start, start + side))
    volume = image.new_zeros((image.shape[0], *shape))
    volume[tuple(places)] = image
    return volume, tuple(places)
