"""Prediction and validation on fake CUDA tensors; tests/system/test_fake_cuda_inference.py runs it in its own process.

The arguments are names of :data:`SCENARIOS`; each prints one line of JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import nn

sys.path.insert(0, __file__.rpartition("/")[0])
from fake_cuda import Watch, allow_autograd, fake_cuda  # type: ignore[import-not-found]  # a neighbour

from app.config.inference import PredictOptions
from app.config.load import RunConfig, load_config, to_plain
from app.inference.backends.executors import TorchEngine
from app.inference.backends.trace import trace_of
from app.inference.model import Model, Predictor
from app.inference.probabilities import predict_answer
from app.inference.sliding_window.memory_fallback import ComputePlan, MemoryFallback
from app.inference.tumour_presence.model import Decision, PresenceModel
from app.system.device import Precision, Runtime
from app.training.presence_labels import RECORD, presence_record
from app.training.state import new_state
from app.training.tasks import task_of
from app.training.validation import on_contrasts, validation_dice
from data.labels import CONTRASTS, CONVENTIONS
from data.patches.sampler import CachedCase
from data.preprocess import Prepared
from models import build_network

_TINY: Final = ("training.patch_voxels=[32, 32, 32]", "network.channels=[8, 16, 32]")
#: Twelve windows of 32 voxels, in two batches.
_SMALL: Final = (64, 40, 40)
_BRAIN: Final = (144, 176, 144)
#: Two windows of the config `large`, which holds most brains in one.
_LARGE: Final = (176, 192, 160)
_AT_2_MM: Final = (72, 88, 72)


class _Networks(Predictor):
    """Several networks that predict together, as an ensemble's do."""

    def members(self) -> Iterator[Model]:
        """Yield the networks."""
        yield from self.plain_config["members"]

    def record(self) -> dict[str, Any]:
        """Return nothing."""
        return {}


def _runtime(config: RunConfig, precision: Precision) -> Runtime:
    return Runtime(
        device_name="cuda:0", precision_name=precision, channels_last=config.runtime.channels_last, reasons=()
    )


def _prepared(shape: tuple[int, int, int], files: tuple[int, int, int] | None = None) -> Prepared:
    """A case whose brain fills the box; ``files`` is the box's shape at the files' own spacing, where that differs."""
    box = files or shape
    return Prepared(
        image=np.ones((len(CONTRASTS), *shape), dtype=np.float32),
        present=CONTRASTS,
        brain=np.ones(box, dtype=np.bool_),
        codes=None,
        spacing_mm=(1.0, 1.0, 1.0),
        box=tuple(slice(5, 5 + side) for side in box),  # type: ignore[arg-type]
        canonical_shape=tuple(side + 12 for side in box),  # type: ignore[arg-type]
        native_affine=np.eye(4),
        zeroed={},
    )


def predict(
    name: str = "resunet-znorm",
    settings: tuple[str, ...] = _TINY,
    *,
    precision: Precision = "bfloat16",
    shape: tuple[int, int, int] = _SMALL,
    files: tuple[int, int, int] | None = None,
    options: PredictOptions = PredictOptions(),  # noqa: B008 - frozen
    networks: int = 1,
    crop: bool = True,
    change: Callable[[ComputePlan], ComputePlan] = lambda plan: plan,
) -> dict[str, Any]:
    """Return the counts of a case's prediction, after another one."""
    config = load_config(name, settings)
    runtime, watch = _runtime(config, precision), Watch()
    graph = trace_of(config.network, in_channels=config.input_channels)
    with fake_cuda(watch):
        members = []
        for _ in range(networks):
            network = build_network(config.network, in_channels=config.input_channels, out_channels=3)
            engine = TorchEngine(graph, dict(network.state_dict()), runtime)
            members.append(
                Model(
                    plain_config=to_plain(config),
                    origin="",
                    takes_missing_contrasts=config.takes_missing_contrasts,
                    spacing_mm=(1.0, 1.0, 1.0),
                    convention=CONVENTIONS["brats2023"],
                    sha256="",
                    engine=engine,
                    window=config.training.patch_voxels,
                    overlap=config.inference.overlap,
                    crop=crop,
                    step=0,
                )
            )
        shared = {key: getattr(members[0], key) for key in ("origin", "takes_missing_contrasts", "spacing_mm")}
        model: Predictor = members[0]
        if networks > 1:
            model = _Networks(**shared, plain_config={"members": members}, convention=members[0].convention, sha256="")
        windows: list[int] = []
        for _ in range(2):  # the first volume moves the weights
            watch.reset()
            windows.clear()
            handles = [one.network.register_forward_pre_hook(lambda *_: windows.append(1)) for one in members]
            predict_answer(model, _prepared(shape, files), runtime, options=options, fallback=_Changed(change))
            for handle in handles:
                handle.remove()
        volume_bytes = len(CONTRASTS) * int(np.prod(shape)) * 4
        return _counts(watch, windows, [one.network for one in members], volume_bytes)


class _Changed(MemoryFallback):
    """Begins with another plan."""

    def __init__(self, change: Callable[[ComputePlan], ComputePlan]) -> None:
        super().__init__()
        self._change = change

    def run(self, compute: Any, first: ComputePlan, **options: Any) -> Any:
        """See :meth:`MemoryFallback.run`."""
        return super().run(compute, self._change(first), **options)


class _Case(CachedCase):
    """A prepared case of ones, without files."""

    def image(self) -> Any:
        """Return ones."""
        return np.ones((len(CONTRASTS), *self.shape), dtype=np.float16)

    def codes(self) -> Any:
        """Return codes of one tissue."""
        return np.ones(self.shape, dtype=np.uint8)


def validate(
    name: str = "resunet-znorm",
    settings: tuple[str, ...] = _TINY,
    *,
    precision: Precision = "bfloat16",
    shape: tuple[int, int, int] = _SMALL,
) -> dict[str, Any]:
    """Return the counts of the validation of a case, in the middle of a training."""
    config = load_config(name, settings)
    runtime, watch = _runtime(config, precision), Watch()
    with fake_cuda(watch):
        torch.manual_seed(0)
        state = new_state(config, runtime)
        state.network.train()
        passes: list[int] = []
        watch.reset()
        validation_dice(
            on_contrasts(state.evaluated, config),
            [_Case(id="a", folder=Path(), shape=shape)],
            window=config.training.patch_voxels,
            config=config.inference,
            runtime=runtime,
            between_windows=lambda: passes.append(1),
        )
        volume_bytes = len(CONTRASTS) * int(np.prod(shape)) * 2 + int(np.prod(shape))
        return _counts(watch, passes, [state.network], volume_bytes)


def judge(name: str, *, networks: int = 1, shape: tuple[int, int, int] = _AT_2_MM) -> dict[str, Any]:
    """Return the counts of a presence model's answer for a case, after another one."""
    config = load_config(name)
    runtime, watch = _runtime(config, "bfloat16"), Watch()
    with fake_cuda(watch):
        members = [new_state(config, runtime).network.eval() for _ in range(networks)]
        model = PresenceModel(
            networks=tuple(members),
            config=config,
            origin="",
            spacing_mm=(2.0, 2.0, 2.0),
            sha256="",
            decisions={name: Decision() for name in config.outputs},
        )
        passes: list[int] = []
        for _ in range(2):
            watch.reset()
            passes.clear()
            handles = [one.register_forward_pre_hook(lambda *_: passes.append(1)) for one in members]
            model.logits(_prepared(shape).image, CONTRASTS, runtime)
            for handle in handles:
                handle.remove()
        return _counts(watch, passes, members, len(CONTRASTS) * int(np.prod(shape)) * 4)


def validate_presence(name: str, *, shape: tuple[int, int, int] = _AT_2_MM) -> dict[str, Any]:
    """Return the counts of the validation of a case in the middle of a presence run."""
    config = load_config(name)
    runtime, watch = _runtime(config, "bfloat16"), Watch()
    labels = {case_id: (value,) * len(config.outputs) for value, case_id in enumerate("ab")}
    facts = {RECORD: presence_record(config, labels, list(labels)), "spacing_mm": (2.0, 2.0, 2.0)}
    with fake_cuda(watch):
        state = new_state(config, runtime)
        state.network.train()
        passes: list[int] = []
        watch.reset()
        task_of(config, facts).validate(
            state.evaluated,
            [_Case(id="a", folder=Path(), shape=shape)],
            runtime=runtime,
            between_windows=lambda: passes.append(1),
        )
        return _counts(watch, passes, [state.network], len(CONTRASTS) * int(np.prod(shape)) * 4)


def _counts(watch: Watch, passes: list[int], networks: list[nn.Module], volume_bytes: int) -> dict[str, Any]:
    devices = {str(parameter.device) for network in networks for parameter in network.parameters()}
    return {**watch.report(), "passes": len(passes), "devices": sorted(devices), "volume_bytes": volume_bytes}


_EVERYTHING: Final = PredictOptions(tta=True, uncertainty=True)
_PRESENCE: Final = (*_TINY, "augment.contrast_dropout=0.3")

SCENARIOS: Final[dict[str, Callable[[], dict[str, Any]]]] = {
    # Fast
    "predict": predict,
    "predict, mirrored": partial(predict, options=_EVERYTHING),
    "predict, float16": partial(predict, precision="float16"),
    "predict, presence": partial(predict, settings=_PRESENCE),
    "predict, padded, whole volume": partial(predict, shape=(20, 64, 40), crop=False),
    "validate": validate,
    "validate, ema, presence": partial(validate, settings=(*_PRESENCE, "training.ema_decay=0.999")),
    "presence, brain": partial(judge, "presence"),
    "presence, validate slabs": partial(validate_presence, "presence-slabs"),
    # Slow
    "predict, size of a brain": partial(predict, settings=(), shape=_BRAIN),
    "predict, unet": partial(predict, "unet", settings=(), shape=_BRAIN),
    "predict, large": partial(predict, "large", settings=(), shape=_LARGE),
    "predict, segresnet": partial(predict, settings=(*_TINY, "network.architecture=segresnet")),
    "predict, float32": partial(predict, precision="float32"),
    "predict, contiguous": partial(predict, settings=(*_TINY, "runtime.channels_last=false")),
    "predict, two networks": partial(predict, networks=2, options=_EVERYTHING),
    "predict, resampled": partial(predict, files=(70, 50, 40), options=_EVERYTHING),
    "predict, logits in float16": partial(predict, change=lambda plan: replace(plan, half=True)),
    "predict, blended on the CPU": partial(predict, change=lambda plan: replace(plan, stitch_on="cpu")),
    "validate, size of a brain": partial(validate, settings=(), shape=_BRAIN),
    "validate, large": partial(validate, "large", settings=("training.patch_voxels=[64, 64, 64]",), shape=(96, 64, 64)),
    "validate, float16": partial(validate, precision="float16"),
    "validate, float32": partial(validate, precision="float32"),
    "presence, slabs": partial(judge, "presence-slabs"),
    "presence, two networks": partial(judge, "presence-slabs", networks=2),
    "presence, validate brain": partial(validate_presence, "presence"),
}


def main(names: list[str]) -> None:
    """Print ``{"name": ..., "found": ...}`` or ``{"name": ..., "error": ...}`` for each scenario."""
    torch.set_num_threads(1)
    allow_autograd()
    for name in names or SCENARIOS:
        try:
            line: dict[str, Any] = {"name": name, "found": SCENARIOS[name]()}
        except Exception:
            line = {"name": name, "error": traceback.format_exc()}
        print(json.dumps(line), flush=True)  # noqa: T201


if __name__ == "__main__":
    main(sys.argv[1:])
