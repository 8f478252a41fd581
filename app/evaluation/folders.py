"""Match two folders of label maps, predictions and references, and score the cases that both have."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Final, TypeVar

import numpy as np

from app.errors import message
from app.progress import LOG
from data.datasets.layouts import Case, decide_for
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import LabelConvention, require_known_values, values_in
from data.nifti import Spacing, Volume, grid_difference, in_order_of, read_label_map
from data.preprocess import smallest_box

#: File with the probabilities of all cases in a folder of presence predictions.
PREDICTIONS_FILE: Final = "predictions.csv"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: Called with each case id that was scored or failed, and the share of cases done so far.
OnCase = Callable[[str, float], None]

_NAMING_RULES: Final = (
    "A label map is matched by its case id, the file name without -seg or _seg and .nii or .nii.gz: "
    "<case>.nii.gz, <case>-seg.nii.gz and <case>_seg.nii.gz all belong to <case>."
)
_SHOWN: Final = 3
_KEPT_BYTES: Final = 1 << 29


@dataclass(frozen=True, kw_only=True)
class Folders:
    """Label maps of two folders, matched by case."""

    predicted: Mapping[str, Path]
    """Predicted label maps by case id."""
    expected: Mapping[str, Path]
    """Reference label maps by case id."""
    prediction_convention: LabelConvention
    """Label convention of the predictions."""
    reference_convention: LabelConvention
    """Label convention of the references."""
    faults: Mapping[str, str]
    """Reasons why cases with both label maps cannot be read, by case id."""
    read: Callable[[Path], Volume]
    """Reads one of the label maps, or returns it from memory; see :class:`LabelMapsOnce`."""
    pixdim_mm: Mapping[str, Spacing]
    """Voxel size stated in the header of the prediction, or else of the reference, if it disagrees with the affine,
    which takes precedence; by case id, for cases with both label maps."""

    @property
    def common(self) -> list[str]:
        """Sorted case ids that both folders have; at least one."""
        return sorted(self.predicted.keys() & self.expected.keys())

    @property
    def missing_predictions(self) -> tuple[str, ...]:
        """Sorted case ids that have a reference but no prediction."""
        return tuple(sorted(self.expected.keys() - self.predicted.keys()))

    @property
    def missing_references(self) -> tuple[str, ...]:
        """Sorted case ids that have a prediction but no reference."""
        return tuple(sorted(self.predicted.keys() - self.expected.keys()))

    def same_grid_pair(self, case: str) -> tuple[Volume, Volume]:
        """Read the prediction and the reference of a case, both in the voxel order of the reference.

        Raises:
            DataError: a file cannot be read, or the two are on different grids.
        """
        reference = self.read(self.expected[case])
        prediction = in_order_of(reference, self.read(self.predicted[case]))
        difference = grid_difference(prediction, reference)
        if difference is not None:
            raise DataError(
                f"{prediction.path} and {reference.path} are on different grids: {difference}. The challenge compares "
                "voxel by voxel: resample the prediction to the grid of the reference first."
            )
        return prediction, reference


def match(predictions: DataSource, references: DataSource) -> Folders:
    """Find the label maps of both folders and determine their label conventions.

    A header whose voxel size disagrees with its affine causes a warning; the affine takes precedence.

    Args:
        predictions: the predicted label maps.
        references: the reference label maps.

    Raises:
        DataError: a folder cannot be used, a folder mixes label conventions, or the folders have no case in common.
    """
    predicted_cases, expected_cases = predictions.find_label_cases(), references.find_label_cases()
    predicted, expected = _label_maps(predicted_cases), _label_maps(expected_cases)
    both = predicted.keys() & expected.keys()
    if not both:
        raise DataError(
            f"no case is in both folders: {predictions.root} has {first_ids(predicted)}; {references.root} has "
            f"{first_ids(expected)}. {_NAMING_RULES}"
        )
    maps = LabelMapsOnce(frozenset(side[case] for side in (predicted, expected) for case in both))
    prediction_convention, prediction_faults = _survey(predictions, predicted_cases, maps)
    reference_convention, reference_faults = _survey(references, expected_cases, maps)
    pixdim_mm = {
        case: stated_mm
        for case in sorted(both)
        if (stated_mm := maps.pixdim_mm.get(predicted[case]) or maps.pixdim_mm.get(expected[case])) is not None
    }
    if pixdim_mm:
        first, (x, y, z) = next(iter(pixdim_mm.items()))
        LOG.warning(
            f"the voxel size in the header (pixdim) differs from that of the affine: {first_ids(pixdim_mm)}; in "
            f"{first}, pixdim is {x:g} x {y:g} x {z:g} mm. The affine is used. Programs that use pixdim, such as the "
            "scripts of BraTS 2023 and of MEN 2024, report other distances and volumes."
        )
    return Folders(
        predicted=predicted,
        expected=expected,
        prediction_convention=prediction_convention,
        reference_convention=reference_convention,
        faults=reference_faults | prediction_faults,
        read=maps.give,
        pixdim_mm=pixdim_mm,
    )


class LabelMapsOnce:
    """Label maps that are used twice (to determine the convention and to score) but read only once.

    After the first use a label map is kept in memory, cropped to its foreground, if the size limit allows.
    """

    def __init__(self, paths: frozenset[Path], *, room_bytes: int = _KEPT_BYTES) -> None:
        """Set up an empty store.

        Args:
            paths: the label maps that will be used twice.
            room_bytes: maximum total size of the label maps in memory; default: 512 MiB.
        """
        self._paths, self._room_bytes, self._lock = paths, room_bytes, Lock()
        self._kept: dict[Path, tuple[Volume, tuple[slice, slice, slice], tuple[int, ...]]] = {}
        #: Voxel size in the header of each label map whose affine states a different one.
        self.pixdim_mm: dict[Path, Spacing] = {}

    def values(self, path: Path) -> set[int]:
        """Return the distinct values in a label map.

        Raises:
            DataError: as raised by :func:`data.nifti.read_label_map`.
        """
        volume = read_label_map(path)
        if volume.pixdim_mm is not None:
            with self._lock:
                self.pixdim_mm[path] = volume.pixdim_mm
        mask = volume.voxels != 0
        if not mask.any():
            return {0}
        box = smallest_box(mask)
        inside = volume.voxels[box].copy(order="K")
        with self._lock:
            if path in self._paths and inside.nbytes <= self._room_bytes:
                self._room_bytes -= inside.nbytes
                self._kept[path] = replace(volume, voxels=inside), box, volume.voxels.shape
        return {int(value) for value in values_in(inside)} | ({0} if inside.size < mask.size else set())

    def give(self, path: Path) -> Volume:
        """Return a label map: hand over the copy kept in memory, or else read the file again.

        Raises:
            DataError: as raised by :func:`data.nifti.read_label_map`.
        """
        with self._lock:
            kept = self._kept.pop(path, None)
            self._room_bytes += kept[0].voxels.nbytes if kept is not None else 0
        if kept is None:
            return read_label_map(path)
        volume, box, shape = kept
        voxels = np.zeros(shape, dtype=np.uint8, order="F" if volume.voxels.flags.f_contiguous else "C")
        voxels[box] = volume.voxels
        return replace(volume, voxels=voxels)


def score_each(
    folders: Folders,
    score: Callable[[str], _Result],
    *,
    on_case: OnCase | None = None,
    workers: int | None = None,
    on_stop: Callable[[], None] = lambda: None,
) -> tuple[list[_Result], dict[str, str]]:
    """Score the cases that both folders have, several at once.

    Args:
        folders: folders from :func:`match`.
        score: scores the case with a given id.
        on_case: called on the caller's thread, in the order of the ids.
        workers: number of cases at a time; default: one per core.
        on_stop: called if the job is interrupted or fails, to end whatever ``score`` waits for in other threads.

    Returns:
        the results of ``score`` in the order of the ids, without failed cases; and the reasons for failures, by id.

    Raises:
        DataError: no case could be scored; the message gives reasons.
    """

    def outcome(case: str) -> _Result | DataError:
        try:
            if case in folders.faults:
                raise DataError(folders.faults[case])
            return score(case)
        except (DataError, OSError) as error:
            return DataError(message(error))

    def announce(number: int) -> None:
        if on_case is not None:
            on_case(common[number], (number + 1) / len(common))

    common = folders.common
    outcomes = _parallel(outcome, common, on_done=announce, workers=workers, on_stop=on_stop)
    failures = {case: str(found) for case, found in zip(common, outcomes, strict=True) if isinstance(found, DataError)}
    if len(failures) == len(common):
        reasons = " ".join(list(failures.values())[:_SHOWN])
        raise DataError(f"none of the {len(common)} cases in both folders could be scored. {reasons}")
    return [found for found in outcomes if not isinstance(found, DataError)], failures


def _label_maps(cases: Mapping[str, Case]) -> dict[str, Path]:
    return {case_id: case.label for case_id, case in cases.items() if case.label is not None}


def _survey(
    source: DataSource, cases: Mapping[str, Case], maps: LabelMapsOnce
) -> tuple[LabelConvention, dict[str, str]]:
    """Determine one side's convention from all of its files; also return why files are unusable, by case id.

    Cases without a counterpart are read too: they may contain the only 3 or 4 of the data set.
    """
    label_maps = _label_maps(cases)

    def values(path: Path) -> set[int] | str:
        try:
            found = maps.values(path)
            require_known_values(found)
        except (DataError, OSError) as error:
            text = message(error)
            return text if str(path) in text else f"{path}: {text}"
        return found

    outcomes = dict(zip(label_maps, _parallel(values, label_maps.values()), strict=True))
    faults = {case: outcome for case, outcome in outcomes.items() if isinstance(outcome, str)}
    seen = {case: outcome for case, outcome in outcomes.items() if not isinstance(outcome, str)}
    try:
        return decide_for(seen, list(cases.values()), labels=source.labels), faults
    except DataError as error:
        raise DataError(f"{source.root}: {error}") from error


def _parallel(
    function: Callable[[_Item], _Result],
    items: Collection[_Item],
    *,
    on_done: Callable[[int], None] = lambda _: None,
    workers: int | None = None,
    on_stop: Callable[[], None] = lambda: None,
) -> list[_Result]:
    """Return results in the order of the items, computed in parallel; an exception or Ctrl-C cancels pending items."""
    results = []
    with ThreadPoolExecutor(max_workers=workers or os.cpu_count()) as pool:
        futures = [pool.submit(function, item) for item in items]
        try:
            for number, future in enumerate(futures):
                results.append(future.result())
                on_done(number)
        except BaseException:
            on_stop()  # before the pool waits for its threads
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return results


def first_ids(ids: Collection[str]) -> str:
    """Format the first few case ids: ``a, b, c and 7 more``."""
    shown = ", ".join(list(ids)[:_SHOWN])
    return shown if len(ids) <= _SHOWN else f"{shown} and {len(ids) - _SHOWN} more"
