"""Time of a training step of the residual-encoder network: upsampling as a matrix product against the convolution.

    python bench/upsampling.py [--rounds 11] [--threads 1] [--patch 80]

Both take turns in one process, with the config ``starter`` in bfloat16. It prints the medians of their processor times
and the ratio of the two.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

from app.config.load import load_config
from data.labels import CONTRASTS, REGIONS
from models.losses import DeepLoss, RegionLoss
from models.networks import build_network
from models.resenc import _Up


def convolved(self: _Up, features: Tensor, head: nn.Conv3d | None = None) -> Tensor:
    """The forward pass of ``_Up`` in evaluation mode: the transposed convolution, then the head."""
    fine: Tensor = self.conv(features)
    return fine if head is None else head(fine)


def main() -> None:
    """Time both ways and print their medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--patch", type=int, default=80)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    network = build_network(load_config("starter").network, in_channels=len(CONTRASTS), out_channels=len(REGIONS))
    network.train().to(memory_format=torch.channels_last_3d)
    loss = DeepLoss(RegionLoss())
    image = torch.randn(1, len(CONTRASTS), *[given.patch] * 3).to(memory_format=torch.channels_last_3d)
    masks = (torch.rand(1, len(REGIONS), *[given.patch] * 3) > 0.9).float()

    def seconds(forward: Callable[..., Tensor]) -> float:
        product, _Up.forward = _Up.forward, forward  # type: ignore[method-assign]
        began = time.process_time()
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(image)
        loss(logits, masks).backward()
        _Up.forward = product  # type: ignore[method-assign]
        return time.process_time() - began

    ways = {"product": _Up.forward, "convolution": convolved}
    rounds = [{name: seconds(way) for name, way in ways.items()} for _ in range(given.rounds + 1)]
    medians = {name: median(one[name] for one in rounds[1:]) for name in ways}  # the first round warms up
    for name, value in medians.items():
        print(f"{name:12} {value:.3f} CPU-s a step")
    print(f"ratio        {medians['convolution'] / medians['product']:.2f}")


if __name__ == "__main__":
    main()
