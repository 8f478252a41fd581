"""Predict label maps on the grid of a case's files, for prepared cases and for scans straight from the scanner."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from app.config.inference import DEFAULTS, PredictOptions
from app.inference.batch.cohort import predict_each
from app.inference.batch.fingerprint import fingerprint, settings_of
from app.inference.batch.manifest import this_worker
from app.inference.batch.native import Native, PreparedScans, prepare_scans
from app.inference.batch.pipeline import MOST_VOXELS_AHEAD, InThisProcess, Steps
from app.inference.batch.prediction_json import ComputedCase, Predictions, case_content
from app.inference.confidence import COMPANIONS, Companion, companions, measure_confidence, nested
from app.inference.flags import CaseFacts, flags_of
from app.inference.model import Predictor
from app.inference.probabilities import MeanPrediction, fallback_for, predict_answer, predict_masks, warm_up
from app.inference.tumour_presence.gate import remove_enhancing_
from app.progress import LOG, OnProgress, silent
from app.runs.folder import write_json
from app.runs.training_record import TrainingRecord
from app.system.device import Runtime
from app.system.process import give_back_freed_memory, granted_processors
from data.contrasts import missing_contrasts
from data.datasets.layouts import Case, misnamed_files
from data.errors import DataError
from data.files import most_name_bytes
from data.labels import REGIONS, Contrast, encode, from_regions
from data.nifti import canonical_spacing, write_label_map, write_shares
from data.preprocess import Prepared, prepare, to_native_grid
from data.quality.intensity_range import quantiles_of

if TYPE_CHECKING:
    from app.inference.tumour_presence.gate import Gate, GateAnswer
    from app.inference.tumour_presence.model import PresenceModel
    from data.native_space.to_brats import NativeCase

#: Threads that read ahead for a GPU; each keeps one case in memory.
GPU_READERS: Final = 4

_Number = TypeVar("_Number", bound=np.generic)


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
    """Predict cases in this process; failed cases are recorded and do not stop the others, and finished ones are kept.

    Args:
        model: the trained network.
        cases: the cases to predict.
        output: folder, created if missing; receives ``<case>.nii.gz``, ``<case>.json`` and ``manifest.json``.
        runtime: the one that the model was loaded for.
        options: options of the prediction.
        overwrite: also predict finished cases.
        on_progress: called with the case that is being processed.

    Raises:
        DataError: ``output`` is a file.
        OSError: ``output`` cannot be written to.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; all files that were written are complete.
    """
    settings = settings_of(model, options)
    steps = PredictSteps(model=model, output=output, runtime=runtime, options=options, settings=settings)
    engine = InThisProcess(steps=steps, worker=this_worker(runtime.device_name))
    return predict_each(cases, output, engine, settings=settings, overwrite=overwrite, on_progress=on_progress)


@dataclass(frozen=True, kw_only=True)
class ReadCase:
    """A case that has been read and can be computed."""

    case: Case
    fingerprint: Mapping[str, Any]
    """Hashes of the settings and of the files, made before these were read."""
    images: Prepared | NativeCase
    """The network's input, or scans from which it has yet to be made."""
    seconds: float
    """Time spent on reading."""


@dataclass(frozen=True, kw_only=True)
class AnsweredCase:
    """A case that the networks have answered; the rest of its work needs no GPU."""

    read: ReadCase
    prepared: Prepared
    scans: PreparedScans | None
    answer: MeanPrediction
    judged: GateAnswer | None
    """What the presence network says; None without one."""
    ladder: tuple[str, ...]
    """Sentences about fallbacks when memory was short."""
    seconds: float
    """Time spent on preparing scans and on the networks."""


@dataclass(frozen=True, kw_only=True)
class PredictSteps(Steps[ReadCase, ComputedCase | AnsweredCase]):
    """Predicts cases with skull-stripped contrasts on one grid or, with ``native``, scans straight from the scanner."""

    model: Predictor
    output: Path
    runtime: Runtime
    settings: Mapping[str, Any]
    """As returned by :func:`app.inference.batch.fingerprint.settings_of`."""
    options: PredictOptions = DEFAULTS
    native: Native | None = None
    gate: Gate | None = None
    """Removes enhancing tumour where its presence network finds none."""

    @property
    def most_voxels_ahead(self) -> int:
        """0 if memory is bounded, as the plan for the current case leaves no memory for another."""
        return MOST_VOXELS_AHEAD if self.options.max_memory_gb is None else 0

    @property
    def readers(self) -> int:
        """1 on a CPU, which computes at the same time; several on a GPU, which is faster than one thread can read."""
        return min(GPU_READERS, granted_processors()) if self._feeds_gpu else 1

    @property
    def writers(self) -> int:
        """The same number: for a GPU, writers also do everything that follows the networks' answer."""
        return self.readers

    @property
    def _feeds_gpu(self) -> bool:
        return self.runtime.device_name != "cpu" and self.options.max_memory_gb is None

    def warm_up(self) -> None:
        """Prepare the network for its windows, unless the first case has to be prepared first."""
        if self.native is None:
            warm_up(self.model, self.runtime, self.options)

    def read(self, case: Case) -> ReadCase:
        """Hash the files of a case and read it.

        Raises:
            DataError: as raised by :func:`data.preprocess.prepare`, :func:`data.native_space.to_brats.read_native`,
                :func:`require_contrasts` and :func:`require_writable`.
            OSError: a file cannot be read.
        """
        require_writable(case, self.output, requested_companions(self.options))
        try:
            inputs = fingerprint(case.require(all_contrasts=False), self.settings)
        except (OSError, DataError):
            self._images(case)  # raises an error that describes the problem better
            raise
        began = time.monotonic()
        images = self._images(case)
        for text in misnamed_files(replace(case, label=None)):
            LOG.warning("case %s: %s", case.id, text)
        for contrast, count in images.zeroed.items():
            LOG.warning("case %s: %d voxels of %s were NaN or infinite; replaced with 0", case.id, count, contrast)
        for contrast, sentence in images.backgrounds.items():
            LOG.warning("case %s, contrast %s: %s", case.id, contrast, sentence)
        return ReadCase(case=case, fingerprint=inputs, images=images, seconds=time.monotonic() - began)

    def _images(self, case: Case) -> Prepared | NativeCase:
        nan_to_zero = self.options.nan_to_zero
        if self.gate is not None:
            try:
                require_contrasts(case, self.gate.model)
            except DataError as error:
                raise DataError(f"--presence {self.gate.model.origin}: {error}") from error
        if self.native is not None:
            from data.native_space.to_brats import read_native

            return read_native(replace(case, label=None), nan_to_zero=nan_to_zero)
        require_contrasts(case, self.model)
        prepared = prepare(case, spacing_mm=self.model.spacing_mm, nan_to_zero=nan_to_zero, all_contrasts=False)
        if absent := missing_contrasts(prepared.present):
            hint = f"; these names match no contrast: {', '.join(case.unrecognised[:3])}" if case.unrecognised else ""
            LOG.warning("case %s: predicted without %s, which is missing%s", case.id, ", ".join(absent), hint)
        return prepared

    def compute(self, read: ReadCase, on_step: Callable[[str], None]) -> ComputedCase | AnsweredCase:
        """Predict a case; the only step that uses the device.

        Raises:
            DataError: memory is not sufficient, or scans cannot be prepared.
        """
        began = time.monotonic()
        model, options, case, images = self.model, self.options, read.case, read.images
        scans: PreparedScans | None = None
        if isinstance(images, Prepared):
            prepared = images
        else:
            assert self.native is not None
            scans = prepare_scans(images, self.native, model.spacing_mm, on_step)
            prepared = scans.network_input
        fallback = fallback_for(options)
        give_back_freed_memory()
        try:
            answer = predict_answer(model, prepared, self.runtime, options=options, fallback=fallback)
        except DataError as error:
            raise DataError(f"case {case.id}: {error}") from error
        if options.uncertainty and answer.disagreement is None:
            LOG.info(
                "case %s: uncertainty is computed from a single prediction; use --tta or an ensemble for several",
                case.id,
            )
        answered = AnsweredCase(
            read=read,
            prepared=prepared,
            scans=scans,
            answer=answer,
            judged=None if self.gate is None else self.gate.answer(prepared),
            ladder=tuple(fallback.sentences),
            seconds=time.monotonic() - began,
        )
        return answered if self._feeds_gpu else self.finish(answered, on_step)

    def finish(self, answered: AnsweredCase, on_step: Callable[[str], None] = lambda _: None) -> ComputedCase:
        """Turn the networks' answer into everything that is written.

        Raises:
            DataError: it cannot be mapped back to the scans.
        """
        began = time.monotonic()
        model, options, read, answer = self.model, self.options, answered.read, answered.answer
        case, images, prepared, scans = read.case, read.images, answered.prepared, answered.scans
        spacing_mm = answer_spacing_mm = canonical_spacing(prepared.native_affine)
        if scans is None:
            masks = predict_masks(model, prepared, answer.centred)
            centred, disagreement = answer.centred, answer.disagreement
        else:
            on_step(f"{case.id}: mapping back to the grid of {scans.space}")
            masks, centred, disagreement, spacing_mm = scans.map_back(model, answer)

        judged = answered.judged
        removed = remove_enhancing_(masks) if judged is not None and judged.removes else 0
        presence = None if judged is None else judged.record(removed * float(np.prod(spacing_mm)) / 1000)

        def in_file(values: npt.NDArray[_Number]) -> npt.NDArray[_Number]:
            if scans is None:
                return to_native_grid(values, prepared)
            return values if values.ndim == 3 else np.moveaxis(values, 0, -1)

        shares = nested(model.calibration.apply(centred))
        trust = measure_confidence(
            masks,
            shares,
            spacing_mm,
            answer_voxels=answer.volumes_voxels,
            answer_spacing_mm=answer_spacing_mm,
            networks=answer.networks,
            flips=answer.flips,
        )
        missing = missing_contrasts(prepared.present)
        facts = CaseFacts(
            case=case.id,
            trust=trust,
            missing=missing,
            zeroed=images.zeroed,
            backgrounds=images.backgrounds,
            repairs=prepared.repairs if scans is None else scans.repairs,
            preparation=() if scans is None else scans.case.warnings,
            unusual=unusual_contrasts(prepared, options.training),
            removed=removed_in_words(presence) if presence is not None and removed else "",
            training=options.training,
        )
        seconds = answered.seconds + time.monotonic() - began
        return ComputedCase(
            case=case,
            fingerprint=read.fingerprint,
            codes=in_file(from_regions(masks)),
            reference=case.contrasts[case.reference if scans is None else scans.space],
            companions={name: in_file(steps) for name, steps in companions(shares, disagreement, options).items()},
            trust=trust,
            flags=flags_of(facts),
            seconds={"read": read.seconds, "compute": seconds}
            if scans is None
            else {"prepare and compute": read.seconds + seconds},
            notes={
                "nan_to_zero": dict(images.zeroed),
                "missing_contrasts": list(missing),
                "ladder": list(answered.ladder),
                **({} if presence is None else {"presence": presence}),
                **({} if scans is None else {"space": scans.space, "prepare": scans.case.record}),
            },
        )

    def write(self, computed: ComputedCase | AnsweredCase) -> dict[str, Any]:
        """Write the files of a case, then its JSON, which marks them as complete.

        Raises:
            DataError: as raised by :meth:`finish`.
            OSError: the folder cannot be written to.
        """
        if isinstance(computed, AnsweredCase):
            computed = self.finish(computed)
        began = time.monotonic()
        model, case = self.model, computed.case
        convention = self.options.labels or case.written_convention or model.convention
        label_map = self.output / f"{case.id}.nii.gz"
        files = {name: companion_path(case, name, self.output) for name in COMPANIONS if name in computed.companions}
        write_label_map(label_map, encode(computed.codes, convention), computed.reference)
        for name, path in files.items():
            what = f"{name} of {', '.join(REGIONS)}"
            write_shares(path, computed.companions[name], computed.reference, what=what)
        seconds = {**computed.seconds, "write": time.monotonic() - began}
        content = case_content(
            computed, model, label_map, files, convention=convention, runtime=self.runtime, seconds=seconds
        )
        write_json(self.output / f"{case.id}.json", content)
        return content


def removed_in_words(presence: Mapping[str, Any]) -> str:
    """Return what a presence network removed, in one sentence, from the entry of the case's JSON."""
    return (
        f"{presence['removed_ml']:.2f} ml of enhancing tumour became tumour core, because a presence network gives "
        f"it a probability of {presence['probability']:.3f}, below its threshold of {presence['threshold']:.3f}."
    )


def unusual_contrasts(prepared: Prepared, training: TrainingRecord) -> tuple[Contrast, ...]:
    """Return the contrasts whose intensities differ from those of the training cases; empty if those are unknown."""
    return () if training.intensities is None else training.intensities.unusual(quantiles_of(prepared.image))


def companion_path(case: Case, name: Companion, output: Path) -> Path:
    """Return the path of an optional file next to the label map."""
    return output / f"{case.id}_{name}.nii.gz"


def require_contrasts(case: Case, model: Predictor | PresenceModel) -> None:
    """Check that a case has the contrasts that a network needs.

    Raises:
        DataError: as raised by :meth:`data.datasets.layouts.Case.require`; a contrast may be missing if the network
            was trained for that.
    """
    if model.takes_missing_contrasts or not missing_contrasts(case.contrasts):
        case.require(all_contrasts=False)
        return
    try:
        case.require()
    except DataError as error:
        raise DataError(
            f"{error}. This run needs all four; a run trained with augment.contrast_dropout above 0 accepts fewer."
        ) from error


def requested_companions(options: PredictOptions) -> tuple[Companion, ...]:
    """Return the optional files that these options may produce."""
    return (
        *(("probabilities",) if options.save_probabilities else ()),
        *(("uncertainty", "disagreement") if options.uncertainty else ()),
    )


def require_writable(case: Case, output: Path, companions: Collection[Companion] = ()) -> None:
    """Check the paths of a case's label map and optional files.

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
            f"bytes, but the file system of {output} allows at most {most}. Give the case a shorter id."
        )
    written = {output / f"{case.id}.nii.gz": "label map"}
    written |= {companion_path(case, name, output): f"file of {name}" for name in COMPANIONS}
    for what, path in [*case.contrasts.items(), ("label map", case.label)]:
        for place, kind in written.items():
            if path is not None and path.resolve() == place.resolve():
                raise DataError(
                    f"case {case.id}: the {kind} would replace its own {what}, {path}. Give another OUTPUT."
                )
