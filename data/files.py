"""Atomic writes: files and folders get a partial name while they are written and are renamed once complete."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from data.filesystem import is_raw

#: Longest file name that Linux, macOS and Windows allow, used if the file system does not report a limit.
MOST_NAME_BYTES: Final = 255
#: Longer names are replaced by their hash, so that the prefix never makes a name exceed the limit.
_LONGEST_KEPT: Final = 64


def partial_name(prefix: str, name: str) -> str:
    """The name of a file or folder while it is written: the prefix, then the name or, if that is long, its hash.

    The result always fits the file system's limit and keeps the file's extension.

    Example:
        >>> partial_name(".partial-1-", "a.nii.gz"), len(partial_name(".partial-1-", "ä" * 124 + ".nii.gz"))
        ('.partial-1-a.nii.gz', 34)
    """
    if len(os.fsencode(name)) <= _LONGEST_KEPT:
        return f"{prefix}{name}"
    ending = ".nii.gz" if name.lower().endswith(".nii.gz") else Path(name).suffix
    ending = ending if len(os.fsencode(ending)) <= _LONGEST_KEPT // 2 else ""
    return f"{prefix}{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{ending}"


def most_name_bytes(folder: Path) -> int:
    """Maximum length in bytes of a file name in a folder: 255, down to 143 on encrypted file systems."""
    try:
        return min(os.pathconf(folder, "PC_NAME_MAX"), MOST_NAME_BYTES)
    except (OSError, ValueError, AttributeError):
        return MOST_NAME_BYTES


#: Prefix of the names of partial files.
_PARTIAL: Final = ".partial-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path next to ``path`` to write to; it replaces ``path`` if the block succeeds and is deleted if it fails.

    The yielded path keeps the extension of ``path``, so writers that choose a format by it behave the same. A symlink
    is kept and its target replaced; a device or a pipe, such as ``/dev/stdout``, is written to directly.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with naming_the_place(path):
            yield path
        return
    place = path.resolve()
    partial = place.with_name(partial_name(partial_prefix(os.getpid()), place.name))
    try:
        with naming_the_place(path):
            yield partial
            partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def folder_when_complete(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder next to ``folder`` to write to; it becomes ``folder`` on success and is deleted on failure.

    ``folder`` must not exist or be empty.
    """
    place = Path(os.path.realpath(folder))  # unlike Path.resolve, leaves a loop of symlinks to mkdir, which names it
    partial = place.with_name(partial_name(f"{_PARTIAL}{os.getpid()}-", place.name))
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming_the_place(folder):
            partial.mkdir(parents=True)
            yield partial
            partial.replace(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_stale(folder: Path) -> list[Path]:
    """Remove partial files that :func:`replacing` left behind when processes of this host were killed.

    Files from processes of other hosts are kept, because there is no way to find out whether those are still running.
    Call this only while no process invisible to this one, such as one in a container, is writing to the folder.

    Returns:
        the removed paths.
    """
    removed = []
    for path in folder.glob(f"{_PARTIAL}{_host_mark()}-*"):
        process = path.name.removeprefix(f"{_PARTIAL}{_host_mark()}-").partition("-")[0]
        if process.isdecimal() and not _is_running(int(process)):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_running(process: int) -> bool:
    """Whether a process with this ID is running on this host."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def partial_prefix(process: int) -> str:
    """Prefix of a process's partial files; it identifies the host and the process."""
    return f"{_PARTIAL}{_host_mark()}-{process}-"


@cache
def _host_mark() -> str:
    """A short hash of this host's name, which has a fixed length and is safe in file names."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextmanager
def naming_the_place(path: Path) -> Iterator[None]:
    """Re-raise a system error so that it names the path the user knows, instead of none or a partial file.

    An error with a text other than the system's own keeps that text; only its path is replaced.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        # shutil.copyfile names its source as well, whichever side failed.
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
        named = bool(names) and not any(map(_is_partial, names))
        if isinstance(error, BlockingIOError) and not named:  # a buffered writer changes number and text of EAGAIN
            error = BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if named and not is_raw(error):
            raise
        what = f"cannot be written: {error.strerror}" if is_raw(error) else error.strerror
        raise OSError(error.errno, what, error.filename if named else str(path)) from error


def _is_partial(name: str) -> bool:
    """Whether a path is, or is inside, a partial file or folder; their names are all hidden."""
    return any(part.startswith(".") and ".partial" in part for part in Path(name).parts)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
