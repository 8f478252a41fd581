"""Checkpoints: safetensors with a JSON beside it; nothing is pickled, nothing half-written counts.

A checkpoint is two files, ``<kind>-<step>.safetensors`` and ``<kind>-<step>.json``. The JSON is written last and holds
the SHA-256 of the other; a pair that is not complete is as good as not there. The older pair goes once the newer is
whole.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim import Optimizer

from app.errors import RunError
from app.runlog import write_json
from data.nifti import replacing

Kind = Literal["best", "last"]

_NAME: Final = re.compile(r"^(?P<kind>best|last)-(?P<step>\d{9})\.json$")
_WEIGHTS: Final = "weights."
_OPTIMIZER: Final = "optimizer."
_RNG: Final = "rng."


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds, in memory."""

    step: int
    tensors: dict[str, Tensor]
    details: dict[str, Any]
    """The JSON beside the tensors."""
    sha256: str

    @property
    def weights(self) -> dict[str, Tensor]:
        """The network's state dict."""
        return _section(self.tensors, _WEIGHTS)


def save(folder: Path, kind: Kind, step: int, tensors: dict[str, Tensor], details: dict[str, Any]) -> None:
    """Save a checkpoint, then remove the older ones of its kind.

    Args:
        folder: made where it is missing.
        kind: ``best`` or ``last``.
        step: optimiser steps done.
        tensors: as of :func:`weight_tensors`, :func:`optimizer_tensors`.
        details: plain data that goes into the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{step:09d}.safetensors"
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    with replacing(path) as beside:
        beside.write_bytes(content)
    write_json(path.with_suffix(".json"), {"kind": kind, "step": step, "sha256": _sha256(content), **details})
    for old_step, old in _saved(folder, kind):
        if old_step != step:
            old.unlink(missing_ok=True)
            old.with_suffix(".safetensors").unlink(missing_ok=True)


def load_newest(folder: Path, kind: Kind) -> Checkpoint | None:
    """The newest checkpoint of a kind, or None where there is none.

    Raises:
        RunError: its tensors are missing, damaged, or not those it was saved with.
    """
    saved = _saved(folder, kind)
    if not saved:
        return None
    step, path = max(saved)
    tensors_path = path.with_suffix(".safetensors")
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(details, dict):
            raise ValueError(f"{path.name} holds no JSON object")
        content = tensors_path.read_bytes()
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{tensors_path}: cannot be read ({error}). Restore it from a copy, or train again.") from error
    digest = _sha256(content)
    if digest != details.get("sha256"):
        raise RunError(
            f"{tensors_path}: its SHA-256 is not the one in {path.name}: the file was changed or damaged since "
            "training. Restore both from a copy, or train again."
        )
    try:
        tensors = safetensors.torch.load(content)
    except SafetensorError as error:
        raise RunError(f"{tensors_path}: not a safetensors file ({error})") from error
    return Checkpoint(step=step, tensors=tensors, details=details, sha256=digest)


def weight_tensors(network: nn.Module) -> dict[str, Tensor]:
    """A network's state dict under the names a checkpoint uses."""
    return {_WEIGHTS + name: tensor for name, tensor in network.state_dict().items()}


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state by parameter: its tensors, and what is no tensor as plain data."""
    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{_OPTIMIZER}{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, plain


def restore_optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Put back what :func:`optimizer_tensors` took; the groups' settings stay the optimiser's own."""
    content = optimizer.state_dict()
    content["state"] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {**_section(checkpoint.tensors, _OPTIMIZER), **checkpoint.details.get("optimizer", {})}
    for name, value in entries.items():
        index, _, key = name.partition(".")
        content["state"].setdefault(int(index), {})[key] = _in_layout_of(parameters[int(index)], value)
    optimizer.load_state_dict(content)


def _in_layout_of(parameter: Tensor, value: Any) -> Any:
    """A state tensor in its parameter's memory layout, which may be channels-last where the file's is contiguous.

    Fused optimisers walk both in memory order, whatever the strides.
    """
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def rng_tensors() -> dict[str, Tensor]:
    """State of torch's random generators (dropout uses them)."""
    tensors = {f"{_RNG}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"{_RNG}cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(checkpoint: Checkpoint) -> None:
    """Put back what :func:`rng_tensors` took."""
    states = _section(checkpoint.tensors, _RNG)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _saved(folder: Path, kind: Kind) -> list[tuple[int, Path]]:
    """Steps and JSON files of the complete checkpoints of a kind."""
    found = []
    for path in folder.glob(f"{kind}-*.json"):
        match = _NAME.match(path.name)
        if match is not None:
            found.append((int(match["step"]), path))
    return found


def _section(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
