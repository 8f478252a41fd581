"""Training patches: prepared cases in a cache on disk, patches drawn from it, batches made ahead of the training step.

Which patch is drawn depends only on the seed and the patch's number, so a resumed run sees what an uninterrupted one
would have. Batches are made by threads: no worker processes, nothing in shared memory.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from data import augment
from data.labels import ENHANCING, NECROSIS, OEDEMA, LabelConvention, to_regions
from data.layouts import Case
from data.nifti import Spacing, naming_the_place
from data.preprocess import prepare

#: Raised when what is stored changes its meaning, so that old caches are made anew.
_CACHE_VERSION: Final = 1
#: Voxels of each tissue that a case remembers as possible patch centres.
_CENTRES_PER_TISSUE: Final = 2000


@dataclass(frozen=True, kw_only=True)
class CachedCase:
    """A prepared case on disk; arrays are mapped, not read."""

    id: str
    folder: Path
    shape: tuple[int, int, int]

    def image(self) -> npt.NDArray[np.float16]:
        """Shape (contrasts, X, Y, Z)."""
        array: npt.NDArray[np.float16] = np.load(self.folder / "image.npy", mmap_mode="r")
        return array

    def codes(self) -> npt.NDArray[np.uint8]:
        """Shape (X, Y, Z), the program's label codes."""
        array: npt.NDArray[np.uint8] = np.load(self.folder / "codes.npy", mmap_mode="r")
        return array

    def centres(self) -> npt.NDArray[np.int16]:
        """Rows of (code, x, y, z): tumour voxels a patch may be centred on."""
        array: npt.NDArray[np.int16] = np.load(self.folder / "centres.npy")
        return array


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one training step sees."""

    image: torch.Tensor
    """float32, shape (N, contrasts, X, Y, Z)."""
    masks: torch.Tensor
    """float32, 0 or 1, shape (N, regions, X, Y, Z)."""
    present: torch.Tensor
    """bool, shape (N, contrasts): which contrasts each patch has; the others are 0 in ``image``."""
    cases: tuple[str, ...]


def cache_cases(
    cases: Sequence[Case],
    folder: Path,
    *,
    spacing_mm: Spacing,
    convention: LabelConvention,
    nan_to_zero: bool = False,
    on_case: Callable[[str], None] | None = None,
) -> list[CachedCase]:
    """Prepare cases with their label maps into a folder; what is there already and still fits is kept.

    Args:
        cases: what to prepare.
        folder: made where it is missing; holds one folder a case, 9 bytes a voxel of the brain's box.
        spacing_mm: spacing the network works at.
        convention: what the label numbers mean.
        nan_to_zero: take image voxels that are NaN or infinite as 0 instead of refusing the case.
        on_case: called with the id of each case that is ready.

    Raises:
        DataError: a case cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def ready(case: Case) -> CachedCase:
        cached = _cache_case(case, folder, spacing_mm, convention, nan_to_zero)
        if on_case is not None:
            on_case(case.id)
        return cached

    # At most four at once: preparing a case takes some 200 MB.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(ready, cases))


class PatchSource:
    """Numbered training patches: patch k is the same whoever asks, whenever."""

    def __init__(
        self,
        cases: Sequence[CachedCase],
        *,
        patch_voxels: tuple[int, int, int],
        tumour_probability: float,
        augmentation: augment.AugmentConfig,
        seed: int,
    ) -> None:
        """Args as in the run's config; ``tumour_probability`` is the share of patches centred on tumour."""
        self._cases = list(cases)
        self._centres = [case.centres() for case in cases]
        self._patch = patch_voxels
        self._tumour_probability = tumour_probability
        self._augmentation = augmentation
        self._seed = seed

    def patch(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], str]:
        """Image (contrasts, X, Y, Z), codes (X, Y, Z) and case id of one patch, augmented."""
        image, codes, case_id, _ = self._patch_and_presence(number)
        return image, codes, case_id

    def _patch_and_presence(
        self, number: int
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], str, tuple[bool, ...]]:
        """The same, and which contrasts the patch has."""
        epoch, position = divmod(number, len(self._cases))
        order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._cases))
        index = int(order[position])
        case = self._cases[index]
        rng = np.random.default_rng([self._seed, 1, number])
        centre = self._centre(index, rng)
        image = cut(case.image(), centre, self._patch).astype(np.float32)
        codes = cut(case.codes(), centre, self._patch)
        variation = augment.draw(self._augmentation, image.shape[0], rng)
        return *augment.apply(variation, image, codes), case.id, variation.present

    def batch(self, step: int, size: int) -> Batch:
        """The patches of one step, or of one micro-batch where steps are accumulated."""
        images, masks, present, ids = [], [], [], []
        for number in range(step * size, (step + 1) * size):
            image, codes, case_id, there = self._patch_and_presence(number)
            images.append(torch.from_numpy(image))
            masks.append(torch.from_numpy(to_regions(codes)))
            present.append(there)
            ids.append(case_id)
        return Batch(
            image=torch.stack(images),
            masks=torch.stack(masks).float(),
            present=torch.tensor(present),
            cases=tuple(ids),
        )

    def _centre(self, index: int, rng: np.random.Generator) -> tuple[int, ...]:
        """A tumour voxel, each tissue the case has being as likely as the others, or any voxel of the box."""
        centres = self._centres[index]
        wanted = rng.random() < self._tumour_probability
        tissues = np.unique(centres[:, 0])
        if wanted and tissues.size:
            of_tissue = centres[centres[:, 0] == rng.choice(tissues)]
            return tuple(int(v) for v in of_tissue[rng.integers(len(of_tissue)), 1:])
        return tuple(int(rng.integers(side)) for side in self._cases[index].shape)


def batches(source: PatchSource, *, first: int, size: int, threads: int, ahead: int = 4) -> Generator[Batch]:
    """Batches from number ``first`` on, without end, made ahead of their use by threads.

    Close the iterator (``contextlib.closing``) to end the threads.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="patches")
    waiting: deque[Future[Batch]] = deque()
    number = first
    try:
        while True:
            while len(waiting) < max(ahead, threads):
                waiting.append(pool.submit(source.batch, number, size))
                number += 1
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cut(array: npt.NDArray[Any], centre: tuple[int, ...], patch: tuple[int, int, int]) -> npt.NDArray[Any]:
    """Cut a patch out of the last three axes: inside the volume where that is large enough, else padded with 0.

    Args:
        array: shape (..., X, Y, Z).
        centre: voxel that the patch's middle should be on; the patch moves where it would leave the volume.
        patch: shape of the result's last three axes.
    """
    inside: list[slice] = []
    outside: list[slice] = []
    for size, middle, side in zip(array.shape[-3:], centre, patch, strict=True):
        start = min(max(middle - side // 2, 0), max(size - side, 0))
        taken = min(side, size)
        pad = (side - taken) // 2
        inside.append(slice(start, start + taken))
        outside.append(slice(pad, pad + taken))
    piece = array[..., inside[0], inside[1], inside[2]]
    if piece.shape[-3:] == tuple(patch):
        return np.array(piece)
    padded = np.zeros((*array.shape[:-3], *patch), dtype=array.dtype)
    padded[..., outside[0], outside[1], outside[2]] = piece
    return padded


def _cache_case(
    case: Case, folder: Path, spacing_mm: Spacing, convention: LabelConvention, nan_to_zero: bool
) -> CachedCase:
    place = folder / case.require().id
    source = _fingerprint(case, spacing_mm, convention, nan_to_zero)
    kept = _read_cached(case.id, place, source)
    if kept is not None:
        return kept
    prepared = prepare(case, spacing_mm=spacing_mm, convention=convention, nan_to_zero=nan_to_zero)
    assert prepared.codes is not None
    partial = folder / f".partial-{os.getpid()}-{case.id}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        with naming_the_place(place):
            _save_array(partial / "image.npy", prepared.image.astype(np.float16))
            _save_array(partial / "codes.npy", prepared.codes)
            _save_array(partial / "centres.npy", _centres(prepared.codes))
            (partial / "source.json").write_text(json.dumps(source), encoding="utf-8")
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    x, y, z = prepared.codes.shape
    return CachedCase(id=case.id, folder=place, shape=(x, y, z))


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """As np.save, but a full disk is told as the system tells it; np.save has an error of its own without a number."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def _read_cached(case_id: str, place: Path, source: dict[str, Any]) -> CachedCase | None:
    """The case as cached earlier, or None where its files or its settings have changed."""
    try:
        same = json.loads((place / "source.json").read_text(encoding="utf-8")) == source
        x, y, z = np.load(place / "codes.npy", mmap_mode="r").shape
        for name in ("image.npy", "centres.npy"):
            np.load(place / name, mmap_mode="r")
    except (OSError, EOFError, ValueError):
        return None
    return CachedCase(id=case_id, folder=place, shape=(x, y, z)) if same else None


def _fingerprint(case: Case, spacing_mm: Spacing, convention: LabelConvention, nan_to_zero: bool) -> dict[str, Any]:
    files = [*case.contrasts.values(), *([case.label] if case.label is not None else [])]
    return {
        "version": _CACHE_VERSION,
        "spacing_mm": list(spacing_mm),
        "labels": list(convention.values),
        "nan_to_zero": nan_to_zero,
        "volumes": case.volumes,
        "files": [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }


def _centres(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """Up to :data:`_CENTRES_PER_TISSUE` voxels of each tissue, spread evenly over it, as rows (code, x, y, z)."""
    rows = []
    for code in (NECROSIS, OEDEMA, ENHANCING):
        voxels = np.argwhere(codes == code)
        chosen = voxels[:: max(1, -(-len(voxels) // _CENTRES_PER_TISSUE))]
        rows.append(np.column_stack([np.full(len(chosen), code), chosen]).astype(np.int16))
    return np.concatenate(rows)
