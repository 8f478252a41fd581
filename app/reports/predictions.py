"""Folders of predictions as ``znormseg predict`` writes them: the files and the JSON record of each case."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from app.html.records import mapping, number_or_none
from app.inference.flags import Flag
from data.datasets.layouts import Case
from data.errors import DataError
from data.filesystem import why
from data.labels import CONTRASTS, CONVENTIONS, REGIONS, Contrast, LabelConvention, Region

_ENDING: Final = ".nii.gz"


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """One case in a folder of predictions."""

    case: str
    """Case id, the stem of the label map's and the JSON's name."""
    label_map: Path
    uncertainty: Path | None
    """Uncertainty map on the same grid, 3D or with one volume per region, or None."""
    record: Mapping[str, Any]
    """Content of ``<case>.json``."""
    images: Mapping[Contrast, Path] = field(default_factory=dict)
    """Paths of the scans, from the JSON or from ``--images``."""
    volumes: Mapping[Contrast, int] = field(default_factory=dict)
    """Volume index of each contrast in a 4D file."""

    @property
    def convention(self) -> LabelConvention:
        """The label convention of the label map.

        Raises:
            DataError: the JSON does not name a known convention.
        """
        name = mapping(self.record.get("labels")).get("convention")
        if not isinstance(name, str) or name not in CONVENTIONS:
            raise DataError(
                f"{self.label_map.with_name(self.case + '.json')}: the label convention is {name!r}; expected one of "
                f"{', '.join(CONVENTIONS)}. Predict the case again."
            )
        return CONVENTIONS[name]

    @property
    def volumes_ml(self) -> dict[Region, float | None]:
        """Predicted volume by region; None if the JSON lacks it."""
        recorded = mapping(self.record.get("volumes_ml"))
        return {region: number_or_none(recorded.get(region)) for region in REGIONS}

    @property
    def confidence(self) -> dict[Region, float]:
        """Mean probability within the segmented region, for the regions in the JSON."""
        recorded = mapping(self.record.get("confidence"))
        found = ((region, number_or_none(recorded.get(region))) for region in REGIONS)
        return {region: value for region, value in found if value is not None}

    @property
    def volume_intervals_ml(self) -> dict[Region, tuple[float, float]]:
        """Lowest and highest volume by region: the interval in the JSON, else the range over single answers."""
        answers = mapping(self.record.get("answers"))
        recorded = mapping(self.record.get("volume_interval_ml")) or mapping(answers.get("volume_range_ml"))
        found: dict[Region, tuple[float, float]] = {}
        for region in REGIONS:
            match recorded.get(region):
                case [int() | float() as low, int() | float() as high]:
                    found[region] = (float(low), float(high))
        return found

    @property
    def interval_name(self) -> str:
        """Column heading for :attr:`volume_intervals_ml`."""
        level = number_or_none(self.record.get("volume_interval_level"))
        if mapping(self.record.get("volume_interval_ml")):
            return "Interval (ml)" if level is None else f"{level:.0%} interval (ml)"
        return "Range of answers (ml)"

    @property
    def model_name(self) -> str:
        """Name of the published or imported model that predicted the case; empty if the JSON has none."""
        return str(mapping(self.record.get("model")).get("name") or "")

    @property
    def model_limits(self) -> tuple[str, ...]:
        """Limits that the model states, one sentence each."""
        limits = mapping(self.record.get("model")).get("limits")
        return tuple(map(str, limits)) if isinstance(limits, list) else ()

    @property
    def flags(self) -> tuple[Flag, ...]:
        """The flags in the JSON; if it has none, a flag for missing contrasts."""
        flags = self.record.get("flags")
        if not isinstance(flags, list):
            missing = self.record.get("missing_contrasts")
            names = ", ".join(map(str, missing)) if isinstance(missing, list) else ""
            return (Flag(code="missing_contrast", sentence=f"Missing: {names}."),) if names else ()
        return tuple(
            Flag(code=str(one.get("code", "flag")), sentence=str(one.get("sentence", "")))
            for one in flags
            if isinstance(one, Mapping)
        )


def is_predictions(folder: Path) -> bool:
    """Return whether a folder contains a label map with its JSON, as written by ``znormseg predict``."""
    return any(path.with_name(path.stem + _ENDING).is_file() for path in folder.glob("*.json"))


def find_predictions(folder: Path, cases: Mapping[str, Case] | None = None) -> tuple[list[Predicted], dict[str, str]]:
    """Return every case in a folder of predictions, sorted by id.

    Args:
        folder: folder of label maps, each with its JSON.
        cases: cases by id, whose scans replace the paths recorded in the JSON.

    Returns:
        the cases, and the reasons why others could not be read, by case id.
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
        uncertainty = path.with_name(f"{path.stem}_uncertainty{_ENDING}")
        # If the JSON has null for this file, the one on disk belongs to an earlier label map.
        belongs = mapping(record.get("files")).get("uncertainty", uncertainty) is not None
        found.append(
            Predicted(
                case=path.stem,
                label_map=label_map,
                uncertainty=uncertainty if belongs and uncertainty.is_file() else None,
                record=record,
                images=images,
                volumes=volumes,
            )
        )
    return found, failures


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
    paths = {contrast: mapping(record.get("inputs")).get(contrast) for contrast in CONTRASTS}
    volumes = {contrast: mapping(record.get("input_volumes")).get(contrast) for contrast in CONTRASTS}
    return (
        {contrast: Path(path) for contrast, path in paths.items() if isinstance(path, str)},
        {contrast: place for contrast, place in volumes.items() if type(place) is int and place >= 0},
    )
