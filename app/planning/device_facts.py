"""Device facts for a plan, queried by a subprocess so that this process never opens the GPU.

A GPU in exclusive mode admits one process at a time, and a query of its free memory occupies it. The subprocess
(``python -m app.planning.device_facts``) ends before the dry run starts.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from typing import Final

import torch
from pydantic import TypeAdapter

from app.errors import DeviceError
from app.system.device import RuntimeConfig, choose_runtime
from app.system.process import own_environment


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """The device of a run, as far as a plan depends on it."""

    kind: str = "cpu"
    """``cpu`` or ``cuda``."""
    half: bool = False
    """Whether it computes in a precision of 16 bits."""
    gpu_bytes: int = 0
    """Free memory of the GPU; 0 on a CPU."""
    error: str | None = None
    """Message of the DeviceError that was raised instead."""


_CONFIG: Final = TypeAdapter(RuntimeConfig)
_FACTS: Final = TypeAdapter(DeviceFacts)


def device_facts(config: RuntimeConfig) -> DeviceFacts:
    """Return the facts about the device that a config requests.

    Raises:
        DeviceError: the device does not exist or cannot be used.
    """
    if config.device == "cpu" or not torch.cuda.is_available():  # which does not open a GPU
        return _facts(config)
    # -P: data/ or models.py in the current folder must not shadow this program's packages.
    command = [sys.executable, "-P", "-m", "app.planning.device_facts", _CONFIG.dump_json(config).decode()]
    asked = subprocess.run(  # noqa: S603
        command,
        env=own_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        last = " / ".join(asked.stderr.splitlines()[-5:]) or "no output"
        raise DeviceError(
            f"the GPU cannot be used (exit status {asked.returncode}): {last}. If another process holds it, wait for "
            "that process, or set runtime.device=cpu."
        )
    found = _FACTS.validate_json(asked.stdout.splitlines()[-1])
    if found.error is not None:
        raise DeviceError(found.error)
    return found


def _facts(config: RuntimeConfig) -> DeviceFacts:
    runtime = choose_runtime(config)
    return DeviceFacts(
        kind=runtime.device.type,
        half=runtime.precision is not torch.float32,
        gpu_bytes=torch.cuda.mem_get_info(runtime.device)[0] if runtime.device.type == "cuda" else 0,
    )


def _main(config: str) -> None:
    """Write the facts, or the message of a DeviceError, to stdout as JSON."""
    try:
        found = _facts(_CONFIG.validate_json(config))
    except DeviceError as error:
        found = DeviceFacts(error=str(error))
    sys.stdout.write(_FACTS.dump_json(found).decode() + "\n")


if __name__ == "__main__":
    _main(sys.argv[1])
