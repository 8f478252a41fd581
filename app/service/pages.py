"""The pages: signing in, the queue, a job, its viewer. Everything that changes something is a form with a secret."""

from __future__ import annotations

import hmac
import secrets
from contextlib import suppress
from datetime import datetime
from typing import Annotated, Final
from urllib.parse import parse_qs

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from markupsafe import Markup

from app.html.scores import REGION_NAMES
from app.html.templates import fill, policy, source
from app.service.accounts import SESSION_SECONDS, Account, is_user_name
from app.service.answers import JobAnswer
from app.service.api import JobId, ResultName, models_of, result_file, result_response
from app.service.identity import (
    TheService,
    address_of,
    cookie_name,
    require_csrf,
    require_same_origin,
    signed_in,
)
from app.service.refusals import RefusedError
from app.service.service import Service

router = APIRouter(include_in_schema=False)
#: Files that every page loads, and their media types.
_STATIC: Final = {
    "page.css": "text/css",
    "report.css": "text/css",
    "service.css": "text/css",
    "service.js": "text/javascript",
}
_MOST_FIELDS: Final = 10
#: Passwords that are verified at a time; each takes 64 MiB and several processors.
_MOST_HASHING: Final = 2
_TITLES: Final = {
    "label_map": "Label map (NIfTI)",
    "probabilities": "Probabilities (NIfTI)",
    "uncertainty": "Uncertainty (NIfTI)",
    "disagreement": "Disagreement of the networks (NIfTI)",
    "dicom_seg": "Segmentation (DICOM SEG)",
    "record": "Volumes, flags and provenance (JSON)",
    "page": "Page with the viewer (HTML)",
}


class SignInNeededError(Exception):
    """A page needs a user, and nobody is signed in."""


def page_account(request: Request) -> Account:
    """Return who is signed in.

    Raises:
        SignInNeededError: nobody.
    """
    account = signed_in(request)
    if account is None:
        raise SignInNeededError
    return account


PageAccount = Annotated[Account, Depends(page_account)]


async def form_account(request: Request) -> Account:
    """Return who sends a form, after checking that it is from this site and this session.

    Raises:
        SignInNeededError: nobody.
        RefusedError: the form is from elsewhere.
    """
    require_same_origin(request)
    account = await to_thread.run_sync(page_account, request)
    require_csrf(account, (await _fields(request)).get("csrf", ""))
    return account


FormAccount = Annotated[Account, Depends(form_account)]


async def _fields(request: Request) -> dict[str, str]:
    """Return the fields of a form.

    Raises:
        RefusedError: it is not an ordinary form.
    """
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise RefusedError(415, "This is not a form.")
    try:
        text = (await request.body()).decode("utf-8")
        found = parse_qs(text, max_num_fields=_MOST_FIELDS, keep_blank_values=True)
    except ValueError as error:
        raise RefusedError(400, "The form is malformed.") from error
    return {name: values[0] for name, values in found.items()}


def page(title: str, body: Markup, account: Account | None, *, status: int = 200) -> HTMLResponse:
    """Return a page of the service."""
    html = fill(
        "service.html",
        title=title,
        body=body,
        user=None if account is None else account.name,
        csrf="" if account is None else account.csrf,
    )
    return HTMLResponse(html, status_code=status)


def message_page(request: Request, status: int, text: str) -> HTMLResponse:
    """Return a page that says why a request was refused."""
    account = signed_in(request) if status < 500 else None  # the database may be what failed
    return page("Not possible", fill("service_message.html", message=text), account, status=status)


@router.get("/static/{name}")
def read_static(name: str) -> Response:
    """Return a style sheet or script."""
    if name not in _STATIC:
        raise RefusedError(404, "There is no such file.")
    headers = {"cache-control": "no-cache"}
    return Response(source(name), media_type=_STATIC[name], headers=headers)


@router.get("/")
def read_start() -> Response:
    """Go to the jobs."""
    return RedirectResponse("/jobs", status_code=303)


@router.get("/sign-in")
def read_sign_in(request: Request, service: TheService) -> Response:
    """Show the form for signing in."""
    if signed_in(request) is not None:
        return RedirectResponse("/jobs", status_code=303)
    return _sign_in_page(request, service, "", 200)


def _sign_in_page(request: Request, service: Service, problem: str, status: int) -> Response:
    random = secrets.token_urlsafe(24)
    body = fill("service_sign_in.html", problem=problem, form_csrf=random)
    answer = page("Sign in", body, None, status=status)
    _set_cookie(request, answer, f"{cookie_name(request)}-form", service.accounts.signed(random), 3600)
    return answer


@router.post("/sign-in")
async def sign_in(request: Request, service: TheService) -> Response:
    """Sign in, and set the cookie of the session."""
    require_same_origin(request)
    fields = await _fields(request)
    expected = service.accounts.unsigned(request.cookies.get(f"{cookie_name(request)}-form", ""))
    if expected is None or not hmac.compare_digest(expected.encode(), fields.get("csrf", "").encode()):
        return _sign_in_page(request, service, "The form was too old. Try again.", 403)
    name, address = fields.get("name", ""), address_of(request)
    if not is_user_name(name):
        name = ""  # nobody has it, and nothing that a stranger sends is kept
    by_name, by_address = service.name_failures, service.address_failures
    if seconds := by_address.wait(address) or by_name.wait(name):
        raise RefusedError(429, "Too many attempts failed. Wait some minutes.", retry_seconds=seconds)
    # Counted before the password is verified, so that attempts at the same time do not pass the limits.
    by_name.add(name)
    by_address.add(address)
    if service.hashing is None:
        service.hashing = CapacityLimiter(_MOST_HASHING)
    password = fields.get("password", "")
    cookie = await to_thread.run_sync(service.accounts.sign_in, name, password, limiter=service.hashing)
    if cookie is None:
        return _sign_in_page(request, service, "Name or password is wrong.", 403)
    by_name.forget(name)
    by_address.take_back(address)
    answer = RedirectResponse("/jobs", status_code=303)
    _set_cookie(request, answer, cookie_name(request), cookie, int(SESSION_SECONDS))
    return answer


def _set_cookie(request: Request, answer: Response, name: str, content: str, seconds: int) -> None:
    secure = request.url.scheme == "https"
    answer.set_cookie(name, content, max_age=seconds, path="/", secure=secure, httponly=True, samesite="strict")


@router.post("/sign-out")
def sign_out(request: Request, service: TheService, account: FormAccount) -> Response:
    """End the session."""
    service.accounts.sign_out(account)
    answer = RedirectResponse("/sign-in", status_code=303)
    answer.delete_cookie(cookie_name(request), path="/")
    return answer


@router.get("/jobs")
def show_jobs(
    service: TheService, account: PageAccount, after: Annotated[str | None, Query(pattern=r"^[0-9]{1,15}$")] = None
) -> Response:
    """Show the form for new jobs, and the queue."""
    listed = service.jobs.listed(account, after=None if after is None else int(after))
    body = fill(
        "service_jobs.html",
        models=models_of(service),
        jobs=[_shown(job) for job in listed.jobs],
        next=listed.next,
        all_users=account.is_admin,
    )
    return page("Jobs", body, account)


@router.get("/jobs/{job}")
def show_job(job: JobId, service: TheService, account: PageAccount) -> Response:
    """Show a job: its state, volumes, flags, and what can be done with it."""
    found = service.jobs.read(account, job)
    body = fill("service_job.html", job=_shown(found), region_names=REGION_NAMES, csrf=account.csrf)
    return page(found.name, body, account)


@router.get("/jobs/{job}/view")
def show_viewer(job: JobId, service: TheService, account: PageAccount) -> Response:
    """Show the case page with the viewer; it has a policy of its own, which allows exactly its script."""
    _, _, path = result_file(service, account, job, "page")
    links = Markup('<li><a href="/jobs">Jobs</a></li><li><a href="/jobs/{}">Downloads</a></li>').format(job)
    nav = f'<header>\n<nav aria-label="Service"><ul>{links}</ul></nav>\n'
    html = path.read_text(encoding="utf-8").replace("<header>\n", nav, 1)
    return HTMLResponse(
        html, headers={"content-security-policy": f"{policy(source('viewer.js'))}; frame-ancestors 'none'"}
    )


@router.get("/jobs/{job}/results/{name}")
def download_result(
    job: JobId, name: ResultName, request: Request, service: TheService, account: PageAccount
) -> Response:
    """Download a result."""
    return result_response(service, account, job, name, request)


@router.post("/jobs/{job}/cancel")
def cancel_by_form(job: JobId, service: TheService, account: FormAccount) -> Response:
    """Cancel a job."""
    service.jobs.cancel(account, job)
    return RedirectResponse(f"/jobs/{job}", status_code=303)


@router.post("/jobs/{job}/retry")
def retry_by_form(job: JobId, service: TheService, account: FormAccount) -> Response:
    """Repeat a job."""
    service.jobs.retry(account, job)
    return RedirectResponse(f"/jobs/{job}", status_code=303)


@router.post("/jobs/{job}/delete")
def delete_by_form(job: JobId, service: TheService, account: FormAccount) -> Response:
    """Delete a job."""
    if service.jobs.mark_deleted(account, job):
        with suppress(OSError):  # the job is marked, and what is left of it is removed later
            service.removal.finish()
    return RedirectResponse("/jobs", status_code=303)


def _shown(job: JobAnswer) -> dict[str, object]:
    """Return what the templates show of a job."""
    return {
        **job.model_dump(mode="json"),
        "now": f"place {job.place}" if job.place else job.step,
        "sent": _moment(job.created),
        "ended_at": "" if job.ended is None else _moment(job.ended),
        "volumes": [] if job.volumes_ml is None else list(job.volumes_ml.items()),
        "has_page": any(result.name == "page" for result in job.results),
        "results": [
            {"name": result.name, "title": _TITLES[result.name], "size": _size(result.bytes)} for result in job.results
        ],
    }


def _moment(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"
