"""Label maps for cases: from their files to files on the same grid."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
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
from app.inference.confidence import COMPANIONS, Companion, ShareSteps, Trust, companions, measure_confidence, nested
from app.inference.flags import CaseFacts, Flag, flags_of
from app.inference.model import Predictor
from app.inference.probabilities import fallback_for, predict_answer, predict_masks, warm_up
from app.notice import NOTICE
from app.progress import LOG, OnProgress, silent
from app.runs.training_record import TrainingRecord
from app.system.device import Runtime, versions
from app.system.process import give_back_freed_memory
from data.contrasts import missing_contrasts
from data.datasets.layouts import Case, misnamed_files
from data.errors import DataError
from data.files import most_name_bytes
from data.labels import REGIONS, Contrast, LabelConvention, encode, from_regions, to_regions
from data.nifti import Spacing, canonical_spacing, spacing_of, write_label_map, write_shares
from data.preprocess import Prepared, prepare, to_native_grid, values_to_native_grid
from data.quality.intensity_range import quantiles_of


def predict(
    model: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    runtime: Runtime,
    options: PredictOptions = DEFAULTS,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Predictions:
    """Predict cases in this process; a failed case is recorded and does not stop the others, finished ones are kept.

    Args:
        model: the trained network.
        cases: the cases to predict.
        output: folder, created if missing; receives ``<case>.nii.gz``, ``<case>.json`` and ``manifest.json``.
        runtime: the one that the model was loaded for.
        options: options of the prediction.
        overwrite: also predict finished cases.
        on_progress: called with the case that is being worked on.

    Raises:
        DataError: ``output`` is a file.
        OSError: ``output`` cannot be written to.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; all files that were written are complete.
    """
    settings = settings_of(model, options)
    engine = InThisProcess(
        steps=steps_of(model, output, runtime, options),
        output=output,
        settings=settings,
        worker=this_worker(runtime.device_name),
    )
    return predict_each(cases, output, engine, settings=settings, overwrite=overwrite, on_progress=on_progress)


@dataclass(frozen=True, kw_only=True)
class PreparedCase:
    """A case that has been read and can be computed."""

    case: Case
    prepared: Prepared
    options: PredictOptions
    seconds: float
    """Time spent on reading and preparing."""


@dataclass(frozen=True, kw_only=True)
class ComputedCase:
    """A case that has been predicted and can be written; the network's input has been freed."""

    case: Case
    codes: npt.NDArray[np.uint8]
    """Label map in the program's codes, on the grid and in the voxel order of the case's files."""
    spacing_mm: Spacing
    """Spacing of the files' grid."""
    companions: Mapping[Companion, ShareSteps]
    """Contents of the optional files, in 65535ths, on the same grid, shape (X, Y, Z, 3)."""
    trust: Trust
    flags: tuple[Flag, ...]
    options: PredictOptions
    zeroed: Mapping[Contrast, int]
    """By contrast: number of NaN or infinite voxels that were replaced with 0."""
    missing: tuple[Contrast, ...]
    """Contrasts that the case lacks."""
    ladder: tuple[str, ...]
    """What was done because memory was short, one sentence each."""
    seconds: Mapping[str, float]
    """Time spent on ``read`` and ``compute``."""


def steps_of(
    model: Predictor, output: Path, runtime: Runtime, options: PredictOptions = DEFAULTS
) -> Steps[PreparedCase, ComputedCase]:
    """The three steps of each case for an executor."""
    return Steps(
        read=lambda case: prepare_case(model, case, output, options),
        compute=lambda given, _: compute_case(model, given, runtime),
        write=lambda computed: write_label_map_of(model, computed, output, runtime),
        warm_up=lambda: warm_up(model, runtime, options),
        most_voxels_ahead=most_voxels_ahead(options),
    )


def prepare_case(model: Predictor, case: Case, output: Path, options: PredictOptions = DEFAULTS) -> PreparedCase:
    """Read a case and prepare it for a network; uses no device, so another thread can do it for the next case.

    Raises:
        DataError: as in :func:`data.preprocess.prepare`, :func:`require_contrasts` and :func:`place_for`.
    """
    place_for(case, output, asked_for(options))
    began = time.monotonic()
    require_contrasts(case, model)
    prepared = prepare(case, spacing_mm=model.spacing_mm, nan_to_zero=options.nan_to_zero, all_contrasts=False)
    if absent := missing_contrasts(prepared.present):
        hint = f"; these names match no contrast: {', '.join(case.unrecognised[:3])}" if case.unrecognised else ""
        LOG.warning("case %s: predicted without %s, which is missing%s", case.id, ", ".join(absent), hint)
    for text in misnamed_files(replace(case, label=None)):
        LOG.warning("case %s: %s", case.id, text)
    for contrast, count in prepared.zeroed.items():
        LOG.warning("case %s: %d voxels of %s were NaN or infinite and are taken as 0", case.id, count, contrast)
    for contrast, sentence in prepared.backgrounds.items():
        LOG.warning("case %s, contrast %s: %s", case.id, contrast, sentence)
    return PreparedCase(case=case, prepared=prepared, options=options, seconds=time.monotonic() - began)


def compute_case(model: Predictor, given: PreparedCase, runtime: Runtime) -> ComputedCase:
    """Predict a prepared case; the only one of the three steps that uses the device.

    Raises:
        DataError: memory is not sufficient.
    """
    began = time.monotonic()
    prepared, options = given.prepared, given.options
    fallback = fallback_for(options)
    give_back_freed_memory()
    try:
        answer = predict_answer(model, prepared, runtime, options=options, fallback=fallback)
    except DataError as error:
        raise DataError(f"case {given.case.id}: {error}") from error
    if options.uncertainty and answer.disagreement is None:
        LOG.info("case %s: uncertainty of one answer alone; --tta or an ensemble give several", given.case.id)
    masks, shares = predict_masks(model, prepared, answer.centred), nested(model.calibration.apply(answer.centred))
    spacing_mm = canonical_spacing(prepared.native_affine)
    found = companions(shares, answer.disagreement, options)
    trust = measure_confidence(
        masks,
        shares,
        spacing_mm,
        answer_voxels=answer.volumes_voxels,
        answer_spacing_mm=spacing_mm,
        networks=answer.networks,
        flips=answer.flips,
    )
    missing = missing_contrasts(prepared.present)
    facts = CaseFacts(
        case=given.case.id,
        trust=trust,
        missing=missing,
        zeroed=prepared.zeroed,
        backgrounds=prepared.backgrounds,
        repairs=prepared.repairs,
        unusual=unusual_contrasts(prepared, options.training),
        training=options.training,
    )
    return ComputedCase(
        case=given.case,
        codes=to_native_grid(from_regions(masks), prepared),
        spacing_mm=spacing_of(prepared.native_affine),
        companions={name: values_to_native_grid(steps, prepared) for name, steps in found.items()},
        trust=trust,
        flags=flags_of(facts),
        options=given.options,
        zeroed=given.prepared.zeroed,
        missing=missing,
        ladder=tuple(fallback.sentences),
        seconds={"read": given.seconds, "compute": time.monotonic() - began},
    )


def write_label_map_of(model: Predictor, computed: ComputedCase, output: Path, runtime: Runtime) -> Prediction:
    """Write the label map of a case; uses no device, so another thread can do it. The executor writes the JSON.

    Raises:
        DataError: the label map would replace a file of the case.
        OSError: the folder cannot be written to.
    """
    case = computed.case
    began = time.monotonic()
    convention = computed.options.labels or case.written_convention or model.convention
    write_label_map(place_for(case, output), encode(computed.codes, convention), case.contrasts[case.reference])
    write_companions(case, computed.companions, output, case.contrasts[case.reference])
    seconds = {**computed.seconds, "write": time.monotonic() - began}
    return finish(
        model,
        case,
        computed.codes,
        output,
        runtime,
        convention=convention,
        spacing_mm=computed.spacing_mm,
        trust=computed.trust,
        companions=tuple(computed.companions),
        flags=computed.flags,
        notes={
            "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()},
            "nan_to_zero": dict(computed.zeroed),
            "missing_contrasts": list(computed.missing),
            "ladder": list(computed.ladder),
        },
    )


def unusual_contrasts(prepared: Prepared, training: TrainingRecord) -> tuple[Contrast, ...]:
    """Contrasts of a case whose intensities are unlike those of the training cases; empty if those are unknown."""
    return () if training.intensities is None else training.intensities.unusual(quantiles_of(prepared.image))


def write_companions(case: Case, found: Mapping[Companion, ShareSteps], output: Path, reference: Path) -> None:
    """Write the optional files next to a label map.

    Args:
        case: the predicted case.
        found: contents by name, in 65535ths, shape (X, Y, Z, 3).
        output: folder of the label map.
        reference: file whose grid the contents are on.
    """
    for name, steps in found.items():
        write_shares(companion_path(case, name, output), steps, reference, what=f"{name} of {', '.join(REGIONS)}")


def companion_path(case: Case, name: Companion, output: Path) -> Path:
    """Path of an optional file next to the label map."""
    return output / f"{case.id}_{name}.nii.gz"


def finish(  # noqa: PLR0913 - each goes into the file
    model: Predictor,
    case: Case,
    codes: npt.NDArray[np.uint8],
    output: Path,
    runtime: Runtime,
    *,
    convention: LabelConvention,
    spacing_mm: Spacing,
    trust: Trust,
    companions: Collection[Companion],
    flags: Sequence[Flag],
    notes: Mapping[str, Any],
) -> Prediction:
    """Build the content of ``<case>.json`` for a label map; the executor adds ``made_from`` and writes the file.

    Args:
        model: the predictor.
        case: the predicted case.
        codes: the label map in the program's codes.
        output: folder of both files.
        runtime: the one that the model was loaded for.
        convention: meaning of the numbers in the file.
        spacing_mm: spacing of the label map's grid.
        trust: how far the prediction can be trusted.
        companions: the optional files that were written.
        flags: flags of the case.
        notes: further entries: seconds by step, voxels that were replaced with 0, ``missing_contrasts``.
    """
    label_map = output / f"{case.id}.nii.gz"
    voxel_ml = float(np.prod(spacing_mm)) / 1000
    volumes = [float(mask.sum()) * voxel_ml for mask in to_regions(codes)]
    content = {
        "case": case.id,
        "label_map": str(label_map),
        "files": {name: str(companion_path(case, name, output)) if name in companions else None for name in COMPANIONS},
        "volumes_ml": {region: round(ml, 3) for region, ml in zip(REGIONS, volumes, strict=True)},
        **trust.to_json(),
        "flags": [asdict(flag) for flag in flags],
        "labels": {
            "convention": convention.name,
            "necrosis": convention.necrosis,
            "oedema": convention.oedema,
            "enhancing": convention.enhancing,
        },
        **notes,
        **model.calibration.record(volumes, complete=not notes["missing_contrasts"]),
        "inputs": {contrast: str(path) for contrast, path in case.contrasts.items()},
        **({"input_volumes": dict(case.volumes)} if case.volumes else {}),
        **model.record(),
        "runtime": list(runtime.reasons),
        "versions": versions(),
        "notice": NOTICE,
    }
    return Prediction(case=case.id, label_map=label_map, content=content)


def require_contrasts(case: Case, model: Predictor) -> None:
    """Check that a case has the contrasts that a network needs.

    Raises:
        DataError: as in :meth:`data.datasets.layouts.Case.require`; a contrast may be missing if the network was
            trained for that.
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


def asked_for(options: PredictOptions) -> tuple[Companion, ...]:
    """The optional files that these options may produce."""
    return (
        *(("probabilities",) if options.save_probabilities else ()),
        *(("uncertainty", "disagreement") if options.uncertainty else ()),
    )


def place_for(case: Case, output: Path, companions: Collection[Companion] = ()) -> Path:
    """Path of a case's label map, after a check that the path can be used.

    Args:
        case: the case to predict.
        output: folder of the results.
        companions: the optional files that may be written.

    Raises:
        DataError: the label map or an optional file would replace one of the case's own files, or a name is too long
            for the file system.
    """
    names = [f"{case.id}.nii.gz", *(companion_path(case, name, output).name for name in companions)]
    longest, most = max(names, key=lambda name: len(os.fsencode(name))), most_name_bytes(output)
    if len(os.fsencode(longest)) > most:
        raise DataError(
            f"case {case.id}: the name of its file ...{longest[len(case.id) :]} would have {len(os.fsencode(longest))} "
            f"bytes, and the file system of {output} takes {most}. Give the case a shorter id."
        )
    label_map = output / f"{case.id}.nii.gz"
    places = {label_map: "label map"} | {companion_path(case, name, output): f"file of {name}" for name in COMPANIONS}
    for what, path in [*case.contrasts.items(), ("label map", case.label)]:
        for place, written in places.items():
            if path is not None and path.resolve() == place.resolve():
                raise DataError(
                    f"case {case.id}: the {written} would replace its own {what}, {path}. Give another OUTPUT."
                )
    return label_map
