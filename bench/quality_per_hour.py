"""Compare the quality after some minutes of training with that of MONAI's recipe, on the same data and processor.

    python bench/quality_per_hour.py OUT [CASES] [--minutes 5] [--seeds 3] [--sweep-minutes 5] [--splits 1] [--crop 96]

CASES are real cases, of which each split holds out a third; without CASES, 24 phantoms at 2 mm are used for training
and 12 others for scoring. There are three sides:

* ``ours``: ``znormseg train --config laptop``;
* ``monai``: the recipe of MONAI's BraTS tutorial and bundle (SegResNet of 16 filters, random crops, flips, intensity
  scale and shift, DiceLoss with squared probabilities, Adam with weight decay 1e-5 and a cosine schedule, batch 1). Its
  crop of 224 x 224 x 144 is for a GPU; here it has ``--crop`` voxels along each side;
* ``monai-same``: the same recipe with our network, patch and batch.

MONAI's cases are kept in memory (CacheDataset). Each side's learning rate is the best of three (``RATES``) on a sixth
of the training cases, with one seed; then every seed trains on all training cases. The minutes count from the first
access to the data to the last step, without imports and scoring. All sides are scored in the same way: whole volumes,
Gaussian windows of the training size, Dice at the training spacing, a region empty in both masks scores 1. Each run is
a process on a dedicated core, two runs at a time. Completed runs are kept in OUT and not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Queue
from statistics import fmean, stdev
from typing import Any, Final

import numpy as np
import torch

from app.config.inference import InferenceConfig
from app.config.load import load_config
from app.runs.checkpoints import load_newest
from app.runs.folder import write_json
from app.system.device import RuntimeConfig, choose_runtime, machine, versions
from app.system.process import keep_freed_memory, share_processors
from app.training.validation import validation_dice
from data.datasets.label_stats import convention_of
from data.datasets.layouts import Case, find_cases
from data.datasets.source import DataSource
from data.labels import REGIONS, to_regions
from data.patches.sampler import cache_cases
from data.phantoms import write_phantoms
from data.preprocess import prepare
from models import NetworkConfig, build_network

#: Candidate learning rates: ours around the config's, MONAI's from the recipe's upwards, since the time is short.
RATES: Final = {
    "ours": (0.002, 0.006, 0.018),
    "monai": (1e-4, 5e-4, 2.5e-3),
    "monai-same": (1e-4, 5e-4, 2.5e-3),
}
#: Student's t for an interval of 95 %, by degrees of freedom.
T95: Final = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
SPACING: Final = {"phantoms": 2.0, "cases": 1.0}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run to make and score."""

    side: str
    rate: float
    seed: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    minutes: float
    crop: int
    spacing_mm: float
    name: str


def main() -> None:
    """Choose the learning rates, train, and print the table."""
    options = _options()
    if options.job:
        work(options.out, options.cases, Job(**json.loads(options.job)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    kind = "phantoms" if options.cases is None else "cases"
    if options.cases is None:
        options.cases = options.out / "phantoms"
        if not options.cases.exists():
            write_phantoms(options.cases, 36, seed=0, spacing_mm=2.0)
    ids = [case.id for case in find_cases(options.cases)]
    print(f"{machine()}; {versions()}; {options.minutes:g} minutes on one core per run, {kind}", flush=True)
    splits = [hold_out(ids, number) for number in range(options.splits)]
    sides = options.sides.split(",")

    def job(
        side: str,
        rate: float,
        seed: int,
        split: tuple[list[str], list[str]],
        name: str,
        *,
        minutes: float = options.minutes,
    ) -> Job:
        train, test = (tuple(part) for part in split)
        shape = {"minutes": minutes, "crop": options.crop, "spacing_mm": SPACING[kind]}
        return Job(side=side, rate=rate, seed=seed, train=train, test=test, name=name, **shape)

    train = splits[0][0]
    inner = train[: -max(1, len(train) // 6)], train[-max(1, len(train) // 6) :]
    sweep = options.sweep_minutes or options.minutes
    tried = [
        job(side, rate, 0, inner, f"rate-{side}-{rate:g}", minutes=sweep) for side in sides for rate in RATES[side]
    ]
    scores = run_all(tried, options)
    best = {side: max((mean_of(scores[one.name]), one.rate) for one in tried if one.side == side)[1] for side in sides}
    for one in tried:
        print(f"  {one.side}, learning rate {one.rate:g}: {mean_of(scores[one.name]):.3f} after {sweep:g} minutes")
    final = [
        job(side, best[side], seed, split, f"{side}-split{number}-seed{seed}")
        for seed in range(options.seeds)
        for number, split in enumerate(splits)
        for side in sides
    ]
    scores = run_all(final, options)
    print(
        "\n| side | learning rate | steps | "
        + " | ".join((*REGIONS, "mean", "95 %"))
        + " | at a quarter, a half of the time |"
    )
    print("|---" * (len(REGIONS) + 6) + "|")
    for side in sides:
        several = [scores[one.name] for one in final if one.side == side]
        show(side, best[side], several)
    for side in sides[1:]:
        pairs = [
            (f"ours-split{n}-seed{s}", f"{side}-split{n}-seed{s}")
            for s in range(options.seeds)
            for n in range(len(splits))
        ]
        gains = [mean_of(scores[ours]) - mean_of(scores[theirs]) for ours, theirs in pairs]
        print(f"ours over {side}, by pairs of seed and split: {fmean(gains):+.3f} +- {half_interval(gains):.3f}")


def hold_out(ids: Sequence[str], number: int) -> tuple[list[str], list[str]]:
    """Split off a third of the cases for the test, a different third for each number."""
    test = [case_id for index, case_id in enumerate(ids) if index % 3 == number]
    return [case_id for case_id in ids if case_id not in test], test


def run_all(jobs: Sequence[Job], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return scores by name; jobs with scores are not repeated. As many jobs run at once as there are cores."""
    cores: Queue[int] = Queue()
    for core in options.cores.split(","):
        cores.put(int(core))

    def run(job: Job) -> dict[str, Any]:
        path: Path = options.out / f"{job.name}.json"
        if not path.exists():
            core = cores.get()
            try:
                words = [
                    sys.executable,
                    __file__,
                    str(options.out),
                    str(options.cases),
                    "--job",
                    json.dumps(asdict(job)),
                ]
                subprocess.run(["taskset", "-c", str(core), *words], check=True)
            finally:
                cores.put(core)
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        assert content["job"]["rate"] == job.rate and content["job"]["minutes"] == job.minutes  # noqa: PT018
        return content

    with ThreadPoolExecutor(cores.qsize()) as pool:
        return {job.name: content for job, content in zip(jobs, pool.map(run, jobs), strict=True)}


def mean_of(content: dict[str, Any]) -> float:
    """Return the mean Dice over regions at the end of a run."""
    return fmean(content["dice"].values())


def half_interval(values: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of a mean; NaN for a single value."""
    return (
        T95[len(values) - 1] * stdev(values) / math.sqrt(len(values)) if 1 < len(values) <= len(T95) + 1 else math.nan
    )


def show(side: str, rate: float, several: Sequence[dict[str, Any]]) -> None:
    """Print one row of the table."""
    regions = " | ".join(f"{fmean(one['dice'][region] for one in several):.3f}" for region in REGIONS)
    means = [mean_of(one) for one in several]
    parts = [fmean(fmean(one["early"][index].values()) for one in several) for index in range(2)]
    early = ", ".join(f"{value:.3f}" for value in parts)
    steps = round(fmean(one["steps"] for one in several))
    print(f"| {side} | {rate:g} | {steps} | {regions} | {fmean(means):.3f} | +- {half_interval(means):.3f} | {early} |")


def work(out: Path, data: Path, job: Job) -> None:
    """Do one job; it has a separate process."""
    keep_freed_memory()
    cases = {case.id: case for case in find_cases(data)}
    held = cache_cases(
        [cases[case_id] for case_id in job.test],
        out / "cache",
        spacing_mm=(job.spacing_mm,) * 3,
        convention=convention_of(list(cases.values())),
        nan_to_zero=True,
    )
    train = train_ours if job.side == "ours" else train_monai
    steps, snapshots, network, window = train(out, data, cases, job)
    runtime = choose_runtime(RuntimeConfig(device="cpu"))
    tables = []
    for weights in snapshots:
        network.load_state_dict(weights)
        tables.append(
            validation_dice(network, held, window=window, config=InferenceConfig(overlap=0.5), runtime=runtime)
        )
    content = {"job": asdict(job), "steps": steps, "dice": tables[-1], "early": tables[:-1], "versions": versions()}
    write_json(out / f"{job.name}.json", content)
    print(f"  {job.name}: {steps} steps, {tables[-1]}", file=sys.stderr, flush=True)


Trained = tuple[int, list[dict[str, torch.Tensor]], torch.nn.Module, tuple[int, int, int]]


def train_ours(out: Path, data: Path, cases: dict[str, Case], job: Job) -> Trained:  # noqa: ARG001 - same signature as train_monai
    """Train as ``znormseg train`` does; keep the checkpoints at a quarter and half of the time."""
    from app.training.run import start
    from data.patches.cache import CaseFolder

    run = out / f"run-{job.name}"
    split = out / f"split-{job.name}.json"
    write_json(split, {"train": list(job.train), "validation": []})
    settings = {
        "training.hours": job.minutes / 60,
        "training.learning_rate": job.rate,
        "training.seed": job.seed,
        "training.checkpoint_minutes": job.minutes / 60,
        "data.spacing_mm": job.spacing_mm,
        "runtime.device": "cpu",
    }
    config = load_config("laptop", [f"{key}={value}" for key, value in settings.items()])
    early: list[dict[str, torch.Tensor]] = []

    def look(progress: Any) -> None:
        if progress.job == "training" and len(early) < 2 and progress.share >= (0.25, 0.5)[len(early)]:
            saved = load_newest(run / "checkpoints", "last")
            assert saved is not None
            early.append(saved.weights)

    result = start(
        DataSource(data), run, config, split_file=split, store=CaseFolder(out / f"cache-{job.name}"), on_progress=look
    )
    last = load_newest(run / "checkpoints", "best")
    assert last is not None
    network = build_network(config.network, in_channels=4, out_channels=len(REGIONS))
    return result.steps, [*early, last.weights], network, config.training.patch_voxels


def train_monai(out: Path, data: Path, cases: dict[str, Case], job: Job) -> Trained:  # noqa: ARG001 - same signature as train_ours
    """Train by the recipe of MONAI's tutorial and bundle."""
    from monai.data import CacheDataset, DataLoader, set_track_meta
    from monai.losses import DiceLoss
    from monai.transforms import (
        Compose,
        EnsureTyped,
        RandFlipd,
        RandScaleIntensityd,
        RandShiftIntensityd,
        RandSpatialCropd,
        SpatialPadd,
        Transform,
    )

    same = load_config("laptop")
    network = build_network(
        same.network
        if job.side == "monai-same"
        else NetworkConfig(architecture="segresnet", channels=(16, 32, 64, 128), dropout=0.2),
        in_channels=4,
        out_channels=len(REGIONS),
    )
    size = same.training.patch_voxels if job.side == "monai-same" else (job.crop,) * 3
    batch = same.training.batch_size if job.side == "monai-same" else 1
    set_track_meta(False)
    torch.manual_seed(job.seed)
    np.random.seed(job.seed)
    convention = convention_of(list(cases.values()))
    both = ("image", "label")

    class Load(Transform):  # type: ignore[misc]
        def __call__(self, case: Case) -> dict[str, Any]:
            # Read, cropped to the brain and z-scored like ours, so that the network sees the same values.
            prepared = prepare(case, spacing_mm=(job.spacing_mm,) * 3, convention=convention, nan_to_zero=True)
            assert prepared.codes is not None
            return {"image": prepared.image, "label": to_regions(prepared.codes).astype(np.float32)}

    transform = Compose(
        [
            Load(),
            EnsureTyped(both, track_meta=False),
            SpatialPadd(both, spatial_size=size),
            RandSpatialCropd(both, roi_size=size, random_size=False),
            *(RandFlipd(both, prob=0.5, spatial_axis=axis) for axis in range(3)),
            RandScaleIntensityd("image", factors=0.1, prob=1.0),
            RandShiftIntensityd("image", offsets=0.1, prob=1.0),
        ]
    )
    transform.set_random_state(seed=job.seed)
    loss_of = DiceLoss(smooth_nr=0, smooth_dr=1e-5, squared_pred=True, to_onehot_y=False, sigmoid=True)
    optimizer = torch.optim.Adam(network.parameters(), job.rate, weight_decay=1e-5)
    started, budget = time.monotonic(), 60 * job.minutes
    # Prepared by one thread, since the run has one core.
    dataset = CacheDataset([cases[case_id] for case_id in job.train], transform, progress=False, num_workers=1)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**7)
    snapshots: list[dict[str, torch.Tensor]] = []
    network.train()
    steps = 0
    for content in DataLoader(dataset, batch_size=batch, sampler=sampler, num_workers=0):
        share = (time.monotonic() - started) / budget
        if len(snapshots) < 2 and share >= (0.25, 0.5)[len(snapshots)]:
            snapshots.append({name: value.clone() for name, value in network.state_dict().items()})
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = job.rate * 0.5 * (1 + math.cos(math.pi * share))
        optimizer.zero_grad()
        loss = loss_of(network(content["image"]), content["label"])
        loss.backward()
        optimizer.step()
        loss.item()
        steps += 1
    return steps, [*snapshots, network.state_dict()], network, size


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for runs and scores")
    parser.add_argument("cases", nargs="?", type=Path)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument(
        "--sweep-minutes", type=float, help="minutes of the runs that choose the learning rate; default: --minutes"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", type=int, default=1, help="number of splits, 1 to 3")
    parser.add_argument("--crop", type=int, default=96, help="crop of MONAI's SegResNet; a multiple of 8")
    parser.add_argument("--sides", default="ours,monai,monai-same")
    parser.add_argument("--cores", default=",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:2]))
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    share_processors()
    main()
