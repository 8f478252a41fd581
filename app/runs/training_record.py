"""Records of the training cases in a run or ensemble: their ids and the range of their intensities."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.errors import RunError
from app.progress import LOG
from app.runs.folder import read_json
from data.datasets.naming import composed, real_id
from data.quality.intensity_range import IntensityRange, merged_range, range_from_json

#: File in the run folder.
INTENSITIES_FILE: Final = "intensities.json"


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """Facts about the training cases of a network."""

    trained_on: tuple[str, ...] = ()
    """Ids of the training cases, and of the real cases whose label maps the synthetic ones share."""
    validated_on: tuple[str, ...] = ()
    """Ids of the validation cases, on which the weights were selected."""
    intensities: IntensityRange | None = None
    """Intensity range of the training cases; None for runs of older versions and imported models."""


#: A record without any information.
UNKNOWN: Final = TrainingRecord()


def training_record(folder: Path) -> TrainingRecord:
    """Read the record of the training cases; missing or damaged files leave it incomplete.

    It only feeds warnings, so it never blocks a prediction; a damaged file is logged.

    Args:
        folder: folder of a run or an ensemble.
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
            trained = tuple(dict.fromkeys((*trained, *map(real_id, trained))))
        except (RunError, KeyError, TypeError) as error:
            LOG.warning("%s is damaged (%s); cases seen in training will not be flagged", split, error)
    ranges: list[IntensityRange] = []
    for path in [folder / INTENSITIES_FILE, *sorted(folder.glob(f"fold-*/{INTENSITIES_FILE}"))]:
        if path.exists():
            try:
                ranges.append(range_from_json(read_json(path)))
            except (RunError, KeyError, TypeError, ValueError, AttributeError) as error:
                LOG.warning("%s is damaged (%s); unusual intensities will not be flagged", path, error)
    return TrainingRecord(
        trained_on=trained, validated_on=validated, intensities=merged_range(ranges) if ranges else None
    )
