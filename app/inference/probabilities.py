"""Probabilities of the regions for a prepared case: the mean over networks and, where asked for, over mirrored images.

Test-time augmentation over the eight ways to mirror a volume is what nnU-Net does (Isensee et al., Nature Methods 18,
203, 2021). That the answers differ tells how uncertain they are: over mirrored images Wang et al., Neurocomputing 338,
34, 2019; over networks Lakshminarayanan et al., NeurIPS 2017 (arXiv 1612.01474).
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
from app.inference.backends.executors import needed_bytes, window_divisor
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

#: The axes of the brain box (after that of contrasts or regions) that are mirrored, of every answer; the first of none.
FLIPS: Final[tuple[tuple[int, ...], ...]] = tuple(axes for count in range(4) for axes in combinations((1, 2, 3), count))
#: Planes that are turned from logits into probabilities at once, so that no second answer is held.
_PLANES = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanPrediction:
    """What the answers of networks come to for a prepared case, over the brain box, at the files' own spacing."""

    centred: npt.NDArray[Any]
    """Mean probability less one half, shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`; -0.5 outside of the
    brain. Float32, or float16 where memory is short."""
    disagreement: npt.NDArray[np.float32] | None
    """Same shape: entropy of the mean less the mean of the answers' entropies, in bits, 0 to 1; None if not asked for,
    or of one answer."""
    volumes_voxels: tuple[tuple[int, int, int], ...]
    """By answer: voxels of each region, cut at the thresholds and nested, without further post-processing."""
    networks: int
    flips: int
    """Mirrored images that each network saw, the image as it is among them: 1 or 8."""


def ladder_for(options: PredictOptions) -> MemoryFallback:
    """A new case's ladder, with the bound that was asked for."""
    return MemoryFallback(None if options.max_memory_gb is None else round(options.max_memory_gb * GB))


def warm_up(model: Predictor, runtime: Runtime, options: PredictOptions) -> None:
    """Prepare a single network for its windows before there is a case; where it cannot be done, nothing happens.

    Where memory is bounded, and for windows that depend on the case, only libraries are loaded.
    """
    if options.max_memory_gb is not None:
        give_back_large_blocks()
    if not isinstance(model, Model):
        return
    way = None
    if options.window != "brain" and options.max_memory_gb is None:
        way = model.engine.first_way(_window(model, model.window, options), runtime)
    with suppress(MemoryError, RuntimeError):  # it will come again with the case, and the ladder answers it
        model.engine.warm_up(way, runtime)


def predict_codes(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.uint8]:
    """Label map of a prepared case, in the program's codes, on the case's own grid and voxel order."""
    return to_native_grid(
        from_regions(predict_masks(model, prepared, predict_centred(model, prepared, runtime))), prepared
    )


def predict_masks(model: Predictor, prepared: Prepared, centred: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Nested masks of the brain box: probabilities less one half, cut and cleaned by the model's rules."""
    return model.postprocess.clean(model.postprocess.cut(centred), canonical_spacing(prepared.native_affine))


def on_canonical_grid(values: npt.NDArray[Any], prepared: Prepared) -> npt.NDArray[np.float32]:
    """Values of the brain box, shape (n, X, Y, Z), in the whole canonical (LPS) volume; 0 around."""
    whole = np.zeros((values.shape[0], *prepared.canonical_shape), dtype=np.float32)
    whole[:, *prepared.box] = values
    return whole


def predict_centred(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[Any]:
    """Probabilities less one half over the brain box, at the files' own spacing; the mean over the networks.

    Returns:
        float32, shape (3, X, Y, Z) of the box, order of :data:`data.labels.REGIONS`; -0.5 outside of the brain.
    """
    return predict_answer(model, prepared, runtime).centred


def predict_answer(
    model: Predictor,
    prepared: Prepared,
    runtime: Runtime,
    *,
    options: PredictOptions = DEFAULTS,
    ladder: MemoryFallback | None = None,
) -> MeanPrediction:
    """Ask every network, with ``tta`` eight times each, and take the mean.

    The mean runs along, so that memory holds one answer beside it; and that of equal answers is exactly theirs.

    Args:
        model: one network or several.
        prepared: the case.
        runtime: as the model was loaded for.
        options: window, overlap, the bound on memory; ``tta``, with which each network sees the image mirrored along
            every subset of the three axes, its answer mirrored back; ``uncertainty``, with which it is told where
            answers differ, holding two arrays more.
        ladder: of the case; it tells afterwards what was done where memory was short.

    Raises:
        DataError: memory is not enough.
    """
    ladder = ladder or ladder_for(options)
    mean: npt.NDArray[Any] | None = None
    entropy: npt.NDArray[Any] | None = None
    volumes: list[tuple[int, int, int]] = []
    for answer in _answers(model, prepared, runtime, options, ladder):
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
    """The mean of ``count`` values out of that of those before, in place; ``value`` is used up."""
    value = value.astype(mean.dtype, copy=False)
    value -= mean
    value /= value.dtype.type(count)
    mean += value
    return mean


def _answers(
    model: Predictor, prepared: Prepared, runtime: Runtime, options: PredictOptions, ladder: MemoryFallback
) -> Iterator[npt.NDArray[Any]]:
    """Probabilities less one half of every network for every mirrored image, mirrored back; one after the other."""
    several = options.tta or not isinstance(model, Model)
    for member in model.members():
        try:
            for axes in FLIPS if options.tta else FLIPS[:1]:
                seen = prepared if not axes else _mirrored(prepared, axes)
                answer = _centre_(_box_logits(member, seen, runtime, options, ladder, several=several))
                del seen
                yield np.flip(answer, axes) if axes else answer
                del answer
        finally:
            if options.max_memory_gb is not None:
                member.engine.forget()  # else the next case's plan would count its windows twice
        del member


def _mirrored(prepared: Prepared, axes: tuple[int, ...]) -> Prepared:
    """A prepared case whose image is mirrored, and with it the volume that its box lies in."""
    return replace(
        prepared,
        image=np.ascontiguousarray(np.flip(prepared.image, axes)),
        brain=np.ascontiguousarray(np.flip(prepared.brain, tuple(axis - 1 for axis in axes))),
        box=_mirrored_box(prepared, axes),
    )


def _mirrored_box(prepared: Prepared, axes: tuple[int, ...]) -> tuple[slice, slice, slice]:
    """Where the box lies in the mirrored volume."""
    x, y, z = (
        slice(side - part.stop, side - part.start) if axis in axes else part
        for axis, (part, side) in enumerate(zip(prepared.box, prepared.canonical_shape, strict=True), 1)
    )
    return (x, y, z)


def _volumes(centred: npt.NDArray[Any], brain: npt.NDArray[np.bool_], thresholds: ByRegion) -> tuple[int, int, int]:
    """Voxels of the regions in one answer: above the threshold, nested, in the brain."""
    counts = []
    inside = brain
    for share, threshold in zip(centred, thresholds, strict=True):
        inside = inside & (share > share.dtype.type(threshold - 0.5))
        counts.append(int(np.count_nonzero(inside)))
    return (counts[0], counts[1], counts[2])


def _centre_(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The sigmoid less one half, in place; unlike it, it does not round a small logit to one half."""
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
    ladder: MemoryFallback,
    *,
    several: bool,
) -> npt.NDArray[Any]:
    """Logits of shape (regions, X, Y, Z) over the brain box, at the files' own spacing; the caller's own to change."""
    engine = model.engine
    image, inner = (prepared.image, ()) if model.crop else in_whole_volume(prepared.image, prepared)
    x, y, z = image.shape[1:]
    present = presence_mask(prepared.present) if model.takes_missing_contrasts else None
    overlap = model.overlap if options.overlap is None else options.overlap

    def compute(way: ComputePlan) -> npt.NDArray[Any]:
        logits = engine.logits(image, present, runtime, overlap=overlap, way=way)[inner]
        if logits.shape[1:] == prepared.box_shape:
            return logits
        # Logits, not labels, go to the finer grid: borders stay smooth.
        return resized(logits, prepared.box_shape)

    def needed(way: ComputePlan) -> int:
        return needed_bytes(
            engine,
            way,
            runtime,
            (x, y, z),
            prepared.box_shape,
            several=several,
            uncertainty=options.uncertainty,
            mirrored=options.tta,
        )

    if options.max_memory_gb is not None:
        give_back_large_blocks()
        with suppress(MemoryError, RuntimeError):  # it will come again, and the ladder answers it
            engine.settle(runtime)
    return ladder.run(
        compute,
        engine.first_way(_window(model, (x, y, z), options), runtime),
        divisor=window_divisor(engine),
        needed_bytes=needed,
    )


def in_whole_volume(
    image: npt.NDArray[np.float32], prepared: Prepared
) -> tuple[npt.NDArray[np.float32], tuple[slice, ...]]:
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
    volume = np.zeros((image.shape[0], *shape), dtype=image.dtype)
    volume[tuple(places)] = image
    return volume, tuple(places)


def _window(model: Model, image_shape: Size, options: PredictOptions) -> Size:
    """Size of the windows that is asked for, as the network takes it."""
    if options.window == "trained":
        return model.window
    sizes = image_shape if options.window == "brain" else options.window
    return rounded_up(sizes, window_divisor(model.engine))
