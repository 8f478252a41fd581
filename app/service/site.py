"""The web application: the API and the pages, behind the guard."""

from __future__ import annotations

import math
from importlib import metadata
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp

from app.progress import LOG
from app.service import api, pages
from app.service.database import is_full
from app.service.guard import Guard
from app.service.refusals import RefusedError, no_room
from app.service.service import Service


def create_site(service: Service) -> ASGIApp:
    """Return the application of a service."""
    return guarded(create_routes(), service)


def guarded(routes: FastAPI, service: Service) -> ASGIApp:
    """Return routes behind the guard, for a service."""
    routes.state.service = service
    return Guard(routes, names=frozenset(service.settings.names))


def create_routes() -> FastAPI:
    """Return the routes of the API and the pages, which still need a service."""
    site = FastAPI(
        title="znormseg",
        version=metadata.version("znormseg"),
        summary="Brain-tumour MRI segmentation. Research use only; not a medical device.",
        openapi_url=f"{api.PREFIX}/openapi.json",
        docs_url=None,  # these pages load scripts from another host
        redoc_url=None,
        redirect_slashes=False,
    )
    site.include_router(api.router)
    site.include_router(pages.router)
    site.add_exception_handler(pages.SignInNeededError, _sign_in)
    site.add_exception_handler(Exception, _bug)
    site.add_exception_handler(RefusedError, _refused)
    site.add_exception_handler(HTTPException, _http)
    site.add_exception_handler(RequestValidationError, _invalid)
    site.add_exception_handler(ClientDisconnect, _gone)
    site.add_exception_handler(OSError, _system)
    site.add_exception_handler(SQLAlchemyError, _database)
    return site


def _answer(request: Request, status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
    """Return a refusal as JSON, or as a page outside of the API."""
    if request.url.path.startswith("/api/"):
        return JSONResponse({"detail": detail}, status_code=status, headers=headers)
    answer = pages.message_page(request, status, detail)
    answer.headers.update(headers or {})
    return answer


def _sign_in(request: Request, error: Any) -> Response:  # noqa: ARG001 - signature of a handler
    return RedirectResponse("/sign-in", status_code=303)


def _bug(request: Request, error: Any) -> Response:  # noqa: ARG001
    return JSONResponse({"detail": "The server failed. Its log says why."}, status_code=500)


def _refused(request: Request, error: Any) -> Response:
    headers = {} if error.retry_seconds is None else {"retry-after": str(max(1, math.ceil(error.retry_seconds)))}
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return _answer(request, error.status, error.detail, headers)


def _http(request: Request, error: Any) -> Response:
    return _answer(request, error.status_code, str(error.detail), dict(error.headers or {}))


def _invalid(request: Request, error: Any) -> Response:
    """Name the first problem, without repeating what was sent."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    return _answer(request, 422, f"{place}: {problem['msg']}"[:500])


def _gone(request: Request, error: Any) -> Response:  # noqa: ARG001
    return _answer(request, 408, "The request did not arrive completely, or too slowly.")


def _system(request: Request, error: Any) -> Response:
    if is_full(error):
        return _refused(request, no_room())
    LOG.error("a request failed: %s", error.strerror or type(error).__name__)
    return _answer(request, 500, "The server could not do this. Its log says why.")


def _database(request: Request, error: Any) -> Response:
    if is_full(error):
        return _refused(request, no_room())
    LOG.error("the database failed: %s", type(error).__name__)
    return _answer(request, 503, "The database does not answer. Try again later.", {"retry-after": "10"})
