"""A client of the API that can be interrupted at any time and resumes; it needs none of the service's packages."""

from __future__ import annotations

import hashlib
import json
import re
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import requests

from app.errors import ConfigError, RunError
from app.runs.folder import write_json
from data.errors import DataError
from data.files import file_sha256, partial_prefix

_TIMEOUT_SECONDS: Final = (10.0, 900.0)
#: Attempts at a request while the server cannot be reached, and the first pause between two of them.
_ATTEMPTS: Final = 8
_PAUSE_SECONDS: Final = 1.0
#: Statuses of a server that is busy, full or restarting, the longest pause then, and for how long it is waited for.
_BUSY: Final = (429, 502, 503, 504, 507)
_LONGEST_PAUSE_SECONDS: Final = 60.0
_MOST_WAIT_SECONDS: Final = 1800.0
_BLOCK_BYTES: Final = 1 << 20
#: Texts of OpenSSL that stay the same however often the request is repeated.
_TLS_FAULTS: Final = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")
_TOKEN: Final = re.compile(r"[!-~]+")


@dataclass(kw_only=True)
class RemoteService:
    """A service and a token for it."""

    url: str
    """Address of the service, such as ``https://segment.example.org``."""
    token: str
    pause: Callable[[float], None] = time.sleep
    on_wait: Callable[[str], None] = lambda _: None
    """Called with the reason when a request has to be repeated, once for each request."""
    _session: requests.Session = field(default_factory=requests.Session, repr=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, self._session.close)
        if not _is_address(self.url):
            raise ConfigError(f"{self.url}: not the address of a service; give http://HOST:PORT or https://HOST")
        if _TOKEN.fullmatch(self.token) is None:
            raise ConfigError(
                "not a token: a token has no spaces, line breaks or accents. Copy the line that token add printed"
            )
        self._session.headers["Authorization"] = f"Bearer {self.token}"

    # ---- submit

    def submit(
        self, files: Sequence[tuple[str, Path, str | None]], request: dict[str, Any], state: Path | None
    ) -> list[dict[str, Any]]:
        """Send files and start their jobs; repeated after an interruption, it continues and starts nothing twice.

        Args:
            files: name, path and contrast (or None) of each file.
            request: further content of the request for jobs: model, options, priority.
            state: file that records the upload, so that the same command continues it; None if it cannot be continued.

        Returns:
            the jobs.

        Raises:
            DataError: the server refuses the images.
            RunError: the server refuses the request.
            OSError: the server cannot be reached.
        """
        announced = {
            "files": [
                {"name": name, "bytes": path.stat().st_size, "contrast": contrast} for name, path, contrast in files
            ]
        }
        key = hashlib.sha256(json.dumps([self.url, announced, request], sort_keys=True).encode()).hexdigest()
        upload = self._known_upload(state, key)
        if upload is None:
            upload = self._json("POST", "/uploads", json=announced)
            if state is not None:
                write_json(state, {"key": key, "upload": upload["id"]})
        for one in upload["files"]:
            if not one["received"]:
                self._send(upload["id"], one["number"], files[one["number"]][1])
        upload = self._json("POST", f"/uploads/{upload['id']}/complete")
        if upload["state"] == "refused":
            if state is not None:
                state.unlink(missing_ok=True)
            raise DataError(f"the server refused the files: {upload['message']}")
        made = self._json(
            "POST",
            "/jobs",
            json={**request, "upload": upload["id"]},
            headers={"Idempotency-Key": f"{upload['id']}.{key[:32]}"},
        )
        if state is not None:
            state.unlink(missing_ok=True)
        jobs: list[dict[str, Any]] = made["jobs"]
        return jobs

    def _known_upload(self, state: Path | None, key: str) -> dict[str, Any] | None:
        if state is None or not state.is_file():
            return None
        try:
            known = json.loads(state.read_text(encoding="utf-8"))
            if known["key"] != key:
                return None
            found = self._json("GET", f"/uploads/{known['upload']}")
            return None if found["state"] == "refused" else found
        except (ValueError, LookupError, TypeError, RunError):
            return None

    def _send(self, upload: str, number: int, path: Path) -> None:
        # Opened for each attempt, since an interrupted one has read a part of it.
        self._request("PUT", f"/uploads/{upload}/files/{number}", body=path)

    # ---- look

    def job(self, job: str) -> dict[str, Any]:
        """Return a job.

        Raises:
            RunError: the server has no such job for this token.
            OSError: the server cannot be reached.
        """
        return self._json("GET", f"/jobs/{job}")

    def jobs(self) -> Iterator[dict[str, Any]]:
        """Yield all jobs, newest first.

        Raises:
            RunError, OSError: as raised by :meth:`job`.
        """
        after: str | None = None
        while True:
            part = self._json("GET", "/jobs", params={"limit": "100"} | ({} if after is None else {"after": after}))
            yield from part["jobs"]
            after = part["next"]
            if after is None:
                return

    def watch(self, jobs: Sequence[str], on_job: Callable[[dict[str, Any]], None]) -> list[dict[str, Any]]:
        """Wait until jobs have ended, and return them; a server that restarts meanwhile is waited for.

        Args:
            jobs: their ids.
            on_job: called with a job whenever it has changed.

        Raises:
            RunError, OSError: as raised by :meth:`job`.
        """
        seen: dict[str, dict[str, Any]] = {}
        while True:
            for job in jobs:
                if job in seen and seen[job]["ended"] is not None:
                    continue
                found = self.job(job)
                if found != seen.get(job):
                    on_job(found)
                seen[job] = found
            if all(one["ended"] is not None for one in seen.values()):
                return [seen[job] for job in jobs]
            self.pause(_PAUSE_SECONDS)

    # ---- fetch

    def fetch(self, job: str, name: str, place: Path) -> bool:
        """Download a result; an interrupted download continues where it was, and a complete one is not repeated.

        Args:
            job: id of the job.
            name: name of the result.
            place: file to write.

        Returns:
            Whether anything was downloaded.

        Raises:
            RunError: the server has no such result, or the file differs from what the server states.
            OSError: the server cannot be reached, or the file cannot be written.
        """
        partial = place.with_name(f"{partial_prefix(0)}{job}-{name}")
        start = partial.stat().st_size if partial.is_file() else 0
        headers = {"Range": f"bytes={start}-"} if start else {}
        if place.is_file():
            headers["If-None-Match"] = f'"{file_sha256(place)}"'
        path = f"/jobs/{job}/results/{name}"
        with self._request("GET", path, headers=headers, stream=True, also=(304, 416)) as answer:
            if answer.status_code == 304:
                return False
            if answer.status_code == 416:
                partial.unlink(missing_ok=True)
                return self.fetch(job, name, place)
            with partial.open("ab" if answer.status_code == 206 else "wb") as file:
                for block in answer.iter_content(_BLOCK_BYTES):
                    file.write(block)
            wanted = answer.headers.get("etag", "").strip('"')
        if file_sha256(partial) != wanted:
            partial.unlink()
            raise RunError(f"{name} of job {job}: arrived damaged. Run the command again.")
        partial.replace(place)
        return True

    # ---- requests

    def _json(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        try:
            content = self._request(method, path, **more).json()
        except requests.exceptions.JSONDecodeError as error:
            raise RunError(f"{self.url}: does not answer as a znormseg service does. Check the address.") from error
        if not isinstance(content, dict):
            raise RunError(f"{self.url}: does not answer as a znormseg service does. Check the address.")
        return content

    def _request(
        self, method: str, path: str, *, body: Path | None = None, also: tuple[int, ...] = (), **more: Any
    ) -> requests.Response:
        address = f"{self.url.rstrip('/')}/api/v1{path}"
        failures, busy, waited = 0, 0, 0.0
        while True:
            try:
                answer = self._once(method, address, body, more)
            except requests.RequestException as error:
                if any(text in str(error) for text in _TLS_FAULTS):
                    raise OSError(_of_tls(self.url, str(error))) from error
                failures += 1
                if failures == _ATTEMPTS:
                    raise OSError(
                        f"{self.url}: cannot be reached: {type(error).__name__}. Check the address, and that it runs"
                    ) from error
                pause = _PAUSE_SECONDS * 2 ** (failures - 1)
                reason = f"cannot be reached: {type(error).__name__}."
            else:
                if answer.ok or answer.status_code in also:
                    return answer
                with answer:
                    reason = _reason(answer)
                if answer.status_code not in _BUSY or waited >= _MOST_WAIT_SECONDS:
                    raise RunError(f"{self.url}: {reason}")
                stated = answer.headers.get("retry-after", "")
                growing = _PAUSE_SECONDS * 2 ** min(busy, 6)
                pause = min(float(stated) if stated.isdecimal() else growing, _LONGEST_PAUSE_SECONDS)
                pause = max(pause, _PAUSE_SECONDS)
                busy, waited = busy + 1, waited + pause
            if failures + busy == 1:
                self.on_wait(f"{self.url}: {reason} Trying again.")
            self.pause(pause)

    def _once(self, method: str, address: str, body: Path | None, more: dict[str, Any]) -> requests.Response:
        if body is None:
            return self._session.request(method, address, timeout=_TIMEOUT_SECONDS, allow_redirects=False, **more)
        with body.open("rb") as file:
            return self._session.request(
                method, address, timeout=_TIMEOUT_SECONDS, allow_redirects=False, data=file, **more
            )


def _is_address(url: str) -> bool:
    """Whether requests can be sent to a URL, which must not contain a password."""
    try:
        parts = urlsplit(url)
        requests.Request("GET", url).prepare()
        usable = parts.scheme in ("http", "https") and parts.hostname is not None and parts.port != 0
    except ValueError:  # requests' own errors are of this kind too
        return False
    return usable and parts.username is None


def _of_tls(url: str, error: str) -> str:
    if "WRONG_VERSION_NUMBER" in error:
        return f"{url}: does not speak TLS. Give its address with http instead of https"
    return (
        f"{url}: its certificate is not trusted. If your hospital issued it, let the variable REQUESTS_CA_BUNDLE name "
        "the PEM file of the hospital's authority"
    )


def _reason(answer: requests.Response) -> str:
    try:
        return str(answer.json()["detail"])
    except (ValueError, LookupError, TypeError, requests.RequestException):
        return f"answered with status {answer.status_code}. Check the address."
