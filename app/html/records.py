"""Read values from JSON records, where they may be missing or damaged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data.labels import REGIONS

Records = Sequence[Mapping[str, Any]]

#: Names of the measures that validations record, by key; the first is that of segmentation.
MEASURE_NAMES: Final = {"dice": "Dice", "one_minus_brier": "1 - Brier score"}

_LARGEST: Final = 1e30  # larger values would overflow in the arithmetic of charts


def measure_in(records: Records) -> str:
    """Return the key of the measure that the validations of a run recorded; ``dice`` if there are none."""
    found = (key for record in records if record.get("kind") == "validation" for key in MEASURE_NAMES if key in record)
    return next(found, "dice")


def outputs_in(records: Records, measure: str) -> list[str]:
    """Return the outputs that the validations scored: the regions, or those of a presence network."""
    if measure == "dice":
        return list(REGIONS)
    return list(dict.fromkeys(name for record in records for name in mapping(record.get(measure))))


def mapping(value: object) -> Mapping[str, Any]:
    """Return a JSON object, or an empty mapping for anything else."""
    return value if isinstance(value, Mapping) else {}


def number_or_none(value: object) -> float | None:
    """Return a JSON number as a float, or None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def number_or_nan(value: object) -> float:
    """Return a JSON number as a float; NaN for anything else, and for numbers that are too large to draw."""
    number = number_or_none(value)
    return number if number is not None and abs(number) < _LARGEST else math.nan


def column(records: Records, key: str) -> npt.NDArray[np.float64]:
    """Return one value per record, converted by :func:`number_or_nan`."""
    return np.array([number_or_nan(record.get(key)) for record in records], dtype=np.float64)
