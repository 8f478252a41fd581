"""Out-of-fold probabilities: predictions of a network that was not trained on the case, one byte per voxel.

A file is a compressed npz of the smallest box that contains the brain and the reference::

    answers         uint8, shape (3, X, Y, Z), order of data.labels.REGIONS
    reference       uint8, shape (X, Y, Z), the program's label codes
    spacing_mm      float64, shape (3,)
    logit_counts    int64, shape (3, 2, bins): voxels around the tumour by their logit (app.experiments.crossval.logits)
    weights_sha256  hash of the network's weights, as text
    computed_by     backend, precision and device, a JSON object as text (missing in versions that always used torch)

A probability is above k/256 exactly if its byte is k or more (k from 1 to 255), so thresholds that are whole 256ths
give the same masks from bytes as from probabilities. Bytes are too coarse for fitting temperatures: anything below
1/256 would count as 1/512, and most of the background is far below that. Hence the logit counts.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from app.errors import RunError
from app.evaluation.reliability import box_around
from app.experiments.crossval.logits import Counts, count_logits, no_counts
from app.inference.model import Model
from app.inference.postprocess import Masks, Postprocess
from app.inference.probabilities import predict_centred
from app.system.device import Runtime
from data.datasets.layouts import Case
from data.errors import DataError
from data.files import replacing
from data.labels import LabelConvention, decode, to_regions
from data.nifti import Spacing, canonical_spacing, read_label_map, reorient
from data.npy import parse_npy
from data.preprocess import prepare, smallest_box

Bytes = npt.NDArray[np.uint8]

_STEPS: Final = 256
_DAMAGE: Final = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True, kw_only=True)
class OutOfFoldPrediction:
    """A network's prediction of a case, and the reference."""

    answers: Bytes
    """Probabilities as bytes, shape (3, X, Y, Z)."""
    reference: Bytes
    """Label codes of the program, shape (X, Y, Z)."""
    logit_counts: Counts
    """Counts from :func:`app.experiments.crossval.logits.count_logits` for the voxels around the tumour; all 0 if there
    is none.
    """
    spacing_mm: Spacing
    weights_sha256: str
    computed_by: Mapping[str, str] | None = None
    """From :meth:`app.system.device.Runtime.record`; None in files of versions that did not record it."""

    def cut(self, rules: Postprocess) -> Masks:
        """Like :meth:`app.inference.postprocess.Postprocess.cut`, for thresholds that are whole 256ths."""
        bounds = [threshold * _STEPS for threshold in rules.thresholds]
        assert all(bound == int(bound) for bound in bounds)
        return np.asarray(self.answers >= np.array(bounds).reshape(3, 1, 1, 1))


def to_bytes(centred: npt.NDArray[np.float32]) -> Bytes:
    """Convert probabilities minus one half to one byte each.

    Example:
        >>> to_bytes(np.array([-0.5, 0.0, 1e-9, 0.5], dtype=np.float32)).tolist()
        [0, 127, 128, 255]
    """
    values: Bytes = np.clip(np.ceil(centred * _STEPS) + (_STEPS // 2 - 1), 0, _STEPS - 1).astype(np.uint8)
    return values


def predict_left_out(
    model: Model, case: Case, runtime: Runtime, *, convention: LabelConvention, nan_to_zero: bool = False
) -> OutOfFoldPrediction:
    """Predict a case and read its reference.

    Args:
        model: a model that was not trained on the case.
        case: a case with a label map.
        runtime: the runtime that the model was loaded for.
        convention: label convention of the label map.
        nan_to_zero: replace NaN and infinite voxels by 0.

    Raises:
        DataError: the case cannot be used.
    """
    prepared = prepare(case, spacing_mm=model.spacing_mm, convention=convention, nan_to_zero=nan_to_zero)
    assert case.label is not None
    reference = decode(reorient(read_label_map(case.label)).voxels, convention)
    if reference.shape != prepared.canonical_shape:
        raise DataError(
            f"case {case.id}: the label map has shape {reference.shape}, the images {prepared.canonical_shape}"
        )
    spacing_mm = canonical_spacing(prepared.native_affine)
    centred = np.full((3, *prepared.canonical_shape), -0.5, dtype=np.float32)
    centred[:, *prepared.box] = predict_centred(model, prepared, runtime)
    around = box_around((centred[0] > 0) | (reference != 0), spacing_mm)
    held = reference != 0
    held[prepared.box] = True
    box = smallest_box(held)
    return OutOfFoldPrediction(
        answers=to_bytes(centred[:, *box]),
        reference=np.ascontiguousarray(reference[box]),
        logit_counts=no_counts()
        if around is None
        else count_logits(centred[:, *around], to_regions(reference[around])),
        spacing_mm=spacing_mm,
        weights_sha256=model.sha256,
        computed_by=runtime.record(),
    )


def write_prediction(path: Path, prediction: OutOfFoldPrediction) -> None:
    """Write an out-of-fold file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {
        "answers": prediction.answers,
        "reference": prediction.reference,
        "logit_counts": prediction.logit_counts,
        "spacing_mm": np.array(prediction.spacing_mm, dtype=np.float64),
        "weights_sha256": np.array(prediction.weights_sha256),
    }
    if prediction.computed_by is not None:
        arrays["computed_by"] = np.array(json.dumps(dict(prediction.computed_by)))
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **arrays)


def read_counts(path: Path) -> Counts:
    """Read only the logit counts of an out-of-fold file.

    Raises:
        RunError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return _counts(_array(file, "logit_counts"))


def read_prediction(path: Path) -> OutOfFoldPrediction:
    """Read an out-of-fold file.

    Raises:
        RunError: the file is missing or damaged.
    """
    with _opened(path) as file:
        answers, reference = _array(file, "answers"), _array(file, "reference")
        x, y, z = _array(file, "spacing_mm").tolist()
        if answers.dtype != np.uint8 or reference.dtype != np.uint8 or answers.shape != (3, *reference.shape):
            raise ValueError(f"it contains {answers.dtype} {answers.shape} and {reference.dtype} {reference.shape}")
        return OutOfFoldPrediction(
            answers=answers,
            reference=reference,
            logit_counts=_counts(_array(file, "logit_counts")),
            spacing_mm=(x, y, z),
            weights_sha256=str(_array(file, "weights_sha256")),
            computed_by=_computed_by(file),
        )


def read_computed_by(path: Path) -> dict[str, str] | None:
    """Read the runtime that computed a file (:meth:`app.system.device.Runtime.record`); None if it was not recorded.

    Raises:
        RunError: the file is missing or damaged.
    """
    with _opened(path) as file:
        return _computed_by(file)


def is_of(path: Path, weights_sha256: str) -> bool:
    """Whether a file exists, is complete and comes from the network with these weights; its voxels are not checked."""
    try:
        with _opened(path) as file:
            return _has(file, "logit_counts") and str(_array(file, "weights_sha256")) == weights_sha256
    except RunError:
        return False


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a file for the block; errors within it mean that the file is missing or damaged."""
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as file:
            yield file
    except _DAMAGE as error:
        raise RunError(f"{path}: missing or damaged ({error}). Delete it to predict its case again.") from error


def _has(file: zipfile.ZipFile, name: str) -> bool:
    return f"{name}.npy" in file.namelist()


def _array(file: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    return parse_npy(file.read(f"{name}.npy"))


def _computed_by(file: zipfile.ZipFile) -> dict[str, str] | None:
    if not _has(file, "computed_by"):
        return None
    record = json.loads(str(_array(file, "computed_by")))
    if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
        raise ValueError(f"computed_by is {record!r}")
    return record


def _counts(found: Counts) -> Counts:
    if found.dtype != np.int64 or found.shape != no_counts().shape or found.min() < 0:
        raise ValueError(f"it contains logit counts of {found.dtype} {found.shape}")
    return found
