"""What a file system may refuse, in one place: which refusals are harmless, and what a user can do about the others.

Network and shared folders (NFS, SMB, FUSE, 9p, exFAT, the shared folders of virtual machines) lack calls that local
disks have. A missing lock, sync of a folder or memory map only takes a safeguard or some memory away: the program warns
once and carries on. Everything else is an error, and :func:`remedy` has the way out for its number.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from typing import IO, Any, Final

log = logging.getLogger("znormseg")

_NOT_SUPPORTED: Final = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY})
#: fsync of a file: man fsync has EROFS and EINVAL for files that cannot be synced. EIO is lost data, never a refusal.
_NO_FILE_SYNC: Final = _NOT_SUPPORTED | {errno.EROFS}
#: open and fsync of a folder: SMB answers EBADF or EISDIR, a folder that may be written but not listed EACCES.
_NO_FOLDER_SYNC: Final = _NO_FILE_SYNC | {errno.EBADF, errno.EISDIR, errno.EACCES, errno.EPERM}
#: flock: NFS without its lock daemon answers ENOLCK, and EBADF where the file is only open for reading.
_NO_LOCKS: Final = _NOT_SUPPORTED | {errno.ENOLCK, errno.EBADF, errno.EPERM}
#: flock: SMB answers EACCES where another process holds the lock.
_LOCKED: Final = frozenset({errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES})
#: mmap: FUSE with direct I/O answers ENODEV.
_NO_MAPPING: Final = _NOT_SUPPORTED | {errno.ENODEV, errno.EACCES, errno.EPERM}

_NO_PERMISSION: Final = "Check who may read and write it, or choose another place."
_NOT_ABLE: Final = (
    "The file system cannot do this or does not take such a name, as network and shared folders often do not; "
    "choose a folder on a local disk."
)
_TOO_MANY_OPEN: Final = "Too many files are open: raise the limit (ulimit -n), or close other programs."
_IN_USE: Final = "Another program uses it: close that program and run the same command again."
_IN_THE_WAY: Final = "Something with this name is in the way: move it, or choose another place."
_SERVER_LOST: Final = "The server of this folder does not answer: check the network, mount the folder again, and retry."
_LOGIN_EXPIRED: Final = "The login at the server of this folder has expired: log in again (such as with kinit)."
_DISK_FAILED: Final = (
    "The disk or the network failed, and what was read or written may be lost: look at the system's log (dmesg), and "
    "choose another disk."
)
_OTHER: Final = "Look at the place with ls -ld and at the system's log (dmesg), or choose another folder."

_REMEDIES: Final[dict[str, str]] = {
    "EACCES": _NO_PERMISSION,
    "EPERM": _NO_PERMISSION,
    "EROFS": "The file system is read-only; choose another folder.",
    "ENOSPC": "Free some space, or choose another folder.",
    "EDQUOT": "The quota is used up. Free some space, or choose another folder.",
    "EFBIG": "Files may not grow to this size here: raise the limit (ulimit -f), or choose another file system.",
    "EIO": _DISK_FAILED,
    "EUCLEAN": "The file system is damaged: have it checked (fsck), and choose another disk until then.",
    "EMFILE": _TOO_MANY_OPEN,
    "ENFILE": _TOO_MANY_OPEN,
    "ENAMETOOLONG": "Shorten the name, or choose a folder with a shorter path.",
    "ELOOP": "Symbolic links lead in a circle: repair them, or give the path without them.",
    "ENOTDIR": "A part of the path is a file where a folder is expected: check the path.",
    "EISDIR": "A folder is where a file is expected: check the path.",
    "ENOENT": "Check the path; a folder above it may be missing, or another program removed it.",
    "EEXIST": _IN_THE_WAY,
    "ENOTEMPTY": _IN_THE_WAY,
    "EXDEV": "It lies on two file systems (mounts): choose a folder within one.",
    "EMLINK": "The file system takes no more entries there: choose another folder.",
    "EBUSY": _IN_USE,
    "ETXTBSY": _IN_USE,
    "EINVAL": _NOT_ABLE,
    "ENOSYS": _NOT_ABLE,
    "EOPNOTSUPP": _NOT_ABLE,
    "ENOTSUP": _NOT_ABLE,
    "ENOTTY": _NOT_ABLE,
    "ENOLCK": _NOT_ABLE,
    "ENODEV": _NOT_ABLE,
    "EILSEQ": "The file system does not take such a name: use plain letters and digits.",
    "EINTR": "A signal interrupted it: run the same command again.",
    "EAGAIN": "The system was busy: run the same command again.",
    "EWOULDBLOCK": "The system was busy: run the same command again.",
    "ENOMEM": "Memory is short: close other programs.",
    "ENXIO": "Nobody reads from this pipe, or its device is gone: choose another place.",
    "EPIPE": "Nobody reads from this pipe: choose another place.",
    "EOVERFLOW": "The file is larger than this system can open: check its size.",
    "EBADF": "The file was closed, or its server is gone: mount the folder again, and retry.",
    "ESTALE": "The server no longer knows the file: mount the folder again, and run the same command again.",
    "ENOTCONN": _SERVER_LOST,
    "ECONNABORTED": _SERVER_LOST,
    "ECONNREFUSED": _SERVER_LOST,
    "ECONNRESET": _SERVER_LOST,
    "EHOSTDOWN": _SERVER_LOST,
    "EHOSTUNREACH": _SERVER_LOST,
    "ENETDOWN": _SERVER_LOST,
    "ENETUNREACH": _SERVER_LOST,
    "ETIMEDOUT": _SERVER_LOST,
    "EREMOTEIO": _SERVER_LOST,
    "EKEYEXPIRED": _LOGIN_EXPIRED,
    "EKEYREVOKED": _LOGIN_EXPIRED,
    "ENOKEY": _LOGIN_EXPIRED,
}

#: Refusals that were warned of: the file system and the kind.
_warned: set[tuple[int | str, str]] = set()


def remedy(number: int | None) -> str:
    """What a user can do about a system error, as a sentence.

    Example:
        >>> remedy(errno.EROFS)
        'The file system is read-only; choose another folder.'
    """
    return _REMEDIES.get(errno.errorcode.get(number or 0, ""), _OTHER)


def in_words(error: OSError) -> str:
    """A system error without its place: what the system says, and what to do about it."""
    return f"{why(error)}."


def why(error: Exception) -> str:
    """The same of any error, without the final stop; other errors have their own text."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    return f"{str(error.strerror or error).rstrip('.')}. {remedy(error.errno)}".rstrip(".")


def is_raw(error: OSError) -> bool:
    """Whether an error has the system's text alone, and nothing of what was being done."""
    return error.errno is not None and error.strerror == os.strerror(error.errno)


def sync_file(file: IO[Any], path: Path) -> None:
    """Have an open file on the disk; where its file system cannot do that, warn once.

    Args:
        file: flushed.
        path: that the user knows it by.

    Raises:
        OSError: the disk failed or is full, and what was written may be lost.
    """
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in _NO_FILE_SYNC:
            raise _at(path, "cannot be brought to the disk (fsync)", error) from error
        warn_once(path.parent, "sync files", error, "A power cut may take the newest files.")


def sync_folder(folder: Path) -> None:
    """Have the names in a folder on the disk; where its file system cannot do that, warn once.

    Raises:
        OSError: the disk failed, and names may be lost.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise _at(folder, "the folder cannot be brought to the disk (fsync)", error) from error
        warn_once(folder, "sync folders", error, "A power cut may take the newest files.")


def lock(file: IO[Any] | int, path: Path, *, shared: bool = False, wait: bool = False) -> None:
    """Lock an open file until it is closed, however its process ends.

    Args:
        file: or its descriptor.
        path: that the user knows it by.
        shared: with others that share it.
        wait: for the process that holds it.

    Raises:
        BlockingIOError: another process holds it.
        OSError: :func:`has_no_locks` says whether the file system has none.
    """
    import fcntl

    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, how)
    except OSError as error:
        if error.errno in _LOCKED:
            raise BlockingIOError(errno.EWOULDBLOCK, "another process has locked it", str(path)) from error
        raise _at(path, "cannot be locked", error) from error


def has_no_locks(error: OSError) -> bool:
    """Whether an error of :func:`lock` means that the file system has no locks."""
    return error.errno in _NO_LOCKS


def has_no_mapping(error: OSError) -> bool:
    """Whether an error of mmap means that the file system maps no files, so that they can only be read."""
    return error.errno in _NO_MAPPING


def warn_once(folder: Path, what: str, error: OSError, consequence: str) -> None:
    """Warn that a file system lacks something; once for each file system and kind, whatever the number of files.

    Args:
        folder: where it was met.
        what: it cannot do, as the words after "cannot".
        error: that said so.
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
