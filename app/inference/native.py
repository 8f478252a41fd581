"""Label maps for scans as they come from the scanner: brought in, predicted, brought back to a scan's own grid."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from app.inference.cohort import Prediction, Predictions, predict_each
from app.inference.flags import Facts, Flag, flags_of
from app.inference.model import Predictor
from app.inference.predict import finish, place_for, unusual_contrasts, write_companions
from app.inference.probabilities import on_canonical_grid, predict_answer
from app.inference.settings import DEFAULTS, PredictOptions
from app.inference.trust import Companion, Steps, Trust, companions, measure, nested
from app.progress import LOG, OnProgress, Progress, silent
from app.runtime import Runtime
from data.bring_back import cut_back, means_back
from data.bring_in import BringInConfig, BroughtIn, NativeCase, bring_in, read_native, zeroed_warnings
from data.brought_in_files import write_case
from data.errors import DataError
from data.itk import grid_of
from data.labels import Contrast, encode, from_regions, to_regions
from data.layouts import Case, find_cases
from data.nifti import canonical_spacing, spacing_of, write_label_map
from data.preprocess import image_problem, prepare


@dataclass(frozen=True, kw_only=True)
class NativeAnswer:
    """A label map on the grid of one scan, and how the case was brought in."""

    codes: npt.NDArray[np.uint8]
    """The program's codes, shape of the scan's image."""
    brought: BroughtIn
    companions: Mapping[Companion, Steps]
    """What was asked for beside the label map, in 65535ths, on the same grid, shape (X, Y, Z, 3)."""
    trust: Trust
    flags: tuple[Flag, ...]


def predict_native(
    model: Predictor,
    cases: Sequence[Case],
    output: Path,
    *,
    runtime: Runtime,
    config: BringInConfig,
    space: Contrast = "t1c",
    options: PredictOptions = DEFAULTS,
    on_progress: OnProgress = silent,
) -> Predictions:
    """Predict cases whose contrasts lie on different grids; label maps are on the grid of ``space``.

    Args:
        model: the trained network.
        cases: what to predict.
        output: folder, made where it is missing; gets ``<case>.nii.gz`` and ``<case>.json``.
        runtime: as the model was loaded for.
        config: how cases are brought in.
        space: the contrast whose file the label map's grid and header are those of.
        options: what is asked for.
        on_progress: told what is being worked on.

    Raises:
        DataError, OSError, InterruptedRunError: as :func:`app.inference.predict.predict`.
    """
    shares_done = {case.id: number / len(cases) for number, case in enumerate(cases)}

    def one(case: Case) -> Prediction:
        place_for(case, output)
        began = time.monotonic()
        native = read_native(case, nan_to_zero=options.nan_to_zero)

        def step(what: str) -> None:
            on_progress(Progress(job="predicting", share=shares_done[case.id], detail=what))

        answer = answer_for(model, native, runtime, config=config, space=space, options=options, on_step=step)
        computed = time.monotonic()
        for warning in answer.brought.warnings:
            LOG.warning("case %s: %s", case.id, warning)
        convention = options.labels or case.written_convention or model.convention
        write_label_map(place_for(case, output), encode(answer.codes, convention), case.contrasts[space])
        write_companions(case, answer.companions, output, case.contrasts[space])
        return finish(
            model,
            case,
            answer.codes,
            output,
            runtime,
            convention=convention,
            spacing_mm=spacing_of(grid_of(native.images[space]).affine),
            trust=answer.trust,
            companions=tuple(answer.companions),
            flags=answer.flags,
            notes={
                "seconds": {
                    "prepare and compute": round(computed - began, 3),
                    "write": round(time.monotonic() - computed, 3),
                },
                "nan_to_zero": dict(native.zeroed),
                "missing_contrasts": [],
                "space": space,
                "prepare": answer.brought.record,
            },
        )

    return predict_each(cases, output, one, on_progress=on_progress)


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
    """Bring one case in, predict it and bring the answer back.

    Args:
        model: the trained network.
        native: the four contrasts, from files or any other source.
        runtime: as the model was loaded for.
        config: how the case is brought in.
        space: the contrast on whose grid the answer is wanted.
        options: what is asked for beside the label map.
        on_step: told what is being done.

    Raises:
        DataError: the case cannot be brought in, or is no skull-stripped brain then.
    """
    brought = bring_in(native, config, on_step=on_step)
    for contrast, voxels in brought.images.items():
        if (problem := image_problem(voxels)) is not None:
            raise DataError(f"case {native.id}, contrast {contrast}, prepared: {problem}.")
    on_step(f"{native.id}: network")
    with tempfile.TemporaryDirectory(prefix="znormseg-") as folder:
        write_case(brought, Path(folder))
        (case,) = find_cases(Path(folder))
        prepared = prepare(case, spacing_mm=model.spacing_mm)
    # The case was written in canonical order, which is that of the shares.
    answer = predict_answer(model, prepared, runtime, tta=options.tta, disagreement=options.uncertainty)
    on_step(f"{native.id}: back to the grid of {space}")
    target = grid_of(native.images[space])

    def back(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        whole = on_canonical_grid(values, prepared)
        return means_back(whole, brought.grid, brought.transform(space), target, source=Path(native.id))

    spacing_mm = spacing_of(target.affine)
    shares = back(answer.centred + np.float32(0.5))
    masks = model.postprocess.clean(to_regions(cut_back(shares, model.postprocess.thresholds)), spacing_mm)
    shown = nested(shares - np.float32(0.5))
    disagreement = None if answer.disagreement is None else np.clip(back(answer.disagreement), 0, 1)
    trust = measure(
        masks,
        shown,
        spacing_mm,
        answer_voxels=answer.volumes_voxels,
        answer_spacing_mm=canonical_spacing(prepared.native_affine),
        networks=answer.networks,
        flips=answer.flips,
    )
    registered = [f"{contrast} was registered to t1c and resampled" for contrast in brought.registrations]
    facts = Facts(
        case=native.id,
        trust=trust,
        zeroed=native.zeroed,
        repairs=(*native.doubts, *registered),
        preparation=tuple(one for one in brought.warnings if one not in zeroed_warnings(native)),
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
    )
