"""Cross-validate the recipe of a config and MONAI's recipe, with equal minutes of training on one core.

    python bench/quality_per_hour.py OUT [CASES] [--config laptop] [--minutes 15] [--folds 4] [--seeds 3] [--jobs 2]

CASES are real cases; without them, OUT/phantoms gets 16 phantoms at 2 mm. There are two sides:

* ``znormseg train --config NAME`` (a named config or a YAML file), with the config's own learning rate;
* ``monai``: the recipe of MONAI's BraTS tutorial and bundle (SegResNet of 16 filters, random crops, flips, intensity
  scale and shift, DiceLoss with squared probabilities, Adam with weight decay 1e-5 and a cosine schedule, batch 1),
  with its cases kept in memory (CacheDataset). Its crop of 224 x 224 x 144 is for a GPU; here it has ``--crop`` voxels
  along each side. Its learning rate is the best of ``--rates``: each is tried with the first seed, in every fold and
  for all minutes. The choice is by mean Dice on the test cases that the table reports on, which favours MONAI.

Folds are those of ``znormseg crossval``: by patient, with similar tumours in each. The minutes count from the first
access to the data to the last step, without imports and scoring. Both sides are scored as ``crossval`` scores: the
label map that ``predict`` would write, on the case's own grid. Dice and HD95 of a region are means over the cases with
at least 0.5 ml of it; if only the prediction is empty, Dice is 0 and HD95 374 mm (BraTS 2023).

The 95 % intervals are percentile bootstraps. Their unit is the case; with each seed, a case is predicted once, by a
network that was not trained on it. Cases and seeds are drawn independently with replacement, and differences are paired
by case and seed. With so few seeds the intervals are somewhat too narrow.

Each training runs in a single-threaded process pinned to its own core. Its scores are kept in OUT/<training>.json, and
a training that has scores is not repeated: interrupt the command at any time, and run it again to continue, on the same
machine and with the same versions. Another ``--config`` with the same OUT reuses MONAI's training runs. By default
there are 32 training runs, 12 of the config and 20 of MONAI's recipe: four hours with two at a time, plus their
scoring.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from statistics import fmean
from typing import Any, Final

import numpy as np
import torch

from app.config.load import from_plain, load_config, to_plain
from app.errors import ConfigError, message
from app.evaluation.metrics import region_scores
from app.evaluation.statistics import FloatArray, bootstrap_interval, paired_difference
from app.experiments.crossval.out_of_fold import predict_left_out
from app.experiments.runs import differences
from app.inference.backends.choose import choose_backend
from app.inference.backends.executors import make_engine
from app.inference.backends.trace import trace
from app.inference.model import Model, load_model
from app.inference.postprocess import Postprocess
from app.runs.folder import write_json
from app.system.device import Runtime, RuntimeConfig, machine, versions
from app.system.process import keep_freed_memory, share_processors
from app.training.cases import case_spacing, median_by_axis
from app.training.run import start
from data.datasets.label_stats import convention_of, read_label_maps, tumours_of
from data.datasets.layouts import Case, patients_of
from data.datasets.source import DataSource
from data.datasets.splits import stratified_split
from data.errors import DataError
from data.labels import REGIONS, LabelConvention, Region, from_regions, to_regions
from data.patches.cache import CaseFolder
from data.phantoms import write_phantoms
from data.preprocess import prepare
from models import NetworkConfig, build_network

MONAI: Final = "monai"
#: Cases with less of a region are left out of its means: a few voxels decide their scores.
LEAST_ML: Final = 0.5
#: Columns of the table: region, score, heading, decimals.
COLUMNS: Final[tuple[tuple[Region, str, str, int], ...]] = (
    *((region, "dice", f"{region} Dice", 3) for region in REGIONS),
    ("WT", "hd95_mm", "WT HD95 in mm", 1),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training to run and score."""

    side: str
    config: Mapping[str, Any] | None
    """Plain data of the config; None for MONAI's recipe."""
    rate: float
    seed: int
    fold: int
    train: tuple[str, ...]
    test: tuple[str, ...]
    minutes: float
    crop: int | None
    """Side of MONAI's crop in voxels."""

    @property
    def name(self) -> str:
        """Name of the training, and of its files without their ending."""
        return f"{self.side}-rate{self.rate:g}-fold{self.fold}-seed{self.seed}"

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return dict(json.loads(json.dumps(asdict(self))))


def main() -> None:
    """Run the missing training runs, choose MONAI's learning rate, and print the table."""
    options = _options()
    if options.job:
        work(options.out, options.cases, Job(**json.loads(options.job)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if options.cases is None:
        options.cases = phantoms(options.out)
    print(f"{machine()}; {versions()}; {options.minutes:g} minutes on one core for each training", flush=True)
    side = Path(options.config).stem
    if side == MONAI:
        sys.exit(f"--config {options.config}: {MONAI} is the name of the other side; rename the file")
    splits = deal(options.cases, options.folds)

    def ours(seed: int) -> list[Job]:
        settings = [f"training.hours={options.minutes / 60}", "training.steps=null", f"training.seed={seed}"]
        config = load_config(options.config, [*settings, "runtime.device=cpu"])
        return [job(side, fold, seed, config.training.learning_rate, to_plain(config)) for fold in range(len(splits))]

    def theirs(seed: int, rate: float) -> list[Job]:
        return [job(MONAI, fold, seed, rate, None) for fold in range(len(splits))]

    def job(side: str, fold: int, seed: int, rate: float, config: Mapping[str, Any] | None) -> Job:
        train, test = splits[fold]
        crop = options.crop if config is None else None
        of_fold: dict[str, Any] = {"fold": fold, "seed": seed, "train": train, "test": test}
        return Job(side=side, config=config, rate=rate, minutes=options.minutes, crop=crop, **of_fold)

    swept = {rate: theirs(0, rate) for rate in options.rates}
    found = run_all([*ours(0), *(one for jobs in swept.values() for one in jobs)], options)
    means = {rate: mean_dice([found[one.name] for one in jobs]) for rate, jobs in swept.items()}
    best = max(means, key=lambda rate: means[rate])
    for rate, mean in means.items():
        print(f"  {MONAI}, learning rate {rate:g}: mean Dice {mean:.3f}{', chosen' if rate == best else ''}")
    if len(means) > 1 and best in (min(means), max(means)):
        print(f"  {best:g} is at the edge of --rates: add one beyond it, and run the command again")
    later = [one for seed in range(1, options.seeds) for one in [*ours(seed), *theirs(seed, best)]]
    found |= run_all(later, options)
    mine = [found[one.name] for seed in range(options.seeds) for one in ours(seed)]
    other = [found[one.name] for seed in range(options.seeds) for one in theirs(seed, best)]
    print("\n" + "\n".join(table(mine, other)))


def phantoms(out: Path) -> Path:
    """Write the phantoms if they are not complete yet, and return their folder."""
    folder, partial = out / "phantoms", out / ".phantoms.partial"
    if not folder.exists():
        shutil.rmtree(partial, ignore_errors=True)
        write_phantoms(partial, 16, seed=0, spacing_mm=2.0)
        partial.rename(folder)
    return folder


def deal(cases: Path, folds: int) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Return the ids of the training and test cases of each fold, as ``znormseg crossval`` deals them."""
    found = DataSource(cases).find_cases()
    tumours = tumours_of(found, read_label_maps(found.values()), convention_of(list(found.values())))
    splits = [stratified_split(tumours, patients_of(found.values()), fold, folds=folds) for fold in range(folds)]
    return [(split.train, split.validation) for split in splits]


def run_all(jobs: Sequence[Job], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run the jobs that have no result yet, and return the results of all jobs by name.

    Sides take turns, so that trainings that run at the same time have the same seed and fold where possible.
    """
    jobs = sorted(jobs, key=lambda job: (job.seed, job.fold))
    missing = [job for job in jobs if result(options.out, job) is None]
    hours = options.minutes / 60 * math.ceil(len(missing) / options.jobs)
    print(f"{len(jobs)} runs, {len(missing)} left: {hours:.1f} hours, and their scoring", flush=True)
    cores: SimpleQueue[int] = SimpleQueue()
    for core in sorted(os.sched_getaffinity(0))[: options.jobs]:
        cores.put(core)

    running: set[subprocess.Popen[bytes]] = set()
    stopped = threading.Event()

    def make(job: Job) -> None:
        words = [sys.executable, __file__, str(options.out), str(options.cases), "--job", json.dumps(job.to_json())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # The pipe closes when this process ends, however it ends, and the training ends with it.
        core = cores.get()
        try:
            if stopped.is_set():
                return
            command = ["taskset", "-c", str(core), *words]
            with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE) as process:
                running.add(process)
                if stopped.is_set():  # after the others were terminated
                    process.terminate()
                status = process.wait()
                running.discard(process)
        finally:
            cores.put(core)
        if status:
            raise RuntimeError(f"{job.name}: ended with exit status {status}. Run the same command again to continue.")

    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            list(pool.map(make, missing))
        except BaseException as error:
            if not isinstance(error, Exception):  # interrupted; after a failure, the others may end
                stopped.set()
                for process in tuple(running):
                    process.terminate()
            pool.shutdown(cancel_futures=True)
            sys.exit(str(error) or "interrupted; run the same command again to continue")
    found = {job.name: result(options.out, job) for job in jobs}
    return {name: content for name, content in found.items() if content is not None}


def result(out: Path, job: Job) -> dict[str, Any] | None:
    """Return the result of a training, or None if there is none yet."""
    path = out / f"{job.name}.json"
    if not path.exists():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    now = {"job": job.to_json(), "machine": _without_cores(machine()), "versions": versions()}
    before = {**content, "machine": _without_cores(content["machine"])}
    if changed := differences({key: before[key] for key in now}, now):
        sys.exit(
            f"{path}: made with other settings, on another machine or with other versions ({'; '.join(changed[:5])}). "
            "Delete it, or give another OUT."
        )
    return content


def _without_cores(machine: str) -> str:
    """Leave out the number of cores, which is 1 in the process of a training."""
    return re.sub(r", \d+ cores?", "", machine)


def scores_of(results: Sequence[Mapping[str, Any]]) -> dict[str, FloatArray]:
    """Return the scores of a side by heading, shape (seeds, cases); a region without cases is left out."""
    by_seed: dict[int, dict[str, Any]] = {}
    for one in results:
        by_seed.setdefault(one["job"]["seed"], {}).update(one["cases"])
    ids = sorted(by_seed[0])
    found = {}
    for region, score, heading, _ in COLUMNS:
        used = [case_id for case_id in ids if by_seed[0][case_id][region]["reference_volume_ml"] >= LEAST_ML]
        if used:
            found[heading] = np.array([[cases[one][region][score] for one in used] for cases in by_seed.values()])
    return found


def mean_dice(results: Sequence[Mapping[str, Any]]) -> float:
    """Return the mean over regions of their mean Dice."""
    return fmean(float(values.mean()) for heading, values in scores_of(results).items() if "Dice" in heading)


def table(mine: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table: both sides and their paired differences, with intervals."""
    ours, theirs = scores_of(mine), scores_of(other)
    columns = [column for column in COLUMNS if column[2] in ours]
    heads = [f"{heading} ({ours[heading].shape[1]} cases)" for _, _, heading, _ in columns]
    lines = [f"| side | learning rate | steps | {' | '.join(heads)} |", "|---" * (len(heads) + 3) + "|"]
    for results, scores in ((mine, ours), (other, theirs)):
        job, steps = results[0]["job"], round(fmean(one["steps"] for one in results))
        cells = []
        for _, _, heading, digits in columns:
            low, high = bootstrap_interval(scores[heading])
            cells.append(f"{scores[heading].mean():.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        lines.append(f"| {job['side']} | {job['rate']:g} | {steps} | {' | '.join(cells)} |")
    cells, ahead = [], []
    for _, score, heading, digits in columns:
        gain = paired_difference(ours[heading], theirs[heading])
        cells.append(f"{gain.mean:+.{digits}f} ({gain.low:+.{digits}f} to {gain.high:+.{digits}f})")
        if gain.high < 0 if score == "hd95_mm" else gain.low > 0:
            ahead.append(heading)
    lines.append(f"| difference | | | {' | '.join(cells)} |")
    behind = [heading for _, _, heading, _ in columns if heading not in ahead]
    name = mine[0]["job"]["side"]
    return [
        *lines,
        "",
        f"{name} is ahead beyond the interval in: {', '.join(ahead) or 'none'}; not in: {', '.join(behind) or 'none'}.",
    ]


def work(out: Path, data: Path, job: Job) -> None:
    """Train and score one job, in a separate process that exits when its standard input closes."""

    def end_with_parent() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    keep_freed_memory()
    cases = DataSource(data).find_cases()
    convention = convention_of(list(cases.values()))
    runtime = choose_backend("auto", RuntimeConfig(device="cpu"))
    if job.config is None:
        model = train_monai([cases[case_id] for case_id in job.train], convention, job, runtime)
    else:
        model = train_ours(out, data, job, runtime)
    scores = {case_id: score(model, cases[case_id], runtime) for case_id in job.test}
    write_json(
        out / f"{job.name}.json",
        {
            "job": job.to_json(),
            "steps": model.step,
            "cases": scores,
            "predicted_by": runtime.record(),
            "machine": machine(),
            "versions": versions(),
        },
    )
    dice = {region: fmean(scores[case_id][region]["dice"] for case_id in scores) for region in REGIONS}
    shown = ", ".join(f"{region} {value:.3f}" for region, value in dice.items())
    print(f"  {job.name}: {model.step} steps, Dice {shown}", file=sys.stderr, flush=True)


def score(model: Model, case: Case, runtime: Runtime) -> dict[str, Any]:
    """Predict a case and return the scores of its regions."""
    prediction = predict_left_out(model, case, runtime, convention=model.convention, nan_to_zero=True)
    rules, spacing_mm = Postprocess(), prediction.spacing_mm
    codes = from_regions(rules.clean(prediction.cut(rules), spacing_mm))
    return {region: asdict(one) for region, one in region_scores(codes, prediction.reference, spacing_mm).items()}


def train_ours(out: Path, data: Path, job: Job, runtime: Runtime) -> Model:
    """Train as ``znormseg train`` does, with a cache of prepared cases that is empty at the start."""
    assert job.config is not None
    run, store, split = out / f"run-{job.name}", out / f"cache-{job.name}", out / f"split-{job.name}.json"
    for left in (run, store):  # left behind by an interrupted training
        shutil.rmtree(left, ignore_errors=True)
    write_json(split, {"train": list(job.train), "validation": []})
    start(DataSource(data), run, from_plain(dict(job.config), job.name), split_file=split, store=CaseFolder(store))
    shutil.rmtree(store, ignore_errors=True)
    return load_model(run, runtime)


def train_monai(cases: Sequence[Case], convention: LabelConvention, job: Job, runtime: Runtime) -> Model:
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

    assert job.crop is not None
    started, budget = time.monotonic(), 60 * job.minutes
    size, both = (job.crop, job.crop, job.crop), ("image", "label")
    spacing_mm = median_by_axis(map(case_spacing, cases))
    set_track_meta(False)
    torch.manual_seed(job.seed)
    np.random.seed(job.seed)
    network = build_network(
        NetworkConfig(architecture="segresnet", channels=(16, 32, 64, 128), dropout=0.2),
        in_channels=4,
        out_channels=len(REGIONS),
    )

    class Load(Transform):  # type: ignore[misc]
        def __call__(self, case: Case) -> dict[str, Any]:
            # Read, cropped to the brain and z-scored like ours, so that the network sees the same values.
            prepared = prepare(case, spacing_mm=spacing_mm, convention=convention, nan_to_zero=True)
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
    # Prepared by one thread, since the run has one core.
    dataset = CacheDataset(list(cases), transform, progress=False, num_workers=1)
    sampler = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**7)
    network.train()
    steps = 0
    for content in DataLoader(dataset, batch_size=1, sampler=sampler, num_workers=0):
        share = (time.monotonic() - started) / budget
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
    weights: Mapping[str, Any] = network.state_dict()
    if runtime.backend == "openvino":
        weights = {name: tensor.numpy() for name, tensor in weights.items()}
    return Model(
        engine=make_engine(trace(network, in_channels=4), weights, runtime),
        plain_config={},
        origin="MONAI's recipe",
        takes_missing_contrasts=False,
        spacing_mm=spacing_mm,
        convention=convention,
        sha256="",
        window=size,
        overlap=0.5,
        crop=True,
        step=steps,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for trainings and scores")
    parser.add_argument("cases", nargs="?", type=Path)
    parser.add_argument("--config", default="laptop", help="a named config or a YAML file; default: laptop")
    parser.add_argument("--minutes", type=float, default=15.0, help="of each training; default: 15")
    parser.add_argument("--folds", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings side by side, each with one thread; default: 2")
    parser.add_argument(
        "--rates",
        type=lambda text: tuple(float(one) for one in text.split(",")),
        default=(1e-4, 5e-4, 2.5e-3),
        help="learning rates of MONAI's recipe to try; default: 1e-4,5e-4,2.5e-3",
    )
    parser.add_argument("--crop", type=int, default=96, help="crop of MONAI's SegResNet; a multiple of 8; default: 96")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if options.job is None and not 1 <= options.jobs <= cores:
        parser.error(f"--jobs takes 1 to {cores}, the cores that this process may use")
    if options.folds < 2 or options.seeds < 1 or options.minutes <= 0:
        parser.error("--folds takes 2 or more, --seeds 1 or more, --minutes more than 0")
    return options


if __name__ == "__main__":
    share_processors()
    try:
        main()
    except (ConfigError, DataError) as error:
        sys.exit(message(error))
