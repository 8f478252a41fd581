"""Prepared cases on disk: found by what they were made from, whole or not there, used by many runs at once.

A case is kept under a key: SHA-256 over the content of its files, the settings it was prepared with and the program
that did it. A copy of a data set, a case in two data sets and a case under another name are therefore one entry; an
edited file is another one. A file's content is hashed once; later its path, size and time of change stand for it, as
they do for make and git, because hashing a whole data set at every start would take minutes on a slow disk. Such a
stand-in is only noted for files that have been still for some seconds, since a coarse clock hides a second change.

An entry is written beside its place and renamed, so several processes may make the same one: the first wins. The
kernel's locks (flock) go with their process, and so nothing that is left behind by a kill keeps anybody waiting.
A shared folder holds::

    <key>/                  image.npy, codes.npy, centres.npy, source.json
    .known/                 keys by path, size and time of the files
    .users/                 one file a process at work: locked by it, and the keys it uses
    .partial-<user>-*/      being written, or being deleted
    .lock                   held for moments, while entries come and go
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from threading import Lock
from typing import IO, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from data.datasets.layouts import Case
from data.files import naming_the_place
from data.filesystem import has_no_mapping, lock, warn_once

#: Raised when the files of an entry change their meaning.
_VERSION: Final = 2
#: The arrays of an entry.
ARRAYS: Final = ("image.npy", "codes.npy", "centres.npy")
_SOURCE: Final = "source.json"
_STILL_SECONDS: Final = 2.0
#: What a prepared case depends on beside this program.
_LIBRARIES: Final = ("nibabel", "numpy", "scipy", "zlib-ng")

_PARSING: Final = Lock()


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """What a shared cache holds."""

    folder: Path
    entries: int
    used_bytes: int
    most_bytes: int
    in_use: int
    """Entries that a living process uses."""

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {
            "folder": str(self.folder),
            "entries": self.entries,
            "bytes": self.used_bytes,
            "limit_bytes": self.most_bytes,
            "in_use": self.in_use,
        }


class CaseFolder:
    """A folder of prepared cases that belongs to one run, and grows as it must."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._user = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.problem: str | None = None
        """Why cases are elsewhere, or None where none is."""

    def key(self, case: Case, settings: Mapping[str, Any]) -> str:
        """Key of a case under settings (plain data), from the content of its files.

        Raises:
            OSError: a file cannot be read.
        """
        files: dict[str, Path] = {str(contrast): path for contrast, path in case.contrasts.items()}
        if case.label is not None:
            files["label"] = case.label
        before = _stamps(files)
        volumes = {str(contrast): number for contrast, number in case.volumes.items()}
        known = self.folder / ".known" / _digest([before, volumes, settings, _program()])
        with suppress(OSError, ValueError):
            noted = known.read_text(encoding="utf-8")
            if len(noted) == len(known.name):
                return noted
        content = {name: [_content(path), path.name.lower().endswith(".gz")] for name, path in files.items()}
        key = _digest([_VERSION, content, volumes, settings, _program()])
        newest = max((stamp[-1] for stamp in before.values()), default=0)
        if _stamps(files) == before and newest < time.time_ns() - _STILL_SECONDS * 1e9:
            with suppress(OSError):  # it only saves time
                self._note(known, key)
        return key

    def hold(self, keys: Collection[str]) -> None:
        """Say which entries this process uses from now on."""

    def find(self, key: str) -> Path | None:
        """Folder of the entry of this key, or None where there is none or it is damaged."""
        place = self.folder / key
        return place if _is_whole(place) else None

    def add(self, key: str, write: Callable[[Path], None]) -> Path:
        """Make an entry.

        Args:
            key: from :meth:`key`.
            write: writes its files into the folder it is given.

        Returns:
            the entry's folder; where another process was faster, that of its entry.
        """
        partial = self._partial(key)
        try:
            with naming_the_place(self.folder):
                partial.mkdir(parents=True)
                write(partial)
                return self._publish(partial, key)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _publish(self, partial: Path, key: str) -> Path:
        place = self.folder / key
        while True:
            try:
                return partial.rename(place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            if _is_whole(place):
                return place
            self._remove([place])

    def _remove(self, places: Sequence[Path]) -> None:
        """Delete entries; nobody sees a half of one."""
        for place in places:
            gone = self._partial("gone")
            with suppress(FileNotFoundError):
                place.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)

    def _partial(self, name: str) -> Path:
        return self.folder / f".partial-{self._user}-{name[:12]}-{secrets.token_hex(4)}"

    def _note(self, known: Path, key: str) -> None:
        """Note a key by stand-ins; a folder of one run lives too shortly for that."""


class SharedCache(CaseFolder):
    """A folder of prepared cases for all runs of a user, bounded: what was not used for longest goes first.

    Entries that a living process holds stay. Use it as a context; the entries held are free afterwards.
    """

    def __init__(self, folder: Path, *, most_bytes: int, overflow: CaseFolder) -> None:
        """Open the cache, and delete what a killed process left half made.

        Args:
            folder: made where it is missing.
            most_bytes: how much the entries may take together.
            overflow: takes the cases that do not fit, and all where the folder can no longer be written to.

        Raises:
            OSError: the folder cannot be written to, or its file system knows no locks.
        """
        super().__init__(folder)
        self._most_bytes = most_bytes
        self._overflow = overflow
        self._held: set[str] = set()
        with naming_the_place(folder):
            for name in (".known", ".users"):
                (folder / name).mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._file = self._sign_in()
                users = self._users()
                for path in folder.glob(".partial-*"):
                    if not any(path.name.startswith(f".partial-{user}-") for user in users):
                        shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Let go of the entries."""
        with suppress(OSError):
            (self.folder / ".users" / self._user).unlink()
        self._file.close()

    def hold(self, keys: Collection[str]) -> None:
        """Say which entries this process uses from now on, before it looks for them."""
        self._held |= set(keys)
        try:
            with self._locked():
                self._file.seek(0)
                self._file.truncate()
                self._file.write("\n".join(sorted(self._held)))
                self._file.flush()
        except OSError as error:
            self._give_up(error)

    def find(self, key: str) -> Path | None:
        """As before; what is found counts as used now."""
        place = super().find(key)
        if place is None:
            return self._overflow.find(key)
        with suppress(OSError):
            os.utime(place / _SOURCE)
        return place

    def add(self, key: str, write: Callable[[Path], None]) -> Path:
        """As before; into the overflow where the entry does not fit, or cannot be written."""
        if self.problem is None:
            try:
                return super().add(key, write)
            except OSError as error:
                self._give_up(error)
        return self._overflow.add(key, write)

    def info(self) -> CacheInfo:
        """What the cache holds."""
        with self._locked():
            entries = self._entries()
            held = set().union(*self._users().values())
        return CacheInfo(
            folder=self.folder,
            entries=len(entries),
            used_bytes=sum(size for _, size, _ in entries),
            most_bytes=self._most_bytes,
            in_use=sum(place.name in held for place, _, _ in entries),
        )

    def clear(self) -> CacheInfo:
        """Delete every entry that no living process holds; return what is left."""
        with self._locked():
            held = set().union(*self._users().values())
            self._remove([place for place, _, _ in self._entries() if place.name not in held])
            for path in (self.folder / ".known").iterdir():
                path.unlink(missing_ok=True)
        return self.info()

    def _publish(self, partial: Path, key: str) -> Path:
        with self._locked():
            if not self._make_room(_bytes_in(partial)):
                raise OSError(errno.EDQUOT, f"the limit of {self._most_bytes / 1e9:g} GB is reached", str(self.folder))
            return super()._publish(partial, key)

    def _make_room(self, needed: int) -> bool:
        """Delete the entries that were not used for longest, until so many bytes fit; False where they cannot."""
        entries = self._entries()
        excess = sum(size for _, size, _ in entries) + needed - self._most_bytes
        if excess <= 0:
            return True
        held = set().union(*self._users().values())
        free = sorted((used, place.name, size) for place, size, used in entries if place.name not in held)
        if sum(size for _, _, size in free) < excess:
            return False
        for _, name, size in free:
            if excess <= 0:
                break
            self._remove([self.folder / name])
            excess -= size
        self._forget({place.name for place, _, _ in self._entries()})
        return True

    def _entries(self) -> list[tuple[Path, int, int]]:
        """Folder, bytes and time of last use of each entry."""
        found = []
        for place in self.folder.iterdir():
            if not place.name.startswith("."):
                with suppress(OSError):  # without its source.json it is damaged, and older than all others
                    source = place / _SOURCE
                    found.append((place, _bytes_in(place), source.stat().st_mtime_ns if source.exists() else 0))
        return found

    def _forget(self, there: Collection[str]) -> None:
        """Drop the stand-ins of entries that are gone."""
        for path in (self.folder / ".known").iterdir():
            with suppress(OSError, ValueError):
                if path.read_text(encoding="utf-8") not in there:
                    path.unlink()

    def _users(self) -> dict[str, set[str]]:
        """The keys that each living process holds; files of dead ones are deleted. To be called under the lock."""
        living = {}
        for path in (self.folder / ".users").iterdir():
            with path.open("r+", encoding="utf-8") as file:  # NFS locks nothing that is open for reading only
                try:
                    lock(file, path)
                except BlockingIOError:
                    try:
                        living[path.name] = set(file.read().split())
                    except PermissionError:  # SMB: what is locked cannot be read either
                        living[path.name] = {place.name for place in self.folder.iterdir()}
                else:
                    path.unlink(missing_ok=True)
        return living

    def _sign_in(self) -> IO[str]:
        """This process's file among the users, locked for as long as it is open. To be called under the lock."""
        file = (self.folder / ".users" / self._user).open("w", encoding="utf-8")
        try:
            lock(file, self.folder)
        except OSError:
            file.close()
            raise
        return file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from adding and deleting; the kernel lets go when this process ends, however it ends."""
        with (self.folder / ".lock").open("a") as file:
            lock(file, self.folder, wait=True)
            yield

    def _note(self, known: Path, key: str) -> None:
        partial = known.with_name(f"{known.name}-{secrets.token_hex(4)}")
        try:
            partial.write_text(key, encoding="utf-8")
            partial.replace(known)
        finally:
            partial.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        self.problem = self.problem or f"{self.folder}: {error.strerror or error}"


def _stamps(files: Mapping[str, Path]) -> dict[str, list[Any]]:
    """What stands for the content of files: path, size, inode, time of change."""
    stamps = {}
    for name, path in files.items():
        status = path.stat()
        stamps[name] = [str(path.resolve()), status.st_size, status.st_ino, status.st_mtime_ns]
    return stamps


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def _program() -> list[str]:
    """What stands for the program that prepares: its own data package, and the libraries it uses."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(resources.files("data"))).rglob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), *(f"{name} {metadata.version(name)}" for name in _LIBRARIES)]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def _bytes_in(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def _is_whole(place: Path) -> bool:
    """Whether every array of an entry is there in its full length."""
    try:
        _source_in(place)
        for name in ARRAYS:
            open_array(place / name, "r")
    except (OSError, EOFError, ValueError):
        return False
    return True


def open_array(path: Path, mode: Literal["r", "c"] | None) -> npt.NDArray[Any]:
    """An array of an entry, mapped in a mode of ``numpy.memmap``, or read where that is None.

    Where the file system maps no files, it is read too, with a warning.

    One at a time: numpy parses the header as Python, and CPython 3.11 may fail at that in two threads at once
    (SystemError: AST constructor recursion depth mismatch).

    Raises:
        OSError, EOFError, ValueError: it cannot be read, or is cut short.
    """
    array: npt.NDArray[Any]
    with _PARSING:
        try:
            array = np.load(path, mmap_mode=mode)
        except OSError as error:
            if mode is None or not has_no_mapping(error):
                if error.errno is None or error.filename is not None:
                    raise
                raise OSError(error.errno, f"cannot be read: {error.strerror}", str(path)) from error
            warn_once(
                path.parents[1],
                "map files into memory",
                error,
                "Prepared cases are read whole; this takes more memory.",
            )
            array = np.load(path)
    return array


def write_source(folder: Path, case: Case, settings: Mapping[str, Any], backgrounds: Mapping[str, str]) -> None:
    """Say beside the arrays what they were made from; for people, the key says it to the program.

    Args:
        folder: of the entry.
        case: what was prepared.
        settings: how, plain data.
        backgrounds: by contrast, what of it was background and not 0; :func:`backgrounds_in` gives it back.
    """
    files = [str(path) for path in (*case.contrasts.values(), *([case.label] if case.label is not None else []))]
    content = {"case": case.id, "files": files, "settings": dict(settings), "program": _program()}
    content["backgrounds"] = dict(backgrounds)
    (folder / _SOURCE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def backgrounds_in(folder: Path) -> dict[str, str]:
    """By contrast of a prepared case: what of it was background and not 0 in its file; none where it cannot be read."""
    try:
        return {str(name): str(said) for name, said in _source_in(folder).get("backgrounds", {}).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _source_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
    return content
