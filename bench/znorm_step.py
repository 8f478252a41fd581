"""Measure the cost of ZNorm relative to clipping, an optimiser step, a training step and minimal memory traffic.

    python bench/znorm_step.py [--device cuda] [--rounds 15] [--without-steps] [--processor-time]

All jobs take turns on one set of gradients, and each round starts with a different job. Before each job a block larger
than the caches is read, as in training a backward pass that moves gigabytes precedes it. A ratio is the median of the
rounds' ratios. On a machine shared with other jobs, ``OMP_NUM_THREADS=1`` with ``--processor-time`` excludes the time
in which others had the processor. The floor is the time to read every gradient twice and write it once at the bandwidth
measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from app.config.load import load_config
from app.system.device import RuntimeConfig, choose_runtime, machine
from models import NetworkConfig, RegionLoss, build_network
from znorm import zscore_

LARGE = NetworkConfig(architecture="resunet", channels=(64, 128, 256, 512, 1280), residual_units=2, first_stride=2)


def main() -> None:
    """Run the measurements and print a table."""
    options = _options()
    device = torch.device(options.device)
    print(f"{machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    clock = time.process_time if options.processor_time else time.perf_counter
    print("\n| network | parameters | tensors | ms | over clip | over AdamW | over a training step | over the floor |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("laptop", "unet", "resunet", "large"):
        config = load_config("resunet" if name == "large" else name)
        network_config = LARGE if name == "large" else config.network
        network = build_network(network_config, in_channels=4, out_channels=3).to(device)
        step = None if options.without_steps else training_step_ms(network, config, device, clock)
        print(row(name, network, device, rounds=options.rounds, step_ms=step, clock=clock), flush=True)


def row(
    name: str,
    network: nn.Module,
    device: torch.device,
    *,
    rounds: int,
    step_ms: float | None,
    clock: Callable[[], float],
) -> str:
    """Return one line of the table: ZNorm on every weight of two or more dimensions, the others on every parameter."""
    parameters = list(network.parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    gradients = [p.grad for p in parameters if p.grad is not None and p.dim() > 1]
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    times = side_by_side(
        {
            "znorm": lambda: zscore_(gradients),
            "clip": lambda: torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True),
            "adamw": optimizer.step,
            "floor": floor(gradients),
        },
        device,
        rounds,
        clock,
    )
    count = sum(p.numel() for p in parameters)
    ours = times["znorm"]
    ratios = {
        rival: median(one / other for one, other in zip(ours, times[rival], strict=True))
        for rival in ("clip", "adamw", "floor")
    }
    over_step = "not measured" if step_ms is None else f"{median(ours) / step_ms:.1%}"
    return (
        f"| {name} | {count / 1e6:.1f} M | {len(gradients)} | {median(ours):.2f} | {ratios['clip']:.2f} "
        f"| {ratios['adamw']:.2f} | {over_step} | {ratios['floor']:.2f} |"
    )


def floor(gradients: list[Tensor]) -> Callable[[], object]:
    """Return a job on a block of the gradients' total size, which it reads twice and writes once."""
    size = sum(g.numel() for g in gradients)
    block = torch.randn(size, device=gradients[0].device)

    def move() -> None:
        torch.dot(block, block)
        block.mul_(1.0)

    return move


def side_by_side(
    jobs: dict[str, Callable[[], object]], device: torch.device, rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Return the milliseconds of each job by round; the jobs take turns."""
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    larger_than_caches = torch.ones(2**24, device=device)
    names = list(jobs)
    for number in range(rounds + 2):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            larger_than_caches.sum()
            started = _now(device, clock)
            jobs[name]()
            if number >= 2:  # the first two rounds are a warm-up
                spent[name].append(1000 * (_now(device, clock) - started))
    return spent


def training_step_ms(network: nn.Module, config: object, device: torch.device, clock: Callable[[], float]) -> float:
    """Time forward, loss, backward and optimiser step on one batch of the config; the second of two runs counts."""
    training = config.training  # type: ignore[attr-defined]
    runtime = choose_runtime(RuntimeConfig(device=device.type))
    network.to(memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    image = torch.randn((training.batch_size, 4, *training.patch_voxels), device=device)
    masks = (torch.rand((training.batch_size, 3, *training.patch_voxels), device=device) > 0.9).float()
    loss_of = RegionLoss()
    spent = 0.0
    for _ in range(2):
        started = _now(device, clock)
        with runtime.autocast():
            logits = network(image.contiguous(memory_format=runtime.memory_format))
        loss_of(logits, masks).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent = 1000 * (_now(device, clock) - started)
    return spent


def _now(device: torch.device, clock: Callable[[], float]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--processor-time", action="store_true", help="measure the CPU time of this process instead of wall-clock time"
    )
    parser.add_argument("--without-steps", action="store_true", help="skip the training steps")
    return parser.parse_args()


if __name__ == "__main__":
    main()
