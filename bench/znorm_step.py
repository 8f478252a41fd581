"""What ZNorm costs: beside clipping, an optimiser step, a training step, and the memory it must move at least.

    python bench/znorm_step.py [--device cuda] [--rounds 15] [--without-steps]

All ratios are measured side by side, round by round in turn, on one set of gradients; the median of the rounds counts.
The floor is the time to read every gradient twice and write it once at the bandwidth measured in the same run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from app.config import load_config
from app.runtime import RuntimeConfig, choose_runtime, machine
from models import NetworkConfig, RegionLoss, build_network
from znorm import zscore_

LARGE = NetworkConfig(architecture="resunet", channels=(64, 128, 256, 512, 1280), residual_units=2, first_stride=2)


def main() -> None:
    """Measure and print a table."""
    options = _options()
    device = torch.device(options.device)
    print(f"{machine()}; torch {torch.__version__}, {torch.get_num_threads()} threads, {device}")
    print("\n| network | parameters | tensors | ms | over clip | over AdamW | over a training step | over the floor |")
    print("|---|---|---|---|---|---|---|---|")
    for name in ("laptop", "unet", "resunet", "large"):
        config = load_config("resunet" if name == "large" else name)
        network_config = LARGE if name == "large" else config.network
        network = build_network(network_config, in_channels=4, out_channels=3).to(device)
        step = None if options.without_steps else training_step_ms(network, config, device)
        print(row(name, network, device, options.rounds, step), flush=True)


def row(name: str, network: nn.Module, device: torch.device, rounds: int, step_ms: float | None) -> str:
    """One line of the table: ZNorm on every weight of two or more dimensions, the rivals on every parameter."""
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
    )
    count = sum(p.numel() for p in parameters)
    ratios = {rival: times["znorm"] / times[rival] for rival in ("clip", "adamw", "floor")}
    over_step = "not measured" if step_ms is None else f"{times['znorm'] / step_ms:.1%}"
    return (
        f"| {name} | {count / 1e6:.1f} M | {len(gradients)} | {times['znorm']:.2f} | {ratios['clip']:.2f} "
        f"| {ratios['adamw']:.2f} | {over_step} | {ratios['floor']:.2f} |"
    )


def floor(gradients: list[Tensor]) -> Callable[[], object]:
    """Two reads and a write of as many bytes: a dot product reads, a multiplication in place reads and writes."""
    size = sum(g.numel() for g in gradients)
    block = torch.randn(size, device=gradients[0].device)

    def move() -> None:
        torch.dot(block, block)
        block.mul_(1.0)

    return move


def side_by_side(jobs: dict[str, Callable[[], object]], device: torch.device, rounds: int) -> dict[str, float]:
    """Median milliseconds of each job; the jobs take turns."""
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(rounds + 2):
        for name, job in jobs.items():
            began = _now(device)
            job()
            if number >= 2:  # warm by then
                spent[name].append(1000 * (_now(device) - began))
    return {name: median(values) for name, values in spent.items()}


def training_step_ms(network: nn.Module, config: object, device: torch.device) -> float:
    """Forward, loss, backward and optimiser step on one batch of the config; the second of two counts."""
    training = config.training  # type: ignore[attr-defined]
    runtime = choose_runtime(RuntimeConfig(device=device.type))
    network.to(memory_format=runtime.memory_format)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    image = torch.randn((training.batch_size, 4, *training.patch_voxels), device=device)
    masks = (torch.rand((training.batch_size, 3, *training.patch_voxels), device=device) > 0.9).float()
    loss_of = RegionLoss()
    spent = 0.0
    for _ in range(2):
        began = _now(device)
        with runtime.autocast():
            logits = network(image.contiguous(memory_format=runtime.memory_format))
        loss_of(logits, masks).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        spent = 1000 * (_now(device) - began)
    return spent


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--without-steps", action="store_true", help="leave the training steps out")
    return parser.parse_args()


if __name__ == "__main__":
    main()
