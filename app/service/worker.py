"""A worker process of the service: it keeps the models loaded and predicts one job after the other.

``python -m app.service.worker`` is started by :mod:`app.service.dispatcher`; see :mod:`app.system.worker_pool`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from app.config.inference import PredictOptions
from app.errors import message
from app.html.elements import write_html
from app.inference.batch.fingerprint import finished_content
from app.inference.batch.job import CASE, PredictJob
from app.inference.batch.manifest import Outcome
from app.inference.batch.native import Native
from app.inference.batch.output_folder import at_work
from app.inference.model import Predictor
from app.progress import LOG
from app.reports.cohort import case_page
from app.reports.predictions import Predicted
from app.runs.folder import write_json
from app.system.device import Runtime
from app.system.disk_full import is_disk_full
from app.system.process import give_back_large_blocks
from app.system.worker_pool import Send, TaskQueue, be_worker
from data.datasets.layouts import Case
from data.errors import DataError
from data.files import file_sha256, remove_stale
from data.filesystem import locked_folder, sync_file, sync_folder
from data.labels import CONVENTIONS
from data.native_space.config import PrepareConfig

#: Name, file and media type of each result, in the order in which they are listed.
RESULTS: Final = (
    ("label_map", "output/case.nii.gz", "application/gzip"),
    ("probabilities", "output/case_probabilities.nii.gz", "application/gzip"),
    ("uncertainty", "output/case_uncertainty.nii.gz", "application/gzip"),
    ("disagreement", "output/case_disagreement.nii.gz", "application/gzip"),
    ("dicom_seg", "shown/segmentation.dcm", "application/dicom"),
    ("record", "shown/record.json", "application/json"),
    ("page", "shown/page.html", "text/html"),
)


def run_task(content: Mapping[str, Any], models: Models, send_step: Any) -> dict[str, Any]:
    """Predict the case of a job, unless a worker before has finished it, and write what is shown of it.

    Args:
        content: from :meth:`app.service.dispatcher.Dispatcher`: the job's folder, case, model and options.
        models: the loaded models.
        send_step: called with a description of each step.

    Returns:
        ``{"result": ...}`` for the database, ``{"failed": message}``, or ``{"full": message}`` if the disk is full.
    """
    folder, case = Path(content["folder"]), CASE.validate_python(content["case"])
    output, shown = folder / "output", folder / "shown"
    try:
        for place in (folder, output, shown):
            place.mkdir(mode=0o700, exist_ok=True)
        with locked_folder(folder):  # a worker of a service that was killed may still work on this job
            record = _predicted(content, models, case, output, send_step)
            if isinstance(record, str):
                return {"failed": record}
            send_step("writing the pages")
            public = _public(record, content, output)
            write_json(shown / "record.json", public)
            _write_segmentation(content, output, shown)
            _write_page(public, content, case, output, shown)
            return {"result": _result(public, folder)}
    except OSError as error:
        if is_disk_full(error):
            return {"full": "the disk is full"}
        return {"failed": f"a file of the job cannot be used: {os.strerror(error.errno or 0)}."}


class Models:
    """The models of the service, each loaded once."""

    def __init__(self, folders: Mapping[str, str], device: str) -> None:
        """Load all models.

        Raises:
            RunError, DeviceError: as raised by :meth:`app.inference.batch.job.PredictJob.load`.
        """
        self._folders, self._device = folders, device
        self._loaded: dict[tuple[str, bool], tuple[Predictor, Runtime]] = {}
        for name in folders:
            self.get(name, postprocess=True)

    def get(self, name: str, *, postprocess: bool) -> tuple[Predictor, Runtime]:
        """Return a model on its device."""
        key = (name, postprocess)
        if key not in self._loaded:
            self._loaded[key] = self.job(name, Path(), postprocess=postprocess).load()
        return self._loaded[key]

    def job(self, name: str, output: Path, *, postprocess: bool) -> PredictJob:
        """Return a job with this model and the default options."""
        return PredictJob(run=Path(self._folders[name]), output=output, device=self._device, postprocess=postprocess)

    @property
    def device_name(self) -> str:
        """Device of the models."""
        return next(iter(self._loaded.values()))[1].device_name


def _predicted(
    content: Mapping[str, Any], models: Models, case: Case, output: Path, send_step: Any
) -> dict[str, Any] | str:
    """Return the content of ``case.json``, or the message of a failure."""
    options, name = content["options"], content["model"]
    model, runtime = models.get(name, postprocess=options["postprocess"])
    prepare = content["study"] is not None if options["prepare"] is None else options["prepare"]
    labels = options["labels"]
    job = replace(
        models.job(name, output, postprocess=options["postprocess"]),
        options=PredictOptions(
            labels=None if labels is None else CONVENTIONS[labels],
            nan_to_zero=options["nan_to_zero"],
            tta=options["tta"],
            save_probabilities=options["save_probabilities"],
            uncertainty=options["uncertainty"],
        ),
        native=Native(config=PrepareConfig(n4=options["n4"]), space=options["space"]) if prepare else None,
    )
    finished = finished_content(case, output, job.settings(model))
    if finished is not None:
        return finished
    outcomes = _Outcomes(send_step)
    with at_work(output):
        remove_stale(output)
        job.engine(model, runtime).one(case, outcomes)
    (outcome,) = outcomes.ended_ones
    if outcome.content is None:
        return _without_paths(str(outcome.message).removeprefix(f"case {case.id}: "), content)
    for path in output.glob("*.nii.gz"):
        with path.open("rb") as file:
            sync_file(file, path)
    sync_folder(output)
    return dict(outcome.content)


class _Outcomes:
    """Receives the events of one case; see :class:`app.inference.batch.cohort.CaseObserver`."""

    def __init__(self, send_step: Any) -> None:
        self._send_step = send_step
        self.ended_ones: list[Outcome] = []

    def started(self, case: str, what: str = "") -> None:
        self._send_step(what.removeprefix(f"{case}: ") or "predicting")

    def ended(self, outcome: Outcome) -> None:
        self.ended_ones.append(outcome)


def _public(record: Mapping[str, Any], content: Mapping[str, Any], output: Path) -> dict[str, Any]:
    """Return the record of a case with the user's names, and without paths of the server."""
    named = {
        **record,
        "case": content["name"],
        "label_map": f"{content['name']}.nii.gz",
        "files": {
            name: None if path is None else Path(path).name.replace("case", content["name"], 1)
            for name, path in record["files"].items()
        },
        "inputs": dict(content["files"]),
        "command": " ".join(["znormseg predict", content["model"], "OUTPUT", *_options_in_words(content)]),
    }
    escaped = json.dumps(f"{output}{os.sep}")[1:-1]
    plain: dict[str, Any] = json.loads(json.dumps(named).replace(escaped, ""))
    return plain


def _options_in_words(content: Mapping[str, Any]) -> list[str]:
    options = content["options"]
    words = [f"--{contrast} {json.dumps(name)}" for contrast, name in content["files"].items()]
    switches = ("prepare", "n4", "tta", "nan_to_zero", "save_probabilities", "uncertainty")
    words += [f"--{name.replace('_', '-')}" for name in switches if options[name]]
    if not options["postprocess"]:
        words.append("--no-postprocess")
    return words


def _without_paths(text: str, content: Mapping[str, Any]) -> str:
    """Return a message with the user's names of the files, instead of paths of the server."""
    for contrast, path in content["case"]["contrasts"].items():
        text = text.replace(str(path), content["files"].get(contrast, contrast))
    return text.replace(f"{content['folder']}{os.sep}", "").replace(content["folder"], "the job")


def _write_segmentation(content: Mapping[str, Any], output: Path, shown: Path) -> None:
    """Write a DICOM segmentation of the series whose grid the label map has, if the images came as DICOM."""
    if content["study"] is None:
        return
    from importlib import metadata

    from data.dicom.segmentation import on_grid_of, write_dicom_seg
    from data.dicom.series_choice import series_of
    from data.dicom.study import open_study
    from data.labels import decode
    from data.nifti import read_label_map

    space, place = content["options"]["space"], shown / "segmentation.dcm"
    try:
        with open_study(Path(content["study"])) as study:
            series = series_of(study.series, space)
            record = json.loads((output / "case.json").read_text(encoding="utf-8"))
            codes = decode(
                on_grid_of(series, read_label_map(output / "case.nii.gz")), CONVENTIONS[record["labels"]["convention"]]
            )
            place.unlink(missing_ok=True)
            write_dicom_seg(place, codes, series, version=metadata.version("znormseg"))
    except DataError as error:
        LOG.warning("a DICOM segmentation could not be written: %s", message(error))


def _write_page(public: Mapping[str, Any], content: Mapping[str, Any], case: Case, output: Path, shown: Path) -> None:
    uncertainty = output / "case_uncertainty.nii.gz"
    predicted = Predicted(
        case=content["name"],
        label_map=output / "case.nii.gz",
        uncertainty=uncertainty if uncertainty.exists() else None,
        record=public,
        images=case.contrasts,
    )
    try:
        write_html(shown / "page.html", case_page(predicted))
    except DataError as error:
        LOG.warning("a case page could not be written: %s", message(error))


def _result(public: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return what the database keeps of a result."""
    files = [
        {
            "name": name,
            "file": file,
            "media_type": media_type,
            "bytes": (folder / file).stat().st_size,
            "sha256": file_sha256(folder / file),
        }
        for name, file, media_type in RESULTS
        if (folder / file).is_file()
    ]
    return {
        "volumes_ml": public["volumes_ml"],
        "flags": public["flags"],
        "seconds": public["seconds"],
        "files": files,
    }


def _work(given: dict[str, Any], tasks: TaskQueue, send: Send) -> None:
    os.umask(0o077)
    give_back_large_blocks()
    models = Models(given["models"], given["device"])
    send({"ready": models.device_name})
    for task, content in iter(tasks.get, None):
        began = time.monotonic()

        def step(what: str, task: str = task) -> None:
            send({"task": task, "progress": what})

        outcome = run_task(content, models, step)
        send({"task": task, "done": {**outcome, "seconds": time.monotonic() - began}})


if __name__ == "__main__":
    sys.exit(be_worker(_work))
