"""Zip archives from strangers: everything in them is checked before anything is unpacked."""

from __future__ import annotations

import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from data.errors import DataError

#: An archive with more entries is refused.
MOST_ENTRIES: Final = 20_000
#: A longer name, with its folders, is refused.
MOST_NAME: Final = 1024
#: How the refusal of an archive begins that would take more space than is allowed.
OVER_THE_LIMIT: Final = "the archive would be unpacked to more than"
#: An entry that is compressed to a smaller share than this is refused: a zip bomb. Images of zeros reach 1/1030.
LEAST_SHARE: Final = 1 / 500
#: Entries below this size are not measured by their share.
_SMALL_BYTES: Final = 1 << 20
_BLOCK_BYTES: Final = 1 << 20
_METHODS: Final = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_ENCRYPTED: Final = 0x1
#: Folders that macOS adds.
_IGNORED: Final = ("__MACOSX",)


@dataclass(frozen=True, kw_only=True)
class ArchiveEntry:
    """A file in an archive."""

    name: PurePosixPath
    bytes: int
    info: zipfile.ZipInfo


@contextmanager
def checked_archive(path: Path, most_bytes: int) -> Iterator[tuple[zipfile.ZipFile, tuple[ArchiveEntry, ...]]]:
    """Open an archive whose entries are all safe to unpack.

    Args:
        path: the archive.
        most_bytes: most bytes of all entries together, unpacked.

    Raises:
        DataError: it is not a zip archive, or one of its entries is not safe; the message says why.
    """
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise DataError("the archive is damaged or not a zip archive. Create it again.") from error
    with archive:
        yield archive, _checked_entries(archive, most_bytes)


def unpack(archive: zipfile.ZipFile, entry: ArchiveEntry, place: Path) -> None:
    """Write an entry to a file that does not exist yet, and no more bytes than its header states.

    Raises:
        DataError: the entry is damaged or larger than stated.
        OSError: the file cannot be written.
    """
    written = 0
    with place.open("xb") as file:
        try:
            with archive.open(entry.info) as stream:
                while block := stream.read(_BLOCK_BYTES):
                    written += len(block)
                    if written > entry.bytes:
                        raise DataError("the archive contains a file that is larger than it states. Create it again.")
                    file.write(block)
        except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError, NotImplementedError) as error:
            raise DataError("the archive contains a damaged file. Create it again.") from error


def _checked_entries(archive: zipfile.ZipFile, most_bytes: int) -> tuple[ArchiveEntry, ...]:
    infos = archive.infolist()
    if len(infos) > MOST_ENTRIES:
        raise DataError(f"the archive has {len(infos)} entries; at most {MOST_ENTRIES} are allowed.")
    _require_apart(infos)
    total, seen, entries = 0, set[str](), []
    for info in infos:
        name = _safe_name(info)
        if str(name).casefold() in seen:
            raise DataError("the archive contains two files of the same name. Create it again.")
        seen.add(str(name).casefold())
        _require_plain(info)
        total += info.file_size
        if total > most_bytes:
            raise DataError(f"{OVER_THE_LIMIT} {most_bytes / 1e9:g} GB, which is the limit.")
        if not info.is_dir() and name.parts[0] not in _IGNORED:
            entries.append(ArchiveEntry(name=name, bytes=info.file_size, info=info))
    return tuple(entries)


def _require_apart(infos: list[zipfile.ZipInfo]) -> None:
    """Refuse entries that share compressed bytes, by which a small archive can hold petabytes."""
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise DataError("the archive's files overlap, as in a zip bomb. Create it again.")
        end = info.header_offset + 30 + info.compress_size


def _safe_name(info: zipfile.ZipInfo) -> PurePosixPath:
    # zipfile cuts names at a null byte and replaces the separator of Windows; the original shows both.
    given = info.orig_filename
    if len(given) > MOST_NAME:
        raise DataError(f"the archive contains a name of {len(given)} characters; at most {MOST_NAME} are allowed.")
    name = PurePosixPath(given)
    drive = len(given) > 1 and given[1] == ":"
    if name.is_absolute() or drive or ".." in name.parts or "\\" in given or not given.isprintable() or not name.parts:
        raise DataError("the archive contains a name that leads out of it or is not a plain path. Create it again.")
    return name


def _require_plain(info: zipfile.ZipInfo) -> None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise DataError("the archive contains a link or a device. Only files and folders are allowed.")
    if info.flag_bits & _ENCRYPTED:
        raise DataError("the archive is encrypted. Send it without a password.")
    if info.compress_type not in _METHODS:
        raise DataError("the archive uses a compression other than deflate. Create it with deflate, which is usual.")
    if info.file_size > max(_SMALL_BYTES, info.compress_size / LEAST_SHARE):
        raise DataError("the archive contains a file that is compressed far more than images are, as in a zip bomb.")
