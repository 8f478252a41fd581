"""What a plan needs to know about the device, found out without opening the GPU in this process.

A GPU in exclusive mode admits one process at a time, and whoever asks it for its free memory occupies it. So a process
that ends before the dry run begins asks: ``python -m app.planning.device_facts``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from pydantic import TypeAdapter

import app
from app.errors import DeviceError
from app.system.device import RuntimeConfig, choose_runtime


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
        DeviceError: the device does not exist.
        RuntimeError: the process that asks the GPU failed for another reason.
    """
    if config.device == "cpu" or not torch.cuda.is_available():  # which does not open a GPU
        return _facts(config)
    paths = [str(Path(app.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    # -P: data/ or models.py in the current folder must not shadow this program's packages.
    command = [sys.executable, "-P", "-m", "app.planning.device_facts", _CONFIG.dump_json(config).decode()]
    asked = subprocess.run(  # noqa: S603
        command,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        last = " / ".join(asked.stderr.splitlines()[-5:])
        raise RuntimeError(
            f"the process that asks the GPU for its memory exited with status {asked.returncode}: {last}"
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
