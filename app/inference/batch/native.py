"""Label maps for scans as they come from the scanner: prepared, predicted, and mapped back to a scan's own grid."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from app.config.inference import DEFAULTS, PredictOptions
from app.inference.batch.cohort import Prediction, Predictions, predict_each
from app.inference.batch.fingerprint import settings_of
from app.inference.batch.manifest import this_worker
from app.inference.batch.pipeline import InThisProcess, Steps, most_voxels_ahead
from app.inference.batch.predict import asked_for, finish, place_for, unusual_contrasts, write_companions
from app.inference.confidence import Companion, ShareSteps, Trust, companions, measure_confidence, nested
from app.inference.flags import CaseFacts, Flag, flags_of
from app.inference.model import Predictor
from app.inference.probabilities import fallback_for, on_canonical_grid, predict_answer
from app.progress import LOG, OnProgress, silent
from app.system.device import Runtime
from data.datasets.layouts import Case, find_cases, misnamed_files
from data.errors import DataError
from data.files import file_sha256
from data.labels import Contrast, encode, from_regions, to_regions
from data.native_space.brain_mask import MASK_WORDS
from data.native_space.case_files import write_brats_case
from data.native_space.from_brats import cut_back, means_back
from data.native_space.itk import grid_of
from data.native_space.to_brats import (
    BringInConfig,
    BroughtIn,
    NativeCase,
    background_warnings,
    bring_in,
    read_native,
    zeroed_warnings,
)
from data.nifti import Spacing, canonical_spacing, spacing_of, write_label_map
from data.preprocess import image_problem, prepare


@dataclass(frozen=True, kw_only=True)
class NativeAnswer:
    """A label map on the grid of one scan, and how the case was prepared."""

    codes: npt.NDArray[np.uint8]
    """The program's codes, shape of the scan's image."""
    brought: BroughtIn
    companions: Mapping[Companion, ShareSteps]
    """Contents of the optional files, in 65535ths, on the same grid, shape (X, Y, Z, 3)."""
    trust: Trust
    flags: tuple[Flag, ...]
    ladder: tuple[str, ...]
    """What was done because memory was short, one sentence each."""


def predict_native(
    model: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    runtime: Runtime,
    config: BringInConfig,
    space: Contrast = "t1c",
    options: PredictOptions = DEFAULTS,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Predictions:
    """Predict cases whose contrasts are on different grids; label maps are on the grid of ``space``.

    Args:
        model: the trained network.
        cases: the cases to predict.
        output: folder, created if missing; receives ``<case>.nii.gz`` and ``<case>.json``.
        runtime: the one that the model was loaded for.
        config: how cases are prepared.
        space: the contrast whose file gives the label map its grid and header.
        options: options of the prediction.
        overwrite: also predict finished cases.
        on_progress: called with the case and step in progress.

    Raises:
        DataError, OSError, InterruptedRunError: as in :func:`app.inference.batch.predict.predict`.
    """
    settings = native_settings(model, options, config, space)
    engine = InThisProcess(
        steps=native_steps(model, output, runtime, config=config, space=space, options=options),
        output=output,
        settings=settings,
        worker=this_worker(runtime.device_name),
    )
    return predict_each(cases, output, engine, settings=settings, overwrite=overwrite, on_progress=on_progress)


def native_settings(
    model: Predictor, options: PredictOptions, config: BringInConfig, space: Contrast
) -> dict[str, Any]:
    """What determines a case's result besides its files; see :func:`app.inference.batch.fingerprint.settings_of`."""
    prepare = asdict(config)
    if config.mask not in MASK_WORDS and (mask := Path(config.mask)).is_file():
        prepare["mask"] = file_sha256(mask)
    return settings_of(model, options, prepare=prepare, space=space)


def native_steps(
    model: Predictor,
    output: Path,
    runtime: Runtime,
    *,
    config: BringInConfig,
    space: Contrast = "t1c",
    options: PredictOptions = DEFAULTS,
) -> Steps[_Read, _Answered]:
    """The three steps of each case for an executor: read the scans, prepare and predict, write."""

    def read(case: Case) -> _Read:
        place_for(case, output, asked_for(options))
        began = time.monotonic()
        for text in misnamed_files(replace(case, label=None)):
            LOG.warning("case %s: %s", case.id, text)
        native = read_native(replace(case, label=None), nan_to_zero=options.nan_to_zero)
        return _Read(case=case, native=native, seconds=time.monotonic() - began)

    def compute(given: _Read, on_step: Callable[[str], None]) -> _Answered:
        began = time.monotonic()
        answer = answer_for(model, given.native, runtime, config=config, space=space, options=options, on_step=on_step)
        for warning in answer.brought.warnings:
            LOG.warning("case %s: %s", given.case.id, warning)
        return _Answered(
            case=given.case,
            answer=answer,
            spacing_mm=spacing_of(grid_of(given.native.images[space]).affine),
            zeroed=dict(given.native.zeroed),
            seconds=given.seconds + time.monotonic() - began,
        )

    def write(answered: _Answered) -> Prediction:
        case, began = answered.case, time.monotonic()
        convention = options.labels or case.written_convention or model.convention
        write_label_map(place_for(case, output), encode(answered.answer.codes, convention), case.contrasts[space])
        write_companions(case, answered.answer.companions, output, case.contrasts[space])
        return finish(
            model,
            case,
            answered.answer.codes,
            output,
            runtime,
            convention=convention,
            spacing_mm=answered.spacing_mm,
            trust=answered.answer.trust,
            companions=tuple(answered.answer.companions),
            flags=answered.answer.flags,
            notes={
                "seconds": {
                    "prepare and compute": round(answered.seconds, 3),
                    "write": round(time.monotonic() - began, 3),
                },
                "nan_to_zero": answered.zeroed,
                "missing_contrasts": [],
                "ladder": list(answered.answer.ladder),
                "space": space,
                "prepare": answered.answer.brought.record,
            },
        )

    return Steps(read=read, compute=compute, write=write, most_voxels_ahead=most_voxels_ahead(options))


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A case whose scans have been read."""

    case: Case
    native: NativeCase
    seconds: float


@dataclass(frozen=True, kw_only=True)
class _Answered:
    """A case that can be written."""

    case: Case
    answer: NativeAnswer
    spacing_mm: Spacing
    zeroed: dict[Contrast, int]
    seconds: float


def answer_for(
    model: Predictor,
    native: NativeCase,
    runtime: Runtime,
    *,
    config: BringInConfig,
    space: Contrast = "t1c",
    options: PredictOptions = DEFAULTS,
    on_step: Callable[[str], None] = lambda _: None,
) -> NativeAnswer:
    """Prepare one case, predict it and map the answer back.

    Args:
        model: the trained network.
        native: the four contrasts, from files or any other source.
        runtime: the one that the model was loaded for.
        config: how the case is prepared.
        space: the contrast whose grid the answer is mapped to.
        options: options of the prediction.
        on_step: called with a description of each step.

    Raises:
        DataError: the case cannot be prepared, or is not a skull-stripped brain afterwards.
    """
    brought = bring_in(native, config, on_step=on_step)
    for contrast, voxels in brought.images.items():
        if (problem := image_problem(voxels)) is not None:
            raise DataError(f"case {native.id}, contrast {contrast}, prepared: {problem}.")
    on_step(f"{native.id}: network")
    with tempfile.TemporaryDirectory(prefix="znormseg-") as folder:
        write_brats_case(brought, Path(folder))
        (case,) = find_cases(Path(folder))
        prepared = prepare(case, spacing_mm=model.spacing_mm)
    # The case was written in canonical voxel order, so the answer is in that order too.
    fallback = fallback_for(options)
    answer = predict_answer(model, prepared, runtime, options=options, fallback=fallback)
    on_step(f"{native.id}: back to the grid of {space}")
    target = grid_of(native.images[space])

    def back(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        whole = on_canonical_grid(values, prepared)
        return means_back(whole, brought.grid, brought.transform(space), target, source=Path(native.id))

    spacing_mm = spacing_of(target.affine)
    shares = back(answer.centred + np.float32(0.5))
    masks = model.postprocess.clean(to_regions(cut_back(shares, model.postprocess.thresholds)), spacing_mm)
    shown = nested(model.calibration.apply(shares - np.float32(0.5)))
    disagreement = None if answer.disagreement is None else np.clip(back(answer.disagreement), 0, 1)
    trust = measure_confidence(
        masks,
        shown,
        spacing_mm,
        answer_voxels=answer.volumes_voxels,
        answer_spacing_mm=canonical_spacing(prepared.native_affine),
        networks=answer.networks,
        flips=answer.flips,
    )
    flagged = {*zeroed_warnings(native), *background_warnings(native)}
    registered = [f"{contrast} was registered to t1c and resampled" for contrast in brought.registrations]
    facts = CaseFacts(
        case=native.id,
        trust=trust,
        zeroed=native.zeroed,
        backgrounds=native.backgrounds,
        repairs=(*native.doubts, *registered),
        preparation=tuple(one for one in brought.warnings if one not in flagged),
        unusual=unusual_contrasts(prepared, options.training),
        training=options.training,
    )
    return NativeAnswer(
        codes=from_regions(masks),
        brought=brought,
        companions={
            name: np.moveaxis(steps, 0, -1) for name, steps in companions(shown, disagreement, options).items()
        },
        trust=trust,
        flags=flags_of(facts),
        ladder=tuple(fallback.sentences),
    )
