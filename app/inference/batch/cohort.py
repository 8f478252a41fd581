"""Prediction of many cases: finished ones are skipped, an executor does the others, a manifest lists the outcomes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from app import NOTICE
from app.errors import InterruptedRunError
from app.inference.batch.challenge import Delivery
from app.inference.batch.fingerprint import finished_content
from app.inference.batch.manifest import MANIFEST_FILE, Cohort, Outcome, write_manifest
from app.inference.batch.output_folder import at_work, make_output
from app.progress import LOG, OnProgress, Progress, silent
from data.datasets.layouts import Case

#: Threads that hash the files of cases that may be finished.
_HASHING_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Files that were written for one case."""

    case: str
    label_map: Path
    content: dict[str, Any]
    """Content of ``<case>.json``."""
    skipped: bool = False
    """Whether it was finished by an earlier command."""

    @property
    def files(self) -> list[Path]:
        """The label map, and the optional files that the JSON lists under ``files``; all are in one folder."""
        return [self.label_map, *(Path(path) for path in self.content.get("files", {}).values() if path)]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """Results of all cases, and the failures."""

    done: tuple[Prediction, ...]
    """In the order of the cases, including those that were finished before."""
    failures: dict[str, str]
    """Message by case id."""
    manifest: Path | None = None
    """Path of the manifest, if one was written."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "cases": [prediction.content for prediction in self.done],
            "skipped": [prediction.case for prediction in self.done if prediction.skipped],
            "failures": self.failures,
            "manifest": None if self.manifest is None else str(self.manifest),
            "notice": NOTICE,
        }

    def brought_to(self, folder: Path) -> Predictions:
        """The same predictions, after only the label maps were copied to another folder."""

        def brought(one: Prediction) -> Prediction:
            place = folder / one.label_map.name
            return replace(one, label_map=place, content={**one.content, "label_map": str(place)})

        return replace(self, done=tuple(map(brought, self.done)), manifest=None)


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

    def work(self, cases: Sequence[Case], told: CaseObserver) -> None:
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
    cohort = Cohort(run=run, settings=json.loads(json.dumps(settings)), engine=engine.name)
    ledger = _Progress(cases, output, cohort, on_progress, delivery)
    try:
        if delivery is not None:
            delivery.make_place(cases)
        make_output(output)
        with at_work(output):
            if not overwrite:
                ledger.look_for_finished()
            left = [case for case in cases if case.id not in ledger.outcomes]
            engine.work(_nameable(left, ledger), ledger)
            ledger.write(ended=True)
    except KeyboardInterrupt as error:
        ledger.write_if_possible()
        done = sum(outcome.content is not None for outcome in ledger.outcomes.values())
        place, again = (output, "goes on") if delivery is None else (delivery.output, "begins anew")
        raise InterruptedRunError(
            f"{str(error) or 'interrupted'} while predicting; {done} of {len(cases)} label maps are in {place}, "
            f"whole. The same command {again}."
        ) from error
    except BaseException:
        ledger.write_if_possible()
        raise
    predictions = ledger.predictions()
    on_progress(Progress(job="predicting", share=1.0, detail=f"{len(predictions.done)} of {len(cases)} cases"))
    return predictions


def _nameable(cases: Sequence[Case], told: CaseObserver) -> list[Case]:
    """The cases whose JSON would not overwrite the manifest; any other is reported as failed."""
    for case in cases:
        if f"{case.id}.json" == MANIFEST_FILE:
            told.ended(
                Outcome(case=case.id, message=f"case {case.id}: {MANIFEST_FILE} is the cohort's. Rename the case.")
            )
    return [case for case in cases if f"{case.id}.json" != MANIFEST_FILE]


class _Progress:
    """Outcomes of the cases so far; reports progress and writes the manifest."""

    def __init__(
        self,
        cases: Sequence[Case],
        output: Path,
        cohort: Cohort,
        on_progress: OnProgress,
        delivery: Delivery | None = None,
    ) -> None:
        self._cases = cases
        self._output = output
        self._cohort = cohort
        self._on_progress = on_progress
        self._delivery = delivery
        self._began = time.monotonic()
        self.outcomes: dict[str, Outcome] = {}
        self.manifest: Path | None = None

    def look_for_finished(self) -> None:
        """Record the cases that are finished."""
        self._on_progress(Progress(job="predicting", share=0.0, detail="looking for finished cases"))

        def content_of(case: Case) -> dict[str, Any] | None:
            return finished_content(case, self._output, self._cohort.settings)

        with ThreadPoolExecutor(_HASHING_THREADS) as threads:
            for case, content in zip(self._cases, threads.map(content_of, self._cases), strict=True):
                if content is not None:
                    self.outcomes[case.id] = Outcome(case=case.id, content=content, skipped=True)
        if self.outcomes:
            LOG.info("%d of %d were finished before", len(self.outcomes), len(self._cases))

    def begun(self, case: str, what: str = "") -> None:
        """Report the progress."""
        share = len(self.outcomes) / len(self._cases)
        self._on_progress(Progress(job="predicting", share=share, detail=what or case))

    def ended(self, outcome: Outcome) -> None:
        """Record the outcome of a case, and deliver its label map if it was successful."""
        if outcome.message is not None:
            LOG.error("%s", outcome.message)
        elif self._delivery is not None:
            self._delivery.bring(self._output / f"{outcome.case}.nii.gz")
        self.outcomes[outcome.case] = outcome

    def write(self, *, ended: bool) -> None:
        """Write the manifest, unless there is none yet and no case has a result."""
        path = self._output / MANIFEST_FILE
        outcomes = dict(self.outcomes)
        if not path.exists() and not any(outcome.content is not None for outcome in outcomes.values()):
            return
        seconds = time.monotonic() - self._began
        ids = [case.id for case in self._cases]
        write_manifest(self._output, self._cohort, ids, outcomes, seconds=seconds, ended=ended)
        self.manifest = path

    def write_if_possible(self) -> None:
        """Write the manifest of a stopped command; it may have stopped because writing is impossible."""
        with suppress(OSError):
            self.write(ended=False)

    def predictions(self) -> Predictions:
        """Results of all cases, in the order of the cases."""
        found = [self.outcomes[case.id] for case in self._cases]
        return Predictions(
            done=tuple(
                Prediction(
                    case=one.case,
                    label_map=self._output / f"{one.case}.nii.gz",
                    content=one.content,
                    skipped=one.skipped,
                )
                for one in found
                if one.content is not None
            ),
            failures={one.case: one.message for one in found if one.message is not None},
            manifest=self.manifest,
        )
