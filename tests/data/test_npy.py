"""Arrays from .npy files: each is what numpy reads, and headers are parsed one at a time."""

from __future__ import annotations

import ast
import io
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.npy import load_npy, parse_npy


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of the numbers 0 to 5."""
    np.save(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    return tmp_path / "a.npy"


def test_every_way_of_reading_gives_the_array_of_the_file(path: Path) -> None:
    for array in (load_npy(path, "r"), load_npy(path, None), parse_npy(path.read_bytes())):
        assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_headers_are_parsed_one_at_a_time_in_threads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    literal_eval, busy = ast.literal_eval, threading.Lock()

    def slow(header: str) -> Any:
        assert busy.acquire(blocking=False), "two headers are parsed at once"
        time.sleep(0.01)
        busy.release()
        return literal_eval(header)

    monkeypatch.setattr(ast, "literal_eval", slow)
    ways = (lambda: load_npy(path, "r"), lambda: parse_npy(path.read_bytes()))
    with ThreadPoolExecutor(4) as pool:
        assert len([future.result() for future in [pool.submit(ways[n % 2]) for n in range(8)]]) == 8


@pytest.mark.parametrize("length", [0, 5, -1])
def test_truncated_content_is_refused(path: Path, length: int) -> None:
    with pytest.raises(ValueError, match="EOF"):
        parse_npy(path.read_bytes()[:length])


def test_nothing_is_unpickled() -> None:
    content = io.BytesIO()
    np.save(content, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
        parse_npy(content.getvalue())
