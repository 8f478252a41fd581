"""Cross-validate: train the folds, tune post-processing on their out-of-fold predictions, build an ensemble.

Completed work is kept, so the same command resumes after an interruption (see
:mod:`app.experiments.crossval.plan`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from app import NOTICE
from app.config.load import RunConfig
from app.errors import RunError
from app.evaluation.metrics import DICE_DEFINITION, HD95_DEFINITION
from app.experiments.crossval.calibrate import Calibrated, calibrate
from app.experiments.crossval.ensemble_folder import write_ensemble
from app.experiments.crossval.out_of_fold import is_of, read_computed_by, read_counts
from app.experiments.crossval.plan import SPLITS, Folds, deal, require_same
from app.experiments.crossval.presence import PresenceCrossValidation, finish_presence, is_answer_of
from app.experiments.crossval.summary import Summary, summarise, write_crossval_table
from app.experiments.crossval.train_fold import require_initial_networks, work_on_fold
from app.experiments.crossval.tune import Scores, Tuning, tune
from app.experiments.crossval.workers import fold_devices, work_in_processes
from app.experiments.runs import (
    JobProgress,
    backends_sentence,
    count_backends,
    has_checkpoint,
    json_object,
    require_place,
    resumable,
)
from app.inference.ensemble import CROSSVAL_FILE, ENSEMBLE_FOLDER
from app.inference.postprocess import Postprocess
from app.progress import LOG, OnProgress, Progress, silent
from app.runs.folder import locked, read_json, read_metrics, write_json
from app.system.device import machine, require_device, versions
from data.datasets.source import DataSource

#: Share of the total time that training and prediction take, for the progress bar.
_FOLDS: Final = 0.97


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Results of a cross-validation."""

    out: Path
    raw: Summary
    """Out-of-fold scores of probabilities thresholded at one half."""
    tuned: Summary
    """Out-of-fold scores with the post-processing that was chosen on the same cases."""
    tuning: Tuning
    calibrated: Calibrated
    results: Sequence[Mapping[str, Any]]
    """Result of training, by fold."""
    metrics: Sequence[Sequence[Mapping[str, object]]]
    """Records of ``metrics.jsonl``, by fold."""
    backends: Sequence[Mapping[str, str | int | None]]
    """From :func:`app.experiments.runs.count_backends`: the backends that computed the out-of-fold predictions."""
    content: Mapping[str, Any] = field(default_factory=dict)
    """Content of ``crossval.json``."""

    @property
    def ensemble(self) -> Path:
        """Folder of the ensemble."""
        return self.out / ENSEMBLE_FOLDER

    @property
    def page(self) -> Path:
        """Path of the page that :func:`app.reports.crossval.write_crossval_page` writes."""
        return self.out / "crossval.html"


def cross_validate(
    data: DataSource,
    out: Path,
    config: RunConfig,
    *,
    folds: int | None = None,
    devices: str | None = None,
    jobs: int | None = None,
    init_from: Path | None = None,
    on_progress: OnProgress = silent,
) -> CrossValidation | PresenceCrossValidation:
    """Do the remaining work of a cross-validation, and write its scores and ensemble.

    Args:
        data: the data set, or several.
        out: folder of the cross-validation: new, empty, or with the same one, which is then resumed.
        config: config of every fold's run.
        folds: 2 to 20; each has at least one patient. None for as many as ``init_from`` has, or else 5.
        devices: comma-separated names; each device runs one fold at a time in a separate process.
        jobs: number of such processes on the config's device, instead of ``devices``.
        init_from: ensemble of an earlier cross-validation of the same cases. Each fold starts from the weights of the
            earlier network of that fold, which never saw the fold's validation cases. Only for segmentations.
        on_progress: called with the progress of the whole job.

    Returns:
        the results of the config's task: segmentation or presence.

    Raises:
        DataError: the data cannot be used, or have changed since the cross-validation was started.
        ConfigError: ``folds``, ``devices``, ``jobs`` or ``data.weights`` is invalid, or ``out`` contains a different
            cross-validation.
        RunError: ``out`` is a file, contains something else, has damaged files, or is in use by another process;
            ``init_from`` is not an ensemble, or its weights are not those it lists.
        DeviceError: a device is not available.
        OSError: the machine failed, e.g. the disk is full or a worker process was killed.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; everything is saved.
    """
    slots = fold_devices(devices, jobs, config_device=config.runtime.device)
    for device in slots:
        require_device(device or config.runtime.device)
    require_place(out, CROSSVAL_FILE, "cross-validation", before=[SPLITS])
    dealt = deal(data, out, config, folds=folds, init_from=init_from)
    require_initial_networks(dealt)
    count = len(dealt.splits)
    with locked(out):
        require_same(dealt)
        progress = JobProgress(job="cross-validating", parts=count, scale=_FOLDS, on_progress=on_progress)
        work = _Work(data=data, folds=dealt, slots=slots, progress=progress)
        with resumable(out, lambda: work.stage):
            work.all_folds()
            work.stage = "the scores"
            outcome = _finish(work)
        progress.end(f"{count} folds")
        return outcome


def _finish(work: _Work) -> CrossValidation | PresenceCrossValidation:
    """Measure trained folds, and write their ensemble."""
    count, progress = len(work.folds.splits), work.progress
    if work.folds.is_presence:
        return finish_presence(work.folds, [read_json(work.folds.result_file(fold)) for fold in range(count)])
    outcome = measure_folds(work.folds, on_share=lambda share: progress.report(count, f"scores: {share:.0%}"))
    work.stage = "the ensemble"
    return _write(work.folds, outcome)


def measure_folds(folds: Folds, *, on_share: Callable[[float], None]) -> CrossValidation:
    """Tune post-processing on the out-of-fold predictions, score them with and without it, and calibrate.

    Args:
        folds: folds that are all trained and predicted.
        on_share: called with the share done, from 0 to 1 in each pass over the cases.

    Raises:
        RunError: a file is missing or damaged.
    """
    fold_of, numbers = folds.fold_of(), range(len(folds.splits))
    files = {case_id: folds.prediction_file(case_id) for case_id in fold_of}
    tuning = tune(Scores(files, on_share=on_share), list(fold_of.values()))
    raw = summarise(folds, Postprocess())
    tuned = raw if tuning.chosen.changes_nothing else summarise(folds, tuning.chosen)
    return CrossValidation(
        out=folds.out,
        raw=raw,
        tuned=tuned,
        tuning=tuning,
        calibrated=calibrate({case_id: read_counts(file) for case_id, file in files.items()}, raw, tuned),
        results=[read_json(folds.result_file(fold)) for fold in numbers],
        metrics=[read_metrics(folds.run(fold)) for fold in numbers],
        backends=count_backends(map(read_computed_by, files.values())),
    )


def _write(folds: Folds, outcome: CrossValidation) -> CrossValidation:
    """Write the ensemble, ``crossval.csv`` and ``crossval.json``."""
    tuning, out = outcome.tuning, folds.out
    if not tuning.chosen.changes_nothing and tuning.estimated_gain <= 0:
        LOG.warning(
            "post-processing gains %.4f on the cases it was chosen on, but %.4f on folds that were left out of the "
            "choice: it may not help on other cases. predict --no-postprocess turns it off.",
            *(tuning.after - tuning.before, tuning.estimated_gain),
        )
    if len(outcome.backends) > 1:
        LOG.warning(
            "out-of-fold predictions were computed by different backends (%s), so their scores differ by rounding. To "
            "predict all of them here, delete %s and run the same command again.",
            *(backends_sentence(outcome.backends), out / "out-of-fold"),
        )
    write_ensemble(folds, tuning, outcome.tuned, outcome.calibrated)
    content = {
        "ensemble": str(outcome.ensemble),
        "folds": [
            {**result, "fold": fold, "cases": len(split.validation), "trained_on": len(split.train)}
            for fold, (result, split) in enumerate(zip(outcome.results, folds.splits, strict=True))
        ],
        "raw": outcome.raw.to_json(),
        "tuned": outcome.tuned.to_json(),
        "tuning": tuning.to_json(),
        "calibration": outcome.calibrated.to_json(),
        "out_of_fold": outcome.backends,
        "dice": DICE_DEFINITION,
        "hd95": HD95_DEFINITION,
        "label_maps_sha256": folds.label_maps_sha256,
        "versions": versions(),
        "machine": machine(),
        "notice": NOTICE,
    }
    write_crossval_table(out / "crossval.csv", {"raw": outcome.raw, "tuned": outcome.tuned})
    write_json(out / "crossval.json", content)
    return replace(outcome, content=content)


@dataclass(kw_only=True)
class _Work:
    """The work of one process on the folds of a cross-validation."""

    data: DataSource
    folds: Folds
    slots: Sequence[str | None]
    progress: JobProgress
    stage: str = "the first fold"
    """The current stage, for messages."""
    shares: dict[int, float] = field(default_factory=dict)

    def all_folds(self) -> None:
        """Train and predict every fold that is not complete."""
        count = len(self.folds.splits)
        left = [fold for fold in range(count) if not self._is_done(fold)]
        self.shares = {fold: 0.0 if fold in left else 1.0 for fold in range(count)}
        self.progress.kept = sum(self.shares.values())
        if len(self.slots) == 1 and self.slots[0] is None:
            for fold in left:
                self.stage = f"fold {fold} of 0 to {count - 1}"
                work_on_fold(self.data, self.folds, fold, on_progress=partial(self._report, fold))
                self._note_done(fold)
        elif left:
            self.stage = f"folds {', '.join(map(str, left))}"
            work_in_processes(
                self.data,
                self.folds.out,
                left,
                self.slots,
                init_from=self.folds.init_from,
                on_progress=self._report,
                on_done=self._note_done,
            )
            shutil.rmtree(self.folds.out / "logs", ignore_errors=True)

    def _is_done(self, fold: int) -> bool:
        """Whether a fold is trained and all its cases are predicted with its current weights."""
        if not (self.folds.result_file(fold).exists() and has_checkpoint(self.folds.run(fold))):
            return False
        saved = sorted((self.folds.run(fold) / "checkpoints").glob("best-*.json"))
        if not saved:
            return False
        try:
            weights = str(json_object(read_json(saved[-1]), saved[-1]).get("sha256"))
        except RunError:  # damaged: loading falls back to the previous pair
            return False
        same = is_answer_of if self.folds.is_presence else is_of
        return all(same(self.folds.prediction_file(case_id), weights) for case_id in self.folds.splits[fold].validation)

    def _note_done(self, fold: int) -> None:
        self.shares[fold] = 1.0
        measure = self.folds.config.measure
        scores = read_json(self.folds.result_file(fold))[f"validation_{measure.key}"]
        in_words = ", ".join(f"{output} {value:.3f}" for output, value in scores.items())
        LOG.info("fold %d is done: %s during training %s", fold, measure.in_words, in_words)

    def _report(self, fold: int, progress: Progress) -> None:
        self.shares[fold] = min(progress.share, 0.999)
        self.progress.report(sum(self.shares.values()), f"fold {fold}  {progress.detail}")
