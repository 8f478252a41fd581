"""Training patches: prepared cases in a cache on disk, patches drawn from them, batches prefetched for training steps.

A patch depends only on the seed and its number, so a resumed run sees the same patches as an uninterrupted one.
Batches are made by threads: no worker processes, no shared memory.

An image is stored on disk as float16 in C order of (contrasts, X, Y, Z), the order networks expect, and memory-mapped:
its pages belong to the operating system, which shares them among processes and reclaims them when memory is short.
With contrasts last, a patch would be read in longer runs, but transposing costs more than that saves. Maps stay open
between patches, and torch converts float16 to float32 while cutting; mapping each patch separately or converting in a
second step takes longer. All of this was measured on patches of 64 and 128 voxels per side:
``bench/loader.py --layouts``.
"""

from __future__ import annotations

import errno
import io
import os
import secrets
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import torch

from data.datasets.layouts import Case
from data.errors import DataError
from data.filesystem import in_words
from data.labels import ENHANCING, NECROSIS, OEDEMA, LabelConvention, to_regions
from data.nifti import Spacing
from data.patches import augmentation as augment
from data.patches.cache import ARRAYS, CaseFolder, backgrounds_in, open_array, write_source
from data.patches.synthetic import synthetic_image
from data.preprocess import Prepared, prepare

#: Maximum number of voxels of each tissue stored per case as possible patch centres.
_CENTRES_PER_TISSUE: Final = 2000
#: Number of cases whose maps stay open, two files each; operating systems allow a process at least 1024 open files.
MOST_OPEN: Final = 128


@dataclass(frozen=True, kw_only=True)
class CachedCase:
    """A prepared case on disk; arrays are mapped, not read. Methods raise DataError if that fails."""

    id: str
    folder: Path
    shape: tuple[int, int, int]
    data_set: int = 0
    """See :attr:`data.datasets.case.Case.data_set`."""
    synthetic: bool = False
    """See :attr:`data.datasets.case.Case.synthetic`; the arrays are those of the real case."""

    def image(self) -> npt.NDArray[np.float16]:
        """Shape (contrasts, X, Y, Z)."""
        array: npt.NDArray[np.float16] = self._array("image.npy", "c")
        return array

    def codes(self) -> npt.NDArray[np.uint8]:
        """Shape (X, Y, Z), the program's label codes."""
        array: npt.NDArray[np.uint8] = self._array("codes.npy", "c")
        return array

    def centres(self) -> npt.NDArray[np.int16]:
        """Rows of (code, x, y, z): tumour voxels on which a patch may be centred."""
        array: npt.NDArray[np.int16] = self._array("centres.npy", None)
        return array

    def backgrounds(self) -> dict[str, str]:
        """Description of a background that was not 0 in the file, by contrast."""
        return backgrounds_in(self.folder)

    def _array(self, name: str, mode: Literal["c"] | None) -> npt.NDArray[Any]:
        # Mapped copy-on-write ("c"): torch warns about read-only memory, and the file must not change.
        try:
            return open_array(self.folder / name, mode)
        except (OSError, EOFError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
                raise DataError(f"case {self.id}: {self.folder / name}: cannot be read: {in_words(error)}") from error
            raise self.missing_error(error) from error

    def missing_error(self, why: object) -> DataError:
        """The error for prepared arrays that were removed or changed during a run."""
        return DataError(
            f"case {self.id}: its prepared arrays in {self.folder} were removed or damaged while they were in use "
            f"({why}). Resume with --resume; they will be prepared again."
        )


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The data of one training step."""

    image: torch.Tensor
    """float32, shape (N, contrasts, X, Y, Z)."""
    masks: torch.Tensor
    """float32, 0 or 1, shape (N, regions, X, Y, Z)."""
    present: torch.Tensor
    """bool, shape (N, contrasts): whether each patch has each contrast; missing ones are 0 in ``image``."""
    cases: tuple[str, ...]


def cache_cases(
    cases: Sequence[Case],
    store: CaseFolder | Path,
    *,
    spacing_mm: Spacing,
    convention: LabelConvention,
    nan_to_zero: bool = False,
    on_case: Callable[[str], None] | None = None,
) -> list[CachedCase]:
    """Prepare cases with their label maps; valid entries already in the store are reused.

    A case without a label map gets an empty one.

    Args:
        cases: the cases to prepare.
        store: the cache for them, or a folder used for nothing else; a case takes 9 bytes per voxel of its brain's box.
        spacing_mm: spacing of the network's input.
        convention: the meaning of the label numbers.
        nan_to_zero: set image voxels that are NaN or infinite to 0 instead of rejecting the case.
        on_case: called with the id of each case that is ready.

    Raises:
        DataError: a case is unusable.
    """
    if isinstance(store, Path):
        store.mkdir(parents=True, exist_ok=True)
        store = CaseFolder(store)
    settings = {
        "spacing_mm": list(spacing_mm),
        "labels": asdict(convention),
        "nan_to_zero": nan_to_zero,
        "centres": _CENTRES_PER_TISSUE,
    }

    def key_of(case: Case) -> str | None:
        try:
            return store.key(case.require(), settings)
        except OSError:
            return None  # reading the voxels will raise a better error

    def ready(case: Case, key: str | None) -> CachedCase:
        place = None if key is None else store.find(key)
        if place is None:
            own = None if case.label is None else convention
            prepared = prepare(case, spacing_mm=spacing_mm, convention=own, nan_to_zero=nan_to_zero)
            place = store.add(key or secrets.token_hex(20), lambda folder: _write(folder, case, prepared, settings))
        cached = CachedCase(
            id=case.id, folder=place, shape=_shape_in(place), data_set=case.data_set, synthetic=case.synthetic
        )
        if on_case is not None:
            on_case(case.id)
        return cached

    # No more than four at once: preparing a case takes about 200 MB.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        keys = list(pool.map(key_of, cases))
        store.hold([key for key in keys if key is not None])
        return list(pool.map(ready, cases, keys))


class PatchSource:
    """Numbered training patches: patch k is the same in every process and at any time."""

    def __init__(
        self,
        cases: Sequence[CachedCase],
        *,
        patch_voxels: tuple[int, int, int],
        tumour_probability: float,
        augmentation: augment.AugmentConfig,
        seed: int,
        enhancing_probability: float | None = None,
        weights: Sequence[int] | None = None,
    ) -> None:
        """Create a source; the arguments correspond to the run's config.

        ``tumour_probability`` is the share of patches centred on tumour. ``enhancing_probability`` is the share of
        these that is centred on enhancing tumour, in cases that have some; None draws each tissue equally often.
        ``weights`` are the numbers of patches that each data set contributes to a cycle; None makes the cases of all
        data sets equally likely.
        """
        self.cases = tuple(cases)
        self._pools = [list(range(len(self.cases)))]
        if weights is not None:
            numbers = range(len(weights))
            self._pools = [[at for at, one in enumerate(self.cases) if one.data_set == number] for number in numbers]
        assert all(self._pools), "every data set with a weight has a case"
        self._weights = (1,) if weights is None else tuple(weights)
        self._centres = [_by_tissue(case.centres()) for case in cases]
        self.patch_voxels = patch_voxels
        self._tumour_probability = tumour_probability
        self._enhancing_probability = enhancing_probability
        self.augmentation = augmentation
        self._seed = seed
        self._open: OrderedDict[int, _Mapped] = OrderedDict()
        self._lock = Lock()

    def patch(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], str, tuple[bool, ...]]:
        """Image (contrasts, X, Y, Z), codes (X, Y, Z), case id and contrasts present of one augmented patch.

        Raises:
            DataError: the prepared arrays of its case were removed or damaged.
        """
        image, codes, case_id, rng = self.crop(number)
        variation = augment.draw_augmentation(self.augmentation, image.shape[0], rng)
        return *augment.apply_augmentation(variation, image, codes), case_id, variation.present

    def crop(self, number: int) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint8], str, np.random.Generator]:
        """Like :meth:`patch`, before augmentation, with the generator for drawing the augmentation."""
        index, centre, rng = self.place(number)
        mapped = self.mapped(index)
        image = cut_image(mapped.image, centre, self.patch_voxels)
        codes = cut_patch(mapped.codes, centre, self.patch_voxels)
        if self.cases[index].synthetic:
            image = synthetic_image(image, codes, rng)
        return image, codes, self.cases[index].id, rng

    def place(self, number: int) -> tuple[int, tuple[int, ...], np.random.Generator]:
        """Index of a patch's case, the voxel at its centre, and the generator for everything that is drawn next."""
        index = self._index(number)
        rng = np.random.default_rng([self._seed, 1, number])
        return index, self._centre(index, rng), rng

    def batch(self, step: int, size: int) -> Batch:
        """The patches of one step, or of one micro-batch if gradients are accumulated."""
        patches = [self.patch(number) for number in range(step * size, (step + 1) * size)]
        images, codes, cases, present = zip(*patches, strict=True)
        return Batch(
            image=torch.stack([torch.from_numpy(image) for image in images]),
            masks=torch.stack([torch.from_numpy(to_regions(one)) for one in codes]).float(),
            present=torch.tensor(present),
            cases=cases,
        )

    def _index(self, number: int) -> int:
        """The case of a patch: pools take turns by weight, and each goes through random permutations of its cases."""
        cycle, position = divmod(number, sum(self._weights))
        in_turn = np.repeat(np.arange(len(self._weights)), self._weights)
        order = np.random.default_rng([self._seed, 2, cycle]).permutation(in_turn)
        chosen = int(order[position])
        nth = cycle * self._weights[chosen] + int(np.count_nonzero(order[:position] == chosen))
        pool = self._pools[chosen]
        epoch, place = divmod(nth, len(pool))
        # Pools of equal length need different orders: real and synthetic patches of one patient would share a batch.
        own = [chosen] if chosen else []
        return pool[int(np.random.default_rng([self._seed, 0, epoch, *own]).permutation(len(pool))[place])]

    def _centre(self, index: int, rng: np.random.Generator) -> tuple[int, ...]:
        """Draw a tumour voxel, or any voxel of the box."""
        centres = self._centres[index]
        wanted = rng.random() < self._tumour_probability
        if wanted and centres:
            of_tissue = centres[self._tissue(list(centres), rng)]
            return tuple(int(v) for v in of_tissue[rng.integers(len(of_tissue))])
        return tuple(int(rng.integers(side)) for side in self.cases[index].shape)

    def _tissue(self, tissues: list[int], rng: np.random.Generator) -> int:
        """Draw one of a case's tissues: all equally likely, or enhancing tumour with the configured probability."""
        if self._enhancing_probability is None or ENHANCING not in tissues:
            return int(rng.choice(tissues))
        others = [tissue for tissue in tissues if tissue != ENHANCING]
        if not others or rng.random() < self._enhancing_probability:
            return ENHANCING
        return int(rng.choice(others))

    def mapped(self, index: int) -> _Mapped:
        """The arrays of a case, reusing open maps.

        Raises:
            DataError: they were removed or damaged.
        """
        with self._lock:
            mapped = self._open.pop(index, None)
            if mapped is not None:
                self._open[index] = mapped
        if mapped is not None:
            mapped.require_whole()
            return mapped
        mapped = _Mapped(self.cases[index])
        with self._lock:
            self._open[index] = mapped
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
        return mapped


class _Mapped:
    """The mapped arrays of one case. They stay readable if their files are deleted, but not if they are truncated."""

    def __init__(self, case: CachedCase) -> None:
        self.image = case.image()
        self.codes = case.codes()
        self._case = case
        self._sizes = self._sizes_now()

    def require_whole(self) -> None:
        """Raise DataError if a file was truncated: accessing the lost part would kill the process without a message."""
        now = self._sizes_now()
        if any(size is not None and size != before for size, before in zip(now, self._sizes, strict=True)):
            raise self._case.missing_error(f"file sizes were {self._sizes}, are {now}")

    def _sizes_now(self) -> list[int | None]:
        sizes: list[int | None] = []
        for name in ("image.npy", "codes.npy"):
            try:
                sizes.append((self._case.folder / name).stat().st_size)
            except OSError:
                sizes.append(None)
        return sizes


def _by_tissue(centres: npt.NDArray[np.int16]) -> dict[int, npt.NDArray[np.int16]]:
    """Rows of (x, y, z) by code."""
    return {int(code): centres[centres[:, 0] == code, 1:] for code in np.unique(centres[:, 0])}


def batches(
    source: PatchSource, *, first: int, size: int, threads: int, ahead: int = 4, every: int = 1
) -> Generator[Batch]:
    """Yield batches from number ``first`` on, every ``every``-th one, without end, prefetched by threads.

    Close the iterator (``contextlib.closing``) to stop the threads.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="patches")
    waiting: deque[Future[Batch]] = deque()
    number = first
    try:
        while True:
            while len(waiting) < max(ahead, threads):
                waiting.append(pool.submit(source.batch, number, size))
                number += every
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def cut_patch(array: npt.NDArray[Any], centre: tuple[int, ...], patch: tuple[int, int, int]) -> npt.NDArray[Any]:
    """Cut a patch out of the last three axes: shifted to fit inside the volume, or padded with 0 if it is too large.

    Args:
        array: shape (..., X, Y, Z).
        centre: voxel to centre the patch on; the patch is shifted if it would leave the volume.
        patch: shape of the result's last three axes.
    """
    inside, outside = slices_of(array.shape[-3:], centre, patch)
    piece = array[..., inside[0], inside[1], inside[2]]
    if piece.shape[-3:] == tuple(patch):
        return np.array(piece)
    padded = np.zeros((*array.shape[:-3], *patch), dtype=array.dtype)
    padded[..., outside[0], outside[1], outside[2]] = piece
    return padded


def cut_image(
    image: npt.NDArray[np.float16], centre: tuple[int, ...], patch: tuple[int, int, int]
) -> npt.NDArray[np.float32]:
    """Like :func:`cut_patch`, converting float16 to float32 on the way, which is faster in torch than in numpy."""
    inside, outside = slices_of(image.shape[-3:], centre, patch)
    piece = torch.from_numpy(image)[..., inside[0], inside[1], inside[2]]
    make = torch.empty if piece.shape[-3:] == tuple(patch) else torch.zeros
    result = make((*image.shape[:-3], *patch), dtype=torch.float32)
    result[..., outside[0], outside[1], outside[2]].copy_(piece)
    return result.numpy()


def slices_of(
    shape: tuple[int, ...], centre: tuple[int, ...], patch: tuple[int, int, int]
) -> tuple[list[slice], list[slice]]:
    """The slices of the volume covered by a patch, and the slices of the patch that they fill."""
    inside: list[slice] = []
    outside: list[slice] = []
    for size, middle, side in zip(shape, centre, patch, strict=True):
        start = min(max(middle - side // 2, 0), max(size - side, 0))
        taken = min(side, size)
        pad = (side - taken) // 2
        inside.append(slice(start, start + taken))
        outside.append(slice(pad, pad + taken))
    return inside, outside


def _write(folder: Path, case: Case, prepared: Prepared, settings: Mapping[str, Any]) -> None:
    """Write a prepared case into an entry of the cache."""
    codes = prepared.codes
    if codes is None:
        codes = np.zeros(prepared.image.shape[1:], dtype=np.uint8)
    arrays: list[npt.NDArray[Any]] = [prepared.image.astype(np.float16), codes, _centres(codes)]
    for name, array in zip(ARRAYS, arrays, strict=True):
        _save_array(folder / name, array)
    write_source(folder, case, settings, {str(name): said for name, said in prepared.backgrounds.items()})


def _shape_in(place: Path) -> tuple[int, int, int]:
    x, y, z = open_array(place / "codes.npy", "r").shape
    return (x, y, z)


def _save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """Like np.save, but a full disk raises the system's error; np.save raises an error without a number."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    path.write_bytes(buffer.getbuffer())


def _centres(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int16]:
    """Up to :data:`_CENTRES_PER_TISSUE` voxels of each tissue, evenly spread over it, as rows (code, x, y, z)."""
    rows = []
    for code in (NECROSIS, OEDEMA, ENHANCING):
        voxels = np.argwhere(codes == code)
        chosen = voxels[:: max(1, -(-len(voxels) // _CENTRES_PER_TISSUE))]
        rows.append(np.column_stack([np.full(len(chosen), code), chosen]).astype(np.int16))
    return np.concatenate(rows)
