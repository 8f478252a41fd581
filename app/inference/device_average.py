"""Answers of networks that stay on the GPU until they are averaged; the numpy code of a CPU is their reference.

The volume of a case is uploaded once for all networks and mirrored images, and mirrored there. Only their mean is
downloaded, in one piece, since the host waits for the GPU at each download.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from app.inference.answer_mean import AnswerMean, ArrayMean, MeanAnswer
from app.inference.postprocess import ByRegion
from data.patches.transfer import upload


class DeviceVolume:
    """The volume of a case, which is uploaded when a device first needs it.

    Args:
        image: shape (contrasts, X, Y, Z), float32.
    """

    def __init__(self, image: npt.NDArray[np.float32]) -> None:
        self._image = image
        self._uploaded: Tensor | None = None

    @torch.inference_mode()
    def mirrored(self, axes: tuple[int, ...], device: torch.device) -> Tensor:
        """Return the volume on a device, mirrored along some of its axes."""
        if self._uploaded is None or self._uploaded.device.type != device.type:
            self._uploaded = upload(torch.from_numpy(self._image), device)
        return self._uploaded.flip(axes) if axes else self._uploaded

    def release(self) -> None:
        """Free the memory on the device."""
        self._uploaded = None


@torch.inference_mode()
def tensor_answer(logits: Tensor, shape: tuple[int, int, int], axes: tuple[int, ...]) -> Tensor:
    """Return probabilities minus one half from logits, resampled to a shape and mirrored back.

    Args:
        logits: shape (regions, X, Y, Z); overwritten.
        shape: shape of the answer.
        axes: axes along which the network's input was mirrored.
    """
    if logits.shape[1:] != shape:
        logits = functional.interpolate(logits[None], shape, mode="trilinear", align_corners=False)[0]
    centred = logits.mul_(0.5).tanh_().mul_(0.5)
    return centred.flip(axes) if axes else centred


class TensorMean(AnswerMean[Tensor]):
    """See :class:`app.inference.answer_mean.AnswerMean`; keeps everything on the device of the first answer."""

    def __init__(self, brain: npt.NDArray[np.bool_], thresholds: ByRegion, *, uncertainty: bool) -> None:
        super().__init__(brain, thresholds, uncertainty=uncertainty)
        self._inside: Tensor | None = None
        self._counts: list[Tensor] = []

    @torch.inference_mode()
    def add(self, answer: Tensor) -> None:
        """See :meth:`app.inference.answer_mean.AnswerMean.add`."""
        if self._inside is None:
            self._inside = upload(torch.from_numpy(self.brain), answer.device)
        inside, counts = self._inside, []
        for share, threshold in zip(answer, self.thresholds, strict=True):
            inside = inside & (share > threshold - 0.5)
            counts.append(torch.count_nonzero(inside))
        own = _entropy_bits(answer) if self.uncertainty else None
        # Nothing has changed if memory ran out above; what follows needs none.
        self.count += 1
        self._counts += counts
        if own is not None:
            self.entropy = own if self.entropy is None else _towards(self.entropy, own, self.count)
        self.mean = answer if self.mean is None else _towards(self.mean, answer, self.count)

    @torch.inference_mode()
    def result(self) -> MeanAnswer:
        """See :meth:`app.inference.answer_mean.AnswerMean.result`."""
        assert self.mean is not None
        assert self._inside is not None
        outside = ~self._inside
        spreads = []
        if self.entropy is not None and self.count > 1:
            spread = (_entropy_bits(self.mean) - self.entropy).clamp_(0, 1).float()
            spreads.append(spread.masked_fill_(outside, 0))
        self.mean.masked_fill_(outside, -0.5)
        counts, *disagreements, centred = fetch_tensors([torch.stack(self._counts), *spreads, self.mean])
        return MeanAnswer(
            centred=centred,
            disagreement=disagreements[0] if disagreements else None,
            volumes_voxels=_by_answer(counts),
        )

    @torch.inference_mode()
    def on_cpu(self) -> ArrayMean:
        """See :meth:`app.inference.answer_mean.AnswerMean.on_cpu`."""
        found = ArrayMean(self.brain, self.thresholds, uncertainty=self.uncertainty)
        found.count = self.count
        # One by one: packed into one piece they would need memory that the device may not have.
        found.mean, found.entropy = (None if one is None else one.cpu().numpy() for one in (self.mean, self.entropy))
        found.volumes.extend(_by_answer(np.array([int(count) for count in self._counts])))
        return found


def _by_answer(counts: npt.NDArray[Any]) -> tuple[tuple[int, int, int], ...]:
    return tuple((int(whole), int(core), int(enhancing)) for whole, core, enhancing in counts.reshape(-1, 3))


def _towards(mean: Tensor, value: Tensor, count: int) -> Tensor:
    """Update the mean of ``count - 1`` values in place to that of ``count`` values; overwrites ``value``."""
    return mean.add_(value.to(mean.dtype).sub_(mean).div_(count))


def _entropy_bits(centred: Tensor) -> Tensor:
    """Return what :func:`app.inference.confidence.entropy_bits` returns."""
    bits: Tensor = torch.special.entr(0.5 + centred) + torch.special.entr(0.5 - centred)
    return bits.div_(log(2)).clamp_(0, 1)


def fetch_tensors(tensors: Sequence[Tensor]) -> list[npt.NDArray[Any]]:
    """Copy tensors to the CPU in one transfer.

    Args:
        tensors: of at least one dimension, those of larger numbers first; all are on one device.

    Returns:
        arrays, which share their memory.
    """
    packed = torch.cat([tensor.contiguous().view(torch.uint8).flatten() for tensor in tensors]).cpu().numpy()
    arrays, start = [], 0
    for tensor in tensors:
        stop = start + tensor.numel() * tensor.element_size()
        dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
        arrays.append(packed[start:stop].view(dtype).reshape(tuple(tensor.shape)))
        start = stop
    return arrays
