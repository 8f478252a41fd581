"""The fingerprint of a data set: the facts that a plan depends on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from app.training.cases import case_spacing, median_by_axis
from data.datasets.label_stats import LabelMap, read_label_maps, tumours_of
from data.datasets.layouts import Case
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import LabelConvention
from data.nifti import Spacing, in_order_of, read_image, read_label_map, reorient
from data.preprocess import smallest_box

#: Number of cases whose images are read to measure brain and tumour; reading more takes minutes and hardly changes a
#: median.
SAMPLE: Final = 24


@dataclass(frozen=True, kw_only=True)
class Extent:
    """Bounding boxes of one case, in millimetres along the canonical axes."""

    brain_mm: Spacing
    """Box of the voxels that are non-zero in any contrast."""
    tumour_mm: Spacing | None
    """Box of the whole tumour; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """Facts about a data set; the case count includes cases without a label map, which cannot be trained on."""

    cases: int
    with_label_map: int
    patients: int
    labels: str
    """Name of the label convention."""
    spacing_mm: Spacing
    """Median along each canonical axis."""
    spacing_percentiles_mm: tuple[Spacing, Spacing]
    """10th and 90th percentile along each canonical axis."""
    extents: Mapping[str, Extent]
    """By case id, for a sample spread evenly over the ids."""
    tumour_ml: tuple[float, float, float]
    """Volume of the whole tumour: 10th percentile, median, 90th percentile."""
    enhancing_share: float
    """Share of the cases with a label map that have enhancing tumour."""
    bytes_on_disk: int

    @property
    def brain_mm(self) -> Spacing:
        """Median brain box of the sample."""
        return median_by_axis([extent.brain_mm for extent in self.extents.values()])

    @property
    def tumour_mm(self) -> Spacing | None:
        """Median tumour box of the sample; None if no case has a tumour."""
        return median_by_axis(self._tumours_mm) if self._tumours_mm else None

    def brain_voxels(self, spacing_mm: Spacing) -> tuple[int, int, int]:
        """Return the median brain box at a spacing, in voxels."""
        x, y, z = (max(1, round(mm / step)) for mm, step in zip(self.brain_mm, spacing_mm, strict=True))
        return (x, y, z)

    def tumours_inside(self, side_mm: Sequence[float]) -> float:
        """Return the share of the sample's tumours whose box fits within these sides; 1 if there are none."""
        boxes = self._tumours_mm
        inside = sum(all(mm <= side for mm, side in zip(box, side_mm, strict=True)) for box in boxes)
        return inside / len(boxes) if boxes else 1.0

    @property
    def _tumours_mm(self) -> list[Spacing]:
        return [extent.tumour_mm for extent in self.extents.values() if extent.tumour_mm is not None]

    def to_json(self) -> dict[str, Any]:
        """Return plain data for ``--json``."""
        content = asdict(self)
        del content["extents"]
        return {
            **content,
            "sampled_cases": len(self.extents),
            "brain_mm": [round(mm, 1) for mm in self.brain_mm],
            "tumour_mm": None if self.tumour_mm is None else [round(mm, 1) for mm in self.tumour_mm],
        }


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """Cases, and the facts read from them for the fingerprint."""

    cases: Mapping[str, Case]
    """All cases with a label map, by id."""
    label_maps: Mapping[str, LabelMap]
    convention: LabelConvention
    fingerprint: Fingerprint


def read_data_set(data: DataSource, *, on_case: Callable[[str, float], None] = lambda *_: None) -> DataSet:
    """Take the fingerprint of a data set from every header and label map, and the images of a sample.

    Args:
        data: the data set.
        on_case: called with the id of each sampled case once it is read, and the share of the sample that is done.

    Raises:
        DataError: there is no data set or no case with a label map, labels are ambiguous, or a case cannot be read.
    """
    found = data.find_cases()
    cases = {case.id: case.require() for case in found.values() if case.label is not None}
    if not cases:
        raise DataError(f"{data.root}: no case has a label map (a file that ends in seg); training needs them")
    label_maps = read_label_maps(cases.values())
    convention = data.decide_convention(cases, label_maps)
    tumours = tumours_of(cases, label_maps, convention).values()
    sample = _spread(list(cases.values()), SAMPLE)
    extents: dict[str, Extent] = {}
    # Few threads, because reading a case takes about 100 MB.
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for case, extent in zip(sample, pool.map(_extent, sample), strict=True):
            extents[case.id] = extent
            on_case(case.id, len(extents) / len(sample))
    spacings = np.array([case_spacing(case) for case in cases.values()])
    low, high = np.percentile(spacings, [10, 90], axis=0).round(4).tolist()
    volumes = np.percentile([tumour.volume_um3 / 1e12 for tumour in tumours], [10, 50, 90]).round(2).tolist()
    fingerprint = Fingerprint(
        cases=len(found),
        with_label_map=len(cases),
        patients=len({case.patient for case in cases.values()}),
        labels=convention.name,
        spacing_mm=median_by_axis([(x, y, z) for x, y, z in spacings.tolist()]),
        spacing_percentiles_mm=(tuple(low), tuple(high)),
        extents=extents,
        tumour_ml=tuple(volumes),
        enhancing_share=sum(tumour.enhances for tumour in tumours) / len(cases),
        bytes_on_disk=sum(path.stat().st_size for case in cases.values() for path in case.files),
    )
    return DataSet(cases=cases, label_maps=label_maps, convention=convention, fingerprint=fingerprint)


def _extent(case: Case) -> Extent:
    """Read the images and the label map of a case, and measure their boxes."""
    reference = reorient(read_image(case.contrasts["t1c"], case.volumes.get("t1c"), nan_to_zero=True))
    inside = reference.voxels != 0
    for contrast, path in case.contrasts.items():
        if contrast != "t1c":
            volume = in_order_of(reference, read_image(path, case.volumes.get(contrast), nan_to_zero=True))
            if volume.voxels.shape != inside.shape:
                raise DataError(
                    f"case {case.id}: {contrast} and t1c have different shapes. Run znormseg data check for details."
                )
            inside |= volume.voxels != 0
    if not inside.any():
        raise DataError(f"case {case.id}: all images are zero everywhere. Run znormseg data check for details.")
    assert case.label is not None
    tumour = in_order_of(reference, read_label_map(case.label)).voxels != 0
    return Extent(
        brain_mm=_sides(inside, reference.spacing_mm),
        tumour_mm=_sides(tumour, reference.spacing_mm) if tumour.any() else None,
    )


def _sides(mask: Any, spacing_mm: Spacing) -> Spacing:
    box = smallest_box(mask)
    x, y, z = ((part.stop - part.start) * mm for part, mm in zip(box, spacing_mm, strict=True))
    return (x, y, z)


def _spread(cases: Sequence[Case], count: int) -> list[Case]:
    """Return up to ``count`` cases, evenly spaced."""
    if len(cases) <= count:
        return list(cases)
    return [cases[round(place)] for place in np.linspace(0, len(cases) - 1, count)]
