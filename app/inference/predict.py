"""Label maps for cases: from their files to files on the same grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from app.errors import InterruptedRunError
from app.inference.model import Model, Predictor
from app.inference.windows import sliding_logits
from app.progress import LOG, OnProgress, Progress, silent
from app.runlog import write_json
from app.runtime import Runtime, versions
from data.errors import DataError
from data.labels import REGIONS, LabelConvention, encode, from_regions, to_regions
from data.layouts import Case
from data.nifti import Spacing, canonical_spacing, spacing_of, write_label_map
from data.preprocess import Prepared, prepare, to_native_grid
from data.presence import missing_contrasts

DISCLAIMER = "Research use only; not a medical device."


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What was written for one case."""

    case: str
    label_map: Path
    content: dict[str, Any]
    """As in ``<case>.json``."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """What was written for all cases, and what could not be."""

    done: tuple[Prediction, ...]
    failures: dict[str, str]
    """Case id to message."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {"cases": [prediction.content for prediction in self.done], "failures": self.failures}


def predict(
    model: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    runtime: Runtime,
    labels: LabelConvention | None = None,
    nan_to_zero: bool = False,
    on_progress: OnProgress = silent,
) -> Predictions:
    """Predict cases one after the other; a bad case is noted and does not stop the others.

    Args:
        model: the trained network.
        cases: what to predict.
        output: folder, made where it is missing; gets ``<case>.nii.gz`` and ``<case>.json``.
        runtime: as the model was loaded for.
        labels: numbers of the label maps; None takes those that go with each case's file names, else the model's.
        nan_to_zero: take voxels that are NaN or infinite as 0; how many is logged and stands in ``<case>.json``.
        on_progress: told which case is being worked on.

    Raises:
        DataError: ``output`` is a file.
        OSError: ``output`` cannot be written to.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; what is written is whole.
    """

    def one(case: Case) -> Prediction:
        return _predict_case(model, case, output, runtime, labels=labels, nan_to_zero=nan_to_zero)

    return predict_each(cases, output, one, on_progress=on_progress)


def predict_each(
    cases: Sequence[Case], output: Path, one: Callable[[Case], Prediction], *, on_progress: OnProgress = silent
) -> Predictions:
    """Call ``one`` for each case; a case that it refuses is noted and does not stop the others.

    Raises:
        DataError, OSError, InterruptedRunError: as :func:`predict`.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder for the label maps")
    done: list[Prediction] = []
    failures: dict[str, str] = {}
    try:
        output.mkdir(parents=True, exist_ok=True)
        for number, case in enumerate(cases):
            on_progress(Progress(job="predicting", share=number / len(cases), detail=case.id))
            try:
                done.append(one(case))
            except DataError as error:
                failures[case.id] = str(error)
                LOG.error("%s", error)
    except KeyboardInterrupt as error:
        raise InterruptedRunError(
            f"{str(error) or 'interrupted'} while predicting; {len(done)} of {len(cases)} label maps are in {output}, "
            "whole. The same command begins again."
        ) from error
    on_progress(Progress(job="predicting", share=1.0, detail=f"{len(done)} of {len(cases)} cases"))
    return Predictions(done=tuple(done), failures=failures)


def predict_codes(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.uint8]:
    """Label map of a prepared case, in the program's codes, on the case's own grid and voxel order."""
    masks = model.postprocess.cut(predict_centred(model, prepared, runtime))
    cleaned = model.postprocess.clean(masks, canonical_spacing(prepared.native_affine))
    return to_native_grid(from_regions(cleaned), prepared)


def predict_shares(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.float32]:
    """Probabilities of the regions of a prepared case, in canonical (LPS) voxel order, before post-processing.

    Returns:
        float32, shape (3, X, Y, Z) of the whole canonical volume, order of :data:`data.labels.REGIONS`; 0 outside of
        the brain.
    """
    shares = np.zeros((len(REGIONS), *prepared.canonical_shape), dtype=np.float32)
    shares[:, *prepared.box] = predict_centred(model, prepared, runtime) + np.float32(0.5)
    return shares


@torch.inference_mode()
def predict_centred(model: Predictor, prepared: Prepared, runtime: Runtime) -> npt.NDArray[np.float32]:
    """Probabilities less one half over the brain box, at the files' own spacing; the mean over the networks.

    The mean runs along, so that memory holds one answer beside it; and that of equal answers is exactly theirs.

    Returns:
        float32, shape (3, X, Y, Z) of the box, order of :data:`data.labels.REGIONS`; -0.5 outside of the brain.
    """
    mean: torch.Tensor | None = None
    for number, member in enumerate(model.members(), 1):
        # The sigmoid less one half; unlike it, it does not round a small logit to one half.
        answer = _box_logits(member, prepared, runtime).mul(0.5).tanh_().mul_(0.5)
        mean = answer if mean is None else mean.add_(answer.sub_(mean).div_(number))
        del member, answer
    assert mean is not None
    centred: npt.NDArray[np.float32] = mean.cpu().numpy()
    return np.where(prepared.brain, centred, np.float32(-0.5))


def _box_logits(model: Model, prepared: Prepared, runtime: Runtime) -> torch.Tensor:
    """Logits of shape (regions, X, Y, Z) over the brain box, at the files' own spacing."""
    logits = sliding_logits(
        model.given(prepared.present),
        torch.from_numpy(prepared.image),
        window=model.config.training.patch_voxels,
        overlap=model.config.inference.overlap,
        runtime=runtime,
    )
    if tuple(logits.shape[1:]) != prepared.box_shape:
        # Logits, not labels, go to the finer grid: borders stay smooth.
        logits = functional.interpolate(logits[None], prepared.box_shape, mode="trilinear", align_corners=False)[0]
    return logits


def _predict_case(
    model: Predictor,
    case: Case,
    output: Path,
    runtime: Runtime,
    *,
    labels: LabelConvention | None,
    nan_to_zero: bool,
) -> Prediction:
    label_map = place_for(case, output)
    began = time.monotonic()
    require_contrasts(case, model)
    prepared = prepare(case, spacing_mm=model.spacing_mm, nan_to_zero=nan_to_zero, all_contrasts=False)
    if absent := missing_contrasts(prepared.present):
        LOG.warning("case %s: predicted without %s, which is missing", case.id, ", ".join(absent))
    for contrast, count in prepared.zeroed.items():
        LOG.warning("case %s: %d voxels of %s were NaN or infinite and are taken as 0", case.id, count, contrast)
    was_read = time.monotonic()
    codes = predict_codes(model, prepared, runtime)
    computed = time.monotonic()
    convention = labels or case.written_convention or model.convention
    write_label_map(label_map, encode(codes, convention), case.contrasts[case.reference])
    return finish(
        model,
        case,
        codes,
        output,
        runtime,
        convention=convention,
        spacing_mm=spacing_of(prepared.native_affine),
        notes={
            "seconds": {
                "read": round(was_read - began, 3),
                "compute": round(computed - was_read, 3),
                "write": round(time.monotonic() - computed, 3),
            },
            "nan_to_zero": prepared.zeroed,
            "missing_contrasts": list(absent),
        },
    )


def finish(
    model: Predictor,
    case: Case,
    codes: npt.NDArray[np.uint8],
    output: Path,
    runtime: Runtime,
    *,
    convention: LabelConvention,
    spacing_mm: Spacing,
    notes: Mapping[str, Any],
) -> Prediction:
    """Write ``<case>.json`` beside a label map that is written.

    Args:
        model: what predicted.
        case: what was predicted.
        codes: the label map in the program's codes.
        output: folder of both files.
        runtime: as the model was loaded for.
        convention: what the numbers in the file mean.
        spacing_mm: of the label map's grid.
        notes: what else belongs into the file: seconds by stage, voxels that were taken as 0.
    """
    label_map = output / f"{case.id}.nii.gz"
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    volumes = [float(mask.sum()) * voxel_ml for mask in to_regions(codes)]
    content = {
        "case": case.id,
        "label_map": str(label_map),
        "volumes_ml": {region: round(ml, 3) for region, ml in zip(REGIONS, volumes, strict=True)},
        "labels": {
            "convention": convention.name,
            "necrosis": convention.necrosis,
            "oedema": convention.oedema,
            "enhancing": convention.enhancing,
        },
        **notes,
        "inputs": {contrast: str(path) for contrast, path in case.contrasts.items()},
        **model.record(),
        "runtime": list(runtime.reasons),
        "versions": versions(),
        "notice": DISCLAIMER,
    }
    write_json(output / f"{case.id}.json", content)
    return Prediction(case=case.id, label_map=label_map, content=content)


def require_contrasts(case: Case, model: Predictor) -> None:
    """Make sure that a case has what a network needs.

    Raises:
        DataError: as :meth:`data.layouts.Case.require`; a contrast may be missing where the network was trained so.
    """
    if model.takes_missing_contrasts or not missing_contrasts(case.contrasts):
        case.require(all_contrasts=False)
        return
    try:
        case.require()
    except DataError as error:
        raise DataError(
            f"{error}. This run needs all four; one trained with augment.contrast_dropout above 0 takes cases without."
        ) from error


def place_for(case: Case, output: Path) -> Path:
    """Where a case's label map is written.

    Raises:
        DataError: one of the case's own files is there.
    """
    label_map = output / f"{case.id}.nii.gz"
    for what, path in [*case.contrasts.items(), ("label map", case.label)]:
        if path is not None and path.resolve() == label_map.resolve():
            raise DataError(f"case {case.id}: the label map would replace its own {what}, {path}. Give another OUTPUT.")
    return label_map
