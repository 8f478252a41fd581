"""Training batches made on a device: cropped from cases that stay there, augmented and split into regions there.

The host draws everything, with the numbers of :class:`data.patches.sampler.PatchSource`, and copies to the device only
what it lacks: a case, once, if it may stay; otherwise the crop. Uploads are queued from pinned memory on a stream of
their own, one batch ahead of the step.

Which cases stay does not change. A run uses each case once per epoch, in random order; a cache that always replaces the
least recently used case would have a hit rate of about f^2 / 2 with room for a share f; a fixed set has f.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data.labels import BACKGROUND, CONTRASTS, ENHANCING, NECROSIS
from data.patches.augmentation import Variation, draw_augmentation
from data.patches.device_augmentation import augment_on_device
from data.patches.sampler import Batch, CachedCase, PatchSource, cut_patch, slices_of
from data.patches.synthetic import synthetic_image
from data.patches.transfer import send

#: Bytes of a prepared voxel: four contrasts in float16, and the label code.
_BYTES_PER_VOXEL: Final = 9


@dataclass(frozen=True, kw_only=True)
class Draft:
    """What the host contributes to one patch."""

    index: int
    """Index of its case in the source."""
    centre: tuple[int, ...]
    variation: Variation
    image: npt.NDArray[Any] | None
    """The crop, or the whole case if ``whole``; None if the device holds the case."""
    codes: npt.NDArray[np.uint8] | None
    whole: bool = False


class DevicePatches:
    """Makes the batches of a patch source on a device; they equal the source's own, except for rounding and noise.

    Noise on a GPU is drawn there, from the patch's own seed. Patches of synthetic cases are generated on the host,
    since what they draw depends on their voxels.
    """

    def __init__(self, source: PatchSource, device: torch.device) -> None:
        self._source = source
        self._device = device
        self._staying: frozenset[int] = frozenset()
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        """Stream on which a GPU makes the batches; None on a CPU."""

    def keep(self, budget_bytes: int) -> tuple[int, int]:
        """Let the first cases that fit into a number of bytes stay on the device, from their next use on.

        Returns:
            the number of cases that stay, and their bytes.
        """
        staying, total = [], 0
        for index, case in enumerate(self._source.cases):
            count = case_bytes(case)
            if not case.synthetic and total + count <= budget_bytes:
                staying.append(index)
                total += count
        self._staying = frozenset(staying)
        return len(staying), total

    def draft(self, number: int) -> Draft:
        """Draw a patch, and read what the device lacks of it; any thread may call this.

        Raises:
            DataError: the prepared arrays of its case were removed or damaged.
        """
        source = self._source
        index, centre, rng = source.place(number)
        image: npt.NDArray[Any] | None = None
        codes: npt.NDArray[np.uint8] | None = None
        whole = index in self._staying
        if index not in self._held:
            mapped = source.mapped(index)
            if whole:
                image, codes = np.array(mapped.image), np.array(mapped.codes)
            else:
                image = cut_patch(mapped.image, centre, source.patch_voxels)
                codes = cut_patch(mapped.codes, centre, source.patch_voxels)
                if source.cases[index].synthetic:
                    image = synthetic_image(image.astype(np.float32), codes, rng)
        variation = draw_augmentation(source.augmentation, len(CONTRASTS), rng)
        return Draft(index=index, centre=centre, variation=variation, image=image, codes=codes, whole=whole)

    def batch(self, drafts: Sequence[Draft]) -> Batch:
        """Make a batch of drafts on the device; only one thread may call this, and it never waits for the device."""
        made = [augment_on_device(draft.variation, *self._crop(draft)) for draft in drafts]
        present = np.array([draft.variation.present for draft in drafts])
        return Batch(
            image=torch.stack([image for image, _ in made]),
            masks=region_masks(torch.stack([codes for _, codes in made])),
            present=send(present, self._device),
            cases=tuple(self._source.cases[draft.index].id for draft in drafts),
        )

    def _crop(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """The patch before augmentation: float32 image and uint8 codes."""
        patch = self._source.patch_voxels
        if draft.image is not None and draft.codes is not None:
            image, codes = draft.image, draft.codes
            if draft.whole and not self._hold(draft.index, image, codes):
                image, codes = (cut_patch(array, draft.centre, patch) for array in (image, codes))
            if draft.index not in self._held:
                return send(image, self._device).float(), send(codes, self._device)
        whole_image, whole_codes = self._held[draft.index]
        return _cut(whole_image, draft.centre, patch).float(), _cut(whole_codes, draft.centre, patch)

    def _hold(self, index: int, image: npt.NDArray[Any], codes: npt.NDArray[np.uint8]) -> bool:
        """Upload a case that may stay; if the device has no memory for it, no further case stays."""
        if index not in self._held:
            try:
                self._held[index] = send(image, self._device), send(codes, self._device)
            except torch.OutOfMemoryError:
                self._staying = frozenset(self._held)
                return False
        return True


def region_masks(codes: Tensor) -> Tensor:
    """Split label maps into region masks on their device, as :func:`data.labels.to_regions` does.

    Args:
        codes: uint8, shape (N, X, Y, Z).

    Returns:
        float32, 0 or 1, shape (N, 3, X, Y, Z).
    """
    enhancing = codes == ENHANCING
    return torch.stack([codes != BACKGROUND, enhancing | (codes == NECROSIS), enhancing], dim=1).float()


def case_bytes(case: CachedCase) -> int:
    """Bytes that a prepared case takes on a device."""
    x, y, z = case.shape
    return x * y * z * _BYTES_PER_VOXEL


def device_batches(
    patches: DevicePatches,
    device: torch.device,
    *,
    first: int,
    size: int,
    threads: int,
    every: int = 1,
    on_batch: Callable[[int], None] = lambda _: None,
) -> Generator[Batch]:
    """Yield batches on a device, like :func:`data.patches.sampler.batches`; threads draft them, several ahead.

    On a GPU each batch is made on a separate stream, while the previous step is computed.

    Args:
        patches: makes the batches.
        device: their device.
        first: number of the first batch.
        size: patches per batch.
        threads: number of threads that draft patches.
        every: step between the numbers of batches.
        on_batch: called with how many batches were yielded before, each time one is requested.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="patches")
    drafting: deque[list[Future[Draft]]] = deque()
    made: deque[tuple[Batch, Any]] = deque()
    number, yielded = first, 0

    def make() -> None:
        nonlocal number
        while len(drafting) < max(4, threads):
            numbers = range(number * size, (number + 1) * size)
            drafting.append([pool.submit(patches.draft, one) for one in numbers])
            number += every
        drafts = [future.result() for future in drafting.popleft()]
        with nullcontext() if patches.stream is None else torch.cuda.stream(patches.stream):
            batch = patches.batch(drafts)
        made.append((batch, None if patches.stream is None else patches.stream.record_event()))

    try:
        make()
        while True:
            on_batch(yielded)
            make()  # one ahead
            batch, ready = made.popleft()
            if ready is not None:
                current = torch.cuda.current_stream(device)
                current.wait_event(ready)
                for tensor in (batch.image, batch.masks, batch.present):
                    tensor.record_stream(current)  # or its memory would be reused before the step has read it
            yielded += 1
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _cut(array: Tensor, centre: tuple[int, ...], patch: tuple[int, int, int]) -> Tensor:
    """:func:`data.patches.sampler.cut_patch` for tensors."""
    inside, outside = slices_of(tuple(array.shape[-3:]), centre, patch)
    piece = array[..., inside[0], inside[1], inside[2]]
    if piece.shape[-3:] == tuple(patch):
        return piece
    padded = array.new_zeros((*array.shape[:-3], *patch))
    padded[..., outside[0], outside[1], outside[2]] = piece
    return padded
