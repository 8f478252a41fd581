"""Find the DICOM files of a folder or an archive and read their headers; voxels are read later.

A file is recognised as DICOM by its content, whatever its name: ``DICM`` after the preamble, or a data set without a
preamble (DICOM PS3.10, section 7.1). Archives are read in place, so no patient data is extracted to disk.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final

import pydicom
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag
from pydicom.uid import UID, MediaStorageDirectoryStorage

from data.errors import DataError

log = logging.getLogger("znormseg")

#: Studies with more files are rejected.
MAX_FILES: Final = 200_000
#: Maximum uncompressed size of a single file, and of all files of an archive together.
MAX_FILE_BYTES: Final = 4 * 1024**3
MAX_ARCHIVE_BYTES: Final = 32 * 1024**3

_PREAMBLE: Final = 132
_PIXEL_GROUP: Final = 0x7FE0
_ENDINGS_OF_DICOM: Final = {"", ".dcm", ".ima", ".dicom"}
#: Size of the pixel data element without its value: tag, VR, length.
_ELEMENT_BYTES: Final = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class DicomFile:
    """One DICOM object: its header, and a function that opens the file."""

    name: str
    """Path within the study."""
    header: pydicom.Dataset = field(repr=False)  # contains patient data
    """All attributes before the voxels."""
    has_voxels: bool
    open: Callable[[], BinaryIO] = field(repr=False)
    """Open the whole file as a stream; works only while the study is open."""

    @property
    def transfer_syntax(self) -> UID:
        """How the voxels are encoded; files without a meta header are implicit little endian."""
        with quiet():
            return UID(text(self.header.file_meta, "TransferSyntaxUID") or pydicom.uid.ImplicitVRLittleEndian)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A file that may be DICOM."""

    name: str
    size: int
    head: Callable[[], bytes]
    open: Callable[[], BinaryIO]


@contextmanager
def dicom_files(path: Path) -> Iterator[tuple[DicomFile, ...]]:
    """Read the headers of all DICOM files in a folder (with subfolders), in a .zip, or of a single file.

    Other files are skipped, as are symlinks that leave the folder. A ``DICOMDIR`` is read as the folder that contains
    it. The files can be opened only inside the ``with`` block.

    Raises:
        DataError: the path does not exist, contains no DICOM file or a damaged one, or is an unsafe archive.
    """
    if not path.exists():
        raise DataError(f"{path}: does not exist. Check the name.")
    with ExitStack() as stack:
        if path.is_dir():
            entries = _in_folder(path)
        elif zipfile.is_zipfile(path):
            entries = _in_archive(path, stack)
        elif path.name.upper() == "DICOMDIR":
            entries = _in_folder(path.parent)
        else:
            entries = iter([_entry(path, path.name)])
        with quiet():
            files = _headers(path, entries)
        yield files


def is_study(path: Path) -> bool:
    """Whether a path is treated as DICOM rather than as NIfTI cases.

    True for an archive, a DICOMDIR, a single DICOM file, or a folder with DICOM files and no NIfTI file.
    """
    if path.is_file():
        return zipfile.is_zipfile(path) or path.name.upper() == "DICOMDIR" or _has_prefix(path)
    found = False
    for folder, _, names in os.walk(path):
        if any(name.lower().endswith((".nii", ".nii.gz")) for name in names):
            return False
        found = found or any(_has_prefix(Path(folder) / name) for name in sorted(names))
    return found


def _has_prefix(path: Path) -> bool:
    """Whether a file starts with a preamble and the prefix ``DICM``."""
    try:
        with path.open("rb") as stream:
            return stream.read(_PREAMBLE)[128:] == b"DICM"
    except OSError:
        return False


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress log messages and warnings of the DICOM libraries, which may quote patient data from the header."""
    logs = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def value(dataset: pydicom.Dataset, keyword: str) -> Any:
    """The value of an attribute; None if it is missing, empty or invalid."""
    try:
        content = dataset.get(keyword)
    except Exception:  # pydicom may raise any exception
        return None
    return None if content == "" else content


def text(dataset: pydicom.Dataset, keyword: str) -> str:
    """The value of an attribute as text; empty if it is missing or invalid."""
    content = value(dataset, keyword)
    return "" if content is None else str(content).strip()


def _headers(path: Path, entries: Iterator[_Entry]) -> tuple[DicomFile, ...]:
    """Every DICOM object, in order of name."""
    found: list[DicomFile] = []
    damaged: list[str] = []
    listed: set[str] = set()
    seen: set[str] = set()
    for entry in entries:
        seen.add(entry.name.upper())
        if len(seen) > MAX_FILES:
            raise DataError(f"{path}: more than {MAX_FILES} files. Give the folder of one study.")
        try:
            file = _read_header(entry)
        except DataError as error:
            damaged.append(f"{entry.name}: {error}")
            continue
        if file is not None and _kind(file.header) == MediaStorageDirectoryStorage:
            listed.update(_listed_in(file))
        elif file is not None:
            found.append(file)
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise DataError(
            f"{path}: damaged: {damaged[0]}{more}. Export or copy the study again, or remove the damaged files."
        )
    if not found:
        raise DataError(
            f"{path}: no DICOM file among {len(seen)} {'file' if len(seen) == 1 else 'files'}. "
            "Give the folder of a study, a .zip of it, or its DICOMDIR."
        )
    if listed - seen:
        log.warning("%s: %d files that its DICOMDIR lists are missing. Is the copy complete?", path, len(listed - seen))
    return tuple(found)


def _kind(header: pydicom.Dataset) -> str:
    return text(header, "SOPClassUID") or text(header.file_meta, "MediaStorageSOPClassUID")


def _listed_in(directory: DicomFile) -> set[str]:
    """Paths within the study of the files listed in a DICOMDIR, in upper case."""
    folder = PurePosixPath(directory.name).parent
    records = value(directory.header, "DirectoryRecordSequence")
    names = [value(record, "ReferencedFileID") for record in records or []]
    return {str(folder.joinpath(*([name] if isinstance(name, str) else name))).upper() for name in names if name}


def _read_header(entry: _Entry) -> DicomFile | None:
    """Read the header, or return None if the file is not a DICOM image or document.

    Raises:
        DataError: the file is DICOM but damaged; the message does not name the file.
    """
    if entry.size == 0 and PurePosixPath(entry.name).suffix.lower() in _ENDINGS_OF_DICOM:
        raise DataError("the file is empty")
    head = entry.head()
    marked = head[128:_PREAMBLE] == b"DICM"
    if not marked and not _may_start_a_data_set(head):
        return None
    if entry.size > MAX_FILE_BYTES:
        raise DataError(f"{entry.size} bytes, more than the {MAX_FILE_BYTES} allowed")
    end = _Voxels()
    try:
        with entry.open() as stream:
            header = read_partial(stream, stop_when=end, force=True)
            place = stream.tell()
    except (MemoryError, DataError):
        raise
    except Exception as error:  # pydicom may raise any exception on a damaged header
        if not marked:
            return None
        raise DataError(f"its header cannot be read ({type(error).__name__})") from error
    kind, study = _kind(header), text(header, "StudyInstanceUID")
    if not marked and not (kind and study):
        return None
    if kind != MediaStorageDirectoryStorage and not (kind and study):
        raise DataError("cut short or damaged: its header states neither its type nor its study")
    deflated = text(header.file_meta, "TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian
    if end.size is not None and not deflated and place + _ELEMENT_BYTES + end.size > entry.size:
        raise DataError(f"cut short: the header announces {end.size} bytes of voxels, the whole file has {entry.size}")
    return DicomFile(name=entry.name, header=header, has_voxels=end.found, open=entry.open)


class _Voxels:
    """Stop condition for reading: stops at the voxels and records their declared size (None if undefined)."""

    def __init__(self) -> None:
        self.found = False
        self.size: int | None = None

    def __call__(self, tag: BaseTag, vr: str | None, length: int) -> bool:  # noqa: ARG002 - pydicom's signature
        if tag.group != _PIXEL_GROUP:
            return False
        self.found = tag.element == 0x0010
        self.size = None if length == 0xFFFFFFFF else length
        return True


def _may_start_a_data_set(head: bytes) -> bool:
    """Whether a file without preamble starts like a data set: group 0002 or 0008, then a VR or a short length."""
    if len(head) < 8 or head[:2] not in (b"\x08\x00", b"\x02\x00") or head[3] != 0:
        return False
    return head[4:6].isalpha() or int.from_bytes(head[4:8], "little") < 256


def _in_folder(root: Path) -> Iterator[_Entry]:
    """The files below a folder; symlinks are followed only to files inside it."""
    inside = root.resolve()

    def refuse(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders.sort()
        for name in sorted(names):
            path = Path(folder, name)
            target = path.resolve()
            if target.is_file() and target.is_relative_to(inside):
                yield _entry(path, path.relative_to(root).as_posix())


def _entry(path: Path, name: str) -> _Entry:
    if not path.is_file():
        raise DataError(f"{path}: not a file. Give the folder of a study, a .zip of it, or its DICOMDIR.")

    def head() -> bytes:
        with path.open("rb") as stream:
            return stream.read(_PREAMBLE)

    return _Entry(name=name, size=path.stat().st_size, head=head, open=lambda: path.open("rb"))


def _in_archive(path: Path, stack: ExitStack) -> Iterator[_Entry]:
    """The files of a .zip; each is read from the archive when it is opened."""
    with _unpacking(path):
        archive = stack.enter_context(zipfile.ZipFile(path))
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) > MAX_FILES:
        raise DataError(f"{path}: {len(members)} files, more than the {MAX_FILES} allowed. Archive one study.")
    total = sum(member.file_size for member in members)
    if total > MAX_ARCHIVE_BYTES:
        raise DataError(
            f"{path}: it would unpack to {total} bytes, more than the {MAX_ARCHIVE_BYTES} allowed. Archive one study."
        )
    for member in members:
        place = PurePosixPath(member.filename.replace("\\", "/"))
        if place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
            raise DataError(
                f"{path}: contains a file whose path leads out of the archive ({member.filename!r}). "
                "Do not trust it; archive the study again."
            )
        if member.flag_bits & 1:
            raise DataError(f"{path}: is protected by a password. Unpack it and give the folder.")

    def entry(member: zipfile.ZipInfo) -> _Entry:
        def head() -> bytes:
            with _unpacking(path), archive.open(member) as stream:
                return stream.read(_PREAMBLE)

        def whole() -> BinaryIO:
            with _unpacking(path):
                return io.BytesIO(archive.read(member))

        return _Entry(name=member.filename, size=member.file_size, head=head, open=whole)

    return map(entry, sorted(members, key=lambda member: member.filename))


@contextmanager
def _unpacking(path: Path) -> Iterator[None]:
    """Convert exceptions of a damaged archive to a DataError."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: the archive is damaged ({error}). Copy it again, or create a new one.") from error
