"""Run cases in one process: while one is computed, the next are read and the previous one is written."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Generic, TypeVar

from app.errors import is_out_of_memory
from app.inference.batch.cohort import CaseObserver
from app.inference.batch.manifest import Outcome, Worker
from data.datasets.layouts import Case
from data.errors import DataError
from data.nifti import voxel_count

R = TypeVar("R")
C = TypeVar("C")

#: A case with more voxels is not read ahead: together with the case being computed, it would need too much memory.
MOST_VOXELS_AHEAD: Final = 320**3


class Steps(ABC, Generic[R, C]):
    """The three steps of a case; each raises a DataError if only this case fails."""

    @property
    def most_voxels_ahead(self) -> int:
        """Largest image, in voxels, that is read ahead; a larger one is read after the previous case is computed."""
        return MOST_VOXELS_AHEAD

    @property
    def readers(self) -> int:
        """Number of threads that read ahead, and of cases that are read ahead."""
        return 1

    @property
    def writers(self) -> int:
        """Number of threads that write, and of cases that are being written at a time."""
        return 1

    def warm_up(self) -> None:
        """Prepare to compute; called once on the computing thread, while the first case is read."""

    @abstractmethod
    def read(self, case: Case) -> R:
        """Read a case; needs no device, and is called on a separate thread."""

    @abstractmethod
    def compute(self, read: R, on_step: Callable[[str], None]) -> C:
        """Compute a case on the computing thread; ``on_step`` receives descriptions of the steps."""

    @abstractmethod
    def write(self, computed: C) -> Mapping[str, Any]:
        """Write a case on a separate thread, and return its record."""


@dataclass(frozen=True, kw_only=True)
class InThisProcess(Generic[R, C]):
    """Executes cases in this process."""

    steps: Steps[R, C]
    worker: Worker
    """This process."""

    @property
    def name(self) -> str:
        """Name for the manifest."""
        return "local"

    def work(
        self, cases: Iterable[Case], observer: CaseObserver, *, stop_cases: Callable[[], None] = lambda: None
    ) -> None:
        """Execute cases one after the other; each reader reads one ahead, and each writer writes one.

        Args:
            cases: in order; the iterator may block before the next case, and is advanced on other threads.
            observer: receives the events.
            stop_cases: called when no more cases are needed; must unblock ``cases``.

        Raises:
            OSError, MemoryError, RuntimeError: from any step, once the file being written is complete or removed.
            KeyboardInterrupt: interrupted, once the file being written is complete or removed.
        """
        waiting, one_at_a_time = iter(cases), threading.Lock()
        stopped = threading.Event()

        def read_next(turn: threading.Event) -> tuple[Case, R] | None:
            """Return the next case that can be read; None at the end. A large one is read when it is its turn."""
            while True:
                with one_at_a_time:
                    case = next(waiting, None)
                if case is None:
                    return None
                if self._is_large(case):
                    turn.wait()
                if stopped.is_set():
                    return None
                with self._isolated_failure(case, observer):
                    return case, self.steps.read(case)

        reader = ThreadPoolExecutor(self.steps.readers, "read")
        writer = ThreadPoolExecutor(self.steps.writers, "write")
        ahead: deque[tuple[threading.Event, Future[tuple[Case, R] | None]]] = deque()

        def read_ahead() -> None:
            turn = threading.Event()
            ahead.append((turn, reader.submit(read_next, turn)))

        writing: deque[Future[None]] = deque()
        try:
            for _ in range(self.steps.readers):
                read_ahead()
            self.steps.warm_up()
            while ahead:
                turn, reading = ahead.popleft()
                turn.set()
                found = reading.result()
                if found is None:  # readers race for the last cases, so a later one may still hold a case
                    continue
                read_ahead()
                case, read = found
                computed = self._computed(case, read, observer)
                del found, read, reading
                ahead[0][0].set()
                while len(writing) >= self.steps.writers:
                    writing.popleft().result()
                if computed is not None:
                    writing.append(writer.submit(self._write, case, computed, observer))
                    del computed
            for written in writing:
                written.result()
        finally:
            stop_cases()
            stopped.set()
            for turn, _ in ahead:
                turn.set()
            reader.shutdown(cancel_futures=True)
            writer.shutdown()

    def one(self, case: Case, observer: CaseObserver) -> None:
        """Execute a single case on this thread.

        Raises:
            OSError, MemoryError, RuntimeError: from any step.
        """
        read = None
        with self._isolated_failure(case, observer):
            read = self.steps.read(case)
        if read is not None and (computed := self._computed(case, read, observer)) is not None:
            self._write(case, computed, observer)

    def _computed(self, case: Case, read: R, observer: CaseObserver) -> C | None:
        observer.started(case.id)
        with self._isolated_failure(case, observer):
            return self.steps.compute(read, partial(observer.started, case.id))
        return None

    def _write(self, case: Case, computed: C, observer: CaseObserver) -> None:
        content = None
        with self._isolated_failure(case, observer):
            content = self.steps.write(computed)
        if content is not None:
            observer.ended(Outcome(case=case.id, content=content, worker=self.worker))

    def _is_large(self, case: Case) -> bool:
        try:
            return any(voxel_count(path) > self.steps.most_voxels_ahead for path in case.contrasts.values())
        except DataError:  # reported when the case is read
            return True

    @contextmanager
    def _isolated_failure(self, case: Case, observer: CaseObserver) -> Iterator[None]:
        """Report a DataError, or a lack of memory, as the failure of one case, so that the others continue."""
        try:
            yield
        except DataError as error:
            text = str(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            text = (
                f"case {case.id}: not enough memory ({reason}). Close other programs, or use a machine with "
                "more memory, and run the command again."
            )
        else:
            return
        observer.ended(Outcome(case=case.id, message=text, worker=self.worker))
