"""A presence network in front of a segmentation: where it finds no enhancing tumour, the label map gets none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from app.errors import RunError
from app.inference.tumour_presence.model import PresenceModel, load_presence
from app.system.device import Runtime
from data.labels import REGIONS, Region
from data.preprocess import Prepared, resample, resampled_shape

#: The region that a gate may remove.
GATED: Final[Region] = "ET"
#: A cross-validation suggests a gate that keeps at least this share of the cases out of fold that have the region.
GATE_SENSITIVITY: Final = 0.95
_PLACE: Final = REGIONS.index(GATED)


@dataclass(frozen=True, kw_only=True)
class GateAnswer:
    """What the presence network says about one case."""

    probability: float
    """Calibrated, if its cross-validation fitted that."""
    threshold: float
    """Below it, enhancing tumour is removed."""
    tuned: bool
    """Whether a cross-validation chose the threshold."""
    run: str
    """Folder of the presence run or ensemble."""
    weights_sha256: str

    @property
    def removes(self) -> bool:
        """Whether enhancing tumour is removed."""
        return self.probability < self.threshold

    def record(self, removed_ml: float) -> dict[str, Any]:
        """Return the entry of the case's JSON; ``removed_ml`` is the volume that was removed."""
        return {
            "region": GATED,
            "probability": round(self.probability, 6),
            "threshold": round(self.threshold, 6),
            "threshold_tuned": self.tuned,
            "removed": self.removes,
            "removed_ml": round(removed_ml, 3),
            "run": self.run,
            "weights_sha256": self.weights_sha256,
        }


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A loaded presence network whose outputs include enhancing tumour."""

    model: PresenceModel
    runtime: Runtime

    def settings(self) -> dict[str, Any]:
        """Return the entries for a prediction's settings."""
        return {"presence": self.model.settings()}

    def answer(self, prepared: Prepared) -> GateAnswer:
        """Judge a case that was prepared for the segmentation; its image is resampled to the gate's spacing."""
        spacing_mm = self.model.spacing_mm
        shape = resampled_shape(prepared.image.shape[1:], prepared.spacing_mm, spacing_mm)
        image = prepared.image
        if shape != image.shape[1:]:
            image = np.stack([resample(contrast, shape) for contrast in image])
        logits = self.model.logits(image, prepared.present, self.runtime)
        decision = self.model.decisions[GATED]
        return GateAnswer(
            probability=float(self.model.probabilities(logits)[GATED].max()),
            threshold=decision.gate_threshold,
            tuned=decision.tuned,
            run=self.model.origin,
            weights_sha256=self.model.sha256,
        )


def load_gate(folder: Path, runtime: Runtime) -> Gate:
    """Load a presence run or ensemble as a gate.

    Args:
        folder: its folder.
        runtime: device and precision of the torch backend.

    Raises:
        RunError: as raised by :func:`load_presence`; or enhancing tumour is not among its outputs.
    """
    model = load_presence(folder, runtime)
    if GATED not in model.outputs or model.config.task.labels_csv is not None:
        raise RunError(
            f"--presence {folder}: it judges {', '.join(model.outputs)}"
            f"{' as labelled in a CSV file' if model.config.task.labels_csv else ''}, not {GATED} in label maps. Train "
            f"one with task.outputs=[{GATED}]."
        )
    return Gate(model=model, runtime=runtime)


def remove_enhancing_(masks: npt.NDArray[np.bool_]) -> int:
    """Remove enhancing tumour from nested masks in place; it stays in the tumour core. Return the number of voxels.

    Args:
        masks: bool, shape (3, X, Y, Z), order of :data:`data.labels.REGIONS`.

    Example:
        >>> masks = np.ones((3, 1, 1, 2), dtype=bool)
        >>> remove_enhancing_(masks), masks[:, 0, 0, 0].tolist()
        (2, [True, True, False])
    """
    removed = int(np.count_nonzero(masks[_PLACE]))
    masks[_PLACE] = False
    return removed
