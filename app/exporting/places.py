"""Create a folder that appears complete or not at all."""

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
def export_folder_when_complete(out: Path) -> Iterator[Path]:
    """Yield a folder to fill, which becomes ``out`` if the block succeeds and is removed if it does not.

    An existing ``out`` (the working directory, a symlink, a mount point) is not replaced: the content is moved into it,
    the checksums last.

    Args:
        out: must be empty or not exist.

    Raises:
        RunError: ``out`` is a file, a dangling symlink, or not empty.
        OSError: the folder cannot be written to.
    """
    require_empty_export(out)
    exists = out.exists()
    place = out if exists else out.parent
    place.mkdir(parents=True, exist_ok=True)
    partial = place / partial_name(f".partial-{os.getpid()}-", out.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if exists:
            _require_nothing_else(out, partial)
            for path in sorted(partial.iterdir(), key=lambda path: path.name == SUMS_FILE):
                path.rename(out / path.name)
        else:
            partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_empty_export(out: Path) -> None:
    """Check that an export can be written to a folder.

    Raises:
        RunError: ``out`` is a file, a dangling symlink, inside a file, or not empty.
    """
    if out.is_symlink() and not out.exists():
        raise RunError(f"{out}: a symlink to {out.readlink()}, which does not exist; give a new or an empty folder")
    above = next(place for place in out.absolute().parents if place.exists())
    if not above.is_dir():
        raise RunError(f"{out}: {above} is a file; give a new or an empty folder")
    if out.exists():
        _require_nothing_else(out, None)


def _require_nothing_else(out: Path, partial: Path | None) -> None:
    if not out.is_dir() or any(path != partial for path in out.iterdir()):
        raise RunError(f"{out}: {'not empty' if out.is_dir() else 'a file'}; give a new or an empty folder")
