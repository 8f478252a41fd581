"""Measure everything that only a GPU shows, in under 8 minutes, and write one table and one JSON file.

    python bench/gpu.py OUT [--device cuda] [--minutes 8] [--small]

OUT receives ``gpu.md``, ``gpu.json`` (with the versions of everything involved) and the output of each part. The parts,
each in a process that ends before the next begins:

- ``znormseg doctor``, and the tests marked ``gpu``;
- training steps of every named config, and of MONAI's loop with the same network (bench/train_step.py): samples per
  second, the share of time in which the GPU is idle, shares of its measured bfloat16 peak and bandwidth, memory;
- ZNorm over clipping, over a step and over the time to move its bytes (bench/znorm_step.py);
- a case on the network of ``resunet-znorm`` with random weights, with and without mirrored images, and with MONAI's
  sliding window; and the seconds that each further case of a cohort adds to ``znormseg predict``.

Cases are phantoms. nnU-Net's loop is not measured, and the table says so. A part that does not fit into the time is
listed as not run. ``--small`` takes phantoms at 4 mm, small patches and two configs, to try the script on a CPU
(``--device cpu``); its figures mean nothing. On a slow or busy machine, give it more ``--minutes``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
#: Named configs, the smallest first; `starter` has the network of `laptop`.
CONFIGS: Final = ("laptop", "unet", "resunet", "resunet-znorm", "large")
SMALL_CONFIGS: Final = ("laptop", "resunet-znorm")
#: Largest share of the time that a part may take: 100 s of 7.5 minutes.
PART_SHARE: Final = 100 / 450
#: Cases of the cohort that `predict` is timed on.
COHORT: Final = 6


def main() -> None:
    """Run the parts, and write the table."""
    options = _options()
    if options.part:
        print(json.dumps(PARTS[options.part](options)))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * options.minutes
    found: dict[str, Any] = {"seconds": {}}
    with tempfile.TemporaryDirectory(prefix="znormseg-gpu-") as scratch:
        environment = {**os.environ, "ZNORMSEG_CACHE": scratch, "PYTHONPATH": str(ROOT)}
        environment["ZNORMSEG_GPU_TESTS"] = options.device  # read by tests/system/test_gpu.py
        for name, command in _parts(options, Path(scratch)):
            began = time.monotonic()
            limit = min(PART_SHARE * 60 * options.minutes, until - began)
            print(f"{name} ...", flush=True)
            found[name] = _run(name, command, options.out, environment, limit)
            found["seconds"][name] = round(time.monotonic() - began, 1)
    (options.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table = "\n".join(report(found)) + "\n"
    (options.out / "gpu.md").write_text(table, encoding="utf-8")
    print(table)


def _parts(options: argparse.Namespace, scratch: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the name and the command of each part."""
    python, cases = sys.executable, scratch / "cases"
    small = ["--small"] if options.small else []
    part = [python, str(Path(__file__).resolve()), str(scratch), "--device", options.device, *small, "--part"]
    spacing = ["--spacing-mm", "4"] if options.small else []
    yield "machine", [*part, "machine"]
    yield "doctor", [python, "-m", "app", "doctor", "--json"]
    yield "phantoms", [python, "-m", "app", "data", "phantom", str(cases), "--count", str(COHORT), *spacing]
    for config in SMALL_CONFIGS if options.small else CONFIGS:
        for side in ("ours", "monai"):
            yield f"train {config} {side}", [*part, "train", "--config", config, "--side", side]
    yield "case", [*part, "case"]
    yield "cohort", [*part, "cohort"]
    rounds = ["--rounds", "2", "--without-steps"] if options.small else []
    yield "znorm", [python, str(HERE / "znorm_step.py"), "--device", options.device.partition(":")[0], *rounds]
    yield "tests", [python, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "tests/system/test_gpu.py"]


def _run(name: str, command: list[str], out: Path, environment: dict[str, str], seconds: float) -> dict[str, Any]:
    """Run a part; return its figures, or ``{"error": ...}``."""
    if seconds < 5:
        return {"error": "not run: out of time"}
    try:
        ended = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"stopped after {seconds:.0f} s"}
    (out / f"{name.replace(' ', '-')}.txt").write_text(ended.stdout + ended.stderr, encoding="utf-8")
    lines = ended.stdout.strip().splitlines()
    if name == "tests":
        return {"summary": lines[-1] if lines else "", "failed": [line for line in lines if line.startswith("FAILED")]}
    if name == "doctor":  # exits with 7 where it finds a problem
        with suppress(ValueError):
            return dict(json.loads(ended.stdout))
    if ended.returncode:
        return {"error": (ended.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return {"table": [line for line in lines if line.startswith("|")]} if name == "znorm" else _last_json(lines)


def _last_json(lines: list[str]) -> dict[str, Any]:
    """Return what a part printed in its last line; empty if that is not JSON."""
    with suppress(ValueError, IndexError):
        return dict(json.loads(lines[-1]))
    return {}


# ---- parts, each in its own process ---------------------------------------------------------------------------------


def machine_facts(options: argparse.Namespace) -> dict[str, Any]:
    """Return the machine, versions, and its measured peaks."""
    import torch

    from app.system.device import RuntimeConfig, choose_runtime, installed_version, machine, versions

    device = choose_runtime(RuntimeConfig(device=options.device)).device
    facts = {
        "machine": machine(),
        "versions": versions(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "triton": installed_version("triton"),
        "nnunetv2": installed_version("nnunetv2"),
        "bandwidth_gb_s": bandwidth(device, options) / 1e9,
    }
    for name in ("bfloat16", "float32"):
        facts[f"{name}_tflops"] = peak_flops(name, options) / 1e12
    return facts


def peak_flops(name: str, options: argparse.Namespace) -> float:
    """Return the operations per second of a large matrix product."""
    import torch

    side = 512 if options.small else 8192
    one = torch.randn(side, side, dtype=getattr(torch, name), device=options.device)
    return 2 * side**3 / _seconds(lambda: one @ one, options.device, 2 if options.small else 8)


def bandwidth(device: Any, options: argparse.Namespace) -> float:
    """Return the bytes per second that a copy within the memory of a device reads and writes."""
    import torch

    source = torch.zeros((1 << 20) if options.small else (1 << 30), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / _seconds(lambda: target.copy_(source), options.device, 8)


def _seconds(job: Callable[[], object], device: str, times: int) -> float:
    """Return the seconds of the fastest of several calls."""
    spent = []
    for _ in range(times + 1):
        _wait(device)
        began = time.perf_counter()
        job()
        _wait(device)
        spent.append(time.perf_counter() - began)
    return min(spent[1:])


def _wait(device: str) -> None:
    import torch

    if device != "cpu":
        torch.cuda.synchronize()


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Return the speed of the training steps of one side, and what limits it."""
    import torch
    import train_step

    from app.config.load import load_config
    from app.system.device import RuntimeConfig, choose_runtime
    from data.datasets.label_stats import convention_of
    from data.datasets.layouts import find_cases
    from data.patches.sampler import cache_cases

    training = load_config(options.config).training
    runtime = choose_runtime(RuntimeConfig(device=options.device))
    cases = find_cases(options.out / "cases")
    cached = cache_cases(
        cases,
        options.out / "prepared",
        spacing_mm=(4.0,) * 3 if options.small else (1.0,) * 3,
        convention=convention_of(cases),
        nan_to_zero=True,
    )
    given = argparse.Namespace(
        config=options.config,
        device=options.device,
        patch=32 if options.small else training.patch_voxels[0],
        batch=1 if options.small else training.batch_size,
        workers=1 if options.small else min(8, os.cpu_count() or 1),
        side=runtime.precision_name,
    )
    make = train_step.our_steps if options.side == "ours" else train_step.monai_steps
    steps = make([case.folder for case in cached], given)
    began, warm_up, number = time.perf_counter(), 1 if options.small else 20, 0
    while number < warm_up or (time.perf_counter() - began < 10 and not options.small):
        next(steps)
        number += 1
    _wait(options.device)
    count = 2 if options.small else 50
    began, waited, flops = time.perf_counter(), 0.0, 0.0
    for _ in range(count):
        of_step, flops = next(steps)
        waited += of_step
    _wait(options.device)
    seconds = (time.perf_counter() - began) / count
    found: dict[str, Any] = {
        "samples_per_second": given.batch / seconds,
        "step_seconds": seconds,
        "patch": given.patch,
        "batch": given.batch,
        "waits_for_batches": waited / count / seconds,
    }
    if options.side == "ours":
        found["flops"] = flops
    with suppress(Exception):
        found["moved_bytes"] = _moved_bytes(steps)
    if options.device != "cpu":
        found["gpu_idle"] = _gpu_idle(steps)
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
    return found


def _moved_bytes(steps: Iterator[Any]) -> int:
    """Return the bytes that the operations of a step read and write; those of compiled kernels are not seen."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Bytes(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                leaves = tree_leaves((args, kwargs, out))
                self.total += sum(one.numel() * one.element_size() for one in leaves if isinstance(one, Tensor))
            return out

    with Bytes() as counted:
        next(steps)
    return counted.total


def _gpu_idle(steps: Iterator[Any], count: int = 10) -> float:
    """Return the share of the time of some steps in which no kernel and no copy ran on the GPU."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    next(steps)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        began = time.perf_counter()
        for _ in range(count):
            next(steps)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    spans = sorted(
        (one.time_range.start, one.time_range.end)
        for one in profiled.events()
        if one.device_type == DeviceType.CUDA  # the others are calls of the host
    )
    busy, reached = 0.0, 0.0
    for start, end in spans:  # several streams overlap
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return max(0.0, 1 - busy / 1e6 / seconds)


def _random_run(options: argparse.Namespace) -> Path:
    """Make a run folder with random weights, of a small network with ``--small``."""
    import torch

    from app.config.load import load_config, to_plain
    from app.inference.backends.graph import GRAPH_KEY
    from app.inference.backends.trace import trace
    from app.runs.checkpoints import save, weight_tensors
    from data.labels import CONTRASTS, REGIONS
    from models import build_network

    small = ["network.channels=[4, 8]", "training.patch_voxels=[32, 32, 32]"] if options.small else []
    config = load_config("resunet-znorm", small)
    torch.manual_seed(0)
    network = build_network(config.network, in_channels=4, out_channels=len(REGIONS))
    details = {
        "contrasts": list(CONTRASTS),
        "takes_missing_contrasts": False,
        "regions": list(REGIONS),
        "labels": "brats2021",
        "spacing_mm": [4.0] * 3 if options.small else [1.0] * 3,
        "config": to_plain(config),
        GRAPH_KEY: trace(network, in_channels=4).to_json(),
    }
    run: Path = options.out / "random-run"
    save(run / "checkpoints", "best", 1, weight_tensors(network), details)
    return run


def case(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds from a prepared case to its label map in CPU memory, ours and with MONAI's sliding window."""
    import numpy as np
    import torch
    from monai.inferers import SlidingWindowInferer

    from app.config.inference import PredictOptions
    from app.inference.backends.choose import choose_backend
    from app.inference.model import load_model
    from app.inference.probabilities import FLIPS, predict_answer, predict_masks
    from app.system.device import RuntimeConfig
    from data.datasets.layouts import find_cases
    from data.labels import from_regions
    from data.preprocess import prepare

    runtime = choose_backend("torch", RuntimeConfig(device=options.device))
    model = load_model(_random_run(options), runtime)
    prepared = prepare(find_cases(options.out / "cases")[0], spacing_mm=model.spacing_mm)
    times, found = 1 if options.small else 5, {"shape": list(prepared.image.shape), "precision": runtime.precision_name}
    labels: dict[str, Any] = {}

    def ours(*, tta: bool) -> None:
        answer = predict_answer(model, prepared, runtime, options=PredictOptions(tta=tta))
        labels[f"ours {tta}"] = from_regions(predict_masks(model, prepared, answer.centred))

    def monai(*, tta: bool) -> None:
        inferer = SlidingWindowInferer(roi_size=model.window, sw_batch_size=1, overlap=0.5, mode="gaussian")
        image = torch.from_numpy(prepared.image)[None].to(runtime.device)
        mean = torch.zeros(1, device=runtime.device)
        with torch.inference_mode(), runtime.autocast():
            for axes in FLIPS if tta else FLIPS[:1]:
                over = tuple(axis + 1 for axis in axes)
                logits = inferer(image.flip(over), model.network)
                mean = mean + torch.sigmoid(logits.float()).flip(over)
        masks = (mean[0] > (4 if tta else 0.5)).cpu().numpy()
        labels[f"monai {tta}"] = from_regions(masks)

    for name, job in (("ours", ours), ("monai", monai)):
        for tta in (False, True):
            found[f"{name}{' mirrored' if tta else ''}"] = _seconds(
                lambda j=job, t=tta: j(tta=t), options.device, times
            )
        if options.device != "cpu":
            found[f"{name}_gb"] = torch.cuda.max_memory_reserved() / 1e9
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    brain = prepared.brain
    found["same_voxels"] = float(np.mean((labels["ours False"] == labels["monai False"])[brain]))
    return found


def cohort(options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds that each further case adds to the command ``znormseg predict``, from files to files."""
    run, cases = _random_run(options), options.out / "cases"
    first = options.out / "first"
    one = sorted(cases.glob("BraTS*"))[0]
    shutil.copytree(one, first / one.name, dirs_exist_ok=True)
    found = {}
    for title, more in (("one", []), ("mirrored", ["--tta"])):
        spent = []
        for name, folder in (("first", first), ("all", cases)):
            place = options.out / f"{title}-{name}"
            command = [sys.executable, "-m", "app", "predict", str(run), str(folder), str(place), "--backend", "torch"]
            began = time.perf_counter()
            subprocess.run([*command, "--device", options.device, *more], cwd=ROOT, check=True, capture_output=True)
            spent.append(time.perf_counter() - began)
        found[f"{title}_start_up_and_first_case"] = spent[0]
        found[f"{title}_further_case"] = (spent[1] - spent[0]) / (COHORT - 1)
    return found


PARTS: Final[dict[str, Callable[[argparse.Namespace], dict[str, Any]]]] = {
    "machine": machine_facts,
    "train": train,
    "case": case,
    "cohort": cohort,
}


# ---- the table ------------------------------------------------------------------------------------------------------


def report(found: dict[str, Any]) -> list[str]:
    """Return the lines of the Markdown table."""
    facts = found["machine"]
    if "machine" not in facts:
        return [f"The machine could not be examined: {facts.get('error', 'no output')}"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"{facts['machine']}; {versions}, CUDA {facts['cuda']}, cuDNN {facts['cudnn']}, triton {facts['triton']}; "
        f"measured: {facts['bfloat16_tflops']:.3g} TFLOP/s in bfloat16, {facts['bandwidth_gb_s']:.3g} GB/s",
        "",
        "| measurement | ours | MONAI | times as fast as MONAI | details |",
        "|---|---|---|---|---|",
    ]
    trained = [name for name in found if name.startswith("train ") and name.endswith(" ours")]
    lines += [
        _training_row(name.split()[1], found[name], found.get(name.replace("ours", "monai"), {}), facts)
        for name in trained
    ]
    why = "this script has no part for it" if facts.get("nnunetv2") else "nnunetv2 is not installed"
    lines.append(f"| training of nnU-Net | not measured: {why} | | | |")
    lines += [_case_row(found.get("case", {}), mirrored) for mirrored in ("", " mirrored")]
    lines += [_cohort_row(found.get("cohort", {}), title) for title in ("one", "mirrored")]
    for row in found.get("znorm", {}).get("table", [])[2:]:
        network, _, tensors, ms, clip, _, step, floor = (cell.strip() for cell in row.strip("| ").split("|"))
        details = f"{tensors} tensors; {clip} x clip, {step} of a step, {floor} x floor"
        lines.append(f"| ZNorm, {network} | {ms} ms | | | {details} |")
    tests = found.get("tests", {})
    failed = "; ".join(tests.get("failed", []))
    lines.append(f"| tests marked gpu | {tests.get('summary') or tests.get('error', 'not run')} | | | {failed} |")
    lines.append(f"| doctor | {_problems(found.get('doctor', {}))} | | | |")
    return lines


def _case_row(found: dict[str, Any], mirrored: str) -> str:
    name = f"a case{mirrored and ', mirrored'}: prepared image to label map"
    if "ours" not in found:
        return f"| {name} | {found.get('error', 'not run')} | | | |"
    ours, theirs = found[f"ours{mirrored}"], found[f"monai{mirrored}"]
    memory = f", {found['ours_gb']:.1f} and {found['monai_gb']:.1f} GB" if "ours_gb" in found else ""
    details = f"{found['precision']}, {found['same_voxels']:.2%} of brain voxels equal{memory}"
    return f"| {name} | {ours:.3g} s | {theirs:.3g} s | {theirs / ours:.2f} | {details} |"


def _cohort_row(found: dict[str, Any], title: str) -> str:
    name = "a further case of predict" + (" --tta" if title == "mirrored" else "")
    if f"{title}_further_case" not in found:
        return f"| {name} | {found.get('error', 'not run')} | | | |"
    first = f"the command and its first case: {found[f'{title}_start_up_and_first_case']:.3g} s"
    return f"| {name} | {found[f'{title}_further_case']:.3g} s | | | {first} |"


def _training_row(config: str, ours: dict[str, Any], theirs: dict[str, Any], facts: dict[str, Any]) -> str:
    name = f"training {config}"
    if "error" in ours or not ours:
        return f"| {name} | {ours.get('error', 'not run')} | | | |"
    details = [f"{ours['batch']} x {ours['patch']}^3", f"waits for batches {ours['waits_for_batches']:.0%}"]
    if "gpu_idle" in ours:
        details += [f"GPU idle {ours['gpu_idle']:.0%}", f"{ours['reserved_gb']:.1f} GB"]
    details.append(f"{ours['flops'] / ours['step_seconds'] / facts['bfloat16_tflops'] / 1e12:.0%} of the bfloat16 peak")
    if "moved_bytes" in ours:
        share = ours["moved_bytes"] / ours["step_seconds"] / facts["bandwidth_gb_s"] / 1e9
        details.append(f"{share:.0%} of the bandwidth")
    speed = ours["samples_per_second"]
    if "samples_per_second" not in theirs:
        return f"| {name} | {speed:.3g} samples/s | {theirs.get('error', 'not run')} | | {', '.join(details)} |"
    other = theirs["samples_per_second"]
    return f"| {name} | {speed:.3g} samples/s | {other:.3g} samples/s | {speed / other:.2f} | {', '.join(details)} |"


def _problems(doctor: dict[str, Any]) -> str:
    findings: Sequence[dict[str, Any]] = doctor.get("findings", [])
    bad = [f"{one['topic']}: {one['found']}" for one in findings if one["level"] in ("problem", "warning")]
    return "; ".join(bad) or ("no problem, no warning" if findings else str(doctor.get("error", "not run")))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for gpu.md, gpu.json and the output of each part")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for everything")
    parser.add_argument("--small", action="store_true", help="to try this script on a CPU")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--config", help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=["ours", "monai"], help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
