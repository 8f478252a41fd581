"""Operations that a file system may not support: which failures are harmless, and how a user can fix the others.

Network and shared folders (NFS, SMB, FUSE, 9p, exFAT, the shared folders of virtual machines) lack calls that local
disks support. A missing lock, folder sync or memory map only costs a safeguard or some memory: the program warns once
and continues. Everything else is an error, and :func:`remedy` returns advice for its error number.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

log = logging.getLogger("znormseg")

_NOT_SUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY})
#: fsync of a file: man fsync lists EROFS and EINVAL for files that cannot be synced. EIO means lost data and is fatal.
_NO_FILE_SYNC: Final = _NOT_SUPPORTED | {errno.EROFS}
#: open and fsync of a folder: SMB returns EBADF or EISDIR; a folder that is writable but not readable returns EACCES.
_NO_FOLDER_SYNC: Final = _NO_FILE_SYNC | {errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}
#: flock: NFS without its lock daemon returns ENOLCK, and EBADF if the file is open for reading only.
_NO_LOCKS: Final = _NOT_SUPPORTED | {errno.ENOLCK, errno.EBADF, errno.EPERM}
#: flock: SMB returns EACCES if another process holds the lock.
_LOCKED: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
#: mmap: FUSE with direct I/O returns ENODEV.
_NO_MAPPING: Final = _NOT_SUPPORTED | {errno.ENODEV, errno.EACCES, errno.EPERM}

_NO_PERMISSION: Final = "Check who may read and write it, or choose another place."
_NOT_ABLE: Final = (
    "The file system does not support this or does not accept the name, as is common on network and shared folders; "
    "choose a folder on a local disk."
)
_TOO_MANY_OPEN: Final = "Too many files are open: raise the limit (ulimit -n), or close other programs."
_IN_USE: Final = "Another program is using it: close that program and run the same command again."
_IN_THE_WAY: Final = "Something with this name already exists: move it, or choose another place."
_SERVER_LOST: Final = "The server of this folder does not answer: check the network, mount the folder again, and retry."
_LOGIN_EXPIRED: Final = "The login at the server of this folder has expired: log in again (such as with kinit)."
_DISK_FAILED: Final = (
    "The disk or the network failed, and what was read or written may be lost: look at the system's log (dmesg), and "
    "choose another disk."
)
_OTHER: Final = "Look at the path with ls -ld and at the system's log (dmesg), or choose another folder."

_REMEDIES: Final[dict[str, str]] = {
    **dict.fromkeys(("EACCES", "EPERM"), _NO_PERMISSION),
    "EROFS": "The file system is read-only; choose another folder.",
    "ENOSPC": "Free some space, or choose another folder.",
    "EDQUOT": "The quota is used up. Free some space, or choose another folder.",
    "EFBIG": "Files may not grow to this size here: raise the limit (ulimit -f), or choose another file system.",
    "EIO": _DISK_FAILED,
    "EUCLEAN": "The file system is damaged: have it checked (fsck), and choose another disk until then.",
    **dict.fromkeys(("EMFILE", "ENFILE"), _TOO_MANY_OPEN),
    "ENAMETOOLONG": "Shorten the name, or choose a folder with a shorter path.",
    "ELOOP": "Symbolic links form a loop: repair them, or give the path without them.",
    "ENOTDIR": "A part of the path is a file where a folder is expected: check the path.",
    "EISDIR": "A folder is where a file is expected: check the path.",
    "ENOENT": "Check the path; a folder above it may be missing, or another program removed it.",
    **dict.fromkeys(("EEXIST", "ENOTEMPTY"), _IN_THE_WAY),
    "EXDEV": "It is on two file systems (mounts): choose a folder within one.",
    "EMLINK": "The file system allows no more entries there: choose another folder.",
    **dict.fromkeys(("EBUSY", "ETXTBSY"), _IN_USE),
    **dict.fromkeys(("EINVAL", "ENOSYS", "EOPNOTSUPP", "ENOTSUP", "ENOTTY", "ENOLCK", "ENODEV"), _NOT_ABLE),
    "EILSEQ": "The file system does not accept this name: use plain letters and digits.",
    "EINTR": "A signal interrupted it: run the same command again.",
    **dict.fromkeys(("EAGAIN", "EWOULDBLOCK"), "The system was busy: run the same command again."),
    "ENOMEM": "Memory is low: close other programs.",
    "ENXIO": "No program reads from this pipe, or its device is gone: choose another place.",
    "EPIPE": "No program reads from this pipe: choose another place.",
    "EOVERFLOW": "The file is larger than this system can open: check its size.",
    "EBADF": "The file was closed, or its server is gone: mount the folder again, and retry.",
    "ESTALE": "The server no longer knows the file: mount the folder again, and run the same command again.",
    **dict.fromkeys(("ENOTCONN", "ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN"), _SERVER_LOST),
    **dict.fromkeys(("EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ETIMEDOUT", "EREMOTEIO"), _SERVER_LOST),
    **dict.fromkeys(("EKEYEXPIRED", "EKEYREVOKED", "ENOKEY"), _LOGIN_EXPIRED),
}

#: Pairs of file system and missing feature that have already been warned about.
_warned: set[tuple[int | str, str]] = set()


def remedy(number: int | None) -> str:
    """Advice to the user about a system error, as a sentence.

    Example:
        >>> remedy(errno.EROFS)
        'The file system is read-only; choose another folder.'
    """
    return _REMEDIES.get(errno.errorcode.get(number or 0, ""), _OTHER)


def in_words(error: OSError) -> str:
    """A system error without its path: the system's text and the advice, ending with a full stop."""
    return f"{why(error)}."


def why(error: Exception) -> str:
    """Like :func:`in_words`, but without the final full stop; for an error that is not the system's, its own text."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    return f"{str(error.strerror or error).rstrip('.')}. {remedy(error.errno)}".rstrip(".")


def is_raw(error: OSError) -> bool:
    """Whether an error carries only the system's own text, without saying which operation failed."""
    return error.errno is not None and error.strerror == os.strerror(error.errno)


def sync_file(file: IO[Any], path: Path) -> None:
    """Flush a file to disk with fsync; warn once if its file system does not support that.

    Args:
        file: an open file whose Python buffer has been flushed.
        path: the file's name as the user knows it.

    Raises:
        OSError: the disk failed or is full, so data may be lost.
    """
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_FILE_SYNC:
            raise _at(path, "cannot be flushed to the disk (fsync)", error) from error
        warn_once(path.parent, "sync files", error, "A power cut may destroy the newest files.")


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk with fsync; warn once if its file system does not support that.

    Raises:
        OSError: the disk failed, so entries may be lost.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise _at(folder, "the folder cannot be flushed to the disk (fsync)", error) from error
        warn_once(folder, "sync folders", error, "A power cut may destroy the newest files.")


def lock(file: IO[Any] | int, path: Path, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file until it is closed or the process ends, for whatever reason.

    Args:
        file: an open file or its descriptor.
        path: the file's name as the user knows it.
        shared: take a shared lock instead of an exclusive one.
        wait: wait until the lock is free instead of failing.

    Raises:
        BlockingIOError: another process holds the lock.
        OSError: any other failure; :func:`has_no_locks` recognises a file system without locks.
    """
    import fcntl

    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in _LOCKED:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has locked it", str(path)) from error
        raise _at(path, "cannot be locked", error) from error


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, after waiting for other processes; warn once if its file system has no locks.

    Raises:
        OSError: the folder cannot be opened, or the lock fails otherwise.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            lock(descriptor, folder, wait=True)
        except OSError as error:
            if not has_no_locks(error):
                raise
            warn_once(folder, "lock folders", error, "Two processes may write to a folder at the same time.")
        yield
    finally:
        os.close(descriptor)


def has_no_locks(error: OSError) -> bool:
    """Whether an error from :func:`lock` means that the file system does not support locks."""
    return error.errno in _NO_LOCKS


def has_no_mapping(error: OSError) -> bool:
    """Whether an error from mmap means that the file system cannot map files, so that they must be read instead."""
    return error.errno in _NO_MAPPING


def warn_once(folder: Path, what: str, error: OSError, consequence: str) -> None:
    """Warn that a file system lacks a feature, once per file system and feature.

    Args:
        folder: where the failure occurred.
        what: the missing feature, phrased to follow "cannot".
        error: the failure.
        consequence: what the user loses, as a sentence.
    """
    try:
        place: int | str = folder.stat().st_dev
    except OSError:
        place = str(folder)
    if (place, what) in _warned:
        return
    _warned.add((place, what))
    reason = os.strerror(error.errno) if error.errno else str(error)
    log.warning("%s: its file system cannot %s (%s). %s", folder, what, reason, consequence)


def _at(path: Path, what: str, error: OSError) -> OSError:
    return OSError(error.errno, f"{what}: {error.strerror or error}", str(path))
