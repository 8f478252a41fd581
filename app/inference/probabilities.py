"""Region probabilities of a prepared case: the mean over networks and, if requested, over mirrored images.

Test-time augmentation over the eight ways to mirror a volume follows nnU-Net (Isensee et al., Nature Methods 18, 203,
2021). The disagreement of the answers measures their uncertainty: for mirrored images see Wang et al., Neurocomputing
338, 34, 2019; for networks Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from app.config.inference import DEFAULTS, PredictOptions
from app.inference.backends.executors import needed_bytes
from app.inference.confidence import entropy_bits
from app.inference.model import Model, Predictor
from app.inference.postprocess import ByRegion
from app.inference.sliding_window.grid import Size, rounded_up
from app.inference.sliding_window.memory_fallback import GB, ComputePlan, MemoryFallback
from app.inference.sliding_window.numpy_blend import resized
from app.system.device import Runtime
from app.system.process import give_back_large_blocks
from data.contrasts import presence_mask
from data.labels import from_regions
from data.nifti import canonical_spacing
from data.preprocess import Prepared, to_native_grid

#: Axes along which the brain box is mirrored for each answer, none for the first; axis 0 holds contrasts or regions.
FLIPS: Final[tuple[tuple[int, ...], ...]] = tuple(axes for count in range(4) for axes in combinations((1, 2, 3), count))
#: Planes turned from logits into probabilities at a time, so that memory never holds a second copy of an answer.
_PLANES = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanPrediction:
    """Combined answers of the networks for a prepared case, over the brain box, at the files' own spacing."""

    centred: npt.NDArray[Any]
    """Mean probability minus one half, shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`; -0.5 outside the
    brain. Float32, or float16 if memory is short."""
    disagreement: npt.NDArray[np.float32] | None
    """Entropy of the mean minus the mean of the answers' entropies, in bits from 0 to 1, the same shape; None if it was
    not requested, or for a single answer."""
    volumes_voxels: tuple[tuple[int, int, int], ...]
    """One entry per answer: voxels of each region, after thresholds and nesting but no other post-processing."""
    networks: int
    flips: int
    """Number of mirrored images per network, including the original image: 1 or 8."""


def fallback_for(options: PredictOptions) -> MemoryFallback:
    """Create the memory fallback for a new case, with the requested bound on memory."""
    return MemoryFallback(None if options.max_memory_gb is None else round(options.max_memory_gb * GB))


def warm_up(model: Predictor, runtime: Runtime, options: PredictOptions) -> None:
    """Prepare a single network for its windows before the first case; failures are ignored.

    If memory is bounded, or windows depend on the case, this only loads libraries.
    """
    if options.max_memory_gb is not None:
        give_back_large_blocks()
    if not isinstance(model, Model):
        return
    plan = None
    if options.window != "brain" and options.max_memory_gb is None:
        plan = model.engine.first_plan(_window(model, model.window, options), runtime)
    with suppress(MemoryError, RuntimeError):  # the error will recur with the case, where the fallback handles it
        model.engine.warm_up(plan, runtime)


def predict_codes(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.uint8]:
    """Return the label map of a prepared case, in the program's codes, on the case's grid and in its voxel order."""
    return to_native_grid(
        from_regions(predict_masks(model, prepared, predict_centred(model, prepared, runtime))), prepared
    )


def predict_masks(model: Predictor, prepared: Prepared, centred: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return nested masks of the brain box: probabilities minus one half, cut and cleaned by the model's rules."""
    return model.postprocess.clean(model.postprocess.cut(centred), canonical_spacing(prepared.native_affine))


def on_canonical_grid(values: npt.NDArray[Any], prepared: Prepared) -> npt.NDArray[np.float32]:
    """Place values of the brain box, shape (n, X, Y, Z), into the whole canonical (LPS) volume, with 0 around them."""
    whole = np.zeros((values.shape[0], *prepared.canonical_shape), dtype=np.float32)
    whole[:, *prepared.box] = values
    return whole


def predict_centred(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[Any]:
    """Return mean probabilities of the networks minus one half, over the brain box, at the files' own spacing.

    Returns:
        float32, shape (3, X, Y, Z) of the box, order of :data:`data.labels.REGIONS`; -0.5 outside the brain.
    """
    return predict_answer(model, prepared, runtime).centred


def predict_answer(
    model: Predictor,
    prepared: Prepared,
    runtime: Runtime,
    *,
    options: PredictOptions = DEFAULTS,
    fallback: MemoryFallback | None = None,
) -> MeanPrediction:
    """Average the answers of all networks: one answer per network, or eight with ``tta``.

    The mean is updated after each answer, so that memory holds only one answer in addition to it. The mean of equal
    answers is exactly their value.

    Args:
        model: one network or several.
        prepared: the case.
        runtime: the one that the model was loaded for.
        options: window, overlap and the bound on memory. With ``tta``, each network also predicts the image mirrored
            along every subset of the three axes, and its answers are mirrored back. With ``uncertainty``, the
            disagreement of the answers is computed, which takes two more arrays.
        fallback: memory fallback of the case; afterwards it describes the fallbacks that were used.

    Raises:
        DataError: memory is not sufficient.
    """
    fallback = fallback or fallback_for(options)
    mean: npt.NDArray[Any] | None = None
    entropy: npt.NDArray[Any] | None = None
    volumes: list[tuple[int, int, int]] = []
    for answer in _answers(model, prepared, runtime, options, fallback):
        volumes.append(_volumes(answer, prepared.brain, model.postprocess.thresholds))
        if options.uncertainty:
            own = entropy_bits(answer)
            entropy = own if entropy is None else _towards(entropy, own, len(volumes))
        mean = answer if mean is None else _towards(mean, answer, len(volumes))
        del answer
    assert mean is not None
    spread: npt.NDArray[np.float32] | None = None
    if entropy is not None and len(volumes) > 1:
        spread = np.clip(entropy_bits(mean) - entropy, 0, 1).astype(np.float32, copy=False)
        np.copyto(spread, np.float32(0), where=~prepared.brain)
    np.copyto(mean, mean.dtype.type(-0.5), where=~prepared.brain)
    flips = len(FLIPS) if options.tta else 1
    return MeanPrediction(
        centred=mean, disagreement=spread, volumes_voxels=tuple(volumes), networks=len(volumes) // flips, flips=flips
    )


def _towards(mean: npt.NDArray[Any], value: npt.NDArray[Any], count: int) -> npt.NDArray[Any]:
    """Update the mean of ``count - 1`` values in place to that of ``count`` values; overwrites ``value``."""
    value = value.astype(mean.dtype, copy=False)
    value -= mean
    value /= value.dtype.type(count)
    mean += value
    return mean


def _answers(
    model: Predictor, prepared: Prepared, runtime: Runtime, options: PredictOptions, fallback: MemoryFallback
) -> Iterator[npt.NDArray[Any]]:
    """Yield probabilities minus one half of every network for every mirrored image, mirrored back."""
    several = options.tta or not isinstance(model, Model)
    for member in model.members():
        try:
            for axes in FLIPS if options.tta else FLIPS[:1]:
                seen = prepared if not axes else _mirrored(prepared, axes)
                answer = _centre_(_box_logits(member, seen, runtime, options, fallback, several=several))
                del seen
                yield np.flip(answer, axes) if axes else answer
                del answer
        finally:
            if options.max_memory_gb is not None:
                member.engine.forget()  # else the next case's plan would count its windows twice
        del member


def _mirrored(prepared: Prepared, axes: tuple[int, ...]) -> Prepared:
    """Mirror the image of a prepared case, and the position of its box in the volume."""
    x, y, z = (
        slice(side - part.stop, side - part.start) if axis in axes else part
        for axis, (part, side) in enumerate(zip(prepared.box, prepared.canonical_shape, strict=True), 1)
    )
    return replace(
        prepared,
        image=np.ascontiguousarray(np.flip(prepared.image, axes)),
        brain=np.ascontiguousarray(np.flip(prepared.brain, tuple(axis - 1 for axis in axes))),
        box=(x, y, z),
    )


def _volumes(centred: npt.NDArray[Any], brain: npt.NDArray[np.bool_], thresholds: ByRegion) -> tuple[int, int, int]:
    """Count the voxels of each region in one answer: above the threshold, nested, inside the brain."""
    counts = []
    inside = brain
    for share, threshold in zip(centred, thresholds, strict=True):
        inside = inside & (share > share.dtype.type(threshold - 0.5))
        counts.append(int(np.count_nonzero(inside)))
    return (counts[0], counts[1], counts[2])


def _centre_(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Compute the sigmoid minus one half in place, via tanh; sigmoid(x) - 0.5 would round small logits to 0."""
    for start in range(0, logits.shape[1], _PLANES):
        planes = logits[:, start : start + _PLANES]
        planes *= planes.dtype.type(0.5)
        np.tanh(planes, out=planes)
        planes *= planes.dtype.type(0.5)
    return logits


def _box_logits(
    model: Model,
    prepared: Prepared,
    runtime: Runtime,
    options: PredictOptions,
    fallback: MemoryFallback,
    *,
    several: bool,
) -> npt.NDArray[Any]:
    """Return the logits over the brain box, shape (regions, X, Y, Z), at the files' own spacing, as a new array."""
    engine = model.engine
    image, inner = (prepared.image, ()) if model.crop else in_whole_volume(prepared.image, prepared)
    x, y, z = image.shape[1:]
    present = presence_mask(prepared.present) if model.takes_missing_contrasts else None
    overlap = model.overlap if options.overlap is None else options.overlap

    def compute(plan: ComputePlan) -> npt.NDArray[Any]:
        logits = engine.logits(image, present, runtime, overlap=overlap, plan=plan)[inner]
        if logits.shape[1:] == prepared.box_shape:
            return logits
        # Logits rather than labels are resampled, so that borders stay smooth.
        return resized(logits, prepared.box_shape)

    def needed(plan: ComputePlan) -> int:
        return needed_bytes(
            engine,
            plan,
            runtime,
            (x, y, z),
            prepared.box_shape,
            several=several,
            uncertainty=options.uncertainty,
            mirrored=options.tta,
        )

    if options.max_memory_gb is not None:
        give_back_large_blocks()
        with suppress(MemoryError, RuntimeError):  # the error will recur below, where the fallback handles it
            engine.settle(runtime)
    return fallback.run(
        compute,
        engine.first_plan(_window(model, (x, y, z), options), runtime),
        divisor=engine.divisor,
        needed_bytes=needed,
    )


def in_whole_volume(
    image: npt.NDArray[np.float32], prepared: Prepared
) -> tuple[npt.NDArray[np.float32], tuple[slice, ...]]:
    """Put the brain box back into the volume that it was cropped from.

    Args:
        image: shape (contrasts, X, Y, Z), of the box, at the network's spacing.
        prepared: defines the place of the box.

    Returns:
        the canonical volume at the network's spacing, 0 around the box; and the place of the box in it, as an index for
        any array of shape (channels, X, Y, Z) over the volume. The place is exact at the files' own spacing; at others
        it is rounded to whole voxels.
    """
    shape, places = [], [slice(None)]
    for side, part, whole in zip(image.shape[1:], prepared.box, prepared.canonical_shape, strict=True):
        scale = side / (part.stop - part.start)
        start = round(part.start * scale)
        shape.append(max(start + side, round(whole * scale)))
        places.append(slice(start, start + side))
    volume = np.zeros((image.shape[0], *shape), dtype=image.dtype)
    volume[tuple(places)] = image
    return volume, tuple(places)


def _window(model: Model, image_shape: Size, options: PredictOptions) -> Size:
    """Return the requested size of the windows, adjusted to the sizes that the network accepts."""
    if options.window == "trained":
        return model.window
    sizes = image_shape if options.window == "brain" else options.window
    return rounded_up(sizes, model.engine.divisor)
