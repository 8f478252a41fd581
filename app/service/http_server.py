"""The HTTP server: uvicorn, with a limit on how slowly headers may arrive, and a clean end on signals."""

from __future__ import annotations

import asyncio
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

#: Seconds in which the headers of a request must arrive, and for which an idle connection is kept.
HEADER_SECONDS: Final = 10.0
#: Longest headers of a request, in bytes.
_MOST_HEADER_BYTES: Final = 32 << 10
#: Connections at a time; more are answered with 503.
_MOST_CONNECTIONS: Final = 512
#: Seconds for answers that are being sent when the service is stopped.
_CLOSE_SECONDS: Final = 3


@dataclass(frozen=True, kw_only=True)
class HttpSettings:
    """Where the service listens."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 lets the system choose."""
    certificate: Path | None = None
    """PEM file of the certificate and its chain; None for plain HTTP."""
    key: Path | None = None
    """PEM file of the certificate's key."""
    proxy: str | None = None
    """Address of a reverse proxy whose X-Forwarded-For and X-Forwarded-Proto are trusted; None trusts nobody."""


class _TimedProtocol(H11Protocol):
    """Closes a connection whose next request does not arrive in time."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Start the clock when a request is awaited, and stop it once its headers are complete."""
        awaited = self.cycle is None or self.cycle.response_complete
        if not awaited:
            self._unwatch()
        elif self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self._close_slow)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """Ends on SIGINT and SIGTERM without sending the signal again, so that the program ends normally."""

    def __init__(self, config: uvicorn.Config, on_start: Callable[[int], None], on_stop: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_start, self._on_stop = on_start, on_stop

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals while the server runs."""

        def stop(number: int, frame: object) -> None:  # noqa: ARG001 - signature of a signal handler
            self.should_exit = True
            self._on_stop()

        before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and report the port."""
        await super().startup(sockets)
        if self.started:
            self._on_start(self.servers[0].sockets[0].getsockname()[1])


def run_http(
    site: ASGIApp, settings: HttpSettings, *, on_start: Callable[[int], None], on_stop: Callable[[], None]
) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        site: the application.
        settings: where to listen.
        on_start: called with the port once requests are answered.
        on_stop: called in the signal's handler.

    Raises:
        SystemExit: the address cannot be used.
    """
    _Server(http_config(site, settings), on_start, on_stop).run()


def http_config(site: ASGIApp, settings: HttpSettings) -> uvicorn.Config:
    """Return the settings of uvicorn."""
    return uvicorn.Config(
        site,
        host=settings.host,
        port=settings.port,
        http=_TimedProtocol,
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=settings.proxy is not None,
        forwarded_allow_ips=settings.proxy or "",
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=math.ceil(HEADER_SECONDS),
        timeout_graceful_shutdown=_CLOSE_SECONDS,
        h11_max_incomplete_event_size=_MOST_HEADER_BYTES,
    )
