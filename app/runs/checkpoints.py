"""Checkpoints: safetensors files with JSON metadata; nothing is pickled, and a partial write is never loaded.

A checkpoint is a pair of files, ``<kind>-<step>.safetensors`` and ``<kind>-<step>.json``. The JSON is written last and
holds the SHA-256 of the tensors and of itself; an incomplete pair is ignored. Both files are synced to disk before
older pairs are removed, and the pair before the newest is kept as a fallback in case the newest is damaged.

Weights may be stored in float16, which halves the size of a published model; they are loaded as float32.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, TypeVar

from safetensors import SafetensorError

from app.errors import RunError
from app.progress import LOG
from app.runs.folder import write_durably, write_json
from data.filesystem import in_words

# torch is imported lazily: prediction with OpenVINO reads arrays and does not need it.
if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor, nn
    from torch.optim import Optimizer

T = TypeVar("T")

Kind = Literal["best", "last"]

#: Number of pairs of each kind that are kept: the newest and the one before it.
GENERATIONS: Final = 2

_NAME: Final = re.compile(r"^(?P<kind>best|last)-(?P<step>\d{9})\.(json|safetensors)$")
#: Key of the JSON's own SHA-256, computed over all its other keys.
_OWN_DIGEST: Final = "json_sha256"
_WEIGHTS: Final = "weights."
_OPTIMIZER: Final = "optimizer."
_RNG: Final = "rng."


@dataclass(frozen=True, kw_only=True)
class Saved(Generic[T]):
    """A loaded checkpoint, with torch tensors or numpy arrays."""

    step: int
    tensors: dict[str, T]
    details: dict[str, Any]
    """Content of the JSON file."""
    sha256: str

    @property
    def weights(self) -> dict[str, T]:
        """The network's state dict."""
        return _section(self.tensors, _WEIGHTS)


#: A loaded checkpoint with torch tensors.
Checkpoint = Saved["Tensor"]


def save(folder: Path, kind: Kind, step: int, tensors: dict[str, Tensor], details: dict[str, Any]) -> None:
    """Save a checkpoint durably, then remove all others of its kind except the one before it.

    Pairs of later steps are removed too: they are damaged, or from before a rollback.

    Args:
        folder: destination, created if missing.
        kind: ``best`` or ``last``.
        step: number of completed optimiser steps.
        tensors: as returned by :func:`weight_tensors` and :func:`optimizer_tensors`.
        details: plain data for the JSON.
    """
    import safetensors.torch

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kind}-{step:09d}.safetensors"
    content = safetensors.torch.save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    digest = _sha256(content)
    facts = json.loads(json.dumps({"kind": kind, "step": step, "sha256": digest, **details}))
    # Saving the same tensors with other details does not rewrite their file, so the pair stays complete throughout.
    is_there = path.is_file() and _sha256(path.read_bytes()) == digest
    try:
        if not is_there:
            write_durably(path, content)
        write_json(path.with_suffix(".json"), {**facts, _OWN_DIGEST: _own_digest(facts)})
    except BaseException:
        if not is_there:
            path.unlink(missing_ok=True)
        raise
    before = sorted((other for other in _saved(folder, kind) if other < step), reverse=True)
    kept = {step, *before[: GENERATIONS - 1]}
    for other, stem in _saved(folder, kind).items():
        if other not in kept:
            stem.with_suffix(".json").unlink(missing_ok=True)
            stem.with_suffix(".safetensors").unlink(missing_ok=True)


def size_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of tensors on disk in bytes, without names and details."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def load_newest(
    folder: Path, kind: Kind, *, unfit: Callable[[Checkpoint], str | None] = lambda _: None
) -> Checkpoint | None:
    """Load the newest usable checkpoint of a kind; None if there is no checkpoint.

    A warning names every newer checkpoint that was skipped, and the reason.

    Args:
        folder: folder of checkpoints.
        kind: ``best`` or ``last``.
        unfit: returns the reason why an intact checkpoint must not be used, or None if it may be.

    Raises:
        RunError: there are checkpoints, but all are damaged or unfit.
    """
    return _newest(folder, kind, _unpack_tensors, unfit)


def load_newest_arrays(folder: Path, kind: Kind) -> Saved[npt.NDArray[np.generic]] | None:
    """Load the newest usable checkpoint as numpy arrays, like :func:`load_newest` but without importing torch.

    Raises:
        RunError: see :func:`load_newest`.
    """
    return _newest(folder, kind, _unpack_arrays, lambda _: None)


def _unpack_tensors(content: bytes) -> dict[str, Tensor]:
    import safetensors.torch
    import torch

    tensors = safetensors.torch.load(content)
    half = {name for name, one in tensors.items() if one.dtype == torch.float16 and name.startswith(_WEIGHTS)}
    return {name: one.float() if name in half else one for name, one in tensors.items()}


def _unpack_arrays(content: bytes) -> dict[str, npt.NDArray[np.generic]]:
    import numpy as np
    import safetensors.numpy

    arrays = safetensors.numpy.load(content)
    half = {name for name, one in arrays.items() if one.dtype == np.float16 and name.startswith(_WEIGHTS)}
    return {name: one.astype(np.float32) if name in half else one for name, one in arrays.items()}


def _newest(
    folder: Path,
    kind: Kind,
    unpack: Callable[[bytes], dict[str, T]],
    unfit: Callable[[Saved[T]], str | None],
) -> Saved[T] | None:
    refused: list[str] = []
    for step, stem in sorted(_saved(folder, kind).items(), reverse=True):
        if not stem.with_suffix(".json").exists():
            # Left by an interrupted save; not worth a message if there is no complete checkpoint at all.
            refused.append(f"{stem.with_suffix('.safetensors')}: its JSON is missing")
            continue
        try:
            found = _load(stem, step, unpack)
            if (reason := unfit(found)) is not None:
                raise RunError(f"{stem.with_suffix('.safetensors')}: {reason}")
        except RunError as error:
            refused.append(str(error))
            continue
        for reason in refused:
            LOG.warning("%s Skipped; using the checkpoint of step %d.", _sentence(reason), step)
        return found
    if not any(stem.with_suffix(".json").exists() for stem in _saved(folder, kind).values()):
        return None
    raise RunError(" ".join(_sentence(reason) for reason in refused) + " Restore both from a copy, or train again.")


def _load(stem: Path, step: int, unpack: Callable[[bytes], dict[str, T]]) -> Saved[T]:
    """Load one pair.

    Raises:
        RunError: a file is missing or damaged, or the two do not belong together.
    """
    path, tensors_path = stem.with_suffix(".json"), stem.with_suffix(".safetensors")
    try:
        details = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(details, dict):
            raise ValueError(f"{path.name} contains no JSON object")
        content = tensors_path.read_bytes()
    except OSError as error:
        raise RunError(f"{error.filename or tensors_path}: cannot be read: {in_words(error)}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{tensors_path}: cannot be read ({error})") from error
    digest = _sha256(content)
    if digest != details.get("sha256"):
        raise RunError(
            f"{tensors_path}: its SHA-256 is not the one in {path.name}: the file was changed or damaged since training"
        )
    # Checkpoints written by older versions have no digest of the JSON.
    if details.pop(_OWN_DIGEST, None) not in (None, _own_digest(details)):
        raise RunError(f"{path}: changed or damaged since training; its own SHA-256 does not match")
    try:
        return Saved(step=step, tensors=unpack(content), details=details, sha256=digest)
    except SafetensorError as error:
        raise RunError(f"{tensors_path}: not a safetensors file ({error})") from error


def weight_tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return a network's state dict under the names used in a checkpoint."""
    return {_WEIGHTS + name: tensor for name, tensor in network.state_dict().items()}


def optimizer_tensors(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state: its tensors, and everything else as plain data, by parameter index and key."""
    import torch

    tensors: dict[str, Tensor] = {}
    plain: dict[str, Any] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{index}.{key}"] = value
            else:
                plain[f"{index}.{key}"] = value
    return tensors, plain


def restore_optimizer(optimizer: Optimizer, checkpoint: Checkpoint) -> None:
    """Restore the state saved by :func:`optimizer_tensors`; the settings of the parameter groups are unchanged."""
    content = optimizer.state_dict()
    content["state"] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    entries = {**_section(checkpoint.tensors, _OPTIMIZER), **checkpoint.details.get("optimizer", {})}
    for name, value in entries.items():
        index, _, key = name.partition(".")
        content["state"].setdefault(int(index), {})[key] = _in_layout_of(parameters[int(index)], value)
    optimizer.load_state_dict(content)


def _in_layout_of(parameter: Tensor, value: Any) -> Any:
    """Return a state tensor, contiguous in the file, in its parameter's memory layout, which may be channels-last.

    Fused optimisers traverse both tensors in memory order and ignore the strides.
    """
    import torch

    if not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)


def rng_tensors() -> dict[str, Tensor]:
    """Return the state of torch's random number generators, which dropout uses."""
    import torch

    tensors = {f"{_RNG}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors[f"{_RNG}cuda"] = torch.cuda.get_rng_state()
    return tensors


def restore_rng(checkpoint: Checkpoint) -> None:
    """Restore the state saved by :func:`rng_tensors`."""
    import torch

    states = _section(checkpoint.tensors, _RNG)
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _saved(folder: Path, kind: Kind) -> dict[int, Path]:
    """Return the steps of a kind with at least one file, each with the pair's path without suffix."""
    found = {}
    for path in folder.glob(f"{kind}-*"):
        match = _NAME.match(path.name)
        if match is not None:
            found[int(match["step"])] = path.with_suffix("")
    return found


def _own_digest(details: Mapping[str, Any]) -> str:
    return _sha256(json.dumps(details, sort_keys=True).encode())


def _sentence(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _section(tensors: dict[str, T], prefix: str) -> dict[str, T]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
