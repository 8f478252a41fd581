"""What every request passes first, and every answer last: hosts, sizes, times and headers."""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Mapping
from typing import Final

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Most bytes of a request's headers; the server's own limit holds only for headers that arrive in several parts.
MOST_HEADER_BYTES: Final = 16 << 10
#: Most bytes of a request that is not a file of an upload.
MOST_BODY_BYTES: Final = 4 << 20
#: Seconds that a request may pause between two parts of its body.
PAUSE_SECONDS: Final = 30.0
#: Seconds in which a body that is not a file must arrive.
BODY_SECONDS: Final = 60.0
#: Policy of every page without one of its own: scripts, styles and requests of this host, and nothing inline.
POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS: Final[Mapping[str, str]] = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}
_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})


class Guard:
    """Refuses requests to other hosts, with tokens in their address, or with bodies that are large or slow."""

    def __init__(self, app: ASGIApp, *, names: frozenset[str]) -> None:
        """Wrap an application.

        Args:
            app: the application.
            names: host names and addresses under which it is reached, in addition to the loopback interface.
        """
        self._app = app
        self._names = _LOOPBACK | {name.lower() for name in names}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        secured = _with_headers(send, https=scope["scheme"] == "https")
        if _host_of(headers.get("host", "")) not in self._names:
            await _refuse(
                secured, 421, "This service does not answer to this host name. Use the one it was set up with."
            )
        elif b"zns_" in scope.get("query_string", b""):
            await _refuse(secured, 400, "Do not put a token in a URL. Send it as: Authorization: Bearer TOKEN")
        elif "transfer-encoding" in headers and "content-length" in headers:
            await _refuse(secured, 400, "The request states its length twice.")
        elif sum(len(name) + len(value) for name, value in scope["headers"]) > MOST_HEADER_BYTES:
            await _refuse(secured, 431, f"The headers are larger than {MOST_HEADER_BYTES} bytes.")
        elif _length(headers) > MOST_BODY_BYTES and not _is_file(scope):
            await _refuse(secured, 413, f"The request is larger than {MOST_BODY_BYTES} bytes.")
        else:
            await self._app(scope, _limited(receive, is_file=_is_file(scope)), secured)


def _is_file(scope: Scope) -> bool:
    path = str(scope["path"])
    return scope["method"] == "PUT" and path.startswith("/api/v1/uploads/") and "/files/" in path


def _length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 19 else 0


def _host_of(header: str) -> str:
    """Return the host name of a Host header without its port, in lower case.

    Example:
        >>> _host_of("[::1]:8000"), _host_of("Example.org:80"), _host_of("a b")
        ('::1', 'example.org', 'a b')
    """
    if header.startswith("["):
        inner = header[1:].partition("]")[0]
        try:
            return str(ipaddress.ip_address(inner))
        except ValueError:
            return header
    return header.partition(":")[0].lower()


def _limited(receive: Receive, *, is_file: bool) -> Receive:
    """Wrap ``receive``: a body that pauses or is too large ends as if the client had gone."""
    seen = 0
    until = asyncio.get_running_loop().time() + BODY_SECONDS
    complete = False

    async def limited() -> Message:
        nonlocal seen, complete
        if complete:  # what follows is only the end of the connection, for which streams wait
            return await receive()
        now = asyncio.get_running_loop().time()
        seconds = PAUSE_SECONDS if is_file else min(PAUSE_SECONDS, max(0.01, until - now))
        try:
            message = await asyncio.wait_for(receive(), seconds)
        except TimeoutError:
            return {"type": "http.disconnect"}
        if message["type"] == "http.request":
            seen += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if not is_file and seen > MOST_BODY_BYTES:
                return {"type": "http.disconnect"}
        return message

    return limited


def _with_headers(send: Send, *, https: bool) -> Send:
    async def secured(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
            headers.setdefault("content-security-policy", POLICY)
            headers.setdefault("cache-control", "no-store")
            if https:
                headers.setdefault("strict-transport-security", "max-age=31536000")
        await send(message)

    return secured


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
