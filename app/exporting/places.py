"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import RunError


@contextmanager
def folder_when_complete(out: Path) -> Iterator[Path]:
    """Give a folder beside ``out`` to fill, which becomes ``out`` when the block ends well, and goes when it does not.

    Args:
        out: empty or not there yet.

    Raises:
        RunError: it is a file, or holds something.
        OSError: the place cannot be written to.
    """
    require_empty(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f".partial-{os.getpid()}-{out.name}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_empty(out: Path) -> None:
    """Make sure that nothing is in the way.

    Raises:
        RunError: it is a file, or holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: {'not empty' if out.is_dir() else 'a file'}; give a folder that is not there yet")
