"""A folder that is there whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app.errors import RunError
from app.runs.model_card import SUMS_FILE
from data.files import partial_name


@contextmanager
def folder_when_complete(out: Path) -> Iterator[Path]:
    """Give a folder to fill, which becomes ``out`` when the block ends well, and goes when it does not.

    An ``out`` that is there stays the folder it is (the working directory, a link, a place where a volume is mounted):
    it gets the content, the sums last.

    Args:
        out: empty or not there yet.

    Raises:
        RunError: it is a file, a link to nothing, or holds something.
        OSError: the place cannot be written to.
    """
    require_empty_export(out)
    there = out.exists()
    place = out if there else out.parent
    place.mkdir(parents=True, exist_ok=True)
    partial = place / partial_name(f".partial-{os.getpid()}-", out.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if there:
            _require_nothing_else(out, partial)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == SUMS_FILE):
                path.rename(out / path.name)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_empty_export(out: Path) -> None:
    """Make sure that nothing is in the way.

    Raises:
        RunError: it is a file, a link to nothing, lies in a file, or holds something.
    """
    if out.is_symlink() and not out.exists():
        raise RunError(f"{out}: a link to {out.readlink()}, which is not there; give a folder that is not there yet")
    above = next(place for place in out.absolute().parents if place.exists())
    if not above.is_dir():
        raise RunError(f"{out}: {above} is a file; give a folder that is not there yet")
    if out.exists():
        _require_nothing_else(out, None)


def _require_nothing_else(out: Path, partial: Path | None) -> None:
    if not out.is_dir() or any(path != partial for path in out.iterdir()):
        raise RunError(f"{out}: {'not empty' if out.is_dir() else 'a file'}; give a folder that is not there yet")
