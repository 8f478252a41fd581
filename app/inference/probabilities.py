"""Probabilities of the regions for a prepared case: one network or the mean of several, over the brain box."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from app.inference.engines import needed_bytes, window_divisor
from app.inference.ladder import GB, Ladder, Way
from app.inference.model import Model, Predictor
from app.inference.places import Size, rounded_up
from app.inference.settings import DEFAULTS, PredictOptions
from app.inference.stitch import resized
from app.runtime import Runtime
from data.labels import REGIONS, from_regions
from data.nifti import canonical_spacing
from data.preprocess import Prepared, to_native_grid
from data.presence import presence_mask

#: Planes that are turned from logits into probabilities at once, so that no second answer is held.
_PLANES = 16


def ladder_for(options: PredictOptions) -> Ladder:
    """A new case's ladder, with the bound that was asked for."""
    return Ladder(None if options.max_memory_gb is None else round(options.max_memory_gb * GB))


def predict_codes(
    model: Predictor,
    prepared: Prepared,
    runtime: Runtime,
    *,
    options: PredictOptions = DEFAULTS,
    ladder: Ladder | None = None,
) -> npt.NDArray[np.uint8]:
    """Label map of a prepared case, in the program's codes, on the case's own grid and voxel order."""
    masks = model.postprocess.cut(predict_centred(model, prepared, runtime, options=options, ladder=ladder))
    cleaned = model.postprocess.clean(masks, canonical_spacing(prepared.native_affine))
    return to_native_grid(from_regions(cleaned), prepared)


def predict_shares(
    model: Predictor,
    prepared: Prepared,
    runtime: Runtime,
    *,
    options: PredictOptions = DEFAULTS,
    ladder: Ladder | None = None,
) -> npt.NDArray[np.float32]:
    """Probabilities of the regions of a prepared case, in canonical (LPS) voxel order, before post-processing.

    Returns:
        float32, shape (3, X, Y, Z) of the whole canonical volume, order of :data:`data.labels.REGIONS`; 0 outside of
        the brain.
    """
    shares = np.zeros((len(REGIONS), *prepared.canonical_shape), dtype=np.float32)
    shares[:, *prepared.box] = predict_centred(model, prepared, runtime, options=options, ladder=ladder)
    shares[:, *prepared.box] += np.float32(0.5)
    return shares


def predict_centred(
    model: Predictor,
    prepared: Prepared,
    runtime: Runtime,
    *,
    options: PredictOptions = DEFAULTS,
    ladder: Ladder | None = None,
) -> npt.NDArray[Any]:
    """Probabilities less one half over the brain box, at the files' own spacing; the mean over the networks.

    The mean runs along, so that memory holds one answer beside it; and that of equal answers is exactly theirs.

    Args:
        model: one network or several.
        prepared: the case.
        runtime: as the model was loaded for.
        options: window, overlap and the bound on memory.
        ladder: of the case; it tells afterwards what was done where memory was short.

    Returns:
        float32 (float16 where the ladder says so), shape (3, X, Y, Z) of the box, order of
        :data:`data.labels.REGIONS`; -0.5 outside of the brain.

    Raises:
        DataError: memory is not enough.
    """
    ladder = ladder or ladder_for(options)
    mean: npt.NDArray[Any] | None = None
    for number, member in enumerate(model.members(), 1):
        answer = _centre_(_box_logits(member, prepared, runtime, options, ladder))
        if mean is None:
            mean = answer
        else:
            answer = answer.astype(mean.dtype, copy=False)
            answer -= mean
            answer /= number
            mean += answer
        del member, answer
    assert mean is not None
    np.copyto(mean, mean.dtype.type(-0.5), where=~prepared.brain)
    return mean


def _centre_(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sigmoid less one half, in place; unlike it, it does not round a small logit to one half."""
    for start in range(0, logits.shape[1], _PLANES):
        planes = logits[:, start : start + _PLANES]
        planes *= planes.dtype.type(0.5)
        np.tanh(planes, out=planes)
        planes *= planes.dtype.type(0.5)
    return logits


def _box_logits(
    model: Model, prepared: Prepared, runtime: Runtime, options: PredictOptions, ladder: Ladder
) -> npt.NDArray[Any]:
    """Logits of shape (regions, X, Y, Z) over the brain box, at the files' own spacing; the caller's own to change."""
    engine = model.engine
    x, y, z = prepared.image.shape[1:]
    present = presence_mask(prepared.present) if model.takes_missing_contrasts else None
    overlap = model.overlap if options.overlap is None else options.overlap

    def compute(way: Way) -> npt.NDArray[Any]:
        logits = engine.logits(prepared.image, present, runtime, overlap=overlap, way=way)
        if logits.shape[1:] == prepared.box_shape:
            return logits
        # Logits, not labels, go to the finer grid: borders stay smooth.
        return resized(logits, prepared.box_shape)

    return ladder.run(
        compute,
        engine.first_way(_window(model, (x, y, z), options), runtime),
        divisor=window_divisor(engine),
        needed_bytes=lambda way: needed_bytes(engine, way, runtime, (x, y, z), prepared.box_shape),
    )


def _window(model: Model, image_shape: Size, options: PredictOptions) -> Size:
    """Size of the windows that is asked for, as the network takes it."""
    if options.window == "trained":
        return model.window
    sizes = image_shape if options.window == "brain" else options.window
    return rounded_up(sizes, window_divisor(model.engine))
