"""The dispatcher, event by event, with a worker that has no process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from app.service.accounts import Account
from app.service.answers import JobRequest
from app.service.dispatcher import Dispatcher, _Worker
from app.service.refusals import RefusedError
from app.service.service import Service
from app.service.tables import Job
from app.system.worker_pool import WorkerSlot

Submit = Callable[[], str]
AWAY = OperationalError("SELECT", {}, Exception("away"))


class Slot(WorkerSlot):
    """A slot whose process only notes whether it was killed."""

    def start(self, module: str, log: Path) -> None:
        process = SimpleNamespace(killed=False, pid=0)
        process.kill = lambda: setattr(process, "killed", True)
        self.closed, self.log, self.process = False, log, process  # type: ignore[assignment]

    def send(self, content: dict[str, Any]) -> None:
        """Send nothing."""

    def close(self, *, finish: bool) -> None:
        self.closed = True

    def join(self) -> None:
        """Wait for nothing."""


@pytest.fixture
def worker(service: Service) -> _Worker:
    """The dispatcher's only worker, which is ready."""
    dispatcher = service.dispatcher
    made = _Worker(slot=Slot(name="worker-1", device=None, environment={}, events=dispatcher._events))
    dispatcher._workers.append(made)
    dispatcher._look()
    dispatcher._handle(made, {"ready": "cpu"})
    return made


@pytest.fixture
def dispatcher(service: Service, worker: _Worker) -> Dispatcher:
    """The dispatcher of the service; its thread does not run."""
    return service.dispatcher


@pytest.fixture
def submit(service: Service, accounts: dict[str, Account], ready_upload: Callable[..., str]) -> Submit:
    """Submit a job of ann; returns its id."""
    upload = ready_upload(accounts["ann"])
    return lambda: service.jobs.submit(accounts["ann"], JobRequest(upload=upload), None)[0].id


def row_of(service: Service, job: str) -> Job:
    with service.database.reading() as session:
        row = session.get(Job, job)
        assert row is not None
        return row


def done(job: str, **outcome: Any) -> dict[str, Any]:
    return {"task": job, "done": {"seconds": 1.0, **outcome}}


def fail(*arguments: object) -> None:
    raise AWAY


def test_cancelling_a_job_as_it_ends_does_not_kill_the_next_process(
    service: Service,
    dispatcher: Dispatcher,
    submit: Submit,
    accounts: dict[str, Account],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (worker,) = dispatcher._workers
    monkeypatch.setattr("app.service.dispatcher._STOP_SECONDS", 0.0)
    job = submit()
    dispatcher._look()
    service.jobs.cancel(accounts["ann"], job)
    dispatcher._look()
    dispatcher._handle(worker, done(job, result={}))
    waiting = submit()
    dispatcher._look()
    assert row_of(service, waiting).state == "queued"  # the process that ends gets no job
    dispatcher._handle(worker, {"gone": 1})
    dispatcher._look()
    dispatcher._look()
    assert worker.slot.process is not None
    assert not worker.slot.process.killed  # type: ignore[attr-defined]
    assert row_of(service, job).state == "cancelled"


def test_a_lost_worker_is_handled_once_the_database_is_back(
    service: Service, dispatcher: Dispatcher, worker: _Worker, submit: Submit
) -> None:
    job = submit()
    dispatcher._look()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(dispatcher, "_lost", fail)
        with pytest.raises(OperationalError):
            dispatcher._handle(worker, {"gone": -9})
    assert worker.job == job
    assert worker.slot.process is not None
    dispatcher._handle(worker, {"gone": -9})
    assert row_of(service, job).state == "queued"


def test_the_service_is_ready_again_once_the_database_answers(service: Service, dispatcher: Dispatcher) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(service.database, "reading", fail)
        dispatcher._look()
        assert dispatcher.trouble == "the database does not answer"
    dispatcher._look()
    assert dispatcher.trouble == ""


def test_a_dispatcher_that_has_ended_is_reported(dispatcher: Dispatcher) -> None:
    dispatcher._thread = threading.Thread()
    assert "has ended" in dispatcher.trouble


def test_a_job_without_a_worker_does_not_stay_running(
    service: Service, dispatcher: Dispatcher, worker: _Worker, submit: Submit
) -> None:
    held = submit()
    dispatcher._look()
    lost = submit()
    with service.database.writing() as session:
        session.get_one(Job, lost).state = "running"
    dispatcher._look()
    assert worker.job == held
    assert [row_of(service, job).state for job in (held, lost)] == ["running", "queued"]


def test_a_job_that_does_not_fit_on_the_disk_waits_behind_the_others(
    service: Service, dispatcher: Dispatcher, worker: _Worker, submit: Submit
) -> None:
    large, small = submit(), submit()
    dispatcher._look()
    dispatcher._handle(worker, done(large, full="the disk is full"))
    dispatcher._look()
    assert dispatcher.trouble == "the disk is full"
    assert worker.job is None
    dispatcher._full_until = 0.0
    dispatcher._look()
    assert worker.job == small
    assert row_of(service, large).state == "queued"


def test_a_job_whose_model_was_removed_fails_and_cannot_be_repeated(
    service: Service, dispatcher: Dispatcher, worker: _Worker, submit: Submit, accounts: dict[str, Account]
) -> None:
    job = submit()
    object.__setattr__(service.settings, "models", {})
    dispatcher._look()
    assert worker.job is None
    assert "no longer has the model tiny" in row_of(service, job).message
    with pytest.raises(RefusedError, match="no longer has the model"):
        service.jobs.retry(accounts["ann"], job)
