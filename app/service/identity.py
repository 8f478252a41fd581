"""Who sends a request: by a token, or by the cookie of a browser that signed in."""

from __future__ import annotations

import hmac
from typing import Annotated, Final

from fastapi import Depends, Request
from fastapi.security import HTTPBearer

from app.service.accounts import Account
from app.service.refusals import RefusedError
from app.service.service import Service

#: Name of the session's cookie; over HTTPS, browsers enforce that it belongs to exactly this host.
COOKIE: Final = "znormseg"
SECURE_COOKIE: Final = "__Host-znormseg"
#: Header in which scripts of a page repeat the session's secret.
CSRF_HEADER: Final = "x-csrf-token"
_SAFE: Final = ("GET", "HEAD", "OPTIONS")
_bearer = HTTPBearer(auto_error=False, description="A token from `znormseg serve token NAME`.")


def service_of(request: Request) -> Service:
    """Return the service that an application belongs to."""
    service: Service = request.app.state.service
    return service


TheService = Annotated[Service, Depends(service_of)]


def cookie_name(request: Request) -> str:
    """Return the name of the session's cookie for this connection."""
    return SECURE_COOKIE if request.url.scheme == "https" else COOKIE


def address_of(request: Request) -> str:
    """Return the client's address; behind a proxy that was named, the one that it reports."""
    return request.client.host if request.client is not None else ""


def signed_in(request: Request) -> Account | None:
    """Return who is signed in with a browser; None if nobody is."""
    cookie = request.cookies.get(cookie_name(request), "")
    return service_of(request).accounts.by_cookie(cookie) if cookie else None


def require_same_origin(request: Request) -> None:
    """Refuse a request that another site made a browser send.

    Raises:
        RefusedError: its origin is not this site.
    """
    origin = request.headers.get("origin")
    host = request.headers.get("host", "").lower()
    if origin is not None and origin.lower() not in (f"http://{host}", f"https://{host}"):
        raise RefusedError(403, "The request comes from another site.")
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise RefusedError(403, "The request comes from another site.")


def require_csrf(account: Account, given: str) -> None:
    """Refuse a request of a browser that does not repeat the secret of its session.

    Raises:
        RefusedError: the secret is missing or wrong.
    """
    if account.csrf is None or not hmac.compare_digest(account.csrf.encode(), given.encode()):
        raise RefusedError(403, "The form is not from your session. Load the page again.")


def account_of(request: Request, _: Annotated[object, Depends(_bearer)]) -> Account:
    """Return who sends a request to the API.

    Raises:
        RefusedError: the token or cookie is missing or not valid; or a browser sends the request without the secret
            of its session.
    """
    service = service_of(request)
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return _by_token(service, token.strip(), address_of(request))
    account = signed_in(request)
    if account is None:
        raise RefusedError(401, "Send a token: Authorization: Bearer TOKEN")
    if request.method not in _SAFE:
        require_same_origin(request)
        require_csrf(account, request.headers.get(CSRF_HEADER, ""))
    return account


def _by_token(service: Service, token: str, address: str) -> Account:
    if seconds := service.token_failures.wait(address):
        raise RefusedError(429, "Too many tokens were not valid. Wait.", retry_seconds=seconds)
    account = service.accounts.by_token(token)
    if account is None:
        service.token_failures.add(address)
        raise RefusedError(401, "The token is not valid. Ask an administrator for one.")
    return account


TheAccount = Annotated[Account, Depends(account_of)]


def require_admin(account: TheAccount) -> Account:
    """Return who sends a request, if it is an administrator.

    Raises:
        RefusedError: it is not.
    """
    if not account.is_admin:
        raise RefusedError(403, "Only administrators may do this.")
    return account


TheAdmin = Annotated[Account, Depends(require_admin)]
