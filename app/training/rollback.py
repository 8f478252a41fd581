"""A loss that is not finite: its batch kept for study, and the way back to the last good checkpoint."""

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

#: Batches that are kept; older ones go.
_MOST_KEPT: Final = 8


def tensors_are_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no number of these is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def unfit_to_go_on(checkpoint: checkpoints.Checkpoint) -> str | None:
    """Why a run cannot go on from a whole checkpoint, or None."""
    return None if tensors_are_finite(list(checkpoint.weights.values())) else "its weights are not all finite"


def weights_are_finite(network: nn.Module) -> bool:
    """Whether a network can be trained on."""
    return tensors_are_finite([tensor.detach() for tensor in network.state_dict().values()])


def keep_batch(run: Path, step: int, batches: Sequence[Batch], facts: dict[str, Any]) -> Path:
    """Save what a step saw as ``nonfinite/step-<step>.safetensors`` with a JSON beside.

    Args:
        run: the run's folder.
        step: its number, from 1.
        batches: its micro-batches; ``image.K``, ``masks.K`` and ``present.K`` in the file, K from 0.
        facts: plain data for the JSON.

    Returns:
        the file of tensors.
    """
    folder = run / "nonfinite"
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:09d}.safetensors"
    tensors: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        tensors |= {f"image.{number}": batch.image, f"masks.{number}": batch.masks, f"present.{number}": batch.present}
    write_durably(path, safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))
    write_json(path.with_suffix(".json"), {"step": step, **facts})
    # By time, not by name: a run that went back meets the same numbers again.
    for old in sorted(folder.glob("step-*.safetensors"), key=lambda p: p.stat().st_mtime_ns)[:-_MOST_KEPT]:
        old.unlink()
        old.with_suffix(".json").unlink(missing_ok=True)
    return path


def rollbacks_in_words(rollbacks: Sequence[dict[str, Any]]) -> str:
    """All returns of a run, for a message."""
    return "; ".join(
        f"step {one['step']} (cases {', '.join(one['cases'])}; batch in {one['file']})" for one in rollbacks
    )


def plain_number(value: float) -> float | str:
    """A number as JSON takes it."""
    return value if math.isfinite(value) else str(value)
