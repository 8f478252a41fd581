"""Network and shared folders that lack features of local disks: the program warns once where it is safe to continue.

Calls are refused as those file systems refuse them: in processes of their own by a sitecustomize, else in this one.
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from app.errors import RunError
from app.experiments.crossval import ensemble_folder
from app.runs.folder import LOCK, MetricsLog, locked, write_durably
from data import filesystem
from data.filesystem import locked_folder, sync_file, sync_folder
from data.nifti import read_label_map, read_volume
from data.patches.cache import CaseFolder, SharedCache, open_array

Call = Callable[..., Any]

#: What refuses, as a sitecustomize: bodies of Python that replace a function of the system.
REFUSE = """
import errno, os, stat
def refuse(module, name, number, when=lambda *_: True):
    real = getattr(module, name)
    def refused(*arguments, **options):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **options)
    setattr(module, name, refused)
is_folder = lambda descriptor, *_: stat.S_ISDIR(os.fstat(descriptor).st_mode)
"""
FOLDERS = "refuse(os, 'fsync', errno.{}, is_folder)"
LOCKS = "import fcntl; refuse(fcntl, 'flock', errno.{})"
MAPS = "import mmap; refuse(mmap, 'mmap', errno.{})"
STAMPS = "refuse(os, 'utime', errno.EPERM); refuse(os, 'chmod', errno.EPERM); refuse(os, 'statvfs', errno.ENOSYS)"


@pytest.fixture
def options(tiny_settings: list[str]) -> list[str]:
    """The tiny settings as arguments of the command line."""
    return [word for setting in (*tiny_settings, "training.steps=2") for word in ("--set", setting)]


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test is the first to meet its file system."""
    monkeypatch.setattr(filesystem, "_warned", set())


@pytest.fixture
def where(tmp_path: Path, shell: Call) -> Call:
    """Run a command in a process in which the system refuses: ``where(script)(words)``."""

    def prepared(script: str) -> Call:
        (tmp_path / "site").mkdir()
        (tmp_path / "site" / "sitecustomize.py").write_text(REFUSE + script)
        path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {"PYTHONPATH": path, "ZNORMSEG_CACHE": str(tmp_path / "cache")}
        return lambda words: shell(words, environment=environment)

    return prepared


def warnings_of(err: str, what: str) -> list[str]:
    return [line for line in err.splitlines() if f"its file system cannot {what}" in line]


@pytest.mark.parametrize(
    ("script", "what"),
    [
        pytest.param(FOLDERS.format("EINVAL"), "sync folders", id="fsync of folders: EINVAL", marks=pytest.mark.slow),
        pytest.param(LOCKS.format("ENOSYS"), "lock files", id="flock: ENOSYS"),
        pytest.param(LOCKS.format("ENOLCK"), "lock files", id="flock: ENOLCK", marks=pytest.mark.slow),
        pytest.param(LOCKS.format("EOPNOTSUPP"), "lock files", id="flock: EOPNOTSUPP", marks=pytest.mark.slow),
        pytest.param(FOLDERS.format("EBADF"), "sync folders", id="fsync of folders: EBADF", marks=pytest.mark.slow),
        pytest.param(MAPS.format("ENODEV"), "map files into memory", id="mmap: ENODEV", marks=pytest.mark.slow),
    ],
)
def test_training_continues_with_one_warning_that_names_the_folder(
    *, script: str, what: str, where: Call, phantoms: Path, tmp_path: Path, options: list[str]
) -> None:
    ended = where(script)(["znormseg", "train", phantoms, tmp_path / "run", *options])
    assert ended.code == 0, ended.err
    (line,) = warnings_of(ended.err, what)
    assert str(tmp_path) in line
    assert list((tmp_path / "run" / "checkpoints").glob("last-000000002.json"))


@pytest.mark.slow
def test_files_without_times_modes_and_free_space_are_accepted(
    where: Call, phantoms: Path, tmp_path: Path, options: list[str]
) -> None:
    ended = where(STAMPS)(["znormseg", "train", phantoms, tmp_path / "run", *options])
    assert ended.code == 0, ended.err


@pytest.mark.slow
def test_a_failing_disk_is_not_mistaken_for_an_unsupported_operation(
    where: Call, phantoms: Path, tmp_path: Path, options: list[str]
) -> None:
    ended = where("refuse(os, 'fsync', errno.EIO)")(["znormseg", "train", phantoms, tmp_path / "run", *options])
    assert ended.code == 7, ended.err
    assert (
        f"{tmp_path / 'run' / 'config.yaml'}: cannot be flushed to the disk (fsync): Input/output error." in ended.err
    )
    assert "may be lost" in ended.err
    assert not (tmp_path / "run").exists()


# In this process


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Call:
    """Have a function of the system refuse: ``refuse(fcntl, "flock", errno.ENOSYS)``."""

    def call(module: Any, name: str, number: int, when: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(module, name)

        def refused(*arguments: Any, **named: Any) -> Any:
            if when(*arguments):
                raise OSError(number, os.strerror(number))
            return real(*arguments, **named)

        monkeypatch.setattr(module, name, refused)

    return call


def is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES])
def test_a_folder_that_cannot_be_synced_causes_one_warning(
    number: int, refuse: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(os, "fsync", number, is_folder)
    for name in ("a", "b"):
        write_durably(tmp_path / name, b"content")
    assert [path.read_bytes() for path in sorted(tmp_path.iterdir())] == [b"content"] * 2
    (said,) = caplog.messages
    assert said.startswith(f"{tmp_path}: its file system cannot sync folders ({os.strerror(number)}). ")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE])
def test_a_file_that_did_not_reach_the_disk_is_an_error_and_the_old_one_is_kept(
    number: int, refuse: Call, tmp_path: Path
) -> None:
    (tmp_path / "a").write_bytes(b"old")
    refuse(os, "fsync", number)
    with pytest.raises(OSError, match=rf"cannot be flushed to the disk .*{tmp_path / 'a'}"):
        write_durably(tmp_path / "a", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_writable_folder_that_cannot_be_listed_causes_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.chmod(0o300)
    sync_folder(tmp_path)
    tmp_path.chmod(0o700)
    assert "cannot sync folders (Permission denied)" in caplog.text


def test_a_pipe_that_cannot_be_synced_causes_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reading, writing = os.pipe()  # a real EINVAL
    with os.fdopen(writing, "wb") as file:
        sync_file(file, tmp_path / "pipe")
    os.close(reading)
    assert "cannot sync files (Invalid argument)" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL])
def test_a_run_folder_without_locks_can_be_trained_in(
    number: int, refuse: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(fcntl, "flock", number)
    with locked(tmp_path / "run", job="a job"):
        assert (tmp_path / "run" / LOCK).read_text() == "a job"
    (said,) = caplog.messages
    assert said.endswith("Make sure that no second process trains in this folder.")


def test_work_in_a_folder_without_locks_continues(
    refuse: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(fcntl, "flock", errno.ENOLCK)
    with locked_folder(tmp_path):
        pass
    assert "cannot lock folders (No locks available)" in caplog.text


@pytest.mark.parametrize("number", [errno.EWOULDBLOCK, errno.EACCES])  # the second is SMB's
def test_a_run_locked_by_another_process_is_never_mistaken_for_one_without_locks(
    number: int, refuse: Call, tmp_path: Path
) -> None:
    refuse(fcntl, "flock", number)
    with pytest.raises(RunError, match="another process is training in this folder"), locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_lock_that_fails_otherwise_is_an_error_with_its_path(number: int, refuse: Call, tmp_path: Path) -> None:
    refuse(fcntl, "flock", number)
    with pytest.raises(OSError, match=f"cannot be locked: .*{tmp_path}"), locked(tmp_path):
        pass


def test_a_shared_cache_locks_files_opened_for_writing_as_nfs_requires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock

    def as_nfs(file: Any, how: int) -> None:
        descriptor = file if isinstance(file, int) else file.fileno()
        if how & fcntl.LOCK_EX and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", as_nfs)
    one = SharedCache(tmp_path, most_bytes=10**6, overflow=CaseFolder(tmp_path / "own"))
    two = SharedCache(tmp_path, most_bytes=10**6, overflow=CaseFolder(tmp_path / "own"))
    assert len(list((tmp_path / ".users").iterdir())) == 2
    one.close()
    two.close()


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENOSYS, errno.EINVAL])
def test_arrays_that_cannot_be_mapped_are_read(number: int, refuse: Call, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    refuse(mmap, "mmap", number)
    assert open_array(tmp_path / "a.npy", "c").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("number", [errno.ENODEV, errno.EPERM])
def test_a_nifti_file_that_cannot_be_mapped_is_read(number: int, refuse: Call, tmp_path: Path) -> None:
    voxels = np.arange(64, dtype=np.uint8).reshape(4, 4, 4)
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), path)
    refuse(mmap, "mmap", number)
    assert np.array_equal(read_volume(path).voxels, voxels)
    assert np.array_equal(read_label_map(path).voxels, voxels)


LINK_REFUSALS = (
    "EACCES EDQUOT EEXIST EIO ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC ENOSYS ENOTDIR EOPNOTSUPP EPERM EROFS "
    "EXDEV"
)


@pytest.mark.parametrize("name", LINK_REFUSALS.split())
def test_weights_of_an_ensemble_are_copied_where_they_cannot_be_linked(name: str, refuse: Call, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"weights")
    refuse(os, "link", getattr(errno, name))
    ensemble_folder._link(tmp_path / "weights", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"weights"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[MetricsLog]:
    """The log of a run in a folder of the test."""
    log = MetricsLog(tmp_path, keep_up_to_step=0, keep_validations_up_to_step=0)
    yield log
    log.close()


def test_unwritable_curves_do_not_end_a_run(log: MetricsLog, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def add_scalar(self, *_: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        def close(self) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    log._board = Broken()  # type: ignore[assignment]
    for step in (1, 2):
        log.overlap(step=step, junctions={"a": {"cosine": 0.5}})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    (said,) = caplog.messages
    assert "TensorBoard lacks curves" in said
