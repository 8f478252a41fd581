"""Compare training steps with the loop of MONAI's BraTS tutorial: samples per second, ratios within one run.

    python bench/train_step.py [CASES] [--config resunet] [--patch 64] [--batch 2] [--steps 4] [--rounds 5]

Both sides train the same network on patches of the same prepared cases (CASES, or temporary phantoms), including loader
and optimiser. Ours is the trainer's own step, with the config's optimiser and gradient transform, in float32 and, if
the hardware supports it, in bfloat16. MONAI's side is that of its tutorial (brats_segmentation_3d in
Project-MONAI/tutorials): CacheDataset, random crop, three flips, z-score, scale and shift of intensities, DataLoader,
DiceLoss, Adam, and reading the loss at every step; on a GPU also its autocast and scaler. Ours draws the same kinds of
augmentation. Each side is a separate process; they take turns, and the median of the rounds is used. The script also
prints the share of our step that is spent waiting for data, and the share of the measured peak of matrix products that
our step reaches.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from app.config.load import load_config
from app.system.device import RuntimeConfig, choose_runtime, machine
from app.system.process import keep_freed_memory, share_processors
from app.training import gpu, gradient
from app.training.loader import Loader
from app.training.state import new_state
from app.training.step import QueuedStep, Stepper
from app.training.telemetry import Telemetry
from data.datasets.label_stats import convention_of
from data.datasets.layouts import find_cases
from data.labels import REGIONS, to_regions
from data.patches.sampler import CachedCase, PatchSource, cache_cases
from data.phantoms import write_phantoms
from models import RegionLoss, build_network

#: Steps on a GPU after which losses are read, as in the trainer.
READ_EVERY = 10
#: Augmentations of the tutorial's loop: flips, and a factor and a shift for each contrast.
AUGMENTATION = {"gain": 0.1, "shift": 0.1, "flip_probability": 0.5}


def main() -> None:
    """Run the measurements and print the results."""
    options = _options()
    if options.side:
        serve(options)
        return
    fast = choose_runtime(RuntimeConfig()).precision is torch.bfloat16
    print(f"{machine()}; torch {torch.__version__}; {options.config}, {options.batch} x {options.patch}^3")
    with tempfile.TemporaryDirectory(prefix="znormseg-bench-") as scratch:
        if options.cases is None:
            options.cases = Path(scratch) / "phantoms"
            write_phantoms(options.cases, 6, seed=0)
        cases = find_cases(options.cases)
        cached = cache_cases(
            cases,
            Path(scratch) / "cache",
            spacing_mm=(1.0, 1.0, 1.0),
            convention=convention_of(cases),
            nan_to_zero=True,
        )
        sides = {name: Side(name, cached, options) for name in ("monai", "float32", *(["bfloat16"] if fast else []))}
        answers: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(options.rounds + 1):
            for name, side in sides.items():
                answer = side.ask()
                if number:  # the first round is a warm-up
                    answers[name].append(answer)
        for side in sides.values():
            side.end()
    seconds = {name: median(answer["seconds"] for answer in several) for name, several in answers.items()}
    for name, of_step in seconds.items():
        line = f"  {name}: {options.batch / of_step:.3f} samples/s"
        if name != "monai":
            waited = median(answer["waited"] / answer["seconds"] for answer in answers[name])
            peak = answers[name][0]["flops"] / of_step / peak_flops(getattr(torch, name), options.device)
            line += f"; over MONAI {seconds['monai'] / of_step:.2f}; waits for data {waited:.1%}; {peak:.0%} of peak"
        print(line)


class Side:
    """A process that runs steps on request."""

    def __init__(self, name: str, cases: list[CachedCase], options: argparse.Namespace) -> None:
        words = [sys.executable, __file__, "--side", name, "--config", options.config, "--device", options.device]
        words += ["--patch", str(options.patch), "--batch", str(options.batch), "--steps", str(options.steps)]
        words += ["--workers", str(options.workers)]
        self._process = subprocess.Popen(words, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._send(json.dumps([str(case.folder) for case in cases]))

    def ask(self) -> dict[str, float]:
        """Request one round of steps, and return its timings."""
        self._send("go")
        assert self._process.stdout is not None
        answer: dict[str, float] = json.loads(self._process.stdout.readline())
        return answer

    def end(self) -> None:
        """End the process."""
        self._process.communicate("\n")

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()


def serve(options: argparse.Namespace) -> None:
    """Act as one side: run a round of steps for each line of standard input."""
    places = [Path(place) for place in json.loads(sys.stdin.readline())]
    steps = monai_steps(places, options) if options.side == "monai" else our_steps(places, options)
    while sys.stdin.readline().strip():
        started, waited, flops = time.perf_counter(), 0.0, 0.0
        for _ in range(options.steps):
            of_step, flops = next(steps)
            waited += of_step
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        spent = time.perf_counter() - started
        print(json.dumps({"seconds": spent / options.steps, "waited": waited / options.steps, "flops": flops}))
        sys.stdout.flush()


def our_steps(places: list[Path], options: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """Run this project's steps; yield the seconds spent waiting for data, and the operations of a step."""
    keep_freed_memory()
    settings = {"training.patch_voxels": [options.patch] * 3, "training.batch_size": options.batch}
    settings |= {f"augment.{key}": value for key, value in AUGMENTATION.items()}
    settings |= {"runtime.precision": options.side, "runtime.device": options.device}
    # Switch off all other augmentations of the config.
    plain = load_config(options.config)
    off = [name for name in vars(plain.augment) if name.endswith("_probability") and name not in AUGMENTATION]
    settings |= {f"augment.{name}": 0 for name in off if not name.startswith(("gain", "shift"))}
    settings |= {"augment.gain_probability": 1, "augment.shift_probability": 1}
    config = load_config(options.config, [f"{key}={value}" for key, value in settings.items()])
    runtime = choose_runtime(config.runtime)
    state = new_state(config, runtime)
    state.network.train()
    gradient.attach_transform(config.gradient, state.optimizer, state.network)
    computation = gpu.prepare_computation(config, runtime, state.network, RegionLoss())
    stepper = Stepper(
        config=config,
        runtime=runtime,
        state=state,
        telemetry=Telemetry(0, state.network, state.optimizer),
        loss_of=computation.loss,
        replica=computation.network,
    )
    cached = []
    for place in places:
        x, y, z = np.load(place / "codes.npy", mmap_mode="r").shape
        cached.append(CachedCase(id=place.name, folder=place, shape=(x, y, z)))
    source = PatchSource(
        cached,
        patch_voxels=config.training.patch_voxels,
        tumour_probability=config.training.tumour_probability,
        augmentation=config.augment,
        seed=0,
    )
    made = Loader(source, config, runtime).batches(first=0)
    flops = operations(config, options)
    queued: list[QueuedStep] = []
    while True:
        queued.append(stepper.queue(made, config.training.learning_rate))
        state.step += 1
        waited = queued[-1].waited_seconds
        if len(queued) == READ_EVERY or runtime.device.type == "cpu":
            stepper.read(queued)
            queued.clear()
        yield waited, flops


def operations(config: Any, options: argparse.Namespace) -> float:
    """Return the floating-point operations of one step, counted by torch."""
    from torch.utils.flop_counter import FlopCounterMode

    network = build_network(config.network, in_channels=4, out_channels=len(REGIONS))
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(options.batch, 4, *(options.patch,) * 3)).sum().backward()
    return float(counter.get_total_flops())


def peak_flops(dtype: torch.dtype, device: str) -> float:
    """Return the operations per second of a large matrix product."""
    place = choose_runtime(RuntimeConfig(device=device)).device
    side = 2048 if place.type == "cpu" else 8192
    one = torch.randn(side, side, dtype=dtype, device=place)
    spent = []
    for _ in range(8):
        started = time.perf_counter()
        product = one @ one
        if place.type == "cuda":
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - started)
    del product
    return 2 * side**3 / min(spent)


def monai_steps(places: list[Path], options: argparse.Namespace) -> Iterator[tuple[float, float]]:
    """Run steps like those of the tutorial."""
    from monai.data import CacheDataset, DataLoader, set_track_meta
    from monai.losses import DiceLoss
    from monai.transforms import (
        Compose,
        EnsureTyped,
        NormalizeIntensityd,
        RandFlipd,
        RandScaleIntensityd,
        RandShiftIntensityd,
        RandSpatialCropd,
        SpatialPadd,
        Transform,
    )

    set_track_meta(False)
    both = ("image", "label")

    class Load(Transform):  # type: ignore[misc]
        def __call__(self, place: Path) -> dict[str, Any]:
            image = np.load(place / "image.npy").astype(np.float32)
            return {"image": image, "label": to_regions(np.load(place / "codes.npy")).astype(np.float32)}

    size = (options.patch,) * 3
    transform = Compose(
        [
            Load(),
            EnsureTyped(both, track_meta=False),
            SpatialPadd(both, spatial_size=size),
            RandSpatialCropd(both, roi_size=size, random_size=False),
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
            NormalizeIntensityd("image", nonzero=True, channel_wise=True),
            RandScaleIntensityd("image", factors=0.1, prob=1.0),
            RandShiftIntensityd("image", offsets=0.1, prob=1.0),
        ]
    )
    data = CacheDataset(places, transform, progress=False, num_workers=1)
    # One endless epoch, so that the start-up cost of epochs is excluded.
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=10**7)
    loader = DataLoader(data, batch_size=options.batch, sampler=sampler, num_workers=options.workers)
    device = choose_runtime(RuntimeConfig(device=options.device)).device
    network = build_network(load_config(options.config).network, in_channels=4, out_channels=len(REGIONS)).to(device)
    loss_of = DiceLoss(smooth_nr=0, smooth_dr=1e-5, squared_pred=True, to_onehot_y=False, sigmoid=True)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4, weight_decay=1e-5)
    on_gpu = device.type == "cuda"
    scaler = torch.amp.GradScaler(device.type, enabled=on_gpu)
    torch.backends.cudnn.benchmark = on_gpu
    network.train()
    for batch in loader:
        image, masks = batch["image"].to(device), batch["label"].to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.float16, enabled=on_gpu):
            loss = loss_of(network(image), masks)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()
        yield 0.0, 0.0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="?", type=Path, help="folder of cases; default: temporary phantoms")
    parser.add_argument("--config", default="resunet")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--patch", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help="steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1, help="worker processes of MONAI's loader")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    # As in the program, idle threads of either side sleep instead of spinning on a processor that the other needs.
    share_processors()
    main()
