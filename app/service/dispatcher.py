"""Starts and ends jobs: one thread decides, and every change is committed before it is reported.

The worker processes know no database. What one of them reports is written by this thread; a job whose worker or
service was killed is found running at the next look, and begins again.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Final

from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from app.inference.batch.parallel import MAX_ATTEMPTS
from app.progress import LOG
from app.service.database import Database, is_full
from app.service.durations import Durations
from app.service.jobs import next_number, note_change, waiting_in_order
from app.service.settings import ServiceSettings
from app.service.tables import Event, Job, Upload
from app.system.process import how_it_ended
from app.system.worker_pool import WorkerSlot, last_output, worker_environment

#: Seconds between looks at the queue when nothing happens.
_LOOK_SECONDS: Final = 1.0
#: Seconds before a worker that could not start is started again; doubled each time, up to the last.
_FIRST_PAUSE, _LAST_PAUSE = 1.0, 60.0
#: Seconds between attempts to write to a database whose disk is full.
_FULL_SECONDS: Final = 1.0
#: Seconds that a worker may take to stop before it is killed.
_STOP_SECONDS: Final = 5.0
#: Seconds in which no job is started after one did not fit on the disk.
_NO_ROOM_SECONDS: Final = 30.0


@dataclass(kw_only=True, eq=False)
class _Worker:
    """A worker and what it does."""

    slot: WorkerSlot
    job: str | None = None
    stopping: bool = False
    """Whether its job was cancelled, and the process asked to end."""
    failures: int = 0
    """How often in a row it could not start."""
    start_at: float = 0.0
    """Monotonic time before which it is not started."""
    kill_at: float | None = None


@dataclass(kw_only=True)
class Dispatcher:
    """Hands out the jobs of the queue to worker processes."""

    settings: ServiceSettings
    database: Database
    durations: Durations = field(default_factory=Durations)
    """Of the jobs since the start, for the metrics."""
    _events: queue.SimpleQueue[tuple[WorkerSlot, dict[str, Any]]] = field(default_factory=queue.SimpleQueue, repr=False)
    _workers: list[_Worker] = field(default_factory=list, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _thread: threading.Thread | None = field(default=None, repr=False)
    _trouble: str = field(default="the workers are starting", repr=False)
    _database_fails: bool = field(default=False, repr=False)
    _is_full: bool = field(default=False, repr=False)
    _full_until: float = field(default=0.0, repr=False)
    """Monotonic time before which no job is started, since one did not fit on the disk."""

    def start(self) -> None:
        """Put jobs that were running when the service ended back into the queue, and start the workers."""
        self._recover()
        count = len(self.settings.devices)
        for number, device in enumerate(self.settings.devices, 1):
            environment = worker_environment(device, count, given=dict(os.environ))
            slot = WorkerSlot(name=f"worker-{number}", device=device, environment=environment, events=self._events)
            self._workers.append(_Worker(slot=slot))
        self._thread = threading.Thread(target=self._run, name="dispatcher", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look at the queue now."""
        if self._workers:
            self._events.put((self._workers[0].slot, {"wake": True}))

    def stop(self, grace_seconds: float) -> None:
        """Hand out no more jobs, wait for the running ones, and stop the workers; unfinished jobs are queued again."""
        self._stop.set()
        self.wake()
        until = time.monotonic() + grace_seconds
        while any(worker.job for worker in self._workers) and time.monotonic() < until:
            time.sleep(0.05)
        for worker in self._workers:
            worker.slot.close(finish=False)
        if self._thread is not None:
            self._events.put((self._workers[0].slot, {"end": True}))
            self._thread.join()
        self._end_processes()
        self._recover()

    @property
    def trouble(self) -> str:
        """Why no job can be computed; empty if one can."""
        if self._stop.is_set():
            return "the service is stopping"
        if self._thread is not None and not self._thread.is_alive():
            return "the dispatcher has ended; restart the service"
        if self._is_full:
            return "the disk is full"
        return "the database does not answer" if self._database_fails else self._trouble

    @property
    def processes(self) -> tuple[int, ...]:
        """Ids of the worker processes."""
        running = (worker.slot.process for worker in self._workers)
        return tuple(process.pid for process in running if process is not None and process.poll() is None)

    # ---- the thread

    def _run(self) -> None:
        while True:
            self._look()
            try:
                slot, event = self._events.get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                continue
            if "end" in event:
                return
            worker = next(worker for worker in self._workers if worker.slot is slot)
            try:
                self._handle(worker, event)
            except (SQLAlchemyError, OSError) as error:
                LOG.error("the database failed: %s", type(error).__name__)
                self._database_fails = True
                self._events.put((slot, event))
                time.sleep(_FULL_SECONDS)

    def _look(self) -> None:
        """Start workers, stop cancelled jobs, and hand out waiting ones."""
        try:
            self._is_full = not self._has_room() or time.monotonic() < self._full_until
            for worker in self._workers:
                self._look_at(worker)
            if not self._is_full and not self._stop.is_set():
                self._recover([worker.job for worker in self._workers if worker.job is not None])
                for worker in self._workers:
                    if worker.slot.ready and not worker.slot.closed and worker.job is None:
                        self._hand_out(worker)
            self._database_fails = False
        except (SQLAlchemyError, OSError) as error:
            self._is_full = is_full(error)
            self._database_fails = not self._is_full
            LOG.warning("the queue cannot be read or written: %s", type(error).__name__)

    def _look_at(self, worker: _Worker) -> None:
        slot, now = worker.slot, time.monotonic()
        if slot.process is None and not self._stop.is_set() and now >= worker.start_at:
            self._start(worker)
        if worker.job is not None and not worker.stopping and self._is_cancelled(worker.job):
            worker.stopping, worker.kill_at = True, now + _STOP_SECONDS
            slot.close(finish=False)
        if worker.kill_at is not None and now >= worker.kill_at and slot.process is not None:
            slot.process.kill()

    def _start(self, worker: _Worker) -> None:
        slot = worker.slot
        slot.ready = False
        slot.start("app.service.worker", self.settings.place.logs / f"{slot.name}.txt")
        device = "cpu" if slot.device == "cpu" else "cuda" if slot.device else self.settings.device
        folders = {name: str(path.resolve()) for name, path in self.settings.models.items()}
        slot.send({"job": {"models": folders, "device": device}})

    def _hand_out(self, worker: _Worker) -> None:
        with self.database.reading() as session:
            if session.scalar(waiting_in_order().limit(1)) is None:
                return
        with self.database.writing() as session:
            wanted = session.scalar(waiting_in_order().limit(1))
            job = None if wanted is None else session.get(Job, wanted, with_for_update=True)
            if job is None or job.state != "queued":  # cancelled at this moment
                return
            upload = session.get(Upload, job.upload_id)
            if job.model not in self.settings.models:
                job.state, job.ended = "failed", time.time()
                job.message = f"The service no longer has the model {job.model}. Send the images again for another one."
                note_change(session, job)
                session.add(Event(at=time.time(), user="service", action="job failed", what=job.id))
                return
            assert upload is not None  # jobs hold their uploads by a foreign key
            job.state, job.started, job.step, job.message = "running", time.time(), "starting", ""
            job.attempts += 1
            note_change(session, job)
        worker.job, worker.stopping, worker.kill_at = job.id, False, None
        worker.slot.send({"task": job.id, "content": self._content(job, upload)})

    def _content(self, job: Job, upload: Upload) -> dict[str, Any]:
        """Return what a worker needs to know of a job; all paths are made here, from ids and numbers."""
        place, recognised = self.settings.place, upload.cases[job.case_number]
        case, cases = dict(recognised["case"]), place.cases(upload.id)
        case["folder"] = str(cases / case["folder"])
        case["contrasts"] = {contrast: str(cases / path) for contrast, path in case["contrasts"].items()}
        study = None
        if recognised["dicom"]:
            unpacked = place.upload(upload.id) / "unpacked"
            study = str(unpacked if unpacked.is_dir() else place.received(upload.id))
        return {
            "folder": str(place.job(job.id)),
            "case": case,
            "files": recognised["files"],
            "name": job.name,
            "model": job.model,
            "options": job.options,
            "study": study,
        }

    def _handle(self, worker: _Worker, event: dict[str, Any]) -> None:
        slot = worker.slot
        match event:
            case {"log": text, "level": level}:
                LOG.log(level, "%s: %s", slot.name, text if worker.job is None else f"job {worker.job}: {text}")
            case {"ready": device}:
                slot.ready, slot.reported_device, worker.failures = True, device, 0
                self._trouble = ""
            case {"progress": str() as step, "task": task} if task == worker.job:
                self._note_step(task, step)
            case {"done": outcome, "task": task} if task == worker.job:
                self._patiently(lambda: self._finish(task, outcome))
                self.durations.add(outcome["seconds"])
                worker.job = None
                if "full" in outcome:
                    self._full_until = time.monotonic() + _NO_ROOM_SECONDS
            case {"error": _}:
                slot.error = event
            case {"gone": status}:
                self._replace(worker, how_it_ended(status))

    def _note_step(self, job: str, step: str) -> None:
        try:
            with self.database.writing() as session:
                row = session.get(Job, job, with_for_update=True)
                if row is not None and row.state == "running" and not row.stopping and row.step != step:
                    row.step = step
                    note_change(session, row)
        except OSError as error:  # only what is shown would be lost
            LOG.warning("the step of job %s was not recorded: %s", job, error.strerror)

    def _finish(self, job: str, outcome: dict[str, Any]) -> None:
        """End a job, unless it has ended or was put back into the queue meanwhile."""
        with self.database.writing() as session:
            row = session.get(Job, job, with_for_update=True)
            if row is None or row.state != "running":
                return
            row.step = ""
            if "full" in outcome and not row.stopping:
                row.state, row.step, row.attempts = "queued", "waits until there is room on the disk", row.attempts - 1
                row.place = next_number(session, "place")
            elif row.stopping:
                row.state, row.ended = "cancelled", time.time()
            elif "failed" in outcome:
                row.state, row.ended, row.message = "failed", time.time(), outcome["failed"]
            else:
                row.state, row.ended, row.result = "done", time.time(), outcome["result"]
            note_change(session, row)
            session.add(Event(at=time.time(), user="service", action=f"job {row.state}", what=job))

    def _replace(self, worker: _Worker, how: str) -> None:
        """Handle a worker that ended."""
        slot, job = worker.slot, worker.job
        if job is not None:  # first: if the database is away, this event is handled again
            self._patiently(lambda: self._lost(job, worker, how))
        worker.job, worker.stopping, worker.kill_at = None, False, None
        was_ready, slot.ready = slot.ready, False
        slot.join()
        slot.process = None
        if was_ready:
            worker.start_at = time.monotonic()
            return
        pause = min(_LAST_PAUSE, _FIRST_PAUSE * 2**worker.failures)
        worker.failures, worker.start_at = worker.failures + 1, time.monotonic() + pause
        said = slot.error["message"] if slot.error else f"its process {how}. {_last_output(slot)}".rstrip()
        if not self._stop.is_set():
            LOG.error("%s cannot start: %s", slot.name, said)
            if not any(one.slot.ready for one in self._workers):
                self._trouble = "no worker can start; the service's log says why"

    def _lost(self, job: str, worker: _Worker, how: str) -> None:
        """Queue the job of a worker that ended again; after several attempts it fails."""
        with self.database.writing() as session:
            row = session.get(Job, job, with_for_update=True)
            if row is None or row.state != "running":
                return
            if row.stopping:
                row.state, row.ended, row.step = "cancelled", time.time(), ""
            elif row.attempts >= MAX_ATTEMPTS and not self._stop.is_set():
                error = worker.slot.error
                said = f" ({error['error']})" if error else ""
                row.state, row.ended, row.step = "failed", time.time(), ""
                row.message = f"Its process {how}{said} in {row.attempts} attempts. The service's log says more."
            else:
                row.state, row.step = "queued", ""
                row.attempts -= int(self._stop.is_set())
            note_change(session, row)
            session.add(Event(at=time.time(), user="service", action=f"job {row.state}", what=job))

    def _patiently(self, write: Any) -> None:
        """Write to the database, waiting while its disk is full: a finished job is never forgotten."""
        while True:
            try:
                write()
            except OSError as error:
                if not is_full(error) or self._stop.is_set():
                    raise
                self._is_full = True
                LOG.warning("the disk of the database is full; waiting until there is room")
                time.sleep(_FULL_SECONDS)
            else:
                return

    def _is_cancelled(self, job: str) -> bool:
        with self.database.reading() as session:
            return bool(session.scalar(select(Job.stopping).where(Job.id == job)))

    def _has_room(self) -> bool:
        # Half of the reserve, so that a full disk stops uploads first.
        return shutil.disk_usage(self.settings.place.root).free >= self.settings.reserve_bytes / 2

    def _recover(self, held: Collection[str] = ()) -> None:
        """Queue jobs that are marked as running although no worker holds them; cancelled ones end."""
        wanted = select(Job).where(Job.state == "running", Job.id.not_in(held))
        with self.database.reading() as session:
            if session.scalar(wanted.limit(1)) is None:
                return
        with self.database.writing() as session:
            for row in session.scalars(wanted.with_for_update()):
                if row.stopping:
                    row.state, row.ended = "cancelled", time.time()
                else:
                    row.state, row.attempts = "queued", max(0, row.attempts - 1)
                row.step = ""
                note_change(session, row)

    def _end_processes(self) -> None:
        for worker in self._workers:
            process = worker.slot.process
            if process is None:
                continue
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
            worker.slot.join()


def _last_output(slot: WorkerSlot) -> str:
    """Return what a worker wrote last; empty if its log was removed."""
    try:
        return last_output(slot.log)
    except OSError:
        return ""
