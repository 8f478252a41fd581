"""The range of intensities in a data set, used to detect cases unlike those in it.

Quantiles of the z-scored brain are compared, since they do not depend on a scanner's scale and offset. A skull that was
left on, a swapped or inverted contrast, and clipped or gamma-corrected intensities change them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from data.labels import CONTRASTS, Contrast

#: The quantiles compared.
QUANTILES: Final = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
#: Minimum number of cases for a meaningful range; chosen by judgement.
LEAST_CASES: Final = 10
#: A case is unusual if a quantile is beyond the range by more than the range's width (the range of few cases is
#: narrower than that of all future ones) and by more than a quarter of a standard deviation of the brain (which
#: different brain masks and a large tumour can cause). Chosen on six cases of BraTS 2021, each compared with the other
#: five: with half the width and a tenth of a deviation, four were unusual; with these values, two. With either choice,
#: all six were unusual once T1 and T2 were swapped.
MARGIN_SHARE: Final = 1.0
MARGIN_SD: Final = 0.25
#: Minimum number of planes sampled per volume (the maximum is twice that), which hold more than enough voxels.
_PLANES: Final = 16

#: For each contrast present, one number per quantile.
Quantiles = Mapping[Contrast, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class IntensityRange:
    """Smallest and largest quantiles over cases."""

    cases: int
    """Number of cases."""
    least: Quantiles
    largest: Quantiles

    def unusual(self, found: Quantiles) -> tuple[Contrast, ...]:
        """Contrasts of a case with a quantile clearly beyond the range; empty if the range covers too few cases.

        Args:
            found: quantiles of the case; missing contrasts are not judged.
        """
        if self.cases < LEAST_CASES:
            return ()
        return tuple(
            contrast for contrast in CONTRASTS if contrast in found and self._is_beyond(contrast, found[contrast])
        )

    def _is_beyond(self, contrast: Contrast, found: tuple[float, ...]) -> bool:
        if contrast not in self.least:
            return False
        least, largest = np.array(self.least[contrast]), np.array(self.largest[contrast])
        margin = np.maximum(MARGIN_SHARE * (largest - least), MARGIN_SD)
        values = np.array(found)
        return bool(((values < least - margin) | (values > largest + margin)).any())

    def to_json(self) -> dict[str, Any]:
        """Plain data, the input of :func:`range_from_json`."""
        return {
            "version": 1,
            "cases": self.cases,
            "quantiles": list(QUANTILES),
            "least": {contrast: list(values) for contrast, values in self.least.items()},
            "largest": {contrast: list(values) for contrast, values in self.largest.items()},
        }


def range_from_json(content: Mapping[str, Any]) -> IntensityRange:
    """Undo :meth:`IntensityRange.to_json`.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the content has another form.
    """
    if content["version"] != 1 or tuple(content["quantiles"]) != QUANTILES:
        raise ValueError(f"version {content['version']}, quantiles {content['quantiles']}")
    ends: list[dict[Contrast, tuple[float, ...]]] = []
    for key in ("least", "largest"):
        ends.append({c: tuple(float(v) for v in content[key][c]) for c in CONTRASTS if c in content[key]})
        if any(len(values) != len(QUANTILES) for values in ends[-1].values()):
            raise ValueError(f"{key}: not {len(QUANTILES)} numbers per contrast")
    if ends[0].keys() != ends[1].keys():
        raise ValueError("least and largest have different contrasts")
    return IntensityRange(cases=int(content["cases"]), least=ends[0], largest=ends[1])


def quantiles_of(image: npt.NDArray[np.floating]) -> dict[Contrast, tuple[float, ...]]:
    """Quantiles of the non-zero voxels in evenly spaced planes.

    Args:
        image: shape (4, X, Y, Z), order of :data:`data.labels.CONTRASTS`, z-scored in the brain; a contrast that is 0
            everywhere counts as missing.
    """
    planes = image[:, :: max(1, image.shape[1] // _PLANES)]
    found: dict[Contrast, tuple[float, ...]] = {}
    for contrast, voxels in zip(CONTRASTS, planes, strict=True):
        values = voxels[voxels != 0].astype(np.float32)
        if values.size:
            found[contrast] = tuple(round(float(value), 4) for value in np.quantile(values, QUANTILES))
    return found


def range_of(cases: Iterable[Quantiles]) -> IntensityRange:
    """The range over cases.

    Example:
        >>> range_of([{"t1": (0.0, 1.0)}, {"t1": (0.5, 0.5)}]).largest
        {'t1': (0.5, 1.0)}
    """
    found = list(cases)
    by_contrast = {c: np.array([one[c] for one in found if c in one]) for c in CONTRASTS}
    present = {contrast: values for contrast, values in by_contrast.items() if values.size}
    return IntensityRange(
        cases=len(found),
        least={contrast: tuple(values.min(axis=0).tolist()) for contrast, values in present.items()},
        largest={contrast: tuple(values.max(axis=0).tolist()) for contrast, values in present.items()},
    )


def merged_range(ranges: Iterable[IntensityRange]) -> IntensityRange:
    """The range over the cases of several ranges; a case in more than one of them is counted in each."""
    found = list(ranges)
    both = range_of([*(one.least for one in found), *(one.largest for one in found)])
    return IntensityRange(cases=sum(one.cases for one in found), least=both.least, largest=both.largest)
