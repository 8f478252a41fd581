"""Compare patch loading with MONAI's CacheDataset, and case reading with nibabel, as ratios within one run.

    python bench/loader.py CASES [--patch 64] [--threads 2] [--copies 1] [--rounds 5] [--monai-threads]
    python bench/loader.py CASES --layouts

CASES is a folder of cases. Both sides read the same prepared cases, crop patches of the same size, mirror them and make
batches of two; they do nothing else. MONAI is used in its fastest form: float32 cached in memory, precomputed centres
(at most 2000 per class), no copy of the cache and no metadata per patch; its workers are processes, or one thread with
--monai-threads. Each side runs in a separate process, and they take turns; the median of the rounds is used. Memory is
the proportional set size of a side and its children (shared pages are counted once), with and without memory-mapped
files, which the system reclaims when memory is short; only Linux reports it. Files are in the system's page cache for
both sides. --layouts compares memory layouts of the image on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import nibabel as nib
import numpy as np
import psutil
import torch

from data.datasets.label_stats import convention_of
from data.datasets.layouts import find_cases
from data.nifti import read_volume
from data.patches.augmentation import AugmentConfig
from data.patches.sampler import Batch, CachedCase, PatchSource, batches, cache_cases

BATCH = 2


def main() -> None:
    """Run the measurements and print the results."""
    options = _options()
    if options.side:
        serve(options)
        return
    cases = find_cases(options.cases)
    with tempfile.TemporaryDirectory(prefix="znormseg-bench-", dir=options.scratch) as scratch:
        cached = cache_cases(
            cases, Path(scratch), spacing_mm=(1.0, 1.0, 1.0), convention=convention_of(cases), nan_to_zero=True
        )
        places = [str(case.folder) for case in cached]
        for number in range(1, options.copies):
            for case in cached:
                places.append(f"{case.folder}-{number}")
                Path(places[-1]).mkdir()
                for path in case.folder.iterdir():
                    (Path(places[-1]) / path.name).write_bytes(path.read_bytes())
        if options.layouts:
            layouts([Path(place) for place in places], options.rounds)
            return
        reading(list(cases[0].contrasts.values()), options.rounds)
        compare(places, options)


def compare(places: list[str], options: argparse.Namespace) -> None:
    """Run both sides in turn, and print their ratios."""
    sides = {name: Side(name, places, options) for name in ("ours", "monai")}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    work: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(options.rounds + 1):
        for name, side in sides.items():
            before = side.processor_seconds()
            seconds = side.ask(f"{number}")["seconds"]
            if number:  # the first round is a warm-up
                rates[name].append(options.patches / seconds)
                work[name].append((side.processor_seconds() - before) / options.patches)
    for side in sides.values():
        side.end()
    print(f"{len(places)} cases, patches of {options.patch}, {options.threads} threads, {options.patches} per round")
    for name, side in sides.items():
        peak_mb, kept_mb = side.peak_bytes / 1e6, side.peak_kept_bytes / 1e6
        print(f"  {name}: {median(rates[name]):.1f} patches/s; {peak_mb:.0f} MB, without mapped files {kept_mb:.0f} MB")
    ours, monai = sides["ours"], sides["monai"]
    print(f"patches/s, ours over MONAI: {median(rates['ours']) / median(rates['monai']):.2f}")
    print(f"processor time per patch, MONAI over ours: {median(work['monai']) / median(work['ours']):.2f}")
    print(f"memory, ours over MONAI: {ours.peak_bytes / monai.peak_bytes:.2f}; ", end="")
    print(f"without mapped files {ours.peak_kept_bytes / monai.peak_kept_bytes:.2f}")


class Side:
    """A process that makes patches on request; the memory of the process and its children is monitored."""

    def __init__(self, name: str, places: list[str], options: argparse.Namespace) -> None:
        words = [sys.executable, __file__, str(options.cases), "--side", name, "--patch", str(options.patch)]
        words += ["--threads", str(options.threads), "--patches", str(options.patches)]
        words += ["--monai-threads"] if options.monai_threads else []
        self._process = subprocess.Popen(
            words,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.ask("imports")
        self.peak_bytes, self.peak_kept_bytes = self._bytes()
        self.ask(json.dumps(places))

    def ask(self, what: str) -> Any:
        """Send a line and return the JSON reply; memory is sampled in the meantime."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        done = threading.Event()
        watch = threading.Thread(target=self._watch, args=(done,))
        if hasattr(self, "peak_bytes"):
            watch.start()
        self._process.stdin.write(f"{what}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        done.set()
        if watch.ident is not None:
            watch.join()
        return json.loads(answer)

    def end(self) -> None:
        """End the process."""
        self._process.communicate("\n")

    def _watch(self, done: threading.Event) -> None:
        while not done.wait(0.1):
            total, kept = self._bytes()
            self.peak_bytes, self.peak_kept_bytes = max(self.peak_bytes, total), max(self.peak_kept_bytes, kept)

    def processor_seconds(self) -> float:
        """Return the CPU time of the process and its children; on a busy machine it measures better than the clock."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

    def _tree(self) -> list[psutil.Process]:
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def _bytes(self) -> tuple[int, int]:
        """Return the proportional set size, in total and without mapped files, which the system can reclaim."""
        total = kept = 0
        for process in self._tree():
            try:
                rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii")
            except OSError:
                continue
            sizes = {words[0]: 1024 * int(words[1]) for words in map(str.split, rollup.splitlines()[1:])}
            total += sizes["Pss:"]
            kept += sizes["Pss_Anon:"] + sizes["Pss_Shmem:"]
        return total, kept


def serve(options: argparse.Namespace) -> None:
    """Act as one side: answer each line of standard input."""
    if options.side == "monai":
        import monai.data
        import monai.transforms  # noqa: F401
    sys.stdin.readline()
    print("{}", flush=True)
    places = [Path(place) for place in json.loads(sys.stdin.readline())]
    make = ours if options.side == "ours" else monai_side
    source = make(places, options)
    print("{}", flush=True)
    while sys.stdin.readline().strip():
        started = time.perf_counter()
        for _ in range(options.patches // BATCH):
            image = next(source)
            assert image.shape == (BATCH, 4, *(options.patch,) * 3)
        print(json.dumps({"seconds": time.perf_counter() - started}), flush=True)


class Mirrored(PatchSource):
    """Patches as in training, but only mirrored."""

    def batch(self, step: int, size: int) -> Batch:
        """Return the patches of one step, with label codes in place of masks."""
        images, codes, ids = [], [], []
        for number in range(step * size, (step + 1) * size):
            image, labels, case_id, rng = self.crop(number)
            axes = np.flatnonzero(rng.random(3) < 0.5)
            images.append(torch.from_numpy(np.ascontiguousarray(np.flip(image, tuple(axes + 1)))))
            codes.append(torch.from_numpy(np.ascontiguousarray(np.flip(labels, tuple(axes)))))
            ids.append(case_id)
        present = torch.ones(size, images[0].shape[0], dtype=torch.bool)
        return Batch(image=torch.stack(images), masks=torch.stack(codes), present=present, cases=tuple(ids))


def ours(places: list[Path], options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield batches made by this project."""
    cases = []
    for place in places:
        x, y, z = np.load(place / "codes.npy", mmap_mode="r").shape
        cases.append(CachedCase(id=place.name, folder=place, shape=(x, y, z)))
    source = Mirrored(
        cases, patch_voxels=(options.patch,) * 3, tumour_probability=0.5, augmentation=AugmentConfig(), seed=0
    )

    def made() -> Iterator[torch.Tensor]:
        with closing(batches(source, first=0, size=BATCH, threads=options.threads)) as several:
            for batch in several:
                yield batch.image

    return made()


def monai_side(places: list[Path], options: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Yield batches made by MONAI."""
    from monai.data import CacheDataset, DataLoader, ThreadDataLoader, set_track_meta
    from monai.transforms import (
        ClassesToIndicesd,
        Compose,
        EnsureTyped,
        RandCropByLabelClassesd,
        RandFlipd,
        Transform,
    )

    set_track_meta(False)

    # CacheDataset caches the output of all transforms before the first one that is random or not a MONAI Transform.
    class Load(Transform):  # type: ignore[misc]
        def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
            codes = np.load(entry["place"] / "codes.npy")[None]
            image = np.load(entry["place"] / "image.npy").astype(np.float32)
            return {"image": image, "label": codes, "tumour": (codes > 0).astype(np.uint8)}

    class Drop(Transform):  # type: ignore[misc]
        def __call__(self, entry: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in entry.items() if key != "tumour"}

    both = ("image", "label")
    transform = Compose(
        [
            Load(),
            ClassesToIndicesd("tumour", num_classes=2, max_samples_per_class=2000),
            Drop(),
            EnsureTyped("image", dtype=torch.float32, track_meta=False),
            EnsureTyped("label", dtype=torch.uint8, track_meta=False),
            RandCropByLabelClassesd(
                both,
                label_key="label",
                spatial_size=(options.patch,) * 3,
                ratios=[1, 1],
                num_classes=2,
                num_samples=1,
                indices_key="tumour_cls_indices",
            ),
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
        ]
    )
    data = CacheDataset([{"place": p} for p in places], transform, copy_cache=False, progress=False, num_workers=1)
    # One endless epoch, so that the start-up cost of epochs is excluded.
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**7)
    if options.monai_threads:
        return (batch["image"] for batch in ThreadDataLoader(data, batch_size=BATCH, sampler=sampler, buffer_size=4))
    loader = DataLoader(data, batch_size=BATCH, sampler=sampler, num_workers=options.threads)
    return (batch["image"] for batch in loader)


def reading(paths: list[Path], rounds: int) -> None:
    """Compare reading the contrasts of a case as float32: with nibabel, and with our reader and all its checks."""
    jobs: dict[str, Callable[[Path], Any]] = {
        "nibabel": lambda path: np.asanyarray(nib.load(path).dataobj, dtype=np.float32),
        "ours": read_volume,
    }
    spent = in_turn({name: partial(_each, job, paths) for name, job in jobs.items()}, rounds)
    print(f"reading one case, nibabel's time over ours: {spent['nibabel'] / spent['ours']:.2f}")


def layouts(places: list[Path], rounds: int) -> None:
    """Compare layouts on disk for cropping float32 patches of shape (contrasts, X, Y, Z) from images."""
    lasts = []
    for place in places:
        lasts.append(place / "last.npy")
        np.save(lasts[-1], np.ascontiguousarray(np.moveaxis(np.load(place / "image.npy"), 0, -1)))
    firsts = [place / "image.npy" for place in places]
    kept = {"first": [_mapped(path) for path in firsts], "last": [_mapped(path) for path in lasts]}

    def first_torch(array: Any, part: tuple[slice, ...]) -> Any:
        piece = torch.from_numpy(array)[(slice(None), *part)]
        return torch.empty(piece.shape, dtype=torch.float32).copy_(piece)

    def first_numpy(array: Any, part: tuple[slice, ...]) -> Any:
        return array[(slice(None), *part)].astype(np.float32)

    def last_torch(array: Any, part: tuple[slice, ...]) -> Any:
        piece = torch.from_numpy(array)[part].permute(3, 0, 1, 2)
        return torch.empty(piece.shape, dtype=torch.float32).copy_(piece)

    def last_numpy(array: Any, part: tuple[slice, ...]) -> Any:
        return np.ascontiguousarray(np.moveaxis(array[part].astype(np.float32), -1, 0))

    def cut(how: Callable[[Any, tuple[slice, ...]], Any], images: list[Any], side: int) -> None:
        rng = np.random.default_rng(0)
        for number in range(24):
            index = number % len(places)
            starts = [int(rng.integers(max(1, n - side + 1))) for n in kept["first"][index].shape[1:]]
            image = images[index]
            how(
                _mapped(image) if isinstance(image, Path) else image,
                tuple(slice(start, start + side) for start in starts),
            )

    for side in (64, 128):
        jobs = {
            "contrasts first, torch": partial(cut, first_torch, kept["first"], side),
            "contrasts first, torch, mapped anew": partial(cut, first_torch, firsts, side),
            "contrasts first, numpy": partial(cut, first_numpy, kept["first"], side),
            "contrasts last, torch": partial(cut, last_torch, kept["last"], side),
            "contrasts last, numpy": partial(cut, last_numpy, kept["last"], side),
        }
        spent = in_turn(jobs, rounds)
        print(f"patches of {side}, time over that of the first:")
        for name, seconds in spent.items():
            print(f"  {name}: {seconds / spent['contrasts first, torch']:.2f}")


def in_turn(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median CPU seconds of each job in one thread; the jobs take turns."""
    torch.set_num_threads(1)
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 1):
        for name, job in jobs.items():
            started = time.thread_time()
            job()
            if number:  # the first round is a warm-up
                spent[name].append(time.thread_time() - started)
    return {name: median(values) for name, values in spent.items()}


def _each(job: Callable[[Path], object], paths: list[Path]) -> None:
    for path in paths:
        job(path)


def _mapped(path: Path) -> Any:
    return np.load(path, mmap_mode="c")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--copies", type=int, default=1, help="use every case this many times, from separate files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", type=int, default=120, help="patches per round")
    parser.add_argument("--layouts", action="store_true")
    parser.add_argument("--monai-threads", action="store_true")
    parser.add_argument("--scratch", type=Path, help="folder for temporary prepared cases")
    parser.add_argument("--side", choices=["ours", "monai"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
