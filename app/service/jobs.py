"""Jobs: what users ask of them. Only the dispatcher starts and ends them."""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session as DatabaseSession

from app.service.accounts import Account
from app.service.answers import (
    JobAnswer,
    JobPage,
    JobRequest,
    PredictionOptions,
    Priority,
    ResultFile,
    State,
    moment,
    plain_options,
)
from app.service.database import Database
from app.service.refusals import RefusedError, not_found
from app.service.settings import ServiceSettings
from app.service.tables import Counter, Event, Job, Submission, Upload, User

#: States of a job that still needs a worker.
OPEN: Final = ("queued", "running")
_PRIORITIES: Final[dict[Priority, int]] = {"low": -1, "normal": 0, "high": 1}
_PRIORITY_NAMES: Final[dict[int, Priority]] = {number: name for name, number in _PRIORITIES.items()}
_RETRY_SECONDS: Final = 60.0


def next_number(session: DatabaseSession, name: str) -> int:
    """Return the next number of a counter; in all databases, its row makes transactions that use it wait in turn."""
    raised = update(Counter).where(Counter.name == name).values(value=Counter.value + 1).returning(Counter.value)
    return int(session.execute(raised, execution_options={"synchronize_session": False}).scalar_one())


def note_change(session: DatabaseSession, job: Job) -> None:
    """Give a job that was changed the next number, by which those who wait for news find it."""
    job.change = next_number(session, "change")


@dataclass(kw_only=True)
class Jobs:
    """The jobs of all users."""

    settings: ServiceSettings
    database: Database
    wake: Callable[[], None] = lambda: None
    """Tells the dispatcher that something has changed."""

    def submit(self, account: Account, request: JobRequest, key: str | None) -> list[JobAnswer]:
        """Create a job for each case of an upload, in one transaction.

        Args:
            account: who asks.
            request: what is asked for.
            key: the same key with the same request creates nothing twice.

        Raises:
            RefusedError: the upload is not ready, a case cannot be predicted, there is no such model, the queue is
                full, or the key was used for another request.
        """
        digest = hashlib.sha256(request.model_dump_json().encode()).hexdigest()
        with self.database.writing() as session:
            session.scalar(select(User).where(User.id == account.id).with_for_update())
            if key is not None and (earlier := session.get(Submission, (account.id, key))) is not None:
                if earlier.request != digest:
                    raise RefusedError(422, "This Idempotency-Key was used for another request. Use a new one.")
                made = session.scalars(select(Job).where(Job.id.in_(earlier.made), Job.deleted.is_(False))).all()
                return self._answers(session, sorted(made, key=lambda job: job.place))
            jobs = self._created(session, account, request)
            if key is not None:
                made_ids = [job.id for job in jobs]
                session.add(Submission(user_id=account.id, key=key, request=digest, made=made_ids, created=time.time()))
            session.flush()
            answers = self._answers(session, jobs)
        self.wake()
        return answers

    def _created(self, session: DatabaseSession, account: Account, request: JobRequest) -> list[Job]:
        upload = session.get(Upload, request.upload, with_for_update=True)
        if upload is None or upload.deleted or (upload.user_id != account.id and not account.is_admin):
            raise not_found("upload")
        if upload.state != "ready":
            raise RefusedError(409, f"The upload is {upload.state}; jobs need one that is ready.")
        model = request.model or next(iter(self.settings.models))
        if model not in self.settings.models:
            raise RefusedError(422, f"There is no model {model}. There are: {', '.join(self.settings.models)}.")
        if request.priority == "high" and not account.is_admin:
            raise RefusedError(403, "Only administrators give jobs a high priority.")
        numbers = list(range(len(upload.cases))) if request.cases is None else list(dict.fromkeys(request.cases))
        for number in numbers:
            if number >= len(upload.cases):
                raise RefusedError(
                    422, f"The upload has {len(upload.cases)} cases, counted from 0; there is no {number}."
                )
            if upload.cases[number]["problems"]:
                raise RefusedError(422, f"Case {number} cannot be predicted: {upload.cases[number]['problems'][0]}")
        self._require_place(session, account, len(numbers))
        return [self._job(session, account, request, upload, model=model, number=number) for number in numbers]

    def _require_place(self, session: DatabaseSession, account: Account, more: int) -> None:
        count = select(func.count()).select_from(Job).where(Job.state.in_(OPEN), Job.deleted.is_(False))
        own = count.where(Job.user_id == account.id)
        for present, most, whose in (
            (session.scalar(own) or 0, self.settings.most_queued_per_user, "Your"),
            (session.scalar(count) or 0, self.settings.most_queued, "The"),
        ):
            if present + more > most:
                raise RefusedError(
                    429, f"{whose} queue is full: {present} of {most} jobs wait or run.", retry_seconds=_RETRY_SECONDS
                )

    def _job(
        self,
        session: DatabaseSession,
        account: Account,
        request: JobRequest,
        upload: Upload,
        *,
        model: str,
        number: int,
    ) -> Job:
        job = Job(
            id=uuid.uuid4().hex,
            user_id=account.id,
            upload_id=upload.id,
            case_number=number,
            name=upload.cases[number]["name"],
            model=model,
            options=plain_options(request.options),
            state="queued",
            priority=_PRIORITIES[request.priority],
            place=next_number(session, "place"),
            change=next_number(session, "change"),
            attempts=0,
            stopping=False,
            deleted=False,
            created=time.time(),
            step="",
            message="",
        )
        session.add(job)
        session.add(Event(at=job.created, user=account.name, action="job", what=job.id))
        return job

    def read(self, account: Account, job: str) -> JobAnswer:
        """Return a job.

        Raises:
            RefusedError: there is no such job, or it belongs to another user.
        """
        with self.database.reading() as session:
            return self._answers(session, [own_job(session, account, job)])[0]

    def listed(
        self, account: Account, *, state: State | None = None, after: int | None = None, most: int = 50
    ) -> JobPage:
        """Return the jobs that a user may see, newest first.

        Args:
            account: who asks; administrators see all jobs.
            state: only jobs in this state.
            after: the ``next`` of the part before.
            most: most jobs of the part.
        """
        wanted = select(Job).where(Job.deleted.is_(False)).order_by(Job.place.desc()).limit(most + 1)
        if not account.is_admin:
            wanted = wanted.where(Job.user_id == account.id)
        if state is not None:
            wanted = wanted.where(Job.state == state)
        if after is not None:
            wanted = wanted.where(Job.place < after)
        with self.database.reading() as session:
            jobs = session.scalars(wanted).all()
            more = len(jobs) > most
            shown = jobs[:most]
            return JobPage(jobs=self._answers(session, shown), next=str(shown[-1].place) if more else None)

    def changed(self, account: Account, since: int) -> tuple[int, list[JobAnswer]]:
        """Return the jobs of a user that have changed since a change, in order, and the number of the last change."""
        wanted = select(Job).where(Job.change > since, Job.deleted.is_(False)).order_by(Job.change).limit(500)
        if not account.is_admin:
            wanted = wanted.where(Job.user_id == account.id)
        with self.database.reading() as session:
            jobs = session.scalars(wanted).all()
            return (jobs[-1].change if jobs else since), self._answers(session, jobs)

    def last_change(self) -> int:
        """Return the number of the last change of any job."""
        with self.database.reading() as session:
            return int(session.scalar(select(Counter.value).where(Counter.name == "change")) or 0)

    def cancel(self, account: Account, job: str) -> JobAnswer:
        """Cancel a job that is queued or running; a cancelled one stays so.

        Raises:
            RefusedError: there is no such job, or it has ended.
        """
        with self.database.writing() as session:
            row = own_job(session, account, job, lock=True)
            if row.state in ("done", "failed"):
                raise RefusedError(409, f"The job is {row.state}; only a queued or running job can be cancelled.")
            if row.state == "queued":
                row.state, row.ended, row.step = "cancelled", time.time(), ""
                note_change(session, row)
            elif row.state == "running" and not row.stopping:
                row.stopping, row.step = True, "stopping"
                note_change(session, row)
            session.add(Event(at=time.time(), user=account.name, action="job cancelled", what=job))
        self.wake()
        return self.read(account, job)

    def retry(self, account: Account, job: str) -> JobAnswer:
        """Queue a job again that has failed or was cancelled.

        Raises:
            RefusedError: there is no such job, it did not fail, its model is gone, or the queue is full.
        """
        with self.database.writing() as session:
            session.scalar(select(User).where(User.id == account.id).with_for_update())
            row = own_job(session, account, job, lock=True)
            if row.state not in ("failed", "cancelled"):
                raise RefusedError(409, f"The job is {row.state}; only a failed or cancelled job can be repeated.")
            if row.model not in self.settings.models:
                raise RefusedError(
                    409, f"The service no longer has the model {row.model}. Send the images again for another one."
                )
            self._require_place(session, account, 1)
            row.state, row.message, row.step, row.attempts, row.stopping = "queued", "", "", 0, False
            row.started = row.ended = None
            row.place = next_number(session, "place")
            note_change(session, row)
            session.add(Event(at=time.time(), user=account.name, action="job repeated", what=job))
        self.wake()
        return self.read(account, job)

    def mark_deleted(self, account: Account, job: str) -> bool:
        """Hide a job, so that its files are removed next.

        Returns:
            Whether that can be done at once; False while it is running, until its worker has stopped.

        Raises:
            RefusedError: there is no such job.
        """
        with self.database.writing() as session:
            row = own_job(session, account, job, lock=True)
            row.deleted = True
            if row.state == "queued":
                row.state, row.ended = "cancelled", time.time()
            row.stopping = row.state == "running"
            note_change(session, row)
            session.add(Event(at=time.time(), user=account.name, action="job deleted", what=job))
            running = row.state == "running"
        self.wake()
        return not running

    def _answers(self, session: DatabaseSession, jobs: Sequence[Job]) -> list[JobAnswer]:
        places: dict[str, int] = {}
        if any(job.state == "queued" for job in jobs):
            places = {job: number for number, job in enumerate(session.scalars(waiting_in_order()), 1)}
        wanted = select(User.id, User.name).where(User.id.in_({job.user_id for job in jobs}))
        owners = dict(session.execute(wanted).all())
        return [_answer(job, owners[job.user_id], places.get(job.id)) for job in jobs]


def waiting_in_order() -> Any:
    """Return the query for the ids of all queued jobs in the order in which they will be computed."""
    wanted = select(Job.id).where(Job.state == "queued", Job.deleted.is_(False))
    return wanted.order_by(Job.priority.desc(), Job.place)


def own_job(session: DatabaseSession, account: Account, job: str, *, lock: bool = False) -> Job:
    """Return a job that a user may see; with ``lock``, no other transaction changes it before this one ends.

    Raises:
        RefusedError: there is no such job, or it belongs to another user; the answers do not differ.
    """
    row = session.get(Job, job, with_for_update=lock)
    if row is None or row.deleted or (row.user_id != account.id and not account.is_admin):
        raise not_found("job")
    return row


def _answer(job: Job, owner: str, place: int | None) -> JobAnswer:
    result = job.result if job.state == "done" and job.result is not None else {}
    return JobAnswer(
        id=job.id,
        name=job.name,
        owner=owner,
        state=cast("State", job.state),
        priority=_PRIORITY_NAMES[job.priority],
        model=job.model,
        options=PredictionOptions.model_validate(job.options),
        place=place if job.state == "queued" else None,
        step=job.step,
        message=job.message,
        attempts=job.attempts,
        created=moment(job.created),
        started=None if job.started is None else moment(job.started),
        ended=None if job.ended is None else moment(job.ended),
        volumes_ml=result.get("volumes_ml"),
        flags=result.get("flags"),
        results=[
            ResultFile(name=one["name"], bytes=one["bytes"], media_type=one["media_type"])
            for one in result.get("files", ())
        ],
    )
