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
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from app.config.inference import DEFAULTS, PredictOptions
from app.errors import is_out_of_memory
from app.inference.answer_mean import AnswerMean, ArrayMean, MeanAnswer
from app.inference.backends.executors import TorchEngine, needed_bytes
from app.inference.model import Model, Predictor
from app.inference.sliding_window.grid import Padding, Size, place_windows, rounded_up
from app.inference.sliding_window.memory_fallback import GB, ComputePlan, MemoryFallback
from app.inference.sliding_window.numpy_blend import resized
from app.system.device import Runtime
from app.system.process import give_back_gpu_memory, give_back_large_blocks
from data.contrasts import presence_mask
from data.labels import from_regions
from data.nifti import canonical_spacing
from data.preprocess import Prepared, to_native_grid

if TYPE_CHECKING:
    from torch import Tensor

    from app.inference.device_average import DeviceVolume

    Answer = npt.NDArray[Any] | Tensor

#: Axes along which the brain box is mirrored for each answer, none for the first; axis 0 holds contrasts or regions.
FLIPS: Final[tuple[tuple[int, ...], ...]] = tuple(axes for count in range(4) for axes in combinations((1, 2, 3), count))
#: Planes turned from logits into probabilities at a time, so that memory never holds a second copy of an answer.
_PLANES = 16


@dataclass(frozen=True, kw_only=True, eq=False)
class MeanPrediction(MeanAnswer):
    """Combined answers of the networks for a prepared case, over the brain box, at the files' own spacing."""

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
    mean: AnswerMean[Any] | None = None
    for answer in _answers(model, prepared, runtime, options, fallback):
        mean = _with_answer(answer, mean, prepared, model, options, fallback=fallback)
        del answer
    assert mean is not None
    flips, count = len(FLIPS) if options.tta else 1, mean.count
    found = _result(mean, fallback)
    return MeanPrediction(
        centred=found.centred,
        disagreement=found.disagreement,
        volumes_voxels=found.volumes_voxels,
        networks=count // flips,
        flips=flips,
    )


def _with_answer(
    answer: Answer,
    before: AnswerMean[Any] | None,
    prepared: Prepared,
    model: Predictor,
    options: PredictOptions,
    *,
    fallback: MemoryFallback,
) -> AnswerMean[Any]:
    """Return the mean with one more answer: on a GPU until an answer comes from the CPU or memory runs out there."""
    thresholds, uncertainty = model.postprocess.thresholds, options.uncertainty
    if not isinstance(answer, np.ndarray):
        if not isinstance(before, ArrayMean):
            from app.inference.device_average import TensorMean

            before = before or TensorMean(prepared.brain, thresholds, uncertainty=uncertainty)
            try:
                before.add(answer)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            else:
                return before
            _leave_gpu(fallback)
        answer = answer.cpu().numpy()
    mean = ArrayMean(prepared.brain, thresholds, uncertainty=uncertainty) if before is None else before.on_cpu()
    mean.add(answer)
    return mean


def _result(mean: AnswerMean[Any], fallback: MemoryFallback) -> MeanAnswer:
    """Return the result of a mean, computed on the CPU if a GPU has no memory for it."""
    try:
        return mean.result()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    _leave_gpu(fallback)
    return mean.on_cpu().result()


def _leave_gpu(fallback: MemoryFallback) -> None:
    fallback.note("out of memory on the GPU while answers were averaged; continued on the CPU")
    give_back_gpu_memory()


def _answers(
    model: Predictor, prepared: Prepared, runtime: Runtime, options: PredictOptions, fallback: MemoryFallback
) -> Iterator[Answer]:
    """Yield probabilities minus one half of every network for every mirrored image, mirrored back."""
    several = options.tta or not isinstance(model, Model)
    volume = _Volume(prepared)
    for member in model.members():
        try:
            for axes in FLIPS if options.tta else FLIPS[:1]:
                yield _answer(member, volume, axes, runtime, options, fallback=fallback, several=several)
        finally:
            if options.max_memory_gb is not None:
                member.engine.forget()  # else the next case's plan would count its windows twice
        del member


class _Volume:
    """The image of a case as networks see it: in CPU memory, and on a GPU once one needs it."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._on_device: DeviceVolume | None = None

    def on_device(self) -> DeviceVolume:
        """Return the volume in GPU memory."""
        from app.inference.device_average import DeviceVolume

        self._on_device = self._on_device or DeviceVolume(np.ascontiguousarray(self.prepared.image))
        return self._on_device

    def leave_device(self) -> None:
        """Free the GPU memory."""
        if self._on_device is not None:
            self._on_device.release()


def _mirrored(prepared: Prepared, axes: tuple[int, ...]) -> Prepared:
    """Mirror the image of a prepared case, and the position of its box in the volume; arrays are views."""
    if not axes:
        return prepared
    x, y, z = (
        slice(side - part.stop, side - part.start) if axis in axes else part
        for axis, (part, side) in enumerate(zip(prepared.box, prepared.canonical_shape, strict=True), 1)
    )
    return replace(
        prepared,
        image=np.flip(prepared.image, axes),
        brain=np.flip(prepared.brain, tuple(axis - 1 for axis in axes)),
        box=(x, y, z),
    )


def _centre_(logits: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Compute the sigmoid minus one half in place, via tanh; sigmoid(x) - 0.5 would round small logits to 0."""
    for start in range(0, logits.shape[1], _PLANES):
        planes = logits[:, start : start + _PLANES]
        planes *= planes.dtype.type(0.5)
        np.tanh(planes, out=planes)
        planes *= planes.dtype.type(0.5)
    return logits


def _answer(
    model: Model,
    volume: _Volume,
    axes: tuple[int, ...],
    runtime: Runtime,
    options: PredictOptions,
    *,
    fallback: MemoryFallback,
    several: bool,
) -> Answer:
    """Return probabilities minus one half over the brain box, shape (regions, X, Y, Z), at the files' own spacing.

    The network sees the image mirrored along some axes. The answer is mirrored back; it is on the device on which
    windows were blended.
    """
    engine, prepared, seen = model.engine, volume.prepared, _mirrored(volume.prepared, axes)
    around = None if model.crop else around_box(seen)
    x, y, z = (side + sum(gaps) for side, gaps in zip(seen.image.shape[1:], around or ((0, 0),) * 3, strict=True))
    present = presence_mask(prepared.present) if model.takes_missing_contrasts else None
    overlap = model.overlap if options.overlap is None else options.overlap

    def compute(plan: ComputePlan) -> Answer:
        return on_cpu(plan) if stays_on_cpu(plan) else on_device(plan)

    def on_cpu(plan: ComputePlan) -> npt.NDArray[Any]:
        volume.leave_device()
        image, inner = (np.ascontiguousarray(seen.image), ()) if around is None else in_whole_volume(seen.image, seen)
        logits = engine.logits(image, present, runtime, overlap=overlap, plan=plan)[inner]
        del image
        if logits.shape[1:] != prepared.box_shape:
            # Logits rather than labels are resampled, so that borders stay smooth.
            logits = resized(logits, prepared.box_shape)
        answer = _centre_(logits)
        return np.flip(answer, axes) if axes else answer

    def on_device(plan: ComputePlan) -> Tensor:
        import torch

        from app.inference.device_average import tensor_answer

        assert isinstance(engine, TorchEngine)
        image = volume.on_device().mirrored(axes, torch.device(plan.stitch_on))
        windows = place_windows(seen.image, plan.window, overlap, around=around)
        logits = engine.tensor_logits(image, windows, present, runtime, plan=plan)
        return tensor_answer(logits, prepared.box_shape, axes)

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


def stays_on_cpu(plan: ComputePlan) -> bool:
    """Whether answers of a plan are in CPU memory, so that numpy averages them."""
    return plan.stitch_on == "cpu"


def around_box(prepared: Prepared) -> Padding:
    """Return how many voxels the canonical volume, at the network's spacing, has before and after the brain box.

    At the files' own spacing this is exact; at others it is rounded to whole voxels.
    """
    gaps: list[tuple[int, int]] = []
    for side, part, whole in zip(prepared.image.shape[1:], prepared.box, prepared.canonical_shape, strict=True):
        scale = side / (part.stop - part.start)
        start = round(part.start * scale)
        gaps.append((start, max(0, round(whole * scale) - start - side)))
    return (gaps[0], gaps[1], gaps[2])


def in_whole_volume(
    image: npt.NDArray[np.float32], prepared: Prepared
) -> tuple[npt.NDArray[np.float32], tuple[slice, ...]]:
    """Put the brain box back into the volume that it was cropped from.

    Args:
        image: shape (contrasts, X, Y, Z), of the box, at the network's spacing.
        prepared: defines the place of the box.

    Returns:
        the canonical volume at the network's spacing, 0 around the box; and the place of the box in it, as an index for
        any array of shape (channels, X, Y, Z) over the volume. See :func:`around_box`.
    """
    around = around_box(prepared)
    places = [slice(before, before + side) for side, (before, _) in zip(image.shape[1:], around, strict=True)]
    return np.pad(image, ((0, 0), *around)), (slice(None), *places)


def _window(model: Model, image_shape: Size, options: PredictOptions) -> Size:
    """Return the requested size of the windows, adjusted to the sizes that the network accepts."""
    if options.window == "trained":
        return model.window
    sizes = image_shape if options.window == "brain" else options.window
    return rounded_up(sizes, model.engine.divisor)
