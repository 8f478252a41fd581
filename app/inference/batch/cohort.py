"""Prediction of many cases: finished ones are skipped, an executor does the others, a manifest lists the outcomes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from app import NOTICE
from app.errors import InterruptedRunError
from app.inference.batch.challenge import Delivery
from app.inference.batch.fingerprint import finished_content
from app.inference.batch.manifest import MANIFEST_FILE, Outcome, write_manifest
from app.inference.batch.output_folder import at_work, make_output
from app.progress import LOG, OnProgress, Progress, silent
from data.datasets.layouts import Case

#: Threads that hash the files of cases that may be finished.
_HASHING_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Results of all cases, and the failures."""

    cases: tuple[Mapping[str, Any], ...]
    """Contents of the files ``<case>.json`` in the order of the cases, including those that were finished before."""
    skipped: tuple[str, ...]
    """Ids of the cases that were finished before."""
    failures: Mapping[str, str]
    """Message by case id."""
    manifest: Path | None
    """Path of the manifest, if one was written."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "cases": list(self.cases),
            "skipped": list(self.skipped),
            "failures": self.failures,
            "manifest": None if self.manifest is None else str(self.manifest),
            "notice": NOTICE,
        }

    def copied_to(self, folder: Path) -> Predictions:
        """The same predictions, after only the label maps were copied to another folder."""
        cases = ({**one, "label_map": str(folder / Path(one["label_map"]).name)} for one in self.cases)
        return replace(self, cases=tuple(cases), manifest=None)


class CaseObserver(Protocol):
    """Receives the events of cases from an executor, on any thread."""

    def begun(self, case: str, what: str = "") -> None:
        """A case is being worked on; ``what`` describes the step, where known."""
        ...

    def ended(self, outcome: Outcome) -> None:
        """A case is done or has failed."""
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
            KeyboardInterrupt: interrupted; nothing is written any more.
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
    """Have an executor do every unfinished case; a case that fails does not stop the others.

    Args:
        cases: the cases to predict.
        output: folder, created if missing.
        engine: the executor.
        settings: as returned by :func:`app.inference.batch.fingerprint.settings_of`.
        run: folder of the run or the ensemble, for the manifest.
        overwrite: also do finished cases.
        delivery: where each label map is copied as well, once it is done.
        on_progress: called with the case that is being worked on.

    Raises:
        DataError, OSError, InterruptedRunError: as in :func:`app.inference.batch.predict.predict`.
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
        folder, again = (output, "continues") if delivery is None else (delivery.output, "starts again")
        raise InterruptedRunError(
            f"{str(error) or 'interrupted'} while predicting; {done} of {len(cases)} label maps are in {folder}, all "
            f"complete. The same command {again}."
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

    def begun(self, case: str, what: str = "") -> None:
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
            LOG.info("%d of %d were finished before", len(self.outcomes), len(self.cases))

    def unfinished(self) -> list[Case]:
        """The cases to predict; one whose JSON would overwrite the manifest is recorded as failed."""
        for case in self.cases:
            if f"{case.id}.json" == MANIFEST_FILE:
                text = f"case {case.id}: its JSON would overwrite {MANIFEST_FILE} of the cohort. Rename the case."
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
        """Write the manifest of a stopped command; it may have stopped because writing is impossible."""
        with suppress(OSError):
            self.write(ended=False)

    def predictions(self) -> Predictions:
        """Results of all cases, in the order of the cases."""
        found = [self.outcomes[case.id] for case in self.cases]
        return Predictions(
            cases=tuple(one.content for one in found if one.content is not None),
            skipped=tuple(one.case for one in found if one.skipped),
            failures=self.failures(),
            manifest=self.manifest,
        )
