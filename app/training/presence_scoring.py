"""Score a finished presence run on cases: 1 - squared error of each probability."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from app.config.load import RunConfig
from app.inference.tumour_presence.model import load_presence
from app.runs.folder import read_json
from app.system.device import Runtime, choose_runtime
from app.training.presence import slab_truth
from app.training.presence_labels import presence_labels
from data.datasets.label_stats import read_label_maps
from data.datasets.layouts import Case
from data.labels import CONVENTIONS
from data.preprocess import prepare


def score_presence_run(
    run: Path, cases: Sequence[Case], config: RunConfig, *, on_case: Callable[[str], None]
) -> tuple[Runtime, str, dict[str, dict[str, float]]]:
    """Predict cases with the weights that ``predict`` would use, and score them against their label maps.

    Args:
        run: folder of a finished presence run, trained on label maps.
        cases: cases with label maps.
        config: config of the run; its runtime section determines device and precision.
        on_case: called with the id of each finished case.

    Returns:
        the runtime that was used; the SHA-256 of the weights; and 1 - squared error by case id and output, the mean
        over the slabs if there are slabs.

    Raises:
        DataError: a case cannot be used.
        RunError: the run has no weights, or they were changed.
    """
    runtime = choose_runtime(config.runtime)
    model = load_presence(run, runtime)
    convention = CONVENTIONS[read_json(run / "run.json")["labels"]]
    own = {case.id: case.require() for case in cases}
    labels = presence_labels(config.task, own, own, read_label_maps(own.values()), [convention])
    scores: dict[str, dict[str, float]] = {}
    for case in own.values():
        prepared = prepare(
            case, spacing_mm=model.spacing_mm, convention=convention, nan_to_zero=config.data.nan_to_zero
        )
        truth = np.array([labels[case.id]], dtype=np.float64)
        if config.task.by_slab:
            assert prepared.codes is not None
            voxel_ml = float(np.prod(prepared.spacing_mm)) / 1000
            truth = slab_truth(prepared.codes, config.training.patch_voxels[2], voxel_ml, config)
        answers = model.probabilities(model.logits(prepared.image, prepared.present, runtime))
        errors = {name: (answers[name] - truth[:, place]) ** 2 for place, name in enumerate(model.outputs)}
        scores[case.id] = {name: float(1 - error.mean()) for name, error in errors.items()}
        on_case(case.id)
    return runtime, model.sha256, scores
