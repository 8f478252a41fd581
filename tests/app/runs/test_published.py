"""Downloads of published models, from a real HTTP server on loopback."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from app.errors import RunError
from app.progress import Progress
from app.runs import published
from app.runs.published import PublishedFile, PublishedModel, download, is_installed

CONTENT = bytes(range(256)) * 4096

# pooch leaves the socket of a broken download to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@dataclass
class Server:
    """A server that answers each path in its own way."""

    url: str
    asked: list[str] = field(default_factory=list)


class Answer(BaseHTTPRequestHandler):
    """/model/weights.bin is right; other folders misbehave as their names say."""

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        folder = self.path.split("/")[1]
        if folder == "missing":
            self.send_error(404)
            return
        if folder == "moved":
            self.send_response(302)
            self.send_header("Location", "/right/model/weights.bin")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT)))
        self.end_headers()
        if folder == "silent":
            time.sleep(1.5)
        elif folder == "cut":
            self.wfile.write(CONTENT[:1000])
        elif folder == "tampered":
            self.wfile.write(b"x" + CONTENT[1:])
        else:
            for start in range(0, len(CONTENT), 1 << 18):
                self.wfile.write(CONTENT[start : start + (1 << 18)])
                time.sleep(0.02 if folder == "slow" else 0)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - name of the base class
        """Print nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        found = Server(url=f"http://127.0.0.1:{running.server_port}")
        running.asked = found.asked  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield found
        running.shutdown()


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "ZNORMSEG_OFFLINE", "ZNORMSEG_MODELS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ZNORMSEG_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def model(url: str = "http://127.0.0.1:9/model/weights.bin") -> PublishedModel:
    file = PublishedFile(name="weights.bin", url=url, hash=f"sha256:{hashlib.sha256(CONTENT).hexdigest()}")
    return PublishedModel(
        name="model",
        task="segmentation",
        summary="a test",
        takes="nothing",
        gives="nothing",
        megabytes=1,
        licence="MIT",
        citation="none",
        files=(file,),
    )


def install(verified: Path, out: Path) -> None:
    out.mkdir()
    (verified / "weights.bin").rename(out / "weights.bin")


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("place", ["right", "slow", "moved"])
def test_a_download_arrives_complete(server: Server, folder: Path, place: str) -> None:
    out = download(model(f"{server.url}/{place}/model/weights.bin"), install)
    assert (out / "weights.bin").read_bytes() == CONTENT
    assert leftovers(folder) == ["model"]


def test_an_installed_model_is_not_downloaded_again(server: Server) -> None:
    for _ in range(2):
        download(model(f"{server.url}/right/model/weights.bin"), install)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("missing", "404"),
        ("cut", "cut|hash differs"),
        ("tampered", "hash differs"),
        ("silent", "in time|no connection"),
    ],
)
def test_a_failed_download_leaves_nothing(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, reason: str
) -> None:
    monkeypatch.setattr(published, "_TIMEOUT_SECONDS", (1.0, 0.5))
    with pytest.raises(RunError, match=rf"model: http\S+ could not be downloaded \(.*({reason})") as caught:
        download(model(f"{server.url}/{place}/model/weights.bin"), install)
    assert "--from FILE" in str(caught.value)
    assert leftovers(folder) == []


def test_an_unreachable_server_is_reported_as_such() -> None:
    with pytest.raises(RunError, match="no connection"):
        download(model(), install)


def test_a_mirror_replaces_the_host(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZNORMSEG_MODELS_URL", f"{server.url}/right/")
    download(model("https://unreachable.invalid/weights.bin"), install)
    assert server.asked == ["/right/model/weights.bin"]


def test_offline_mode_refuses_and_names_the_command(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZNORMSEG_OFFLINE", "1")
    with pytest.raises(RunError, match="znormseg model download model"):
        download(model(f"{server.url}/right/model/weights.bin"), install)
    assert server.asked == []


def test_a_user_supplied_file_also_works_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZNORMSEG_OFFLINE", "1")
    (tmp_path / "other.bin").write_bytes(CONTENT)
    assert (download(model(), install, source=tmp_path / "other.bin") / "weights.bin").read_bytes() == CONTENT


@pytest.mark.parametrize(("content", "reason"), [(b"other", "is not the published file"), (None, "does not exist")])
def test_a_wrong_user_supplied_file_is_refused(
    tmp_path: Path, folder: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "weights.bin").write_bytes(content)
    with pytest.raises(RunError, match=reason):
        download(model(), install, source=tmp_path / "weights.bin")
    assert leftovers(folder) == []


def test_a_failed_installation_leaves_nothing(server: Server, folder: Path) -> None:
    def fail(verified: Path, out: Path) -> None:
        out.mkdir()
        raise RunError("not that network")

    with pytest.raises(RunError, match="not that network"):
        download(model(f"{server.url}/right/model/weights.bin"), fail)
    assert leftovers(folder) == []


def _download_in_a_process(url: str) -> None:
    download(model(url), install)


def test_two_concurrent_processes_both_succeed(server: Server, folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    url = f"{server.url}/slow/model/weights.bin"
    both = [context.Process(target=_download_in_a_process, args=(url,)) for _ in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(60)
    assert [one.exitcode for one in both] == [0, 0]
    assert is_installed("model")
    assert leftovers(folder) == ["model"]


def test_a_full_disk_is_reported_with_its_folder(server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(verified: Path, out: Path) -> None:
        raise OSError(28, os.strerror(28))

    with pytest.raises(OSError, match=str(folder)):
        download(model(f"{server.url}/right/model/weights.bin"), full)
    assert leftovers(folder) == []


def test_progress_ends_at_the_full_size(server: Server) -> None:
    seen: list[Progress] = []
    download(model(f"{server.url}/slow/model/weights.bin"), install, on_progress=seen.append)
    shares = [one.share for one in seen]
    assert shares == sorted(shares)
    assert shares[-1] == 1
