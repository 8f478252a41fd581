"""Choices for a run on a GPU, each with its reason: cuDNN's benchmark, torch.compile, deterministic algorithms."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor, nn

from app.config.load import RunConfig
from app.errors import ConfigError
from app.system.device import Runtime, choose_runtime
from app.training.distributed import World
from models import PRESENCE_ARCHITECTURES

#: Budget from which on a run earns back the minute or two that torch.compile takes: steps, or hours.
_LONG_STEPS: Final = 5000
_LONG_HOURS: Final = 1.0

Loss = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Computation:
    """The network and the loss that a step calls."""

    network: nn.Module
    loss: Loss
    reasons: tuple[str, ...] = ()
    """One sentence for each choice; none on a CPU, unless ``runtime.compile`` is true."""


def training_runtime(config: RunConfig, world: World) -> Runtime:
    """Choose the runtime of a training process.

    Raises:
        ConfigError: ``runtime.deterministic`` is set, and the network has no deterministic gradients on a GPU; or see
            :func:`choose_compile`.
        DeviceError: see :func:`app.system.device.choose_runtime`.
    """
    runtime = choose_runtime(config.runtime, local_rank=world.launch.local_rank)
    require_deterministic(config, runtime)
    choose_compile(config, runtime)  # an error comes now, not after the cases are prepared
    return runtime


def require_deterministic(config: RunConfig, runtime: Runtime) -> None:
    """Check that a GPU can train the network deterministically, if the config requires it.

    Raises:
        ConfigError: it cannot.
    """
    architecture = config.network.architecture
    operations = {"segresnet": "trilinear upsampling", **dict.fromkeys(PRESENCE_ARCHITECTURES, "max pooling")}
    if config.runtime.deterministic and runtime.device.type == "cuda" and architecture in operations:
        others = ", choose unet, resunet or resenc" if architecture == "segresnet" else ""
        raise ConfigError(
            f"runtime.deterministic: true does not work with network.architecture: {architecture} on a GPU, because "
            f"torch has no deterministic gradient of {operations[architecture]}. Set runtime.deterministic to "
            f"false{others}, or train on a CPU (runtime.device=cpu)."
        )


def choose_compile(config: RunConfig, runtime: Runtime, *, processes: int = 1) -> tuple[bool, str]:
    """Return whether to compile network and loss, and the reason.

    Raises:
        ConfigError: ``runtime.compile`` is true with telemetry.
    """
    training, wanted = config.training, config.runtime.compile
    if wanted and training.telemetry_steps > 0:
        raise ConfigError(
            "runtime.compile: true does not work with training.telemetry_steps, whose hooks a compiled network "
            "ignores. Set one of them to false or 0."
        )
    if wanted is not None:
        return wanted, f"torch.compile {'on' if wanted else 'off'}: requested"
    long = (training.steps or 0) >= _LONG_STEPS or (training.hours or 0.0) >= _LONG_HOURS
    against = {
        "a CPU gains less than compiling costs": runtime.device.type != "cuda",
        f"it pays from {_LONG_STEPS} steps or {_LONG_HOURS:g} hour on": not long,
        "compiled sums may be added in another order (runtime.deterministic)": config.runtime.deterministic,
        "telemetry hooks into the network (training.telemetry_steps)": training.telemetry_steps > 0,
        "network.backward_normalization changes a number of the backward pass between steps": bool(
            config.network.backward_normalization
        ),
        "several processes share a loss": processes > 1,
        "Triton is not installed": find_spec("triton") is None,
    }
    reasons = [reason for reason, applies in against.items() if applies]
    return (False, f"torch.compile off: {reasons[0]}") if reasons else (True, "torch.compile on: the run is long")


def prepare_computation(
    config: RunConfig, runtime: Runtime, network: nn.Module, loss: Loss, *, processes: int = 1
) -> Computation:
    """Set up a run's computation: on a GPU, with cuDNN's benchmark and compiled where that is chosen.

    Args:
        config: config of the run.
        runtime: its device and precision.
        network: the network in training; it is not changed.
        loss: called with logits and the target.
        processes: number of processes that train together.
    """
    compiled, reason = choose_compile(config, runtime, processes=processes)
    if runtime.device.type != "cuda" and not compiled:
        return Computation(network=network, loss=loss)
    reasons = []
    if runtime.device.type == "cuda":
        fixed = config.task.name == "segmentation"
        torch.backends.cudnn.benchmark = fixed and not config.runtime.deterministic
        if config.runtime.deterministic:
            reasons.append("cuDNN may only choose deterministic algorithms: runtime.deterministic")
        elif fixed:
            reasons.append("cuDNN times its algorithms in the first step: all patches have one shape")
        else:
            reasons.append("cuDNN chooses its algorithms by rule: whole brains differ in shape")
    computation = Computation(network=network, loss=loss, reasons=(*reasons, reason))
    return compile_or_not(computation, config, runtime) if compiled else computation


def compile_or_not(
    computation: Computation, config: RunConfig, runtime: Runtime, *, backend: str = "inductor"
) -> Computation:
    """Compile network and loss and try them on a patch of zeros; if that fails, return them as they are, with why.

    The random state and the gradients are as before afterwards.
    """
    began = time.monotonic()
    network: Any = torch.compile(computation.network, backend=backend)
    loss: Any = torch.compile(computation.loss, backend=backend)
    size, sides = config.training.batch_size, config.training.patch_voxels
    device, inputs = runtime.device, config.input_channels
    devices = [device] if device.type == "cuda" else []
    was_training = computation.network.training
    computation.network.train()
    try:
        # Dynamo looks at the gradient of every input, also of logits, which makes torch warn.
        with torch.random.fork_rng(devices=devices), warnings.catch_warnings(action="ignore"):
            image = torch.zeros(size, inputs, *sides, device=device)
            with runtime.autocast():
                logits = network(image.contiguous(memory_format=runtime.memory_format))
            finest = logits if isinstance(logits, Tensor) else logits[0]
            loss(logits, torch.zeros_like(finest, dtype=torch.float32)).backward()
    except Exception as error:  # compilers fail in many ways, none of which should stop a run
        torch.compiler.reset()
        first = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        reasons = (*computation.reasons[:-1], f"torch.compile off: it failed ({first})")
        return Computation(network=computation.network, loss=computation.loss, reasons=reasons)
    finally:
        computation.network.zero_grad(set_to_none=True)
        computation.network.train(was_training)
    spent = f"{computation.reasons[-1]}; it took {time.monotonic() - began:.0f} s"
    return Computation(network=network, loss=loss, reasons=(*computation.reasons[:-1], spent))
