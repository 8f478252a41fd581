"""Config of the task: what a network learns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from data.labels import REGIONS


@dataclass(frozen=True, kw_only=True)
class Measure:
    """The measure on validation cases that chooses a run's weights; larger is better, from 0 to 1."""

    key: str
    """Name in ``metrics.jsonl`` and other files."""
    in_words: str
    """Name in the log and on pages."""


#: The measure of each task.
MEASURES_OF_TASKS: Final = {
    "segmentation": Measure(key="dice", in_words="Dice"),
    "presence": Measure(key="one_minus_brier", in_words="1 - Brier score"),
}

_LEAST_ML: Final = 0.0
_MOST_ML: Final = 1000.0


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """What the network learns: the outline of each region, or only whether it is present."""

    name: Literal["segmentation", "presence"] = "segmentation"
    """``segmentation``: a label map of WT, TC and ET; ``presence``: one probability for each entry of ``outputs``, for
    the whole brain or for each slab. The other keys of this section apply to ``presence``."""
    outputs: tuple[str, ...] = ("ET",)
    """What is present or absent: regions, or columns of ``labels_csv``."""
    threshold_ml: tuple[float, ...] = (0.5,)
    """A region is present in a case, or in a slab, if its volume in the label map is at least this many ml: one number
    for all outputs, or one for each."""
    labels_csv: str | None = None
    """CSV file with a column ``case`` and a column of 0 and 1 for each output, used instead of the label maps; null
    uses the label maps."""
    class_weights: Literal["balanced", "none"] = "balanced"
    """``balanced``: present and absent cases of an output have the same total weight in the loss; not used with
    ``by_slab``, where ``training.tumour_probability`` sets the share of slabs with tumour."""
    by_slab: bool = False
    """False: the network sees the whole brain, and ``training.patch_voxels`` should hold it. True: it sees slabs of
    ``training.patch_voxels[2]`` axial slices, and each slab gets probabilities."""

    def __post_init__(self) -> None:
        if self.name != "presence":
            return
        if not self.outputs or len(set(self.outputs)) < len(self.outputs) or not all(self.outputs):
            raise ValueError(f"task.outputs: at least one name, each once, got {list(self.outputs)}")
        if self.labels_csv is None and (unknown := [name for name in self.outputs if name not in REGIONS]):
            raise ValueError(
                f"task.outputs: {', '.join(unknown)} is not a region ({', '.join(REGIONS)}); for another label, give "
                "its CSV file as task.labels_csv"
            )
        if len(self.threshold_ml) not in (1, len(self.outputs)):
            raise ValueError(
                f"task.threshold_ml: one number, or one for each of the {len(self.outputs)} outputs, got "
                f"{list(self.threshold_ml)}"
            )
        if not all(_LEAST_ML < volume <= _MOST_ML for volume in self.threshold_ml):
            raise ValueError(f"task.threshold_ml: above 0 and at most {_MOST_ML:g} ml, got {list(self.threshold_ml)}")
        if self.by_slab and self.labels_csv is not None:
            raise ValueError("task.by_slab: slabs take their labels from label maps; leave out task.labels_csv")

    @property
    def thresholds_ml(self) -> tuple[float, ...]:
        """The threshold of each output."""
        return self.threshold_ml * (len(self.outputs) if len(self.threshold_ml) == 1 else 1)
