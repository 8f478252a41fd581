"""Training steps on fake CUDA tensors; tests/system/test_fake_cuda_training.py starts it as a separate process.

The arguments are names of :data:`SCENARIOS`; each prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from fake_cuda import (  # type: ignore[import-not-found]  # a neighbour of this script
    Watch,
    allow_autograd,
    fake_cuda,
    is_ndhwc,
)

from app.config.load import RunConfig, load_config
from app.system.device import Precision, Runtime
from app.training import gradient
from app.training.cases import patch_settings
from app.training.presence_labels import RECORD, presence_record
from app.training.state import new_state, to_checkpoint
from app.training.step import Stepper
from app.training.tasks import task_of
from app.training.telemetry import Telemetry
from data.patches.on_device import DevicePatches
from data.patches.sampler import Batch, CachedCase, PatchSource

#: Steps before the counted one: the first allocates the optimiser's state, and both upload the cases that stay.
_WARM_UP: Final = 2
_SMALL: Final = ("training.patch_voxels=[64, 64, 64]", "network.channels=[8, 16, 32, 64]")
#: Every augmentation for every contrast of every patch.
_AUGMENTED: Final = tuple(
    f"augment.{name}_probability=1"
    for name in (
        *("flip", "affine", "gamma", "noise", "rotation", "scaling", "gain", "shift", "stretch"),
        *("range_gamma", "inverted_gamma", "bias_field", "blur", "low_resolution"),
    )
)


class Scenario(NamedTuple):
    """A config on a fake GPU."""

    config: str
    settings: tuple[str, ...] = ()
    precision: Precision = "bfloat16"
    cases_stay: bool = True
    """Whether the cases are in GPU memory; otherwise each patch is uploaded."""
    synthetic: bool = False
    reads: bool = False
    """Whether the loss takes a detour over the host, as a mistake would."""


def _small(*settings: str, config: str = "resunet-znorm", **more: Any) -> Scenario:
    return Scenario(config, (*_SMALL, *settings), **more)


FAST: Final[dict[str, Scenario]] = {
    "resunet-znorm": Scenario("resunet-znorm"),
    "none": _small("gradient.transform=none"),
    "clip": _small("gradient.transform=clip"),
    "float16": _small(precision="float16"),
    "scope channel": _small("gradient.znorm.scope=channel"),
    "scope global": _small("gradient.znorm.scope=global"),
    "contrast dropout, accumulate 3": _small("augment.contrast_dropout=0.5", "training.accumulate=3"),
    "every augmentation": _small(*_AUGMENTED),
    "presence": Scenario("presence"),
    "presence-slabs": Scenario("presence-slabs"),
    "a read in the step": _small(reads=True),
}
SLOW: Final[dict[str, Scenario]] = {
    "unet": Scenario("unet"),
    "resunet": Scenario("resunet"),
    "laptop": Scenario("laptop"),
    "starter": Scenario("starter"),
    "large": Scenario("large"),
    "patches uploaded": Scenario("resunet-znorm", cases_stay=False),
    "synthetic patches": _small(synthetic=True),
    "float32": _small(precision="float32"),
    "clip, float16": _small(config="resunet", precision="float16"),
    "sgd": _small("training.optimizer=sgd", config="unet"),
    "sgd, float16": _small("training.optimizer=sgd", config="unet", precision="float16"),
    "segresnet": _small("network.architecture=segresnet"),
    "resenc": _small("network.architecture=resenc"),
    "deep supervision": _small("network.architecture=resenc", "network.deep_supervision=true"),
    "contiguous": _small("runtime.channels_last=false"),
    "dropout": _small("network.dropout=0.2"),
    "ema": _small("training.ema_decay=0.999"),
    "telemetry": _small("training.telemetry_steps=1"),
    "clip_norm": _small("gradient.znorm.clip_norm=1.0"),
    **{
        f"rule {rule}": _small(f"gradient.transform={rule}")
        for rule in ("clip-value", "centralize", "adaptive-clip", "scale")
    },
}
SCENARIOS: Final = {**FAST, **SLOW}


class Zeros(CachedCase):
    """A prepared case of zeros, of the size of a brain."""

    def image(self) -> npt.NDArray[np.float16]:
        """Return zeros."""
        return np.zeros((4, *self.shape), np.float16)

    def codes(self) -> npt.NDArray[np.uint8]:
        """Return zeros."""
        return np.zeros(self.shape, np.uint8)

    def centres(self) -> npt.NDArray[np.int16]:
        """Return one voxel of oedema."""
        return np.array([[2, 70, 80, 70]], np.int16)


def count_step(scenario: Scenario) -> dict[str, Any]:
    """Return the counts of one step and its read, after :data:`_WARM_UP` others, and where its tensors are."""
    config = load_config(scenario.config, scenario.settings)
    runtime = Runtime(
        device_name="cuda:0",
        precision_name=scenario.precision,
        channels_last=config.runtime.channels_last,
        reasons=(),
    )
    cases = [
        Zeros(id=name, folder=Path(), shape=(140, 172, 138), synthetic=scenario.synthetic) for name in ("one", "two")
    ]
    source = PatchSource(cases, **patch_settings(replace(config, data=replace(config.data, weights=None))))
    watch = Watch()
    with fake_cuda(watch):
        torch.manual_seed(0)
        state = new_state(config, runtime)
        state.network.train()
        attached = gradient.attach_transform(config.gradient, state.optimizer, state.network)
        task = task_of(config, _facts(config))
        loss = task.loss()
        stepper = Stepper(
            config=config,
            runtime=runtime,
            state=state,
            loss_of=(lambda logits, masks: loss(logits, masks).cpu().to(runtime.device)) if scenario.reads else loss,
            target_of=task.target,
            telemetry=Telemetry(config.training.telemetry_steps, state.network, state.optimizer),
        )
        patches = DevicePatches(source, runtime.device)
        patches.keep(10**12 if scenario.cases_stay else 0)
        batches = _batches(patches, config.training.batch_size)
        for _ in range(_WARM_UP):
            stepper.step(batches, 1e-3)
            state.step += 1
        watch.reset()
        queued = stepper.queue(batches, 1e-3, with_norm=True)
        while_queued = sum(watch.waits.values())
        stepper.read([queued], attached.skipped())
        found: dict[str, Any] = watch.report()
        parameters = list(state.network.parameters())
        moments = [one for entry in state.optimizer.state.values() for one in entry.values() if isinstance(one, Tensor)]
        found["waits_while_queued"] = while_queued
        found["devices"] = sorted({str(one.device) for one in [*parameters, *moments]})
        found["ndhwc"] = all(map(is_ndhwc, (one for one in parameters if one.dim() == 5)))
        to_checkpoint(state)
        return found


def _facts(config: RunConfig) -> dict[str, Any]:
    """What a run's folder says of the two cases: every output is absent in "one" and present in "two"."""
    labels = {name: (value,) * len(config.outputs) for value, name in enumerate(("one", "two"))}
    return {RECORD: presence_record(config, labels, list(labels)), "spacing_mm": (2.0, 2.0, 2.0)}


def _batches(patches: DevicePatches, size: int) -> Iterator[Batch]:
    """Batches, in this thread: fake tensors are made only in the thread that asks for them."""
    number = 0
    while True:
        yield patches.batch([patches.draft(number + one) for one in range(size)])
        number += size


def main(names: list[str]) -> None:
    """Print ``{"name": ..., "found": ...}`` or ``{"name": ..., "error": ...}`` for each scenario."""
    torch.set_num_threads(1)
    allow_autograd()
    for name in {"--fast": list(FAST), "--slow": list(SLOW)}.get(names[0], names):
        try:
            line: dict[str, Any] = {"name": name, "found": count_step(SCENARIOS[name])}
        except Exception:
            line = {"name": name, "error": traceback.format_exc()}
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
