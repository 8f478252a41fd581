"""Calibration from a cross-validation: temperatures for probabilities, and intervals for volumes.

Temperature scaling divides the logit of a probability by one number per region (Guo et al. 2017, arXiv 1706.04599).
A probability of one half stays one half, and the order of probabilities does not change. Masks are cut before
calibration, with thresholds chosen on uncalibrated probabilities. Intervals for volumes are split conformal (Vovk et
al. 2005; Lei et al. 2018, JASA 113, 1094): the error of a volume is the absolute logarithm of (true + offset) /
(marked + offset), and the interval covers errors up to their finite-sample quantile over the cross-validated cases. The
offset gives an empty region an interval too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from app.errors import first_problem
from app.inference.postprocess import ByRegion, by_region
from data.labels import REGIONS, Region

#: Share of cases whose true volume the interval should cover.
LEVEL: Final = 0.9
#: Added to volumes before their ratio is taken, in ml.
OFFSET_ML: Final = 1.0
#: Version of the section ``calibration`` of ``ensemble.json``.
VERSION: Final = 1
_NOT_FROM_CROSSVAL: Final = "a single run is not calibrated; an ensemble from znormseg crossval is"
_NOT_MEASURED: Final = "this ensemble was built by a version without calibration; rebuild it with znormseg crossval"


@dataclass(frozen=True, kw_only=True)
class VolumeErrors:
    """Errors of volumes on cases that the networks were not trained on."""

    level: float
    """Share of cases that the interval covers, such as 0.9."""
    offset_ml: float
    """Added to both volumes before their ratio is taken."""
    log_ratio: ByRegion
    """By region: quantile of the absolute logarithm of the ratio."""

    def interval_ml(self, number: int, volume_ml: float) -> tuple[float, float]:
        """Return the interval for the true volume of a region.

        Args:
            number: index of the region in :data:`data.labels.REGIONS`.
            volume_ml: volume of the region in the label map.

        Example:
            >>> errors = VolumeErrors(level=0.9, offset_ml=1.0, log_ratio=(math.log(2), 0.0, 0.0))
            >>> [round(ml, 3) for ml in errors.interval_ml(0, 9.0)], errors.interval_ml(1, 9.0)
            ([4.0, 19.0], (9.0, 9.0))
        """
        factor = math.exp(self.log_ratio[number])
        shifted = volume_ml + self.offset_ml
        return max(0.0, shifted / factor - self.offset_ml), shifted * factor - self.offset_ml


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Calibration of a predictor's probabilities and volumes."""

    temperature: ByRegion | None = None
    """By region: divisor of the logits; None if it was not measured, which has the effect of 1."""
    volume: VolumeErrors | None = None
    """None if there is no interval."""
    why_no_interval: str | None = None
    """Why ``volume`` is None, in words."""

    def apply(self, centred: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Calibrate probabilities minus one half; the result is for display, not for cutting masks.

        Args:
            centred: probabilities minus one half, shape (3, ...), order of :data:`data.labels.REGIONS`, from -0.5 to
                0.5; the values -0.5, 0 and 0.5 do not change.

        Returns:
            calibrated probabilities minus one half, the same shape; ``centred`` itself if every temperature is 1.
        """
        if self.temperature is None or self.temperature == (1.0, 1.0, 1.0):
            return centred
        calibrated = centred.copy()
        with np.errstate(divide="ignore"):  # a probability of exactly 0 or 1 has an infinite logit and does not change
            for place, temperature in zip(calibrated, self.temperature, strict=True):
                if temperature != 1:
                    half_logits = np.arctanh(2 * place)
                    half_logits /= temperature
                    place[:] = np.tanh(half_logits) / 2
        return calibrated

    def record(self, volumes_ml: Sequence[float], *, complete: bool) -> dict[str, Any]:
        """Return the entries about calibration in a case's JSON.

        Args:
            volumes_ml: of the label map, by region in the order of :data:`data.labels.REGIONS`.
            complete: whether all contrasts were present, as in the cases that the errors were measured on.
        """
        why, intervals, level = self.why_no_interval, None, None
        if self.volume is not None and complete:
            found = [self.volume.interval_ml(number, ml) for number, ml in enumerate(volumes_ml)]
            intervals = {region: [round(ml, 3) for ml in pair] for region, pair in zip(REGIONS, found, strict=True)}
            level = self.volume.level
        elif self.volume is not None:
            why = "contrasts are missing, and the errors were only measured on complete cases"
        return {
            "calibration": {
                "state": "not calibrated" if self.temperature is None else "calibrated",
                "temperature": None if self.temperature is None else dict(zip(REGIONS, self.temperature, strict=True)),
            },
            "volume_interval_ml": intervals,
            "volume_interval_level": level,
            "volume_interval_note": why,
        }


#: Calibration of a single run.
NOT_CALIBRATED: Final = Calibration(why_no_interval=_NOT_FROM_CROSSVAL)


def conformal_quantile(errors: Sequence[float], level: float) -> float | None:
    """Return the bound that a new, exchangeable error stays within with a probability of at least ``level``.

    Args:
        errors: each at least 0.
        level: above 0 and below 1.

    Returns:
        the ceil((n + 1) level)-th smallest of n errors; None if that rank exceeds n, since there is then no bound.

    Example:
        >>> conformal_quantile(range(9), 0.9), conformal_quantile(range(8), 0.9), conformal_quantile(range(19), 0.9)
        (8, None, 17)
    """
    place = math.ceil((len(errors) + 1) * level - 1e-9)
    return sorted(errors)[place - 1] if place <= len(errors) else None


def fewest_cases(level: float) -> int:
    """Return the number of cases that an interval of a level needs: 9 for 0.9."""
    return math.ceil(level / (1 - level) - 1e-9)


def log_ratio(true_ml: float, marked_ml: float) -> float:
    """Return the error of a volume, at least 0, as defined in the docstring of this module."""
    return abs(math.log((true_ml + OFFSET_ML) / (marked_ml + OFFSET_ML)))


@dataclass(frozen=True, kw_only=True)
class _VolumeInterval:
    level: Annotated[float, Field(gt=0, lt=1)]
    offset_ml: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    cases: int
    log_ratio: dict[str, dict[Region, Annotated[float, Field(ge=0, allow_inf_nan=False)]] | None]


@dataclass(frozen=True, kw_only=True)
class _Section:
    """The section ``calibration`` of ``ensemble.json``."""

    version: Literal[1]
    temperature: dict[Region, Annotated[float, Field(gt=0, allow_inf_nan=False)]]
    volume_interval: _VolumeInterval


_SECTION: Final = TypeAdapter(_Section)


def calibration_from_json(content: Mapping[str, Any] | None, *, postprocessed: bool) -> Calibration:
    """Read ``calibration`` from ``ensemble.json``, as ``Calibrated.to_json`` of app.experiments.crossval writes it.

    Args:
        content: the section; None for an ensemble without it, whose probabilities are used as they are.
        postprocessed: whether volumes are measured on post-processed masks.

    Raises:
        KeyError, ValueError: the content is not valid.
    """
    if content is None:
        return Calibration(why_no_interval=_NOT_MEASURED)
    try:
        section = _SECTION.validate_python(content)
    except ValidationError as error:
        raise ValueError(f"calibration.{first_problem(error)}") from error
    temperature, found = by_region(section.temperature), section.volume_interval
    errors = found.log_ratio["postprocessed" if postprocessed else "plain"]
    if errors is None:
        why = (
            f"only {found.cases} cases were cross-validated; an interval that covers {found.level:.0%} needs "
            f"{fewest_cases(found.level)} or more"
        )
        return Calibration(temperature=temperature, why_no_interval=why)
    volume = VolumeErrors(level=found.level, offset_ml=found.offset_ml, log_ratio=by_region(errors))
    return Calibration(temperature=temperature, volume=volume)
