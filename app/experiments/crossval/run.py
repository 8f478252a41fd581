"""Cross-validate: train the folds, tune post-processing on their out-of-fold predictions, build an ensemble.

Completed work is kept, so the same command resumes after an interruption (see
:mod:`app.experiments.crossval.folds`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from app import NOTICE
from app.config.load import RunConfig
from app.errors import InterruptedRunError, RunError
from app.evaluation.metrics import DICE_DEFINITION, HD95_DEFINITION
from app.experiments.crossval.calibrate import Calibrated, calibrate
from app.experiments.crossval.ensemble_folder import write_ensemble
from app.experiments.crossval.fold import work_on_fold
from app.experiments.crossval.folds import SPLITS, Folds, deal, require_same
from app.experiments.crossval.out_of_fold import is_of, read_computed_by, read_counts
from app.experiments.crossval.summary import Summary, summarise, write_crossval_table
from app.experiments.crossval.tune import Scores, Tuning, tune
from app.experiments.crossval.workers import fold_devices, work_in_processes
from app.experiments.runs import backends_sentence, count_backends, has_begun, json_object, only_warnings, require_place
from app.inference.ensemble import CROSSVAL_FILE
from app.inference.postprocess import Postprocess
from app.progress import LOG, OnProgress, Progress, silent
from app.runs.folder import locked, read_json, read_metrics, write_json
from app.system.device import machine, require_device, versions
from data.datasets.source import DataSource

#: Share of the total time that training and prediction take, for the progress bar.
_FOLDS = 0.97


@dataclass(frozen=True, kw_only=True)
class CrossValidation:
    """Results of a cross-validation."""

    out: Path
    ensemble: Path
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
    backends: str
    """The backends that computed the out-of-fold predictions, in words."""
    content: Mapping[str, Any]
    """Content of ``crossval.json``."""

    @property
    def page(self) -> Path:
        """Path of the page that :func:`app.reports.crossval.write_crossval_page` writes."""
        return self.out / "crossval.html"


def cross_validate(
    data: DataSource,
    out: Path,
    config: RunConfig,
    *,
    folds: int = 5,
    devices: str | None = None,
    jobs: int | None = None,
    on_progress: OnProgress = silent,
) -> CrossValidation:
    """Do the remaining work of a cross-validation, and write its scores and ensemble.

    Args:
        data: the data set.
        out: folder of the cross-validation: new, empty, or holding the same one, which is then resumed.
        config: config of every fold's run.
        folds: 2 to 20; each has at least one patient.
        devices: comma-separated names; each device runs one fold at a time in a separate process.
        jobs: number of such processes on the config's device, instead of ``devices``.
        on_progress: called with the progress of the whole job.

    Raises:
        DataError: the data cannot be used, or have changed since the cross-validation was started.
        ConfigError: ``folds``, ``devices`` or ``jobs`` is invalid, or ``out`` holds a different cross-validation.
        RunError: ``out`` is a file, holds something else, has damaged files, or is in use by another process.
        DeviceError: a device is not available.
        OSError: the machine failed, such as a full disk or a killed worker process.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; everything is saved.
    """
    slots = fold_devices(devices, jobs, config_device=config.runtime.device)
    for device in slots:
        require_device(device or config.runtime.device)
    require_place(out, CROSSVAL_FILE, "cross-validation", before=[SPLITS])
    dealt = deal(data, out, config, folds=folds)
    with locked(out):
        require_same(dealt)
        work = _Work(data=data, folds=dealt, slots=slots, on_progress=on_progress)
        try:
            with only_warnings(__file__):
                work.all_folds()
                return work.summary()
        except (InterruptedRunError, KeyboardInterrupt) as error:
            raise InterruptedRunError(
                f"{str(error).partition(';')[0] or 'interrupted'} in {work.what}; everything is saved in {out}. "
                "The same command goes on there."
            ) from error


@dataclass
class _Work:
    """The work of one process on a cross-validation."""

    data: DataSource
    folds: Folds
    slots: Sequence[str | None]
    on_progress: OnProgress
    what: str = "the first fold"
    """The current stage, for messages."""
    shares: dict[int, float] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    kept: float = 0.0
    """Share of the folds that was complete before this process started."""

    def all_folds(self) -> None:
        """Train and predict every fold that is not complete."""
        count = len(self.folds.splits)
        left = [fold for fold in range(count) if not self._is_done(fold)]
        self.shares = {fold: 0.0 if fold in left else 1.0 for fold in range(count)}
        self.kept = sum(self.shares.values()) / count
        if not left:
            return
        if len(self.slots) == 1 and self.slots[0] is None:
            for fold in left:
                self.what = f"fold {fold} of 0 to {count - 1}"

                def told(progress: Progress, fold: int = fold) -> None:
                    self._tell(fold, progress)

                work_on_fold(self.data, self.folds, fold, on_progress=told)
                self._note_done(fold)
            return
        self.what = f"folds {', '.join(map(str, left))}"
        work_in_processes(
            self.data.root,
            self.folds.out,
            left,
            self.slots,
            follow_links=self.data.follow_links,
            on_progress=self._tell,
            on_done=self._note_done,
        )
        shutil.rmtree(self.folds.out / "logs", ignore_errors=True)

    def summary(self) -> CrossValidation:
        """Tune post-processing, calibrate, write the ensemble and the scores."""
        self.what = "the choice of post-processing"
        fold_of = self.folds.fold_of()

        def told(share: float) -> None:
            detail = f"post-processing: {share:.0%} of {len(fold_of)} cases"
            self.on_progress(Progress(job="cross-validating", share=_FOLDS, detail=detail))

        scores = Scores({case_id: self.folds.answer_file(case_id) for case_id in fold_of}, on_share=told)
        tuning = tune(scores, list(fold_of.values()))
        self.what = "the scores"
        raw = summarise(self.folds, Postprocess())
        tuned = raw if tuning.chosen.changes_nothing else summarise(self.folds, tuning.chosen)
        if not tuning.chosen.changes_nothing and tuning.estimated_gain <= 0:
            LOG.warning(
                "post-processing gains %.4f on the cases it was chosen on, but %.4f where it is chosen without the "
                "fold it is scored on: it may not help on other cases. predict --no-postprocess leaves it out.",
                tuning.after - tuning.before,
                tuning.estimated_gain,
            )
        self.what = "the calibration"
        counts = {case_id: read_counts(self.folds.answer_file(case_id)) for case_id in fold_of}
        calibrated = calibrate(counts, raw, tuned)
        backends = count_backends(read_computed_by(self.folds.answer_file(case_id)) for case_id in fold_of)
        if len(backends) > 1:
            LOG.warning(
                "out-of-fold predictions were not all computed alike (%s), so their scores differ by rounding. To "
                "predict all of them here, delete %s and give the same command again.",
                backends_sentence(backends),
                self.folds.out / "out-of-fold",
            )
        self.what = "the ensemble"
        ensemble = write_ensemble(self.folds, tuning, tuned, calibrated)
        out = self.folds.out
        results = [read_json(self.folds.result_file(fold)) for fold in range(len(self.folds.splits))]
        content = {
            "ensemble": str(ensemble),
            "folds": [
                {**result, "fold": fold, "cases": len(split.validation), "trained_on": len(split.train)}
                for fold, (result, split) in enumerate(zip(results, self.folds.splits, strict=True))
            ],
            "raw": raw.to_json(),
            "tuned": tuned.to_json(),
            "tuning": tuning.to_json(),
            "calibration": calibrated.to_json(),
            "out_of_fold": backends,
            "dice": DICE_DEFINITION,
            "hd95": HD95_DEFINITION,
            "label_maps_sha256": self.folds.label_maps_sha256,
            "versions": versions(),
            "machine": machine(),
            "notice": NOTICE,
        }
        write_crossval_table(out / "crossval.csv", {"raw": raw, "tuned": tuned})
        write_json(out / "crossval.json", content)
        metrics = [read_metrics(self.folds.run(fold)) for fold in range(len(self.folds.splits))]
        self.on_progress(
            Progress(job="cross-validating", share=1.0, detail=f"{len(self.folds.splits)} folds", eta_seconds=0.0)
        )
        return CrossValidation(
            out=out,
            ensemble=ensemble,
            raw=raw,
            tuned=tuned,
            tuning=tuning,
            calibrated=calibrated,
            results=results,
            metrics=metrics,
            backends=backends_sentence(backends),
            content=content,
        )

    def _is_done(self, fold: int) -> bool:
        """Whether a fold is trained and all its cases are predicted with its current weights."""
        if not (self.folds.result_file(fold).exists() and has_begun(self.folds.run(fold))):
            return False
        saved = sorted((self.folds.run(fold) / "checkpoints").glob("best-*.json"))
        if not saved:
            return False
        try:
            weights = str(json_object(read_json(saved[-1]), saved[-1]).get("sha256"))
        except RunError:  # damaged: loading falls back to the previous pair
            return False
        return all(is_of(self.folds.answer_file(case_id), weights) for case_id in self.folds.splits[fold].validation)

    def _note_done(self, fold: int) -> None:
        self.shares[fold] = 1.0
        dice = read_json(self.folds.result_file(fold))["validation_dice"]
        LOG.info("fold %d is done: Dice while training %s", fold, ", ".join(f"{r} {v:.3f}" for r, v in dice.items()))

    def _tell(self, fold: int, progress: Progress) -> None:
        """Report progress of the whole job; estimate the time left from what this process has done."""
        self.shares[fold] = min(progress.share, 0.999)
        share = sum(self.shares.values()) / len(self.shares)
        made, spent = share - self.kept, time.monotonic() - self.began
        self.on_progress(
            Progress(
                job="cross-validating",
                share=_FOLDS * share,
                detail=f"fold {fold}  {progress.detail}",
                eta_seconds=spent / made * (1 - share) if made > 0.02 else None,
            )
        )
