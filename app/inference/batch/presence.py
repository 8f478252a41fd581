"""Predict presence: a probability for each output of each case, and of each slab, as JSON and CSV."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from app import NOTICE
from app.evaluation.folders import PREDICTIONS_FILE
from app.evaluation.tables import write_csv
from app.inference.batch.cohort import predict_each
from app.inference.batch.fingerprint import FINGERPRINT, PRESENCE, answer_sha256, fingerprint
from app.inference.batch.manifest import this_worker
from app.inference.batch.pipeline import InThisProcess, Steps
from app.inference.batch.predict import require_contrasts
from app.inference.batch.prediction_json import Predictions
from app.inference.tumour_presence.model import PresenceModel
from app.progress import LOG, OnProgress, silent
from app.runs.folder import write_json
from app.runs.training_record import TrainingRecord
from app.system.device import Runtime, versions
from data.contrasts import missing_contrasts
from data.datasets.layouts import Case
from data.nifti import axial_positions_mm
from data.preprocess import Prepared, prepare

#: File with the probabilities of all slabs.
SLABS_FILE: Final = "slabs.csv"
_DIGITS: Final = 6


def predict_presence(
    model: PresenceModel,
    cases: Sequence[Case],
    output: Path,
    *,
    runtime: Runtime,
    run: Path,
    training: TrainingRecord,
    nan_to_zero: bool = False,
    overwrite: bool = False,
    on_progress: OnProgress = silent,
) -> Predictions:
    """Predict cases in this process; failed cases do not stop the others, and finished ones are kept.

    Args:
        model: the trained network or ensemble.
        cases: the cases to predict.
        output: folder, created if missing; receives ``<case>.json``, ``predictions.csv``, ``manifest.json`` and, from a
            network that judges slabs, ``slabs.csv``.
        runtime: the one that the model was loaded for.
        run: folder of the model, for the manifest.
        training: ids of the training and validation cases.
        nan_to_zero: replace NaN and infinite voxels with 0.
        overwrite: also predict finished cases.
        on_progress: called with the case that is being processed.

    Raises:
        DataError, OSError, InterruptedRunError: as raised by :func:`app.inference.batch.predict.predict`.
    """
    settings = {
        **model.settings(),
        "task": PRESENCE,
        "options": {"nan_to_zero": nan_to_zero},
        "znormseg": versions()["znormseg"],
    }
    steps = PresenceSteps(
        model=model, output=output, runtime=runtime, settings=settings, nan_to_zero=nan_to_zero, training=training
    )
    engine = InThisProcess(steps=steps, worker=this_worker(runtime.device_name))
    outcome = predict_each(
        cases, output, engine, settings=settings, run=run, overwrite=overwrite, on_progress=on_progress
    )
    if outcome.cases:
        write_presence_tables(output, outcome.cases, model.outputs)
    return outcome


def write_presence_tables(output: Path, contents: Sequence[Mapping[str, Any]], outputs: Sequence[str]) -> None:
    """Write ``predictions.csv``, and ``slabs.csv`` if the cases have slabs.

    Args:
        output: folder of the results.
        contents: contents of the files ``<case>.json``.
        outputs: names of the outputs.
    """
    decided = [f"{name}_present" for name in outputs]
    rows: list[list[object]] = [["case", *outputs, *decided]]
    slabs: list[list[object]] = [["case", "from_mm", "to_mm", *outputs]]
    for one in contents:
        decisions = (int(one["present"][name]) for name in outputs)
        rows.append([one["case"], *(one["probability"][name] for name in outputs), *decisions])
        slabs += [
            [one["case"], slab["from_mm"], slab["to_mm"], *(slab["probability"][name] for name in outputs)]
            for slab in one["slabs"] or ()
        ]
    write_csv(output / PREDICTIONS_FILE, rows)
    if len(slabs) > 1:
        write_csv(output / SLABS_FILE, slabs)


@dataclass(frozen=True, kw_only=True)
class ReadPresenceCase:
    """A case that has been read and can be computed."""

    case: Case
    fingerprint: Mapping[str, Any]
    prepared: Prepared
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PresenceAnswer:
    """A case that has been computed and can be written."""

    read: ReadPresenceCase
    logits: npt.NDArray[np.float64]
    """Shape (parts, outputs)."""
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PresenceSteps(Steps[ReadPresenceCase, PresenceAnswer]):
    """Predicts presence in cases with skull-stripped contrasts on one grid."""

    model: PresenceModel
    output: Path
    runtime: Runtime
    settings: Mapping[str, Any]
    nan_to_zero: bool
    training: TrainingRecord

    def read(self, case: Case) -> ReadPresenceCase:
        """Hash the files of a case and read it.

        Raises:
            DataError: as raised by :func:`data.preprocess.prepare`.
            OSError: a file cannot be read.
        """
        require_contrasts(case, self.model)
        began = time.monotonic()
        inputs = fingerprint(case, self.settings)
        prepared = prepare(case, spacing_mm=self.model.spacing_mm, nan_to_zero=self.nan_to_zero, all_contrasts=False)
        for contrast, count in prepared.zeroed.items():
            LOG.warning("case %s: %d voxels of %s were NaN or infinite; replaced with 0", case.id, count, contrast)
        return ReadPresenceCase(case=case, fingerprint=inputs, prepared=prepared, seconds=time.monotonic() - began)

    def compute(self, read: ReadPresenceCase, on_step: Callable[[str], None]) -> PresenceAnswer:
        """Compute the logits of a case."""
        del on_step
        began = time.monotonic()
        logits = self.model.logits(read.prepared.image, read.prepared.present, self.runtime)
        return PresenceAnswer(read=read, logits=logits, seconds=time.monotonic() - began)

    def write(self, computed: PresenceAnswer) -> dict[str, Any]:
        """Write ``<case>.json`` and return its content.

        Raises:
            OSError: the folder cannot be written.
        """
        case = computed.read.case
        content = presence_content(computed, self.model, self.training, runtime=self.runtime)
        content[FINGERPRINT] = {
            **computed.read.fingerprint,
            "files_sha256": {},
            "answer_sha256": answer_sha256(content),
        }
        write_json(self.output / f"{case.id}.json", content)
        return content


def presence_content(
    computed: PresenceAnswer, model: PresenceModel, training: TrainingRecord, *, runtime: Runtime
) -> dict[str, Any]:
    """Return the content of ``<case>.json``, as :class:`app.schemas.PresenceRecord` describes it, without checksums."""
    case, prepared = computed.read.case, computed.read.prepared
    probabilities = model.probabilities(computed.logits)
    largest = {name: round(float(values.max()), _DIGITS) for name, values in probabilities.items()}
    seen = dict.fromkeys(training.trained_on, "training") | dict.fromkeys(training.validated_on, "validation")
    task = model.config.task
    return {
        "case": case.id,
        "probability": largest,
        "present": {name: largest[name] >= model.decisions[name].threshold for name in model.outputs},
        "decisions": {name: dict(vars(decision)) for name, decision in model.decisions.items()},
        "slabs": _slabs(probabilities, prepared, model) if task.by_slab else None,
        "threshold_ml": None if task.labels_csv else dict(zip(model.outputs, task.thresholds_ml, strict=True)),
        "seen_in": seen.get(case.id),
        "missing_contrasts": list(missing_contrasts(prepared.present)),
        "nan_to_zero": dict(prepared.zeroed),
        "ladder": [],
        "seconds": {"read": round(computed.read.seconds, 3), "compute": round(computed.seconds, 3)},
        "inputs": {contrast: str(path) for contrast, path in case.contrasts.items()},
        "weights_sha256": model.sha256,
        "networks": len(model.networks),
        "runtime": list(runtime.reasons),
        "versions": versions(),
        "notice": NOTICE,
    }


def _slabs(
    probabilities: Mapping[str, npt.NDArray[np.float64]], prepared: Prepared, model: PresenceModel
) -> list[dict[str, Any]]:
    """Return the position and the probabilities of each slab, from the feet to the head."""
    from app.inference.tumour_presence.answers import slab_starts

    slices, depth = model.config.training.patch_voxels[2], prepared.image.shape[3]
    edges_mm = axial_positions_mm(prepared.native_affine, prepared.canonical_shape, prepared.box[2], depth)
    found = []
    for place, start in enumerate(slab_starts(depth, slices)):
        values = {name: round(float(of_slabs[place]), _DIGITS) for name, of_slabs in probabilities.items()}
        end = min(start + slices, depth)
        edges = {"from_mm": round(edges_mm[start], 3), "to_mm": round(edges_mm[end], 3)}
        found.append({**edges, "probability": values})
    return found
