"""Predict many cases: finished ones are skipped, an executor runs the others, and a manifest lists the outcomes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from app.errors import InterruptedRunError
from app.inference.batch.challenge import Delivery
from app.inference.batch.fingerprint import finished_content
from app.inference.batch.manifest import MANIFEST_FILE, Outcome, write_manifest
from app.inference.batch.output_folder import at_work, make_output
from app.inference.batch.prediction_json import Predictions
from app.progress import LOG, OnProgress, Progress, silent
from data.datasets.layouts import Case

#: Threads that hash the files of cases that may be finished.
_HASHING_THREADS = 4


class CaseObserver(Protocol):
    """Receives the events of cases from an executor, on any thread."""

    def started(self, case: str, what: str = "") -> None:
        """Note that a case is being processed; ``what`` describes the step, if known."""
        ...

    def ended(self, outcome: Outcome) -> None:
        """Note that a case is done or has failed."""
        ...


class CaseExecutor(Protocol):
    """Executes cases: in this process, in others on this machine, or on Ray."""

    @property
    def name(self) -> str:
        """Name for the manifest."""
        ...

    def work(self, cases: Sequence[Case], observer: CaseObserver) -> None:
        """Execute every case; one that fails is reported and does not stop the others.

        Raises:
            Exception: an error that stops all cases.
            KeyboardInterrupt: interrupted; nothing more is written.
        """
        ...


def predict_each(
    cases: Sequence[Case],
    output: Path,
    engine: CaseExecutor,
    *,
    settings: Mapping[str, Any],
    run: Path | None = None,
    overwrite: bool = False,
    delivery: Delivery | None = None,
    on_progress: OnProgress = silent,
) -> Predictions:
    """Run an executor on every unfinished case; a case that fails does not stop the others.

    Args:
        cases: the cases to predict.
        output: folder, created if missing.
        engine: the executor.
        settings: as returned by :func:`app.inference.batch.fingerprint.settings_of`.
        run: folder of the run or the ensemble, for the manifest.
        overwrite: also predict finished cases.
        delivery: copies each label map to another folder, once it is done.
        on_progress: called with the case that is being processed.

    Raises:
        DataError, OSError, InterruptedRunError: as raised by :func:`app.inference.batch.predict.predict`.
    """
    progress = _CohortProgress(
        job="predicting",
        cases=cases,
        on_progress=on_progress,
        output=output,
        run=run,
        settings=json.loads(json.dumps(settings)),
        engine=engine.name,
        delivery=delivery,
    )
    try:
        if delivery is not None:
            delivery.create_folder(cases)
        make_output(output)
        with at_work(output):
            if not overwrite:
                progress.find_finished()
            engine.work(progress.unfinished(), progress)
            progress.write(ended=True)
    except KeyboardInterrupt as error:
        progress.write_if_possible()
        done = sum(outcome.content is not None for outcome in progress.outcomes.values())
        folder, again = (output, "to resume") if delivery is None else (delivery.output, "to start over")
        raise InterruptedRunError(
            f"{str(error) or 'interrupted'} while predicting; {done} of {len(cases)} label maps are in {folder}, all "
            f"complete. Run the same command again {again}."
        ) from error
    except BaseException:
        progress.write_if_possible()
        raise
    progress.finish()
    return progress.predictions()


@dataclass(kw_only=True)
class CaseProgress:
    """Outcomes of the cases so far; reports progress and logs failures."""

    job: str
    cases: Sequence[Case]
    on_progress: OnProgress
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def started(self, case: str, what: str = "") -> None:
        """Report the progress."""
        share = len(self.outcomes) / len(self.cases)
        self.on_progress(Progress(job=self.job, share=share, detail=what or case))

    def ended(self, outcome: Outcome) -> None:
        """Record the outcome of a case."""
        if outcome.message is not None:
            LOG.error("%s", outcome.message)
        self.outcomes[outcome.case] = outcome

    def failures(self) -> dict[str, str]:
        """Messages by case id, in the order of the cases."""
        found = [self.outcomes[case.id] for case in self.cases]
        return {one.case: one.message for one in found if one.message is not None}

    def finish(self) -> None:
        """Report the end."""
        done = sum(outcome.content is not None for outcome in self.outcomes.values())
        self.on_progress(Progress(job=self.job, share=1.0, detail=f"{done} of {len(self.cases)} cases"))


@dataclass(kw_only=True)
class _CohortProgress(CaseProgress):
    """Also finds finished cases, copies label maps and writes the manifest."""

    output: Path
    run: Path | None
    settings: Mapping[str, Any]
    engine: str
    delivery: Delivery | None
    began: float = field(default_factory=time.monotonic)
    manifest: Path | None = None

    def find_finished(self) -> None:
        """Record the cases that are finished."""
        self.on_progress(Progress(job=self.job, share=0.0, detail="looking for finished cases"))

        def content_of(case: Case) -> dict[str, Any] | None:
            return finished_content(case, self.output, self.settings)

        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            for case, content in zip(self.cases, threads.map(content_of, self.cases), strict=True):
                if content is not None:
                    self.outcomes[case.id] = Outcome(case=case.id, content=content, skipped=True)
        if self.outcomes:
            LOG.info("%d of %d cases were already finished", len(self.outcomes), len(self.cases))

    def unfinished(self) -> list[Case]:
        """Return the cases to predict; one whose JSON would overwrite the manifest is recorded as failed."""
        for case in self.cases:
            if f"{case.id}.json" == MANIFEST_FILE:
                text = f"case {case.id}: its JSON would overwrite the cohort's {MANIFEST_FILE}. Rename the case."
                self.ended(Outcome(case=case.id, message=text))
        return [case for case in self.cases if case.id not in self.outcomes]

    def ended(self, outcome: Outcome) -> None:
        """Record the outcome of a case, and copy its label map if it was successful."""
        if outcome.message is None and self.delivery is not None:
            self.delivery.copy(self.output / f"{outcome.case}.nii.gz")
        super().ended(outcome)

    def write(self, *, ended: bool) -> None:
        """Write the manifest, unless there is none yet and no case has a result."""
        path = self.output / MANIFEST_FILE
        if path.exists() or any(outcome.content is not None for outcome in self.outcomes.values()):
            write_manifest(
                path,
                {case.id: self.outcomes.get(case.id) for case in self.cases},
                run=self.run,
                settings=self.settings,
                engine=self.engine,
                seconds=time.monotonic() - self.began,
                ended=ended,
            )
            self.manifest = path

    def write_if_possible(self) -> None:
        """Write the manifest of a stopped command, ignoring an OSError, which may be why it stopped."""
        with suppress(OSError):
            self.write(ended=False)

    def predictions(self) -> Predictions:
        """Return the results of all cases, in the order of the cases."""
        found = [self.outcomes[case.id] for case in self.cases]
        return Predictions(
            cases=tuple(one.content for one in found if one.content is not None),
            skipped=tuple(one.case for one in found if one.skipped),
            failures=self.failures(),
            manifest=self.manifest,
        )
