"""Predictions as ``znormseg predict`` wrote them: the files of each case, and what its JSON tells."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from data.datasets.layouts import Case
from data.errors import DataError
from data.filesystem import why
from data.labels import CONTRASTS, CONVENTIONS, REGIONS, Contrast, LabelConvention, Region

_ENDING: Final = ".nii.gz"


@dataclass(frozen=True, kw_only=True)
class ShownFlag:
    """Something about a case that a reader should know."""

    code: str
    """Name of the rule, e.g. ``missing-contrast``."""
    sentence: str
    """What it found."""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One case of a folder of predictions."""

    case: str
    """Case id: the name of both files."""
    label_map: Path
    uncertainty: Path | None
    """A map of the same grid, 3D or one volume a region, where there is one."""
    record: Mapping[str, Any]
    """The content of ``<case>.json``."""
    images: Mapping[Contrast, Path] = field(default_factory=dict)
    """Scans that are there, as the JSON or ``--images`` names them."""
    volumes: Mapping[Contrast, int] = field(default_factory=dict)
    """Which volume a contrast is, of scans that are 4D."""

    @property
    def convention(self) -> LabelConvention:
        """What the numbers of the label map mean.

        Raises:
            DataError: the JSON names no convention of this program.
        """
        name = _mapping(self.record.get("labels")).get("convention")
        if not isinstance(name, str) or name not in CONVENTIONS:
            raise DataError(
                f"{self.label_map.with_name(self.case + '.json')}: the label convention is {name!r}; expected one of "
                f"{', '.join(CONVENTIONS)}. Predict the case again."
            )
        return CONVENTIONS[name]

    @property
    def volumes_ml(self) -> dict[Region, float | None]:
        """Predicted volume by region."""
        told = _mapping(self.record.get("volumes_ml"))
        return {region: number_or_none(told.get(region)) for region in REGIONS}

    @property
    def confidence(self) -> dict[Region, float]:
        """Mean probability within the marked region, of regions where the JSON tells it."""
        told = _mapping(self.record.get("confidence"))
        found = {region: number_or_none(told.get(region)) for region in REGIONS}
        return {region: value for region, value in found.items() if value is not None}

    @property
    def volume_intervals_ml(self) -> dict[Region, tuple[float, float]]:
        """Least and largest volume by region: the interval of the JSON, else the range of single answers."""
        answers = _mapping(self.record.get("answers"))
        told = _mapping(self.record.get("volume_interval_ml")) or _mapping(answers.get("volume_range_ml"))
        found: dict[Region, tuple[float, float]] = {}
        for region in REGIONS:
            ends = told.get(region)
            if isinstance(ends, list) and len(ends) == 2:
                low, high = map(number_or_none, ends)
                if low is not None and high is not None:
                    found[region] = (low, high)
        return found

    @property
    def interval_name(self) -> str:
        """What :attr:`volume_intervals_ml` are, for the head of a column."""
        level = number_or_none(self.record.get("volume_interval_level"))
        if _mapping(self.record.get("volume_interval_ml")):
            return "Interval (ml)" if level is None else f"{level:.0%} interval (ml)"
        return "Range of answers (ml)"

    @property
    def flags(self) -> tuple[ShownFlag, ...]:
        """What the JSON warns of; contrasts that were missing, where it has no flags."""
        told = self.record.get("flags")
        if not isinstance(told, list):
            missing = self.record.get("missing_contrasts")
            names = [str(name) for name in missing] if isinstance(missing, list) else []
            return (ShownFlag(code="missing-contrast", sentence=f"Missing: {', '.join(names)}."),) if names else ()
        return tuple(
            ShownFlag(code=str(one.get("code", "flag")), sentence=str(one.get("sentence", "")))
            for one in told
            if isinstance(one, Mapping)
        )


def is_predictions(folder: Path) -> bool:
    """Whether a folder holds a label map with its JSON, as ``znormseg predict`` writes them."""
    return any(path.with_name(path.stem + _ENDING).is_file() for path in folder.glob("*.json"))


def find_predictions(folder: Path, cases: Mapping[str, Case] | None = None) -> tuple[list[Predicted], dict[str, str]]:
    """Every case of a folder of predictions, sorted by id.

    Args:
        folder: of label maps, each with its JSON.
        cases: by id, where to find the scans instead of where they were predicted from.

    Returns:
        the cases, and why others could not be read, by case id.
    """
    found, failures = [], {}
    for path in sorted(folder.glob("*.json")):
        label_map = path.with_name(path.stem + _ENDING)
        if not label_map.is_file():
            continue
        try:
            record = _read(path)
        except DataError as error:
            failures[path.stem] = str(error)
            continue
        images, volumes = _images(record, None if cases is None else cases.get(path.stem))
        beside = path.with_name(f"{path.stem}_uncertainty{_ENDING}")
        # A file that the JSON knows and does not have is of an earlier label map.
        belongs = _mapping(record.get("files")).get("uncertainty", beside) is not None
        found.append(
            Predicted(
                case=path.stem,
                label_map=label_map,
                uncertainty=beside if belongs and beside.is_file() else None,
                record=record,
                images=images,
                volumes=volumes,
            )
        )
    return found, failures


def number_or_none(value: object) -> float | None:
    """A number of JSON, or None for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _is_place(value: object) -> bool:
    """Whether a value of JSON can be the number of a volume."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: damaged ({why(error)}). Predict the case again.") from error
    if not isinstance(content, dict) or not isinstance(content.get("volumes_ml"), dict):
        raise DataError(f"{path}: not the JSON that znormseg predict writes: volumes_ml is missing.")
    return content


def _images(record: Mapping[str, Any], case: Case | None) -> tuple[dict[Contrast, Path], dict[Contrast, int]]:
    if case is not None:
        return dict(case.contrasts), dict(case.volumes)
    told, volumes = _mapping(record.get("inputs")), _mapping(record.get("input_volumes"))
    return (
        {contrast: Path(told[contrast]) for contrast in CONTRASTS if isinstance(told.get(contrast), str)},
        {contrast: volumes[contrast] for contrast in CONTRASTS if _is_place(volumes.get(contrast))},
    )
