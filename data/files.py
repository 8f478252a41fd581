"""Write files and folders so that they are there whole or not at all: partial names, renaming, what a crash left."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Final

from data.filesystem import is_raw

#: What Linux, macOS and Windows take as the name of a file where the file system does not say.
MOST_NAME_BYTES: Final = 255
#: A name of more bytes is replaced by its hash, so that a prefix never makes it longer than it may be.
_LONGEST_KEPT: Final = 64


def partial_name(prefix: str, name: str) -> str:
    """The name of a file or folder while it is written: the prefix, then the name or, of a long one, its hash.

    It is never longer than a name that the file system takes, and it keeps the ending.

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
    """How many bytes the name of a file in a folder may have: 255, on encrypted file systems down to 143."""
    try:
        return min(os.pathconf(folder, "PC_NAME_MAX"), MOST_NAME_BYTES)
    except (OSError, ValueError, AttributeError):
        return MOST_NAME_BYTES


#: How the names of files begin that are being written.
_PARTIAL: Final = ".partial-"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside ``path`` to write to; it takes the place of ``path`` when the block ends well, else it goes.

    The path given keeps the ending of ``path``, so that writers that look at it do the same as they would have. A link
    stays one, its target is replaced; a device or a pipe, such as ``/dev/stdout``, is written to as it is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with naming_the_place(path):
            yield path
        return
    place = path.resolve()
    beside = place.with_name(partial_name(partial_prefix(os.getpid()), place.name))
    try:
        with naming_the_place(path):
            yield beside
            beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def remove_stale(folder: Path) -> list[Path]:
    """Remove the files that :func:`replacing` gave to processes of this host that were killed since.

    Files of another host's processes stay: whether those live cannot be told. To be called while no process that this
    one cannot see (one in a container) writes to the folder.

    Returns:
        what was removed.
    """
    removed = []
    for path in folder.glob(f"{_PARTIAL}{_host_mark()}-*"):
        process = path.name.removeprefix(f"{_PARTIAL}{_host_mark()}-").partition("-")[0]
        if process.isdecimal() and not _lives(int(process)):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _lives(process: int) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def partial_prefix(process: int) -> str:
    """How the names of a process's partial files begin: they say whose they are."""
    return f"{_PARTIAL}{_host_mark()}-{process}-"


@cache
def _host_mark() -> str:
    """Stands for the name of this host, whatever its length and letters."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


@contextmanager
def naming_the_place(path: Path) -> Iterator[None]:
    """Have a system error say what could not be written, by the path the user knows; it may name none, or a partial.

    An error that says more than the system's own text stays as it is, but for the place.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        # shutil.copyfile names its source too, whichever side failed.
        names = [os.fsdecode(name) for name in (error.filename, error.filename2) if name is not None]
        named = bool(names) and not any(map(_is_partial, names))
        if named and not is_raw(error):
            raise
        what = f"cannot be written: {error.strerror}" if is_raw(error) else error.strerror
        raise OSError(error.errno, what, error.filename if named else str(path)) from error


def _is_partial(name: str) -> bool:
    """Whether a path lies in a file or folder that is being written; all of their names are hidden."""
    return any(part.startswith(".") and ".partial" in part for part in Path(name).parts)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
