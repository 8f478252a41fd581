"""Label maps for cases: from their files to files on the same grid."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.inference.cohort import Prediction, Predictions, predict_each
from app.inference.model import Predictor
from app.inference.probabilities import predict_codes
from app.inference.settings import DEFAULTS, PredictOptions
from app.progress import LOG, OnProgress, silent
from app.runlog import write_json
from app.runtime import Runtime, versions
from data.errors import DataError
from data.labels import REGIONS, LabelConvention, encode, to_regions
from data.layouts import Case
from data.nifti import Spacing, spacing_of, write_label_map
from data.preprocess import prepare
from data.presence import missing_contrasts

DISCLAIMER = "Research use only; not a medical device."


def predict(
    model: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    runtime: Runtime,
    options: PredictOptions = DEFAULTS,
    on_progress: OnProgress = silent,
) -> Predictions:
    """Predict cases one after the other; a bad case is noted and does not stop the others.

    Args:
        model: the trained network.
        cases: what to predict.
        output: folder, made where it is missing; gets ``<case>.nii.gz`` and ``<case>.json``.
        runtime: as the model was loaded for.
        options: what is asked for.
        on_progress: told which case is being worked on.

    Raises:
        DataError: ``output`` is a file.
        OSError: ``output`` cannot be written to.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; what is written is whole.
    """

    def one(case: Case) -> Prediction:
        return _predict_case(model, case, output, runtime, options)

    return predict_each(cases, output, one, on_progress=on_progress)


def _predict_case(
    model: Predictor,
    case: Case,
    output: Path,
    runtime: Runtime,
    options: PredictOptions,
) -> Prediction:
    label_map = place_for(case, output)
    began = time.monotonic()
    require_contrasts(case, model)
    prepared = prepare(case, spacing_mm=model.spacing_mm, nan_to_zero=options.nan_to_zero, all_contrasts=False)
    if absent := missing_contrasts(prepared.present):
        LOG.warning("case %s: predicted without %s, which is missing", case.id, ", ".join(absent))
    for contrast, count in prepared.zeroed.items():
        LOG.warning("case %s: %d voxels of %s were NaN or infinite and are taken as 0", case.id, count, contrast)
    was_read = time.monotonic()
    codes = predict_codes(model, prepared, runtime)
    computed = time.monotonic()
    convention = options.labels or case.written_convention or model.convention
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
        notes: what else belongs into the file: seconds by stage, voxels that were taken as 0, ``missing_contrasts``.
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
        **model.calibration.record(volumes, complete=not notes["missing_contrasts"]),
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
