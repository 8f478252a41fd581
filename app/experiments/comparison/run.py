"""The runs of a comparison, made one after the other; completed runs are kept.

The folder of a comparison contains::

    plan.json       what is compared, and the case ids by part
    split.json      the training and validation cases of every run
    runs/           one run folder per run, as ``train`` makes them
    results/        one JSON file per run: its start, its end and, for final runs, the Dice by scored case
    compare.csv     Dice of every final run and scored case
    compare.json    everything in numbers and words
    compare.html    the page
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app.experiments.comparison.plan import ComparisonPlan, RunKey
from app.experiments.comparison.split import ThreeWaySplit
from app.experiments.runs import JobProgress, has_checkpoint, json_object, start_or_resume
from app.inference.scoring import score_run
from app.progress import LOG, Progress
from app.runs import checkpoints
from app.runs.folder import read_json, write_json
from app.training.cases import patch_settings
from app.training.presence_scoring import score_presence_run
from app.training.run import TrainResult, prepare_as_run
from data.datasets.layouts import Case
from data.datasets.source import DataSource
from data.patches.cache import CaseFolder
from data.patches.sampler import PatchSource

#: Entries of a run's result that the comparison keeps.
_KEPT: Final = ("steps", "seconds", "best_step", "skipped_steps")


@dataclass(frozen=True, kw_only=True)
class Results:
    """Results of the runs of a comparison."""

    plan: ComparisonPlan
    parts: ThreeWaySplit
    chosen: Mapping[tuple[str, str], float]
    """Chosen learning rate by optimiser and arm."""
    runs: Mapping[RunKey, Mapping[str, Any]]
    """The content of ``results/<run>.json`` of every run."""


@dataclass(kw_only=True)
class ComparisonRuns:
    """Makes the missing runs of a comparison."""

    data: DataSource
    out: Path
    plan: ComparisonPlan
    parts: ThreeWaySplit
    cases: Mapping[str, Case]
    store: CaseFolder
    """Prepared cases, shared by all runs."""
    progress: JobProgress
    done: int = 0
    """Number of complete runs."""

    def make(self) -> Results:
        """Make the sweep, choose the learning rates, and make and score the final runs."""
        runs: dict[RunKey, Mapping[str, Any]] = {}
        for key in self.plan.sweep():
            runs[key] = self._one(key)
        chosen = choose_rates(self.plan, runs)
        for (optimizer, arm), rate in chosen.items():
            name = self.plan.config.measure.in_words
            LOG.info("%s, %s: learning rate %g has the best validation %s", optimizer, arm, rate, name)
        for key in self.plan.finals(chosen):
            if key not in runs:
                runs[key] = self._one(key)
            runs[key] = self._scored(key, runs[key])
        self.progress.end(f"{self.done} runs")
        return Results(plan=self.plan, parts=self.parts, chosen=chosen, runs=runs)

    def _one(self, key: RunKey) -> Mapping[str, Any]:
        """Make one run, or read its result if it is complete."""
        path = self._result_path(key)
        recorded = read_json(path) if path.exists() else {}
        if "steps" in recorded and has_checkpoint(self._run(key)):
            self.done += 1
            self.progress.kept += 1
            return json_object(recorded, path)
        outcome = self._train(key)
        result = {
            "run": f"runs/{key.name}",
            "optimizer": key.optimizer,
            "arm": key.arm,
            "learning_rate": key.rate,
            "seed": key.seed,
            **{name: outcome.to_json()[name] for name in (*_KEPT, f"validation_{outcome.measure.key}")},
            "start": (read_json(path) if path.exists() else {}).get("start"),
        }
        write_json(path, result)
        self.done += 1
        score, name = _mean(outcome.validation_scores), outcome.measure.in_words
        LOG.info("%d of %d, %s: validation %s %.3f", self.done, self.plan.count(), key.name, name, score)
        return result

    def _train(self, key: RunKey) -> TrainResult:
        """Start or resume a run."""
        run, config = self._run(key), self.plan.config_of(key)

        def report(progress: Progress) -> None:
            share = 0.0
            if progress.job == "training":
                self._note_start(key)
                share = min(progress.share, 0.999)
            self.progress.report(self.done + share, f"{self.position()}  {key.name}  {progress.detail}")

        if has_checkpoint(run):
            self._note_start(key)
        split_file = self.out / "split.json"
        return start_or_resume(self.data, run, config, split_file=split_file, store=self.store, on_progress=report)

    def _note_start(self, key: RunKey) -> None:
        """Record hashes of a run's initial weights and first batch while its checkpoint of step 0 exists."""
        path, run = self._result_path(key), self._run(key)
        if path.exists():
            return
        checkpoint = checkpoints.load_newest(run / "checkpoints", "last")
        if checkpoint is None or checkpoint.step != 0:
            return
        path.parent.mkdir(exist_ok=True)
        hashes = {"weights_sha256": hash_of_weights(checkpoint), "batch_sha256": self._batch_sha256(key, run)}
        write_json(path, {"start": hashes})

    def _batch_sha256(self, key: RunKey, run: Path) -> str:
        """Return the SHA-256 of the first batch, rebuilt from the prepared cases as the run builds it."""
        config, facts = self.plan.config_of(key), read_json(run / "run.json")
        prepared = prepare_as_run([self.cases[case_id] for case_id in self.parts.train], self.store, config, facts)
        batch = PatchSource(prepared, **patch_settings(config)).batch(0, config.training.batch_size)
        digest = hashlib.sha256(" ".join(batch.cases).encode())
        for tensor in (batch.image, batch.masks):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def _scored(self, key: RunKey, result: Mapping[str, Any]) -> Mapping[str, Any]:
        """Add the final scores by case if they are missing."""
        ids, measure = list(self.parts.scored), self.plan.config.measure.key
        if list(result.get(measure, {})) == ids:
            return result
        began = time.monotonic()
        score = score_presence_run if measure != "dice" else score_run
        runtime, sha256, scores = score(
            self._run(key),
            [self.cases[case_id] for case_id in ids],
            self.plan.config_of(key),
            on_case=lambda case_id: self.progress.report(self.done, f"scored {case_id}  {key.name}"),
        )
        scored = {
            **result,
            "weights_sha256": sha256,
            "computed_by": runtime.record(),
            "scoring_seconds": round(time.monotonic() - began, 3),
            measure: scores,
        }
        write_json(self._result_path(key), scored)
        return scored

    def position(self) -> str:
        """Describe the run in progress."""
        count = self.plan.count()
        return f"run {min(self.done + 1, count)} of {count}"

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
        the chosen rates; among equally good ones, the lowest.
    """
    chosen = {}
    for optimizer in plan.optimizers:
        for arm in plan.arms:
            keys = [
                RunKey(optimizer=optimizer, arm=arm, rate=rate, seed=plan.first_seed) for rate in plan.rates[optimizer]
            ]
            best = max(keys, key=lambda key: _mean(runs[key][f"validation_{plan.config.measure.key}"]))
            chosen[optimizer, arm] = best.rate
    return chosen


def _mean(dice: Mapping[str, float] | None) -> float:
    return sum(dice.values()) / len(dice) if dice else -1.0


def hash_of_weights(checkpoint: checkpoints.Checkpoint) -> str:
    """Return the SHA-256 of the names and values of a checkpoint's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(checkpoint.weights.items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
