"""Make the runs of a comparison one after the other; completed runs are kept.

The folder of a comparison holds::

    plan.json       what is compared, and the case ids by part
    split.json      the training and validation cases of every run
    runs/           one run folder per run, as ``train`` makes them
    results/        one JSON file per run: how it began, how it ended; scores on the third part for the final ones
    compare.csv     Dice of every final run and scored case
    compare.json    everything in numbers and words
    compare.html    the page
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from app.config.load import from_plain
from app.errors import ConfigError, InterruptedRunError
from app.experiments.comparison.plan import ComparisonPlan, RunKey, shared_settings
from app.experiments.comparison.split import ThreeWaySplit, fold_parts, read_parts
from app.experiments.runs import (
    differences,
    has_begun,
    json_object,
    only_warnings,
    require_place,
    start_or_resume,
)
from app.inference.scoring import score_run
from app.progress import LOG, OnProgress, Progress, silent
from app.runs import checkpoints
from app.runs.case_cache import prepared_cases
from app.runs.folder import locked, read_json, write_json
from app.training.cases import require_labels, tell_of_names, tell_of_patients
from app.training.run import TrainResult
from data.datasets.label_stats import LabelStats, read_label_maps, tumours_of
from data.datasets.layouts import Case, patients_of
from data.datasets.patients import patient_by_older_versions
from data.datasets.source import DataSource
from data.errors import DataError
from data.labels import CONVENTIONS, convention_named
from data.patches.cache import CaseFolder
from data.patches.sampler import PatchSource, cache_cases

_VERSION: Final = 1
#: Describes the comparison.
_PLAN: Final = "plan.json"


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of the runs of a comparison."""

    plan: ComparisonPlan
    parts: ThreeWaySplit
    chosen: Mapping[tuple[str, str], float]
    """Chosen learning rate by optimiser and arm."""
    runs: Mapping[RunKey, Mapping[str, Any]]
    """The content of ``results/<run>.json`` of every run."""


def make_runs(
    data: DataSource,
    out: Path,
    plan: ComparisonPlan,
    *,
    fold: int = 0,
    split_file: Path | None = None,
    on_progress: OnProgress = silent,
) -> Results:
    """Make every missing run, choose the learning rates, and score the final runs.

    Args:
        data: the data set.
        out: folder of the comparison: new, empty, or holding the same comparison, which is then resumed.
        plan: what to compare.
        fold: the test fold; the next fold is used for validation.
        split_file: JSON file with the lists ``train``, ``validation`` and ``test``; overrides ``fold``.
        on_progress: called with the progress of the whole comparison.

    Raises:
        DataError: the data cannot be used, or has too few patients.
        ConfigError: ``out`` holds a different comparison.
        RunError: ``out`` is a file, holds something else, or is in use by another process.
        InterruptedRunError: stopped by Ctrl-C or SIGTERM; everything is saved.
    """
    cases = data.find_cases()
    patients = patients_of(cases.values())
    parts = fold_parts(patients, fold) if split_file is None else read_parts(split_file, patients)
    used = [cases[case_id].require() for case_id in (*parts.train, *parts.validation, *parts.test)]
    require_labels(used)
    require_place(out, _PLAN, "comparison")
    if split_file is None:
        parts = _dealt(cases, fold, data, begun=_parts_on_record(out))
    tell_of_patients(cases.values(), (parts.train, parts.validation, parts.test))
    tell_of_names(used)
    with locked(out):
        settled = {} if data.labels is None else {"labels": convention_named(data.labels).name}
        _require_same(out, {"version": _VERSION, **plan.to_json(), "parts": parts.to_json(), **settled})
        write_json(out / "split.json", parts.split.to_json())
        work: _Work | None = None
        try:
            with only_warnings(__file__), prepared_cases(out / "cache") as store:
                work = _Work(
                    data=data,
                    out=out,
                    plan=plan,
                    parts=parts,
                    cases=cases,
                    store=store,
                    on_progress=on_progress,
                )
                results = work.all_runs()
            shutil.rmtree(out / "cache", ignore_errors=True)
            return results
        except (InterruptedRunError, KeyboardInterrupt) as error:
            behind = 0 if work is None else work.position
            place = f"run {min(behind + 1, plan.count())} of {plan.count()}"
            raise InterruptedRunError(
                f"{str(error).partition(';')[0] or 'interrupted'} in {place}; everything is saved in {out}. "
                "The same command goes on there."
            ) from error


@dataclass
class _Work:
    """The work of one process on a comparison."""

    data: DataSource
    out: Path
    plan: ComparisonPlan
    parts: ThreeWaySplit
    cases: Mapping[str, Case]
    store: CaseFolder
    """Prepared cases, shared by all runs."""
    on_progress: OnProgress
    position: int = 0
    """Number of runs done so far."""
    began: float = field(default_factory=time.monotonic)
    kept: int = 0
    """Number of runs that were complete before this process started."""

    def all_runs(self) -> Results:
        """Make the sweep, choose the learning rates, and make and score the final runs."""
        runs: dict[RunKey, Mapping[str, Any]] = {}
        for key in self.plan.sweep():
            runs[key] = self._one(key)
        chosen = choose_rates(self.plan, runs)
        for (optimizer, arm), rate in chosen.items():
            LOG.info("%s, %s: learning rate %g has the best validation Dice", optimizer, arm, rate)
        for key in self.plan.finals(chosen):
            if key not in runs:
                runs[key] = self._one(key)
            runs[key] = self._scored(key, runs[key])
        self.on_progress(Progress(job="comparing", share=1.0, detail=f"{self.position} runs", eta_seconds=0.0))
        return Results(plan=self.plan, parts=self.parts, chosen=chosen, runs=runs)

    def _one(self, key: RunKey) -> Mapping[str, Any]:
        """Make one run, or read its result if it is complete."""
        path = self._result_path(key)
        known = read_json(path) if path.exists() else {}
        if "steps" in known and has_begun(self._run(key)):
            self.position += 1
            self.kept += 1
            return json_object(known, path)
        outcome = self._train(key)
        result = {
            "run": f"runs/{key.name}",
            "optimizer": key.optimizer,
            "arm": key.arm,
            "learning_rate": key.rate,
            "seed": key.seed,
            "steps": outcome.steps,
            "seconds": round(outcome.seconds, 3),
            "validation_dice": outcome.dice,
            "best_step": outcome.best_step,
            "skipped_steps": outcome.skipped_steps,
            "start": (read_json(path) if path.exists() else {}).get("start"),
        }
        write_json(path, result)
        self.position += 1
        dice = _mean(outcome.dice)
        LOG.info("%d of %d, %s: validation Dice %.3f", self.position, self.plan.count(), key.name, dice)
        return result

    def _train(self, key: RunKey) -> TrainResult:
        """Start or resume a run."""
        run, config = self._run(key), self.plan.config_of(key)

        def told(progress: Progress) -> None:
            if progress.job == "training":
                self._note_start(key)
            self._tell(
                progress.share if progress.job == "training" else 0.0, f"{self._place()}  {key.name}  {progress.detail}"
            )

        if has_begun(run):
            self._note_start(key)
        return start_or_resume(
            self.data,
            run,
            config,
            split_file=self.out / "split.json",
            store=self.store,
            on_progress=told,
        )

    def _note_start(self, key: RunKey) -> None:
        """Record hashes of a run's initial weights and first batch while its checkpoint of step 0 exists."""
        path, run = self._result_path(key), self._run(key)
        if path.exists():
            return
        checkpoint = checkpoints.load_newest(run / "checkpoints", "last")
        if checkpoint is None or checkpoint.step != 0:
            return
        path.parent.mkdir(exist_ok=True)
        write_json(
            path,
            {"start": {"weights_sha256": _weights_sha256(checkpoint), "batch_sha256": self._batch_sha256(key, run)}},
        )

    def _batch_sha256(self, key: RunKey, run: Path) -> str:
        """Return the SHA-256 of the first batch, rebuilt from the prepared cases as the run builds it."""
        config, facts = self.plan.config_of(key), read_json(run / "run.json")
        prepared = cache_cases(
            [self.cases[case_id] for case_id in self.parts.train],
            self.store,
            spacing_mm=tuple(facts["spacing_mm"]),
            convention=CONVENTIONS[facts["labels"]],
            nan_to_zero=config.data.nan_to_zero,
        )
        source = PatchSource(
            prepared,
            patch_voxels=config.training.patch_voxels,
            tumour_probability=config.training.tumour_probability,
            enhancing_probability=config.training.enhancing_probability,
            augmentation=config.augment,
            seed=config.training.seed,
        )
        batch = source.batch(0, config.training.batch_size)
        digest = hashlib.sha256(" ".join(batch.cases).encode())
        for tensor in (batch.image, batch.masks):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _scored(self, key: RunKey, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add the final Dice by case if it is missing."""
        ids = list(self.parts.scored)
        if list(result.get("dice", {})) == ids:
            return result
        began = time.monotonic()
        runtime, sha256, dice = score_run(
            self._run(key),
            [self.cases[case_id] for case_id in ids],
            self.plan.config_of(key),
            on_case=lambda case_id: self._tell(0.0, f"scored {case_id}  {key.name}"),
        )
        scored = {
            **result,
            "weights_sha256": sha256,
            "computed_by": runtime.record(),
            "scoring_seconds": round(time.monotonic() - began, 3),
            "dice": dice,
        }
        write_json(self._result_path(key), scored)
        return scored

    def _tell(self, share: float, detail: str) -> None:
        """Report progress of the whole comparison; estimate the time left from the runs that this process made."""
        total, share = self.plan.count(), min(share, 0.999)
        made = self.position - self.kept + share
        spent = time.monotonic() - self.began
        eta = spent / made * (total - self.position - share) if made > 0.02 else None
        self.on_progress(
            Progress(
                job="comparing",
                share=min(0.999, (self.position + share) / total),
                detail=detail,
                eta_seconds=eta,
            )
        )

    def _place(self) -> str:
        return f"run {self.position + 1} of {self.plan.count()}"

    def _run(self, key: RunKey) -> Path:
        return self.out / "runs" / key.name

    def _result_path(self, key: RunKey) -> Path:
        return self.out / "results" / f"{key.name}.json"


def choose_rates(plan: ComparisonPlan, runs: Mapping[RunKey, Mapping[str, Any]]) -> dict[tuple[str, str], float]:
    """Choose the learning rate with the best mean validation Dice for the first seed, by optimiser and arm.

    Args:
        plan: what is compared.
        runs: results of its sweep.

    Returns:
        the chosen rates; of equally good rates the lowest.
    """
    chosen = {}
    for optimizer in plan.optimizers:
        for arm in plan.arms:
            keys = [
                RunKey(optimizer=optimizer, arm=arm, rate=rate, seed=plan.first_seed) for rate in plan.rates[optimizer]
            ]
            best = max(keys, key=lambda key: _mean(runs[key]["validation_dice"]))
            chosen[optimizer, arm] = best.rate
    return chosen


def _mean(dice: Mapping[str, float] | None) -> float:
    return sum(dice.values()) / len(dice) if dice else -1.0


def _require_same(out: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or require that an existing one is the same."""
    path = out / _PLAN
    if not path.exists():
        write_json(path, plan)
        return
    there = json_object(read_json(path), path)
    # Keys that later versions added have their defaults.
    there = {"variants": {}, "first_seed": 0, **there}
    there["config"] = shared_settings(from_plain(there.get("config", {}), str(path)))
    changed = differences(there, plan)
    if changed:
        raise ConfigError(
            f"{out} holds another comparison; give another folder, or the settings it was begun with. "
            f"Different: {'; '.join(changed)}"
        )


def _parts_on_record(out: Path) -> Any:
    """Return the parts that a comparison was started with, or None."""
    path = out / _PLAN
    return json_object(read_json(path), path).get("parts") if path.exists() else None


def _dealt(cases: Mapping[str, Case], fold: int, data: DataSource, *, begun: Any) -> ThreeWaySplit:
    """Return the parts of a fold; in a comparison that an older version started, the parts by that version's rules."""
    patients = patients_of(cases.values())
    before = {case_id: patient_by_older_versions(case_id) for case_id in cases}
    tumours: dict[str, LabelStats] | None = None
    if begun is not None:
        for known in (patients, before):  # by case id only, as in the oldest versions
            with suppress(DataError):
                if (parts := fold_parts(known, fold)).to_json() == begun:
                    return parts
        tumours = _tumours(cases, data)
        with suppress(DataError):
            if (parts := fold_parts(before, fold, tumours)).to_json() == begun:
                return parts
    return fold_parts(patients, fold, _tumours(cases, data) if tumours is None else tumours)


def _tumours(cases: Mapping[str, Case], data: DataSource) -> dict[str, LabelStats]:
    held = read_label_maps(cases.values())
    return tumours_of(cases, held, data.decide_convention(cases, held))


def _weights_sha256(checkpoint: checkpoints.Checkpoint) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
