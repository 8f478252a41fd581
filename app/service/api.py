"""The HTTP API, ``/api/v1``."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from anyio import sleep, to_thread
from fastapi import APIRouter, Header, Query, Request, Response
from fastapi import Path as PathPart
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, StreamingResponse
from pydantic import BaseModel

from app.html.templates import policy, source
from app.progress import LOG
from app.runs.published import MODELS
from app.service.accounts import Account
from app.service.answers import (
    FolderRequest,
    HealthAnswer,
    JobAnswer,
    JobPage,
    JobRequest,
    JobsAnswer,
    ModelAnswer,
    ModelsAnswer,
    ProblemAnswer,
    ReadyAnswer,
    State,
    UploadAnswer,
    UploadRequest,
)
from app.service.identity import TheAccount, TheAdmin, TheService
from app.service.jobs import own_job
from app.service.metrics import metrics_text
from app.service.refusals import RefusedError, not_found
from app.service.service import Service

PREFIX: Final = "/api/v1"
#: Names of results in addresses.
ResultName = Literal["label_map", "probabilities", "uncertainty", "disagreement", "dicom_seg", "record", "page"]
_EVENT: Final = {
    "type": "object",
    "description": "`data` is a list of jobs, as `GET /jobs/ID` returns them, in JSON.",
    "properties": {name: {"type": "string"} for name in ("id", "event", "data", "retry")},
}
#: Event streams that one user may hold open.
_MOST_STREAMS: Final = 8
#: Clients then connect again, with a token that is still valid.
_STREAM_SECONDS: Final = 600
_POLL_SECONDS: Final = 0.5
#: Seconds between comments that keep a stream open through proxies.
_COMMENT_SECONDS: Final = 15.0

_REASONS: Final = {
    400: "The request is malformed.",
    401: "The token is missing or not valid.",
    403: "Not allowed.",
    404: "There is no such thing, or it belongs to another user.",
    408: "The request did not arrive completely, or too slowly.",
    409: "Not in this state.",
    413: "Too large.",
    416: "No such range.",
    421: "Another host name.",
    422: "The request does not have the right form.",
    429: "Too many requests; see Retry-After.",
    431: "The headers are too large.",
    503: "The service or its database cannot answer now. Try again later.",
    507: "The disk is full; see Retry-After.",
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    # Stated as JSON too, since FastAPI documents the model under the media type of the route.
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ProblemAnswer"}}}
    return {
        status: {"model": ProblemAnswer, "description": _REASONS[status], "content": content} for status in statuses
    }


_ALWAYS: Final = _problems(400, 401, 403, 408, 413, 421, 422, 429, 431, 503)
router = APIRouter(prefix=PREFIX, responses=_ALWAYS)
UploadId = Annotated[str, PathPart(pattern=r"^[0-9a-f]{32}$", description="Id of an upload.")]
JobId = Annotated[str, PathPart(pattern=r"^[0-9a-f]{32}$", description="Id of a job.")]


# ---- uploads


@router.post("/uploads", status_code=201, responses=_problems(507), tags=["uploads"])
def announce_upload(request: UploadRequest, account: TheAccount, service: TheService) -> UploadAnswer:
    """Announce the files of an upload; then send each file, and complete the upload."""
    return service.uploads.announce(account, request)


@router.post("/uploads/from-folder", status_code=201, responses=_problems(404, 409, 507), tags=["uploads"])
def upload_folder(request: FolderRequest, account: TheAccount, service: TheService) -> UploadAnswer:
    """Copy a folder of the server, below the one that its administrator allows, to a new upload."""
    return service.uploads.from_folder(account, request)


@router.get("/uploads/{upload}", responses=_problems(404), tags=["uploads"])
def read_upload(upload: UploadId, account: TheAccount, service: TheService) -> UploadAnswer:
    """Read an upload: which files have arrived, and what was recognised."""
    return service.uploads.read(account, upload)


@router.put(
    "/uploads/{upload}/files/{number}",
    status_code=204,
    responses=_problems(404, 409, 507),
    tags=["uploads"],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def send_file(
    upload: UploadId,
    number: Annotated[int, PathPart(ge=0, le=20_000, description="Number of the file.")],
    request: Request,
    account: TheAccount,
    service: TheService,
) -> Response:
    """Send a file of an upload as the body; sending it again replaces it."""
    await service.uploads.receive(account, upload, number, request.stream())
    return Response(status_code=204)


@router.post("/uploads/{upload}/complete", responses=_problems(404, 409, 507), tags=["uploads"])
def complete_upload(upload: UploadId, account: TheAccount, service: TheService) -> UploadAnswer:
    """Recognise the cases of an upload whose files have all arrived, and check their images."""
    return service.uploads.complete(account, upload)


@router.delete(
    "/uploads/{upload}",
    status_code=204,
    responses={
        **_problems(404, 409, 507),
        202: {"description": "It is marked as deleted; its files are removed as soon as possible."},
    },
    tags=["uploads"],
)
def delete_upload(upload: UploadId, account: TheAccount, service: TheService) -> Response:
    """Delete an upload that no job uses."""
    service.uploads.delete(account, upload)
    return _removed(service)


# ---- jobs


@router.post("/jobs", status_code=201, responses=_problems(404, 409, 507), tags=["jobs"])
def create_jobs(
    request: JobRequest,
    account: TheAccount,
    service: TheService,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=128,
            pattern=r"^[A-Za-z0-9_.:-]+$",
            description="A key of your choice: the same request with the same key is done once.",
        ),
    ] = None,
) -> JobsAnswer:
    """Start a job for each case of an upload."""
    return JobsAnswer(jobs=service.jobs.submit(account, request, idempotency_key))


@router.get("/jobs", tags=["jobs"])
def list_jobs(
    account: TheAccount,
    service: TheService,
    state: State | None = None,
    after: Annotated[str | None, Query(pattern=r"^[0-9]{1,15}$", description="The `next` of the part before.")] = None,
    limit: Annotated[int, Query(ge=1, le=200, description="Most jobs of this part.")] = 50,
) -> JobPage:
    """List your jobs, newest first; administrators see those of all users."""
    return service.jobs.listed(account, state=state, after=None if after is None else int(after), most=limit)


_UNCHANGED: Final[dict[int | str, dict[str, Any]]] = {304: {"description": "Unchanged since the given ETag."}}


@router.get("/jobs/{job}", responses={**_problems(404), **_UNCHANGED}, response_model=JobAnswer, tags=["jobs"])
def read_job(job: JobId, request: Request, account: TheAccount, service: TheService) -> Response:
    """Read a job; with If-None-Match, only if it has changed."""
    return _tagged(request, service.jobs.read(account, job))


@router.post("/jobs/{job}/cancel", responses=_problems(404, 409, 507), tags=["jobs"])
def cancel_job(job: JobId, account: TheAccount, service: TheService) -> JobAnswer:
    """Cancel a job that is queued or running."""
    return service.jobs.cancel(account, job)


@router.post("/jobs/{job}/retry", responses=_problems(404, 409, 507), tags=["jobs"])
def retry_job(job: JobId, account: TheAccount, service: TheService) -> JobAnswer:
    """Queue a job again that has failed or was cancelled."""
    return service.jobs.retry(account, job)


@router.delete(
    "/jobs/{job}",
    status_code=204,
    responses={
        **_problems(404, 507),
        202: {
            "description": "It is marked as deleted; its files are removed as soon as possible, those of a running job "
            "once its worker has stopped."
        },
    },
    tags=["jobs"],
)
def delete_job(job: JobId, account: TheAccount, service: TheService) -> Response:
    """Delete a job with its results, and its images if no other job uses them."""
    if not service.jobs.mark_deleted(account, job):
        return Response(status_code=202)
    return _removed(service)


@router.get(
    "/jobs/{job}/results/{name}",
    responses={
        **_problems(404, 416),
        **_UNCHANGED,
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "The range that was asked for."},
    },
    response_class=FileResponse,
    tags=["jobs"],
)
def fetch_result(job: JobId, name: ResultName, request: Request, account: TheAccount, service: TheService) -> Response:
    """Fetch a result; ranges and ETags allow to resume."""
    return result_response(service, account, job, name, request)


@router.get("/models", tags=["service"])
def list_models(account: TheAccount, service: TheService) -> ModelsAnswer:  # noqa: ARG001 - only for who may ask
    """List the models that jobs may name."""
    return ModelsAnswer(models=models_of(service))


@router.get(
    "/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {"schema": _EVENT}}}},
    tags=["jobs"],
)
async def stream_events(
    account: TheAccount,
    service: TheService,
    last_event_id: Annotated[str | None, Header(pattern=r"^[0-9]{1,15}$")] = None,
    seconds: Annotated[int, Query(ge=0, le=_STREAM_SECONDS, description="How long to listen.")] = _STREAM_SECONDS,
) -> StreamingResponse:
    """Listen to changes of your jobs as server-sent events; after a break, Last-Event-ID continues where it was."""
    since = int(last_event_id) if last_event_id else await to_thread.run_sync(service.jobs.last_change)
    if service.streams.get(account.id, 0) >= _MOST_STREAMS:
        raise RefusedError(429, f"You listen {_MOST_STREAMS} times already.", retry_seconds=30)
    return StreamingResponse(_events(service, account, since, seconds), media_type="text/event-stream")


# ---- the service


@router.get("/health", tags=["service"])
def read_health() -> HealthAnswer:
    """Tell whether the process answers; needs no token."""
    return HealthAnswer(status="ok")


@router.get("/ready", responses={503: {"model": ReadyAnswer, "description": "Not ready."}}, tags=["service"])
def read_ready(service: TheService) -> Response:
    """Tell whether jobs can be computed; needs no token."""
    trouble = service.dispatcher.trouble
    answer = ReadyAnswer(ready=not trouble, reason=trouble)
    return JSONResponse(answer.model_dump(mode="json"), status_code=503 if trouble else 200)


@router.get(
    "/metrics",
    response_class=PlainTextResponse,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    tags=["service"],
)
def show_metrics(account: TheAdmin, service: TheService) -> Response:  # noqa: ARG001 - only for who may ask
    """Read the numbers for Prometheus: queue, seconds, memory, disk; needs an administrator's token."""
    return PlainTextResponse(metrics_text(service), media_type="text/plain; version=0.0.4; charset=utf-8")


def _removed(service: Service) -> Response:
    """Remove the files of what is marked as deleted; those that cannot be removed now are tried again later."""
    try:
        service.removal.finish()
    except OSError as error:
        LOG.warning("what was deleted could not be removed, tried again later: %s", type(error).__name__)
        return Response(status_code=202)
    return Response(status_code=204)


def models_of(service: Service) -> list[ModelAnswer]:
    """Return the models that jobs may name, the default first."""
    names = list(service.settings.models)
    known = {name: MODELS.get(name) for name in names}
    return [
        ModelAnswer(
            name=name,
            default=name == names[0],
            summary="" if model is None else model.summary,
            limits=[] if model is None else list(model.limits),
        )
        for name, model in known.items()
    ]


def result_response(service: Service, account: Account, job: str, name: str, request: Request) -> Response:
    """Return a result as a download.

    Raises:
        RefusedError: there is no such job or result.
    """
    file, shown, path = result_file(service, account, job, name)
    tag = f'"{file["sha256"]}"'
    headers = {"etag": tag, "cache-control": "private, no-cache"}
    if _matches(request, tag):
        return Response(status_code=304, headers=headers)
    headers["content-disposition"] = f"attachment; filename=\"{name}\"; filename*=UTF-8''{quote(shown, safe='')}"
    if name == "page":
        headers["content-security-policy"] = (
            f"{policy(source('viewer.js'))}; frame-ancestors 'none'; sandbox allow-scripts"
        )
    return FileResponse(path, media_type=file["media_type"], headers=headers)


def result_file(service: Service, account: Account, job: str, name: str) -> tuple[dict[str, Any], str, Path]:
    """Return what is recorded of a result, the name under which it is downloaded, and its path.

    Raises:
        RefusedError: there is no such job or result.
    """
    with service.database.reading() as session:
        row = own_job(session, account, job)
        files = row.result["files"] if row.state == "done" and row.result is not None else []
        file = next((one for one in files if one["name"] == name), None)
        if file is None:
            raise not_found("result")
        path = service.settings.place.job(job) / file["file"]
        if not path.is_file():
            raise not_found("result")
        return file, f"{row.name}{_endings(name)}", path


def _endings(name: str) -> str:
    special = {"label_map": ".nii.gz", "dicom_seg": ".dcm", "record": ".json", "page": ".html"}
    return special.get(name, f"_{name}.nii.gz")


def _tagged(request: Request, answer: BaseModel) -> Response:
    """Return an answer with an ETag, or 304 if the client has it."""
    body = answer.model_dump_json().encode()
    tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    headers = {"etag": tag, "cache-control": "private, no-cache"}
    if _matches(request, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, media_type="application/json", headers=headers)


def _matches(request: Request, tag: str) -> bool:
    given = request.headers.get("if-none-match", "")
    return tag in [one.strip().removeprefix("W/") for one in given.split(",")]


async def _events(service: Service, account: Account, since: int, seconds: int) -> AsyncIterator[str]:
    service.streams[account.id] = service.streams.get(account.id, 0) + 1
    until = time.monotonic() + seconds
    spoken = time.monotonic()
    try:
        yield f"retry: 2000\nid: {since}\n\n"
        while True:
            since, changed = await to_thread.run_sync(service.jobs.changed, account, since)
            if changed:
                spoken = time.monotonic()
                data = json.dumps([job.model_dump(mode="json") for job in changed])
                yield f"id: {since}\nevent: jobs\ndata: {data}\n\n"
            elif time.monotonic() - spoken > _COMMENT_SECONDS:
                spoken = time.monotonic()
                yield ": still here\n\n"
            if time.monotonic() >= until or service.stopping.is_set():
                return
            await sleep(_POLL_SECONDS)
    finally:
        service.streams[account.id] -= 1
