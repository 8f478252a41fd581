"""The task of presence: whether each output is present in a case or a slab, scored by the Brier score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor, nn

from app.config.load import RunConfig
from app.evaluation.presence import FloatArray, area_under_roc
from app.inference.tumour_presence.answers import case_logits, slab_starts
from app.system.device import Runtime
from app.training.distributed import ALONE, World
from app.training.presence_labels import RECORD
from app.training.task import OnCodes, Task, ValidationScores
from app.training.validation import on_contrasts
from data.labels import REGIONS, to_regions
from data.patches.sampler import Batch, CachedCase
from data.patches.transfer import send
from models import PresenceLoss


class Presence(Task):
    """Answers whether each output is present.

    Args:
        config: config of the run.
        facts: content of its ``run.json``, with the labels of the cases.
    """

    def __init__(self, config: RunConfig, facts: Mapping[str, Any]) -> None:
        record = facts[RECORD]
        self._config, self._outputs = config, config.outputs
        self._labels = {case_id: tuple(values) for case_id, values in record["labels"].items()}
        self._weights: tuple[list[float], list[float]] = record["weight_absent"], record["weight_present"]
        self._voxel_ml = float(np.prod(facts["spacing_mm"])) / 1000

    def loss(self, world: World = ALONE) -> Callable[[Any, Tensor], Tensor]:
        """Return the weighted cross-entropy; averaged gradients make it that of the batches of all processes."""
        del world
        return PresenceLoss(*self._weights)

    def target(self, batch: Batch) -> Tensor:
        """Return 0 or 1 for each output, shape (N, outputs): of the case, or of the slab after augmentation."""
        if not self._config.task.by_slab:
            labels = np.array([self._labels[case_id] for case_id in batch.cases], dtype=np.float32)
            return send(labels, batch.image.device)
        volumes_ml = batch.masks.sum(dim=(2, 3, 4)) * self._voxel_ml
        limits = zip(self._outputs, self._config.task.thresholds_ml, strict=True)
        return torch.stack([volumes_ml[:, REGIONS.index(name)] >= ml for name, ml in limits], dim=1).float()

    def validate(
        self,
        network: nn.Module,
        cases: Sequence[CachedCase],
        *,
        runtime: Runtime,
        world: World = ALONE,
        between_windows: Callable[[], None] = lambda: None,
        on_case: OnCodes = lambda *_: None,
    ) -> ValidationScores:
        """Return 1 - Brier score by output, and the area under the ROC curve; see :meth:`Task.validate`."""
        del on_case
        was_training = network.training
        network.eval()
        taking = on_contrasts(network, self._config)
        parts = [self._parts(case) for case in cases]
        most = max(parts)

        def probabilities(number: int) -> list[float]:
            logits = case_logits([taking], cases[number].image(), self._config, runtime, between=between_windows)
            return [*expit(logits).ravel(), *[0.0] * (most - len(logits)) * len(self._outputs)]

        rows = world.rows(len(cases), probabilities)
        network.train(was_training)
        answers = [np.array(row).reshape(most, -1)[:own] for row, own in zip(rows, parts, strict=True)]
        truths = [self._truth(case) for case in cases]
        errors = [(answer - truth) ** 2 for answer, truth in zip(answers, truths, strict=True)]
        by_case = {
            case.id: dict(zip(self._outputs, (1 - error.mean(axis=0)).tolist(), strict=True))
            for case, error in zip(cases, errors, strict=True)
        }
        means = 1 - np.concatenate(errors).mean(axis=0)
        area: dict[str, float | None] = {
            name: area_under_roc(np.concatenate(truths)[:, place], np.concatenate(answers)[:, place])
            for place, name in enumerate(self._outputs)
        }
        return ValidationScores(
            by_output=dict(zip(self._outputs, means.tolist(), strict=True)), cases=by_case, more={"auroc": area}
        )

    def _parts(self, case: CachedCase) -> int:
        """Return how many answers a case gets."""
        if not self._config.task.by_slab:
            return 1
        return len(slab_starts(case.shape[2], self._config.training.patch_voxels[2]))

    def _truth(self, case: CachedCase) -> FloatArray:
        """Return the labels of a case or of its slabs, shape (parts, outputs)."""
        if not self._config.task.by_slab:
            return np.array([self._labels[case.id]], dtype=np.float64)
        slices = self._config.training.patch_voxels[2]
        return slab_truth(np.asarray(case.codes()), slices, self._voxel_ml, self._config)


def slab_truth(codes: Any, slices: int, voxel_ml: float, config: RunConfig) -> FloatArray:
    """Return 0 or 1 for each slab of a label map, shape (slabs, outputs).

    Args:
        codes: the program's label codes, shape (X, Y, Z).
        slices: slices in a slab.
        voxel_ml: volume of a voxel.
        config: config of the run.
    """
    masks = to_regions(codes)
    places = [REGIONS.index(name) for name in config.outputs]
    volumes = [
        masks[places, :, :, start : start + slices].sum(axis=(1, 2, 3)) * voxel_ml
        for start in slab_starts(codes.shape[2], slices)
    ]
    return (np.array(volumes) >= np.array(config.task.thresholds_ml)).astype(np.float64)
