"""Rollback after a non-finite loss: keep its batch for study, and check that weights and checkpoints are finite."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor, nn

from app.runs import checkpoints
from app.runs.folder import write_durably, write_json
from data.patches.sampler import Batch

#: Maximum number of saved batches; older ones are deleted.
_MOST_KEPT: Final = 8


def tensors_are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether the tensors contain no NaN and no infinity."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def unfit_to_resume(checkpoint: checkpoints.Checkpoint) -> str | None:
    """Return why a run cannot continue from an intact checkpoint, or None if it can."""
    return None if tensors_are_finite(list(checkpoint.weights.values())) else "its weights are not all finite"


def weights_are_finite(network: nn.Module) -> bool:
    """Whether all weights and buffers of a network are finite."""
    return tensors_are_finite([tensor.detach() for tensor in network.state_dict().values()])


def keep_batch(run: Path, step: int, batches: Sequence[Batch], facts: dict[str, Any]) -> Path:
    """Save the batches of a step as ``nonfinite/step-<step>.safetensors``, and facts about it as JSON next to it.

    Args:
        run: the run's folder.
        step: number of the step, from 1.
        batches: its micro-batches, saved as ``image.K``, ``masks.K`` and ``present.K``, K from 0.
        facts: plain data for the JSON file.

    Returns:
        the path of the safetensors file.
    """
    folder = run / "nonfinite"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        tensors |= {f"image.{number}": batch.image, f"masks.{number}": batch.masks, f"present.{number}": batch.present}
    write_durably(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    write_json(path.with_suffix(".json"), {"step": step, **facts})
    # By time, not by name: after a rollback the run reaches the same step numbers again.
    for old in sorted(folder.glob("step-*.safetensors"), key=lambda p: p.stat().st_mtime_ns)[:-_MOST_KEPT]:
        old.unlink()
        old.with_suffix(".json").unlink(missing_ok=True)
    return path


def rollbacks_in_words(rollbacks: Sequence[dict[str, Any]]) -> str:
    """Describe all rollbacks of a run, for a message."""
    return "; ".join(
        f"step {one['step']} (cases {', '.join(one['cases'])}; batch in {one['file']})" for one in rollbacks
    )


def plain_number(value: float) -> float | str:
    """Return a number that JSON can hold: NaN and infinity become strings."""
    return value if math.isfinite(value) else str(value)
