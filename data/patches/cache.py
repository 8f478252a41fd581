"""Prepared cases on disk: addressed by content, complete or absent, shared by concurrent runs.

The key of a case is the SHA-256 of its files' content, the settings it was prepared with and the program that prepared
it. A copy of a data set, a case in two data sets and a renamed case therefore share one entry; an edited file gets
another. A file's content is hashed once; later its path, size and modification time identify it, as in make and git,
because hashing a whole data set at every start would take minutes on a slow disk. Such a stamp is recorded only for
files unchanged for some seconds, since a coarse clock may hide a second change.

An entry is written under a partial name and renamed, so if several processes make the same entry, the first one wins.
The kernel's locks (flock) end with their process, so leftovers of a killed process never block another.
A shared folder contains::

    <key>/                  image.npy, codes.npy, centres.npy, source.json
    .known/                 keys by path, size and modification time of the files
    .users/                 one file per active process: locked by it, lists the keys in use
    .partial-<user>-*/      entries being written or deleted
    .lock                   held briefly while entries are added or removed
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
from typing import IO, Any, Final, Literal

import numpy.typing as npt

from data.datasets.layouts import Case
from data.files import file_sha256, naming_the_place
from data.filesystem import has_no_mapping, lock, warn_once
from data.npy import load_npy

#: Increment this when the format of an entry's files changes.
_VERSION: Final = 2
#: The arrays of an entry.
ARRAYS: Final = ("image.npy", "codes.npy", "centres.npy")
_SOURCE: Final = "source.json"
_STILL_SECONDS: Final = 2.0
#: Libraries that affect a prepared case.
_LIBRARIES: Final = ("nibabel", "numpy", "scipy", "zlib-ng")


@dataclass(frozen=True, kw_only=True)
class CacheInfo:
    """Statistics of a shared cache."""

    folder: Path
    entries: int
    used_bytes: int
    most_bytes: int
    in_use: int
    """Number of entries in use by a running process."""

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
    """A folder of prepared cases that belongs to one run and has no size limit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._user = f"{os.getpid()}-{secrets.token_hex(4)}"
        self.problem: str | None = None
        """Why cases are stored elsewhere; None if they are not."""

    def key(self, case: Case, settings: Mapping[str, Any]) -> str:
        """Key of a case under the given settings (plain data), from the content of its files.

        Raises:
            OSError: a file cannot be read.
        """
        files: dict[str, Path] = {str(contrast): path for contrast, path in case.contrasts.items()}
        if case.label is not None:
            files["label"] = case.label
        before = _stamps(files)
        volumes = {str(contrast): number for contrast, number in case.volumes.items()}
        record = self.folder / ".known" / _digest([before, volumes, settings, _program()])
        with suppress(OSError, ValueError):
            recorded = record.read_text(encoding="utf-8")
            if len(recorded) == len(record.name):
                return recorded
        content = {name: [file_sha256(path), path.name.lower().endswith(".gz")] for name, path in files.items()}
        key = _digest([_VERSION, content, volumes, settings, _program()])
        newest = max((stamp[-1] for stamp in before.values()), default=0)
        if _stamps(files) == before and newest < time.time_ns() - _STILL_SECONDS * 1e9:
            with suppress(OSError):  # the record only saves time
                self._record_key(record, key)
        return key

    def hold(self, keys: Collection[str]) -> None:
        """Declare which entries this process uses from now on."""

    def find(self, key: str) -> Path | None:
        """Folder of the entry with this key; None if it is missing or damaged."""
        place = self.folder / key
        return place if _is_whole(place) else None

    def add(self, key: str, write: Callable[[Path], None]) -> Path:
        """Create an entry.

        Args:
            key: the result of :meth:`key`.
            write: function that writes the entry's files into the given folder.

        Returns:
            the entry's folder; if another process was faster, that of its entry.
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
        """Delete entries; a partly deleted one is never visible."""
        for place in places:
            trash = self._partial("gone")
            with suppress(FileNotFoundError):
                place.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)

    def _partial(self, name: str) -> Path:
        return self.folder / f".partial-{self._user}-{name[:12]}-{secrets.token_hex(4)}"

    def _record_key(self, record: Path, key: str) -> None:
        """Record the key of files by their stamps; does nothing here, since a run's folder is too short-lived."""


class SharedCache(CaseFolder):
    """A size-limited folder of prepared cases, shared by all runs of a user; the least recently used are evicted first.

    Entries held by a running process are kept. Use it as a context manager; leaving the context releases the entries.
    """

    def __init__(self, folder: Path, *, most_bytes: int, overflow: CaseFolder) -> None:
        """Open the cache, and delete partial entries left by killed processes.

        Args:
            folder: created if missing.
            most_bytes: size limit of all entries together.
            overflow: stores the cases that do not fit, and all cases once the folder is not writable.

        Raises:
            OSError: the folder is not writable, or its file system does not support locks.
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
                try:
                    users = self._users()
                except OSError:
                    self.close()
                    raise
                for path in folder.glob(".partial-*"):
                    if not any(path.name.startswith(f".partial-{user}-") for user in users):
                        shutil.rmtree(path, ignore_errors=True)

    def close(self) -> None:
        """Release the entries."""
        with suppress(OSError):
            (self.folder / ".users" / self._user).unlink()
        self._file.close()

    def hold(self, keys: Collection[str]) -> None:
        """Declare which entries this process uses from now on; call it before looking for them."""
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
        """Like :meth:`CaseFolder.find`; also marks the entry as recently used and searches the overflow."""
        place = super().find(key)
        if place is None:
            return self._overflow.find(key)
        with suppress(OSError):
            os.utime(place / _SOURCE)
        return place

    def add(self, key: str, write: Callable[[Path], None]) -> Path:
        """Like :meth:`CaseFolder.add`; stores the entry in the overflow if it does not fit or cannot be written."""
        if self.problem is None:
            try:
                return super().add(key, write)
            except OSError as error:
                self._give_up(error)
        return self._overflow.add(key, write)

    def info(self) -> CacheInfo:
        """Statistics of the cache."""
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
        """Delete every entry not held by a running process; return the statistics of the rest."""
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
        """Evict the least recently used entries until ``needed`` bytes fit; return False if that is impossible."""
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
        """Folder, size in bytes and time of last use of each entry."""
        found = []
        for place in self.folder.iterdir():
            if not place.name.startswith("."):
                with suppress(OSError):  # without source.json the entry is damaged and counts as oldest
                    source = place / _SOURCE
                    found.append((place, _bytes_in(place), source.stat().st_mtime_ns if source.exists() else 0))
        return found

    def _forget(self, kept: Collection[str]) -> None:
        """Delete the records of entries that no longer exist."""
        for path in (self.folder / ".known").iterdir():
            with suppress(OSError, ValueError):
                if path.read_text(encoding="utf-8") not in kept:
                    path.unlink()

    def _users(self) -> dict[str, set[str]]:
        """The keys held by each running process; files of dead processes are deleted. Requires the lock."""
        active = {}
        for path in (self.folder / ".users").iterdir():
            with path.open("r+", encoding="utf-8") as file:  # NFS cannot lock files open for reading only
                try:
                    lock(file, path)
                except BlockingIOError:
                    try:
                        active[path.name] = set(file.read().split())
                    except PermissionError:  # on SMB, locked files cannot be read
                        active[path.name] = {place.name for place in self.folder.iterdir()}
                else:
                    path.unlink(missing_ok=True)
        return active

    def _sign_in(self) -> IO[str]:
        """Create this process's file among the users, locked until it is closed. Requires the lock."""
        file = (self.folder / ".users" / self._user).open("w", encoding="utf-8")
        try:
            lock(file, self.folder)
        except OSError:
            file.close()
            raise
        return file

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes from adding and deleting; the kernel releases the lock even if the process is killed."""
        with (self.folder / ".lock").open("a") as file:
            lock(file, self.folder, wait=True)
            yield

    def _record_key(self, record: Path, key: str) -> None:
        partial = record.with_name(f"{record.name}-{secrets.token_hex(4)}")
        try:
            partial.write_text(key, encoding="utf-8")
            partial.replace(record)
        finally:
            partial.unlink(missing_ok=True)

    def _give_up(self, error: OSError) -> None:
        self.problem = self.problem or f"{self.folder}: {error.strerror or error}"


def _stamps(files: Mapping[str, Path]) -> dict[str, list[Any]]:
    """Stamps that identify files without reading them: path, size, inode, modification time."""
    stamps = {}
    for name, path in files.items():
        status = path.stat()
        stamps[name] = [str(path.resolve()), status.st_size, status.st_ino, status.st_mtime_ns]
    return stamps


@cache
def _program() -> list[str]:
    """Identification of the preparing program: a hash of its data package, and versions of the libraries it uses."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(resources.files("data"))).rglob("*.py")):
        digest.update(path.read_bytes())
    return [digest.hexdigest(), *(f"{name} {metadata.version(name)}" for name in _LIBRARIES)]


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:40]


def _bytes_in(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in os.scandir(folder))


def _is_whole(place: Path) -> bool:
    """Whether an entry has its source.json and every array in full length."""
    try:
        _source_in(place)
        for name in ARRAYS:
            open_array(place / name, "r")
    except (OSError, EOFError, ValueError):
        return False
    return True


def open_array(path: Path, mode: Literal["r", "c"] | None) -> npt.NDArray[Any]:
    """Open an array of an entry, mapped in a mode of ``numpy.memmap``, or read it if the mode is None.

    If the file system cannot map files, the array is read with a warning.

    Raises:
        OSError, EOFError, ValueError: the file is unreadable or truncated.
    """
    try:
        return load_npy(path, mode)
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
    return load_npy(path, None)


def write_source(folder: Path, case: Case, settings: Mapping[str, Any], backgrounds: Mapping[str, str]) -> None:
    """Record next to the arrays what they were made from, for human readers; the program finds an entry by its key.

    Args:
        folder: folder of the entry.
        case: the case that was prepared.
        settings: how it was prepared, as plain data.
        backgrounds: description of backgrounds that were not 0, by contrast, as returned by :func:`backgrounds_in`.
    """
    files = [str(path) for path in (*case.contrasts.values(), *([case.label] if case.label is not None else []))]
    content = {"case": case.id, "files": files, "settings": dict(settings), "program": _program()}
    content["backgrounds"] = dict(backgrounds)
    (folder / _SOURCE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def backgrounds_in(folder: Path) -> dict[str, str]:
    """Description of backgrounds that were not 0, by contrast of a prepared case; empty if the record is unreadable."""
    try:
        return {str(name): str(said) for name, said in _source_in(folder).get("backgrounds", {}).items()}
    except (OSError, ValueError, AttributeError):
        return {}


def _source_in(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / _SOURCE).read_text(encoding="utf-8"))
    return content
