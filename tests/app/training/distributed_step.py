"""Run twenty of the trainer's steps in float64, in any number of processes; called by
tests/app/training/test_distributed.py.

The first argument is the file for the weights, the second the number of patches that all processes take together.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file

from app.config.gradient import GradientConfig
from app.config.load import RunConfig
from app.config.training import TrainingConfig
from app.system.device import RuntimeConfig, choose_runtime
from app.training import gradient
from app.training.distributed import joined_processes
from app.training.state import new_state
from app.training.step import Stepper
from app.training.telemetry import Telemetry
from data.patches.sampler import Batch, PatchSource, batches
from models import NetworkConfig, RegionLoss

STEPS = 20


class Noise:
    """Numbered patches of random numbers; their masks are of very different sizes."""

    def batch(self, step: int, size: int) -> Batch:
        images, masks = [], []
        for number in range(step * size, (step + 1) * size):
            random = torch.Generator().manual_seed(number)
            images.append(torch.randn(4, 16, 16, 16, generator=random, dtype=torch.float64))
            share = float(torch.rand(1, generator=random)) ** 4
            masks.append((torch.rand(3, 16, 16, 16, generator=random, dtype=torch.float64) < share).double())
        present = torch.ones(size, 4, dtype=torch.bool)
        return Batch(image=torch.stack(images), masks=torch.stack(masks), present=present, cases=("",) * size)


def train(out: Path, together: int) -> None:
    with joined_processes() as world:
        config = RunConfig(
            network=NetworkConfig(channels=(4, 8), residual_units=1),
            training=TrainingConfig(
                steps=STEPS, patch_voxels=(16, 16, 16), batch_size=together // world.size, accumulate=2
            ),
            gradient=GradientConfig(transform="znorm"),
            runtime=RuntimeConfig(device="cpu", precision="float32"),
        )
        runtime = choose_runtime(config.runtime, local_rank=world.launch.local_rank)
        torch.manual_seed(0)
        state = new_state(config, runtime)
        state.network.double()
        gradient.attach_transform(config.gradient, state.optimizer, state.network)
        stepper = Stepper(
            config=config,
            runtime=runtime,
            state=state,
            telemetry=Telemetry(0, state.network, state.optimizer),
            loss_of=RegionLoss(total=world.total if world.size > 1 else None),
            world=world,
            replica=world.replica(state.network),
        )
        source = cast("PatchSource", cast("Any", Noise()))
        with closing(
            batches(source, first=world.rank, size=config.training.batch_size, threads=1, every=world.size)
        ) as made:
            losses = [stepper.step(made, 1e-2).loss for _ in range(STEPS)]
        if world.is_first:
            tensors = {name: tensor.contiguous() for name, tensor in state.network.state_dict().items()}
            save_file({**tensors, "losses": torch.tensor(losses, dtype=torch.float64)}, out)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]))
