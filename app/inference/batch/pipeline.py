"""Cases in one process: while one is computed, the next is read and the previous one is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from app.config.inference import PredictOptions
from app.errors import is_out_of_memory
from app.inference.batch.cohort import CaseObserver, Prediction
from app.inference.batch.fingerprint import MADE_FROM, files_sha256, made_from
from app.inference.batch.manifest import Outcome, Worker
from app.runs.folder import write_json
from data.datasets.layouts import Case
from data.errors import DataError
from data.nifti import voxel_count

R = TypeVar("R")
C = TypeVar("C")

#: A case with more voxels is not read ahead: it and the case being computed would need too much memory.
MOST_VOXELS_AHEAD: Final = 320**3


def most_voxels_ahead(options: PredictOptions) -> int:
    """Limit for reading ahead: 0 if memory is bounded, as the plan for the current case leaves no room for another."""
    return MOST_VOXELS_AHEAD if options.max_memory_gb is None else 0


@dataclass(frozen=True, kw_only=True)
class Steps(Generic[R, C]):
    """The three steps of a case."""

    read: Callable[[Case], R]
    """Needs no device; called on a separate thread."""
    compute: Callable[[R, Callable[[str], None]], C]
    """Called on the thread that works through the cases, with a function that reports what is being done."""
    write: Callable[[C], Prediction]
    """Writes every file except ``<case>.json``; called on a separate thread."""
    warm_up: Callable[[], None] = lambda: None
    """Called once on the thread that computes, while the first case is read."""
    most_voxels_ahead: int = MOST_VOXELS_AHEAD
    """A case with a larger image is only read after the previous one has been computed."""


@dataclass(frozen=True, kw_only=True)
class _Read(Generic[R]):
    case: Case
    made: dict[str, Any]
    read: R


@dataclass(frozen=True, kw_only=True)
class InThisProcess(Generic[R, C]):
    """Executes cases in this process."""

    steps: Steps[R, C]
    output: Path
    settings: Mapping[str, Any]
    """As returned by :func:`app.inference.batch.fingerprint.settings_of`."""
    worker: Worker
    """This process."""

    @property
    def name(self) -> str:
        """Name for the manifest."""
        return "local"

    def work(self, cases: Iterable[Case], told: CaseObserver, *, stop_cases: Callable[[], None] = lambda: None) -> None:
        """Execute cases one after the other; at most one is read ahead, and at most one is being written.

        Args:
            cases: in order; the iterator may block before the next case, and is advanced on another thread.
            told: receives the events.
            stop_cases: called when no more cases are needed; must unblock ``cases``.

        Raises:
            OSError, MemoryError, RuntimeError: from any step, once the file being written is complete or removed.
            KeyboardInterrupt: interrupted, likewise.
        """
        ahead = _Ahead(self, iter(cases), told)
        writer = ThreadPoolExecutor(1, "write")
        writing: Future[None] | None = None
        try:
            self.steps.warm_up()
            while (took := ahead.take()) is not None:
                told.begun(took.case.id)
                try:
                    with _naming_memory(took.case, "predict"):
                        computed = self.steps.compute(took.read, partial(told.begun, took.case.id))
                except DataError as error:
                    told.ended(self.failed(took.case, error))
                    continue
                finally:
                    ahead.computed()
                if writing is not None:
                    writing.result()
                writing = writer.submit(self._write, took.case, took.made, computed, told)
                del took, computed
            if writing is not None:
                writing.result()
        finally:
            stop_cases()
            ahead.stop()
            writer.shutdown()

    def one(self, case: Case, told: CaseObserver) -> None:
        """Execute a single case on this thread.

        Raises:
            OSError, MemoryError, RuntimeError: from any step.
        """
        try:
            took = self.read(case)
            with _naming_memory(case, "predict"):
                computed = self.steps.compute(took.read, partial(told.begun, case.id))
        except DataError as error:
            told.ended(self.failed(case, error))
            return
        self._write(case, took.made, computed, told)

    def read(self, case: Case) -> _Read[R]:
        """Read a case, after hashing its files.

        Raises:
            DataError: the case cannot be used.
            OSError: a file cannot be read.
        """
        try:
            made = made_from(case.require(all_contrasts=False), self.settings)
        except (OSError, DataError):
            self.steps.read(case)  # its own error describes the problem better
            raise
        with _naming_memory(case, "read"):
            return _Read(case=case, made=made, read=self.steps.read(case))

    def _write(self, case: Case, made: dict[str, Any], computed: C, told: CaseObserver) -> None:
        """Write the files, then the JSON, which marks them as complete."""
        try:
            with _naming_memory(case, "write"):
                prediction = self.steps.write(computed)
        except DataError as error:
            told.ended(self.failed(case, error))
            return
        files = files_sha256(prediction.files)
        content = {**prediction.content, MADE_FROM: {**made, "files_sha256": files}}
        write_json(self.output / f"{case.id}.json", content)
        told.ended(Outcome(case=case.id, content=content, worker=self.worker))

    def failed(self, case: Case, error: DataError) -> Outcome:
        """Outcome of a case that failed."""
        return Outcome(case=case.id, message=str(error), worker=self.worker)


@contextmanager
def _naming_memory(case: Case, doing: str) -> Iterator[None]:
    """Make a lack of memory the failure of a single case, so that the others continue."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"case {case.id}: memory is not enough to {doing} it ({said}). "
            "Close other programs, or use a machine with more memory; the same command goes on."
        ) from error


class _Ahead(Generic[R]):
    """Reads one case ahead on a separate thread."""

    def __init__(self, engine: InThisProcess[R, Any], cases: Iterator[Case], told: CaseObserver) -> None:
        self._engine = engine
        self._cases = cases
        self._told = told
        self._stopped = False
        self._idle = threading.Event()
        self._idle.set()
        self._reader = ThreadPoolExecutor(1, "read")
        self._reading = self._reader.submit(self._next)

    def take(self) -> _Read[R] | None:
        """The next case that could be read, or None at the end; starts to read the one after it."""
        took = self._reading.result()
        self._idle.clear()
        if took is not None:
            self._reading = self._reader.submit(self._next)
        return took

    def computed(self) -> None:
        """Signal that the case taken last no longer needs memory."""
        self._idle.set()

    def stop(self) -> None:
        """Wait for the thread, which starts nothing further."""
        self._stopped = True
        self._idle.set()
        self._reader.shutdown(cancel_futures=True)

    def _next(self) -> _Read[R] | None:
        for case in self._cases:
            try:
                if any(voxel_count(path) > self._engine.steps.most_voxels_ahead for path in case.contrasts.values()):
                    self._idle.wait()
            except DataError:  # reported when the case is read
                self._idle.wait()
            if self._stopped:
                return None
            try:
                return self._engine.read(case)
            except DataError as error:
                self._told.ended(self._engine.failed(case, error))
        return None
