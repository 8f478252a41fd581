"""What a run or an ensemble tells of its training cases: their ids, the range of their intensities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.errors import RunError
from app.progress import LOG
from app.runs.folder import read_json
from data.datasets.naming import composed
from data.quality.intensity_range import IntensityRange, merged_range, range_from_json

#: In the folder of a run.
INTENSITIES_FILE: Final = "intensities.json"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """What is known of the cases that a network learnt from."""

    trained_on: tuple[str, ...] = ()
    """Case ids."""
    validated_on: tuple[str, ...] = ()
    """Case ids by which its weights were chosen."""
    intensities: IntensityRange | None = None
    """None of runs of older versions, and of models that come from elsewhere."""


#: Nothing is known.
UNKNOWN: Final = TrainingRecord()


def training_record(folder: Path) -> TrainingRecord:
    """Read what a run or an ensemble tells of its training cases; what is not there, or damaged, is not known.

    What it is for are hints, so nothing of it stops a prediction; a file that is damaged is logged.

    Args:
        folder: of a run or of an ensemble.
    """
    trained: tuple[str, ...] = ()
    validated: tuple[str, ...] = ()
    split = folder / "split.json"
    if split.exists():
        try:
            content = read_json(split)
            trained, validated = (
                tuple(composed(str(one)) for one in content[part]) for part in ("train", "validation")
            )
        except (RunError, KeyError, TypeError) as error:
            LOG.warning("%s is damaged (%s); whether cases were trained on is not known", split, error)
    ranges: list[IntensityRange] = []
    for path in [folder / INTENSITIES_FILE, *sorted(folder.glob(f"fold-*/{INTENSITIES_FILE}"))]:
        if path.exists():
            try:
                ranges.append(range_from_json(read_json(path)))
            except (RunError, KeyError, TypeError, ValueError, AttributeError) as error:
                LOG.warning("%s is damaged (%s); whether intensities are unusual is not known", path, error)
    return TrainingRecord(
        trained_on=trained, validated_on=validated, intensities=merged_range(ranges) if ranges else None
    )
