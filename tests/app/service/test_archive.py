"""Archives from strangers: each kind of attack is refused before anything is unpacked."""

from __future__ import annotations

import stat
import struct
import zipfile
from pathlib import Path

import pytest

from app.service.archive import checked_archive, unpack
from data.errors import DataError

GB = 10**9


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return tmp_path / "upload.zip"


def refused(archive: Path, most_bytes: int = GB) -> str:
    """The message with which an archive is refused."""
    with pytest.raises(DataError) as error, checked_archive(archive, most_bytes):
        pass
    return str(error.value)


def test_the_files_of_an_ordinary_archive_are_unpacked_under_other_names(archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("case/a_t1.nii", b"scan" * 1000)
        made.writestr("__MACOSX/._a", b"x")
    with checked_archive(archive, GB) as (opened, entries):
        assert [str(entry.name) for entry in entries] == ["case/a_t1.nii"]
        unpack(opened, entries[0], tmp_path / "00000")
    assert (tmp_path / "00000").read_bytes() == b"scan" * 1000


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/passwd", "..\\evil", "C:\\evil", "C:evil", "a\x07b"])
def test_a_name_that_points_outside_is_refused(archive: Path, name: str) -> None:
    with zipfile.ZipFile(archive, "w") as made:
        info = zipfile.ZipInfo("x")
        info.filename = name
        made.writestr(info, b"x")
    assert "name" in refused(archive)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFIFO])
def test_a_symlink_or_a_device_is_refused(archive: Path, kind: int) -> None:
    with zipfile.ZipFile(archive, "w") as made:
        info = zipfile.ZipInfo("a_t1.nii")
        info.external_attr = (kind | 0o777) << 16
        made.writestr(info, b"/etc/passwd")
    assert "link" in refused(archive)


def test_a_decompression_bomb_of_zeros_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a_t1.nii", b"\0" * (4 << 20))
    assert "bomb" in refused(archive)


def test_more_than_the_limit_is_refused_before_anything_is_unpacked(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as made:
        for number in range(3):
            made.writestr(f"{number}", b"x" * 1000)
    assert "limit" in refused(archive, most_bytes=2999)


def test_entries_that_share_their_bytes_are_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a", b"x" * 1000)
        first = made.infolist()[0]
        twin = zipfile.ZipInfo("b")
        for part in ("header_offset", "CRC", "compress_size", "file_size"):
            setattr(twin, part, getattr(first, part))
        made.filelist.append(twin)
    assert "overlap" in refused(archive)


def test_a_file_that_is_larger_than_it_states_is_refused(archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a_t1.nii", bytes(range(256)) * 100)
    content = bytearray(archive.read_bytes())
    at = content.index(b"PK\x01\x02") + 24
    content[at : at + 4] = struct.pack("<I", 10)
    archive.write_bytes(content)
    with checked_archive(archive, GB) as (opened, entries), pytest.raises(DataError):
        unpack(opened, entries[0], tmp_path / "00000")


def test_an_encrypted_entry_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a", b"x")
    content = bytearray(archive.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(content)
    assert "encrypted" in refused(archive)


def test_unusual_compression_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_LZMA) as made:
        made.writestr("a", b"x" * 100)
    assert "deflate" in refused(archive)


def test_two_files_with_the_same_name_are_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a_t1.nii", b"x")
        made.writestr("A_T1.NII", b"y")
    assert "same name" in refused(archive)


def test_more_entries_than_allowed_are_refused(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.service.archive.MOST_ENTRIES", 2)
    with zipfile.ZipFile(archive, "w") as made:
        for number in range(3):
            made.writestr(str(number), b"x")
    assert "entries" in refused(archive)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"PK\x05\x06" + b"\xff" * 18, b"x" * 1000])
def test_a_file_that_is_not_an_archive_is_refused(archive: Path, content: bytes) -> None:
    archive.write_bytes(content)
    assert "damaged" in refused(archive)


def test_a_name_that_is_too_long_is_refused(archive: Path) -> None:
    with zipfile.ZipFile(archive, "w") as made:
        made.writestr("a/" * 600, b"")
    assert "1200 characters" in refused(archive)


def test_a_damaged_stream_is_refused(archive: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("a", b"scan" * 100)
    content = bytearray(archive.read_bytes())
    content[31:35] = b"\xff" * 4  # behind the header of 30 bytes and the name of one
    archive.write_bytes(content)
    with checked_archive(archive, GB) as (opened, entries), pytest.raises(DataError, match="damaged file"):
        unpack(opened, entries[0], tmp_path / "00000")
