"""Compare the whole ``znormseg predict`` command with MONAI in one run: seconds, memory, agreement of label maps.

    python bench/predict.py RUN CASE [--out FOLDER] [--window brain] [--repeats 1] [--small]

All commands use the same weights and case. Each is a separate process, timed from its start until the file is written:

- znormseg with ``--window`` (default: brain), in the automatically chosen precision and in float32;
- znormseg with windows of the size the network was trained on;
- MONAI as in its BraTS bundle: window 240x240x160, overlap 0.5, fp32, MONAI's transforms and SlidingWindowInferer;
- MONAI with Gaussian windows of 128x128x128, overlap 0.5, fp32.

RUN is the folder of a trained run; ``random-segresnet`` (16 filters, like the bundle) or ``random-resunet`` (like the
config resunet-znorm) makes one with random weights. ``--small`` keeps every third voxel of the case and reduces the
windows to a third, to test this script itself. The script reports the seconds and peak resident memory of each command,
the stages of znormseg, the share of brain voxels with different labels, Dice against the truth if the case has one, and
the network's GFLOP/s next to the machine's measured peak.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, Final

import nibabel as nib
import numpy as np
import psutil

HERE: Final = Path(__file__).resolve().parent
CONTRASTS: Final = ("t1", "t1c", "t2", "flair")
#: Stride of the voxels that ``--small`` keeps along each axis.
SMALL: Final = 3

REFERENCE: Final = """
import json, sys, time
import numpy as np, torch
from monai.data import MetaTensor
from monai.inferers import SlidingWindowInferer
from monai.transforms import Activationsd, AsDiscreted, Compose, EnsureTyped, LoadImaged, NormalizeIntensityd
from app.runs.checkpoints import load_newest
from app.config.load import from_plain
from models import build_network
import nibabel as nib
import pathlib

facts = json.loads(sys.argv[1])
torch.set_num_threads(facts["threads"])
start = time.time()
found = load_newest(pathlib.Path(facts["run"]) / "checkpoints", "best")
config = from_plain(found.details["config"], "run")
network = build_network(config.network, in_channels=4, out_channels=3).eval()
network.load_state_dict(found.weights)
read = Compose([
    LoadImaged(keys="image", ensure_channel_first=True),
    NormalizeIntensityd(keys="image", nonzero=True, channel_wise=True),
    EnsureTyped(keys="image"),
])
image = read({"image": facts["files"]})["image"]
loaded = time.time()
inferer = SlidingWindowInferer(roi_size=facts["window"], sw_batch_size=1, overlap=0.5, mode=facts["mode"])
with torch.inference_mode():
    logits = inferer(image[None].as_tensor(), network)
computed = time.time()
after = Compose([Activationsd(keys="pred", sigmoid=True), AsDiscreted(keys="pred", threshold=0.5)])
wt, tc, et = after({"pred": logits[0]})["pred"].numpy().astype(bool)
tc &= wt
et &= tc
labels = np.zeros(wt.shape, dtype=np.uint8)
labels[wt], labels[tc], labels[et] = 2, 1, 4
nib.save(nib.Nifti1Image(labels, image.affine.numpy()), facts["out"])
print(json.dumps({"load": loaded - start, "compute": computed - loaded, "save": time.time() - computed}))
"""


def main() -> None:
    """Run all commands, print the results, and write them as JSON."""
    parser = argparse.ArgumentParser(description="Compare znormseg predict with MONAI, each in a separate process")
    parser.add_argument("run", help="folder of a run, random-segresnet or random-resunet")
    parser.add_argument("case", type=Path, help="folder of one case in BraTS 2021 layout")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder for label maps and results.json; default: temporary"
    )
    parser.add_argument("--window", default="brain", help="window of znormseg, as for predict --window")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each command; the fastest counts")
    parser.add_argument("--small", action="store_true", help="every third voxel, and windows of a third of the size")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch) / "out"
        out.mkdir(parents=True, exist_ok=True)
        run = _random_run(options.run, Path(scratch)) if options.run.startswith("random-") else Path(options.run)
        case = _smaller(options.case, Path(scratch)) if options.small else options.case
        results = measure(run, case, out, window=options.window, small=options.small, repeats=options.repeats)
    (out / "results.json").write_text(json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))


def measure(run: Path, case: Path, out: Path, *, window: str, small: bool, repeats: int) -> dict[str, Any]:
    """Run all commands one after the other, and return their results."""
    scale = SMALL if small else 1
    trained = ",".join(str(max(32, 128 // scale // 16 * 16)) for _ in range(3))
    ways = {
        "znormseg": ["--window", window],
        "znormseg, same windows, float32": ["--window", window, "--precision", "float32"],
        "znormseg, same windows, torch float32": ["--window", window, "--precision", "float32", "--backend", "torch"],
        "znormseg, 128^3 windows": ["--window", trained],
        "znormseg, 128^3 windows, float32": ["--window", trained, "--precision", "float32"],
    }
    found: dict[str, Any] = {}
    maps: dict[str, Any] = {}
    for name, more in ways.items():
        place = out / name.replace(" ", "-").replace(",", "")
        command = [sys.executable, "-m", "app", "predict", str(run), str(case), str(place), "--overwrite", *more]
        found[name] = _best(command, repeats)
        content = json.loads((place / f"{case.name}.json").read_text())
        stages = content["seconds"]
        found[name]["parts"] = {
            **stages,
            "start-up and loading of the network": round(found[name]["seconds"] - sum(stages.values()), 3),
        }
        found[name]["runtime"] = content["runtime"]
        maps[name] = _labels(next(place.glob("*.nii.gz")))
    sides = {"MONAI, bundle's window": (240, 240, 160), "MONAI, 128^3 Gaussian windows": (128, 128, 128)}
    for (name, sizes), mode in zip(sides.items(), ("constant", "gaussian"), strict=True):
        place = out / f"{name.replace(' ', '-').replace(',', '').replace(chr(39), '')}.nii.gz"
        facts = {
            "run": str(run),
            "files": [str(_file(case, contrast)) for contrast in CONTRASTS],
            "window": [max(32, side // scale // 16 * 16) for side in sizes],
            "mode": mode,
            "out": str(place),
            "threads": len(psutil.Process().cpu_affinity() or [1]),
        }
        found[name] = _best([sys.executable, "-c", REFERENCE, json.dumps(facts)], repeats)
        found[name]["parts"] = json.loads(found[name].pop("out").splitlines()[-1])
        maps[name] = _labels(place)
    brain = np.any([np.asarray(nib.load(_file(case, contrast)).dataobj) != 0 for contrast in CONTRASTS], axis=0)
    pairs = {
        "znormseg": "znormseg, same windows, float32",
        "znormseg, same windows, float32": "znormseg, same windows, torch float32",
        "znormseg, 128^3 windows": "znormseg, 128^3 windows, float32",
    }
    for name, other in pairs.items():
        share = float(np.mean((maps[name] != maps[other])[brain]))
        found[name]["another_label"] = {"against": other, "share_of_brain_voxels": share}
    truth = next(case.glob("*seg.nii*"), None)
    if truth is not None:
        for name, labels in maps.items():
            found[name]["dice"] = _dice(labels, _labels(truth))
    mine = found["znormseg"]
    for name in sides:
        found[name]["znormseg_is_faster_by"] = round(found[name]["seconds"] / mine["seconds"], 2)
        found[name]["znormseg_takes_of_its_memory"] = round(mine["peak_gb"] / found[name]["peak_gb"], 3)
    return {"commands": found, "machine": _peaks(), "network": _network(run, brain, scale)}


def _best(command: Sequence[str], repeats: int) -> dict[str, Any]:
    return min((_timed(command) for _ in range(repeats)), key=lambda one: one["seconds"])


def _timed(command: Sequence[str]) -> dict[str, Any]:
    """Run a command; return its seconds and the peak resident memory with its children, sampled every 10 ms."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=HERE.parent, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    watched, peak = psutil.Process(process.pid), 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        try:
            lines = status.read_text().splitlines()
            peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
            peak = max(peak, watched.memory_info().rss + sum(c.memory_info().rss for c in watched.children()))
        except (psutil.Error, OSError, TypeError):
            break
        time.sleep(0.01)
    out, err = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:4])}: ended with {process.returncode}\n{err}")
    return {"seconds": round(seconds, 3), "peak_gb": round(peak / 1e9, 3), "out": out}


def _peaks() -> dict[str, float]:
    """Return the GFLOP/s of a 4096x4096 matrix product, best of five."""
    import torch

    torch.set_num_threads(len(psutil.Process().cpu_affinity() or [1]))
    found = {}
    for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a = torch.randn(4096, 4096).to(kind)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            torch.mm(a, a)
            best = min(best, time.perf_counter() - start)
        found[f"{name}_gflops"] = round(2 * 4096**3 / best / 1e9, 1)
    return found


def _network(run: Path, brain: Any, scale: int) -> dict[str, float]:
    """Return the seconds of one window around the brain, and the GFLOP/s that OpenVINO reaches in it."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from app.inference.backends.choose import choose_backend
    from app.inference.model import load_model
    from app.inference.sliding_window.grid import rounded_up
    from app.system.device import RuntimeConfig
    from data.preprocess import smallest_box

    x, y, z = (part.stop - part.start for part in smallest_box(brain))
    network = load_model(run, choose_backend("torch", RuntimeConfig(device="cpu"))).network
    window = rounded_up((x, y, z), 16)
    # Counted on a sixteenth of the voxels; except for borders, the work is proportional to their number.
    part = (window[0], max(32, window[1] // 4 // 16 * 16), max(32, window[2] // 4 // 16 * 16))
    with FlopCounterMode(display=False) as counted, torch.inference_mode():
        network(torch.zeros(1, 4, *part))
    gflop = counted.get_total_flops() * prod(window) / prod(part) / 1e9
    found = {"gflop": round(gflop, 1), "scale": scale}
    image = np.random.default_rng(0).normal(size=(4, *window)).astype(np.float32)
    for precision in ("float32", "bfloat16"):
        runtime = choose_backend("openvino", RuntimeConfig(device="cpu", precision=precision))
        engine = load_model(run, runtime).engine
        plan = engine.first_plan(window, runtime)
        engine.logits(image, None, runtime, overlap=0, plan=plan)
        start = time.perf_counter()
        engine.logits(image, None, runtime, overlap=0, plan=plan)
        seconds = time.perf_counter() - start
        found |= {f"{precision}_seconds": round(seconds, 3), f"{precision}_gflops": round(gflop / seconds, 1)}
    return found


def _random_run(name: str, folder: Path) -> Path:
    """Make a run folder with random weights from seed 0."""
    import torch

    from app.config.load import load_config, to_plain
    from app.inference.backends.graph import GRAPH_KEY
    from app.inference.backends.trace import trace
    from app.runs.checkpoints import save, weight_tensors
    from data.labels import CONTRASTS as ORDER
    from data.labels import REGIONS
    from models import build_network

    more = ["network.architecture=segresnet", "network.channels=[16,32,64,128]"] if name == "random-segresnet" else []
    config = load_config("resunet-znorm", more)
    torch.manual_seed(0)
    network = build_network(config.network, in_channels=4, out_channels=len(REGIONS))
    biases = [one for name, one in network.named_parameters() if name.endswith("bias") and one.numel() == len(REGIONS)]
    torch.nn.init.zeros_(biases[-1])  # otherwise all voxels are background, and label maps cannot differ
    details = {
        "contrasts": list(ORDER),
        "takes_missing_contrasts": False,
        "regions": list(REGIONS),
        "labels": "brats2021",
        "spacing_mm": [1.0, 1.0, 1.0],
        "config": to_plain(config),
        GRAPH_KEY: trace(network, in_channels=4).to_json(),
    }
    save(folder / "run" / "checkpoints", "best", 1, weight_tensors(network), details)
    return folder / "run"


def _smaller(case: Path, folder: Path) -> Path:
    """Keep every third voxel of a case but not its spacing, so that only its size changes."""
    target = folder / case.name
    target.mkdir()
    for path in case.glob("*.nii*"):
        image = nib.load(path)
        voxels = np.asarray(image.dataobj)[::SMALL, ::SMALL, ::SMALL]
        nib.save(nib.Nifti1Image(voxels, image.affine), target / path.name)
    return target


def _file(case: Path, contrast: str) -> Path:
    ending = "t1ce" if contrast == "t1c" else contrast
    return next(case.glob(f"*_{ending}.nii*"))


def _labels(path: Path) -> Any:
    return np.asarray(nib.load(path).dataobj).astype(np.uint8)


def _dice(one: Any, other: Any) -> dict[str, float]:
    found = {}
    for region, numbers in (("WT", (1, 2, 4)), ("TC", (1, 4)), ("ET", (4,))):
        a, b = np.isin(one, numbers), np.isin(other, numbers)
        found[region] = float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))
    return found


if __name__ == "__main__":
    main()
