"""What a cross-validation learnt of how far probabilities and volumes can be trusted: temperatures, volume intervals.

Temperature scaling divides the logit of a probability by one number a region (Guo et al. 2017, arXiv 1706.04599). One
half stays one half, and what is larger stays larger; masks are cut before it, with the thresholds that were chosen
without it. The interval of a volume is split conformal (Vovk et al. 2005; Lei et al. 2018, JASA 113, 1094): its error
is the logarithm of (true + offset) / (marked + offset), and the interval has the errors up to their
finite-sample quantile over the cross-validated cases. The offset lets an empty region have an interval too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data.labels import REGIONS

ByRegion = tuple[float, float, float]

#: Share of cases whose true volume the interval is to cover.
LEVEL: Final = 0.9
#: What is added to volumes before their ratio is taken, in ml.
OFFSET_ML: Final = 1.0
#: Of the part of ``ensemble.json``.
VERSION: Final = 1
_NOT_FROM_CROSSVAL: Final = "a single run is not calibrated; an ensemble of znormseg crossval is"
_NOT_MEASURED: Final = "this ensemble was made before calibration; znormseg crossval in its folder makes it anew"


@dataclass(frozen=True, kw_only=True)
class VolumeErrors:
    """How far volumes were from the truth on cases that the networks had not trained on."""

    level: float
    """Share of cases that the interval covers, such as 0.9."""
    offset_ml: float
    """Added to both volumes."""
    log_ratio: ByRegion
    """By region: the quantile of the absolute logarithm of the ratio."""

    def interval_ml(self, number: int, volume_ml: float) -> tuple[float, float]:
        """The interval of the true volume of a region.

        Args:
            number: of the region in :data:`data.labels.REGIONS`.
            volume_ml: that is marked.

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
    """What is known of a predictor's probabilities and volumes."""

    temperature: ByRegion | None = None
    """By region: what logits are divided by; None where nothing was measured, which is as 1."""
    volume: VolumeErrors | None = None
    """None where there is no interval."""
    why_no_interval: str | None = None
    """Why ``volume`` is None, in words."""

    def apply(self, centred: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Calibrated probabilities less one half, of probabilities less one half; for showing, not for cutting.

        Args:
            centred: shape (3, ...), order of :data:`data.labels.REGIONS`, -0.5 to 0.5; -0.5, 0 and 0.5 stay.

        Returns:
            the same shape; ``centred`` itself where every temperature is 1.
        """
        if self.temperature is None or self.temperature == (1.0, 1.0, 1.0):
            return centred
        calibrated = centred.copy()
        with np.errstate(divide="ignore"):  # a probability of exactly 0 or 1 has no finite logit, and stays
            for place, temperature in zip(calibrated, self.temperature, strict=True):
                if temperature != 1:
                    half_logits = np.arctanh(2 * place)
                    half_logits /= temperature
                    place[:] = np.tanh(half_logits) / 2
        return calibrated

    def record(self, volumes_ml: Sequence[float], *, complete: bool) -> dict[str, Any]:
        """What a case's JSON says.

        Args:
            volumes_ml: of the label map, by region in the order of :data:`data.labels.REGIONS`.
            complete: whether all contrasts were there, as in the cases that the errors are of.
        """
        why = self.why_no_interval
        if self.volume is not None and not complete:
            why = "contrasts are missing, and the errors are known of complete cases alone"
        intervals = None
        if self.volume is not None and complete:
            found = [self.volume.interval_ml(number, ml) for number, ml in enumerate(volumes_ml)]
            intervals = {region: [round(ml, 3) for ml in pair] for region, pair in zip(REGIONS, found, strict=True)}
        return {
            "calibration": {
                "state": "not calibrated" if self.temperature is None else "calibrated",
                "temperature": None if self.temperature is None else dict(zip(REGIONS, self.temperature, strict=True)),
            },
            "volume_interval_ml": intervals,
            "volume_interval_level": None if intervals is None or self.volume is None else self.volume.level,
            "volume_interval_note": why,
        }


#: Of a single run.
NOT_CALIBRATED: Final = Calibration(why_no_interval=_NOT_FROM_CROSSVAL)


def conformal_quantile(errors: Sequence[float], level: float) -> float | None:
    """The error that a new one, exchangeable with these, does not exceed with a probability of ``level`` or more.

    Args:
        errors: 0 or more each.
        level: above 0 and below 1.

    Returns:
        the ceil((n + 1) level)-th smallest of n errors; None where that is more than n, so that no bound holds.

    Example:
        >>> conformal_quantile(range(9), 0.9), conformal_quantile(range(8), 0.9), conformal_quantile(range(19), 0.9)
        (8, None, 17)
    """
    place = math.ceil((len(errors) + 1) * level - 1e-9)
    return sorted(errors)[place - 1] if place <= len(errors) else None


def fewest_cases(level: float) -> int:
    """How many cases an interval of a level needs: 9 for 0.9."""
    return math.ceil(level / (1 - level) - 1e-9)


def log_ratio(true_ml: float, marked_ml: float) -> float:
    """The error of a volume, 0 or more: see the head of this file."""
    return abs(math.log((true_ml + OFFSET_ML) / (marked_ml + OFFSET_ML)))


def calibration_from_json(content: Mapping[str, Any] | None, *, postprocessed: bool) -> Calibration:
    """Read the part ``calibration`` of ``ensemble.json`` (``Calibrated.to_json`` of app.experiments.crossval).

    Args:
        content: the part; None of an ensemble that has none, whose probabilities are taken as they are.
        postprocessed: whether volumes are those of post-processed masks.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: it is not of that form.
    """
    if content is None:
        return Calibration(why_no_interval=_NOT_MEASURED)
    if content["version"] != VERSION:
        raise ValueError(f"calibration of version {content['version']}")
    temperature = _by_region(content["temperature"], "temperature", above_zero=True)
    told = content["volume_interval"]
    level, offset, cases = float(told["level"]), float(told["offset_ml"]), int(told["cases"])
    if not (0 < level < 1 and 0 < offset < math.inf):
        raise ValueError(f"volume_interval: level {level:g}, offset {offset:g} ml")
    errors = told["log_ratio"]["postprocessed" if postprocessed else "plain"]
    if errors is None:
        why = (
            f"{cases} cases were cross-validated, and an interval that covers {level:.0%} needs {fewest_cases(level)} "
            "or more"
        )
        return Calibration(temperature=temperature, why_no_interval=why)
    ratios = _by_region(errors, "volume_interval", above_zero=False)
    return Calibration(temperature=temperature, volume=VolumeErrors(level=level, offset_ml=offset, log_ratio=ratios))


def _by_region(content: Mapping[str, Any], what: str, *, above_zero: bool) -> ByRegion:
    x, y, z = (float(content[region]) for region in REGIONS)
    if not all((value > 0 if above_zero else value >= 0) and value < math.inf for value in (x, y, z)):
        raise ValueError(f"{what} {x:g}, {y:g}, {z:g}")
    return (x, y, z)
