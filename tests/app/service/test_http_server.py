"""Attacks that need a real connection: slow, cut, oversized and ambiguous requests."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest

from app.service.service import Service


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait only half a second for headers and parts of bodies."""
    monkeypatch.setattr("app.service.http_server.HEADER_SECONDS", 0.5)
    monkeypatch.setattr("app.service.guard.PAUSE_SECONDS", 0.5)


@pytest.fixture
def port(short_waits: None, live_port: int) -> int:
    """Port of a server that waits only half a second."""
    return live_port


@pytest.fixture
def say(port: int) -> Iterator[Callable[[bytes], bytes]]:
    """Send bytes on a new connection and return the whole response until it is closed."""
    opened: list[socket.socket] = []

    def exchange(content: bytes) -> bytes:
        connection = socket.create_connection(("127.0.0.1", port), timeout=20)
        opened.append(connection)
        connection.sendall(content)
        received = b""
        while part := connection.recv(65536):
            received += part
        return received

    yield exchange
    for connection in opened:
        connection.close()


HEALTH = b"GET /api/v1/health HTTP/1.1\r\nHost: localhost\r\n"


def test_an_ordinary_request_is_answered(say: Callable[[bytes], bytes]) -> None:
    answer = say(HEALTH + b"Connection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"\r\nserver:" not in answer.lower()


@pytest.mark.parametrize(
    "start", [b"", b"GET /api", HEALTH, HEALTH + b"\r\nGET /ap"], ids=["nothing", "line", "head", "2nd"]
)
def test_a_connection_that_sends_no_headers_is_closed(say: Callable[[bytes], bytes], start: bytes) -> None:
    began = time.monotonic()
    say(start)
    assert time.monotonic() - began < 10


def test_slowly_sent_headers_are_cut_off_after_the_total_limit(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        began, is_open = time.monotonic(), True
        connection.sendall(HEALTH)
        while is_open and time.monotonic() - began < 10:
            time.sleep(0.1)
            try:
                connection.sendall(b"X: y\r\n")
            except OSError:
                is_open = False
    assert not is_open


def test_a_stalled_body_is_cut_off(say: Callable[[bytes], bytes], service: Service) -> None:
    token = service.accounts.add_token("ann").encode()
    head = b"POST /api/v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = say(head + b"Authorization: Bearer " + token + b'\r\nContent-Length: 100\r\n\r\n{"upload":')
    assert answer.startswith((b"HTTP/1.1 408", b"HTTP/1.1 400"))


@pytest.mark.parametrize(
    "request_",
    [
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /\0 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET http://evil.example/ HTTP/1.1\r\n\r\n",
        b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /sign-in HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n",
    ],
    ids=["smuggling", "two hosts", "large header", "null", "tls", "no host", "negative length", "odd length"],
)
def test_an_ambiguous_or_malformed_request_is_refused(say: Callable[[bytes], bytes], request_: bytes) -> None:
    answer = say(request_)
    assert answer == b"" or answer.split(b" ", 2)[1][:1] == b"4", answer
