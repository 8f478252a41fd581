"""Training steps on fake CUDA tensors; called by tests/system/test_fake_cuda_training.py in a process of its own.

The arguments are names of :data:`SCENARIOS`; each prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, __file__.rpartition("/")[0])
from fake_cuda import Watch, allow_autograd, fake_cuda, is_ndhwc

from app.config.load import load_config
from app.system.device import Precision, Runtime
from app.training import gradient
from app.training.state import new_state, to_checkpoint
from app.training.step import Stepper, loss_for
from app.training.telemetry import Telemetry
from data.patches.sampler import Batch

#: Steps before the counted one: the first allocates the optimiser's state.
_WARM_UP: Final = 2
_SMALL: Final = ("training.patch_voxels=[64, 64, 64]",)
_TINY: Final = (*_SMALL, "network.channels=[8, 16, 32, 64]")


class Scenario(NamedTuple):
    """A config on a fake GPU."""

    config: str
    settings: tuple[str, ...] = ()
    precision: Precision = "bfloat16"
    finite: bool = True


SCENARIOS: Final[dict[str, Scenario]] = {
    # Fast: at their own size, then what changes the step most
    "resunet-znorm": Scenario("resunet-znorm"),
    "resunet": Scenario("resunet"),
    "none": Scenario("resunet-znorm", (*_TINY, "gradient.transform=none")),
    "float16": Scenario("resunet-znorm", _TINY, "float16"),
    "float16, gradients not finite": Scenario("resunet-znorm", _TINY, "float16", finite=False),
    "bfloat16, gradients not finite": Scenario("resunet-znorm", _TINY, finite=False),
    "scope channel": Scenario("resunet-znorm", (*_TINY, "gradient.znorm.scope=channel")),
    "scope global": Scenario("resunet-znorm", (*_TINY, "gradient.znorm.scope=global")),
    "contrast dropout, accumulate 3": Scenario(
        "resunet-znorm", (*_TINY, "augment.contrast_dropout=0.3", "training.accumulate=3")
    ),
    # Slow
    "unet": Scenario("unet"),
    "laptop": Scenario("laptop"),
    "starter": Scenario("starter"),
    "large": Scenario("large"),
    "float32": Scenario("resunet-znorm", _TINY, "float32"),
    "clip, float16": Scenario("resunet", _TINY, "float16"),
    "clip, gradients not finite": Scenario("resunet", _TINY, finite=False),
    "sgd": Scenario("unet", (*_TINY, "training.optimizer=sgd")),
    "sgd, float16": Scenario("unet", (*_TINY, "training.optimizer=sgd"), "float16"),
    "segresnet": Scenario("resunet-znorm", (*_TINY, "network.architecture=segresnet")),
    "resenc": Scenario("resunet-znorm", (*_TINY, "network.architecture=resenc")),
    "deep supervision": Scenario(
        "resunet-znorm", (*_TINY, "network.architecture=resenc", "network.deep_supervision=true")
    ),
    "contiguous": Scenario("resunet-znorm", (*_TINY, "runtime.channels_last=false")),
    "dropout": Scenario("resunet-znorm", (*_TINY, "network.dropout=0.2")),
    "ema": Scenario("resunet-znorm", (*_TINY, "training.ema_decay=0.999")),
    "telemetry": Scenario("resunet-znorm", (*_TINY, "training.telemetry_steps=1")),
    "clip_norm": Scenario("resunet-znorm", (*_TINY, "gradient.znorm.clip_norm=1.0")),
    **{
        f"rule {rule}": Scenario("resunet-znorm", (*_TINY, f"gradient.transform={rule}"))
        for rule in ("clip-value", "centralize", "adaptive-clip", "scale")
    },
}


def count_step(scenario: Scenario) -> dict[str, Any]:
    """Return the counts of one step, after :data:`_WARM_UP` others, and where its tensors are."""
    config = load_config(scenario.config, scenario.settings)
    runtime = Runtime(
        device_name="cuda:0",
        precision_name=scenario.precision,
        channels_last=config.runtime.channels_last,
        reasons=(),
    )
    watch = Watch()
    watch.finite = scenario.finite
    with fake_cuda(watch):
        torch.manual_seed(0)
        state = new_state(config, runtime)
        state.network.train()
        attached = gradient.attach_transform(config.gradient, state.optimizer, state.network)
        stepper = Stepper(
            config=config,
            runtime=runtime,
            state=state,
            loss_of=loss_for(config),
            telemetry=Telemetry(config.training.telemetry_steps, state.network, state.optimizer),
        )
        batches = _batches(config.training.batch_size, config.training.patch_voxels)
        for _ in range(_WARM_UP):
            stepper.step(batches, 1e-3)
            state.step += 1
        watch.reset()
        stepper.step(batches, 1e-3)
        found = watch.report()
        parameters = list(state.network.parameters())
        moments = [one for entry in state.optimizer.state.values() for one in entry.values() if isinstance(one, Tensor)]
        found["devices"] = sorted({str(one.device) for one in [*parameters, *moments]})
        found["ndhwc"] = all(map(is_ndhwc, (one for one in parameters if one.dim() == 5)))
        found["skipped"] = attached.skipped_steps()
        to_checkpoint(state)
        return found


def _batches(size: int, sides: tuple[int, int, int]) -> Iterator[Batch]:
    while True:
        yield Batch(
            image=torch.zeros((size, 4, *sides)),
            masks=torch.zeros((size, 3, *sides)),
            present=torch.ones((size, 4), dtype=torch.bool),
            cases=("a",) * size,
        )


def main(names: list[str]) -> None:
    """Print ``{"name": ..., "found": ...}`` or ``{"name": ..., "error": ...}`` for each scenario."""
    torch.set_num_threads(1)
    allow_autograd()
    for name in names or SCENARIOS:
        try:
            line: dict[str, Any] = {"name": name, "found": count_step(SCENARIOS[name])}
        except Exception:
            line = {"name": name, "error": traceback.format_exc()}
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
