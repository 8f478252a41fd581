"""Each call to the file system fails with each error that its manual page documents, in each command.

Whatever happens, the message has the place, what could not be done and a way out; inputs and earlier outputs stay as
they were, and nothing half-written is left. Calls fail as the system has them fail: a write without the file's name.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import io
import json
import mmap
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813

from data import filesystem
from data.native_space import to_brats
from data.native_space.rigid import Registration

Call = Callable[..., Any]

CASE = "BraTS2021_00000"

#: By call: the errors of its manual page, and those that network folders add. Not EFAULT, a fault of the caller; nor
#: EINTR of write, after which Python writes again.
ERRORS = {
    "read": "EACCES EBUSY EINTR EINVAL EIO ELOOP EMFILE ENAMETOOLONG ENFILE ENODEV ENOENT ENOMEM ENOTDIR ENXIO "
    "EOPNOTSUPP EOVERFLOW EPERM EAGAIN ESTALE ENOTCONN ETIMEDOUT EKEYEXPIRED",
    "open": "EACCES EBADF EBUSY EDQUOT EEXIST EFBIG EINTR EINVAL EIO EISDIR ELOOP EMFILE ENAMETOOLONG ENFILE ENODEV "
    "ENOENT ENOMEM ENOSPC ENOTDIR ENXIO EOPNOTSUPP EOVERFLOW EPERM EROFS ETXTBSY EAGAIN ESTALE EILSEQ",
    "write": "EAGAIN EBADF EDQUOT EFBIG EINVAL EIO ENOSPC EPERM EPIPE ESTALE ENOTCONN",
    "rename": "EACCES EBUSY EDQUOT EEXIST EINVAL EIO EISDIR ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC ENOTDIR "
    "ENOTEMPTY EPERM EROFS ESTALE ETXTBSY EXDEV",
    "fsync": "EBADF EDQUOT EINTR EINVAL EIO ENOSPC ENOSYS EOPNOTSUPP EROFS ESTALE",
    "flock": "EACCES EBADF EINTR EINVAL EIO ENOLCK ENOSYS EOPNOTSUPP EAGAIN",
    "mmap": "EACCES EAGAIN EBADF EEXIST EINVAL ENFILE ENODEV ENOMEM ENOSYS EOVERFLOW EPERM ETXTBSY",
    "mkdir": "EACCES EDQUOT EINVAL EIO ELOOP EMLINK ENAMETOOLONG ENOENT ENOMEM ENOSPC ENOTDIR EPERM EROFS ESTALE",
}
#: What stands for a call in the fast tests, at its first and at its last time.
TYPICAL = {
    "read": ("EIO", "ESTALE"),
    "open": ("EMFILE", "EINVAL"),
    "write": ("EIO", "ENOSPC"),
    "rename": ("EBUSY", "EXDEV"),
    "fsync": ("EIO", "EINVAL"),
    "flock": ("ENOSYS", "ENOLCK"),
    "mmap": ("ENODEV", "ENOMEM"),
    "mkdir": ("EDQUOT", "EROFS"),
}
#: Each in the scene below; OUT is empty but for an older table of scores.
COMMANDS = {
    "train": ["train", "DATA", "OUT/run", "SMALL"],
    "predict": ["predict", "RUN", f"DATA/{CASE}", "OUT/predictions"],
    "evaluate": ["evaluate", f"DATA/{CASE}", f"DATA/{CASE}", "--out", "OUT/scores.csv"],
    "check": ["data", "check", "DATA"],
    "phantom": ["data", "phantom", "OUT/phantoms", "-n", "1", "--spacing-mm", "6"],
    "export": ["data", "export", "DATA", "OUT/exported", "--format", "nnunet"],
    "prepare": ["data", "prepare", f"SCANS/{CASE}", "OUT/prepared", "--mask", "none"],
}
#: Folders of the scene that commands read. SCANS has the middle of a case, 12x12x10 voxels.
INPUTS = ("DATA", "SCANS", "RUN")
OLD = "case,WT\nan older table,1\n"


@dataclass
class Failing:
    """Calls that fail, from one on, for paths in folders of the test."""

    call: str
    number: int
    places: tuple[Path, ...]
    first: int
    """0 is the first; what comes after it fails too."""
    seen: int = 0

    def meets(self, call: str, place: object) -> bool:
        """Whether this call is to fail."""
        if call != self.call or not isinstance(place, (str, bytes, os.PathLike)):
            return False
        path = Path(os.fsdecode(place)).absolute()
        if not any(path == one or one in path.parents for one in self.places):
            return False
        self.seen += 1
        return self.seen > self.first

    def error(self, *names: object) -> OSError:
        """As the system raises it."""
        return OSError(self.number, os.strerror(self.number), *names)


def path_of(file: Any) -> str:
    """The path of an open file or descriptor."""
    return str(Path(f"/proc/self/fd/{file if isinstance(file, int) else file.fileno()}").readlink())


@contextmanager
def failing(fault: Failing) -> Iterator[None]:
    """Put functions that fail in the place of the system's."""
    real_open, real_os_open, sendfile = builtins.open, os.open, os.sendfile

    class Refusing(io.FileIO):
        def write(self, content: Any) -> int:
            if fault.meets("write", self.name):
                raise fault.error()
            return super().write(content)

    def opened(file: Any, mode: str = "r", buffering: int = -1, *others: Any, **named: Any) -> Any:
        writes = bool(set(mode) & set("wax+"))
        if fault.meets("open" if writes else "read", file):
            raise fault.error(os.fspath(file))
        if not writes or fault.call != "write" or isinstance(file, int):
            return real_open(file, mode, buffering, *others, **named)
        raw = Refusing(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered: Any = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, named.get("encoding") or "utf-8")

    def os_opened(path: Any, flags: int, *others: Any, **named: Any) -> int:
        if fault.meets("open" if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else "read", path):
            raise fault.error(os.fspath(path))
        return real_os_open(path, flags, *others, **named)

    def sent(out: int, *others: Any) -> int:
        if fault.meets("write", path_of(out)):
            raise fault.error()
        return sendfile(out, *others)

    def by_path(call: str, real: Call) -> Call:
        def called(path: Any, *others: Any, **named: Any) -> Any:
            if fault.meets(call, path):
                raise fault.error(os.fspath(path), *([None, os.fspath(others[0])] if call == "rename" else []))
            return real(path, *others, **named)

        return called

    def by_file(call: str, real: Call) -> Call:
        def called(file: Any, *others: Any, **named: Any) -> Any:
            if fault.meets(call, path_of(file)):
                raise fault.error()
            return real(file, *others, **named)

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        patch.setattr(os, "open", os_opened)
        patch.setattr(os, "sendfile", sent)
        for name, call in (("rename", "rename"), ("replace", "rename"), ("mkdir", "mkdir")):
            patch.setattr(os, name, by_path(call, getattr(os, name)))
        patch.setattr(os, "fsync", by_file("fsync", os.fsync))
        patch.setattr(fcntl, "flock", by_file("flock", fcntl.flock))
        patch.setattr(mmap, "mmap", by_file("mmap", mmap.mmap))
        yield


class Scene:
    """A folder with data, a run and an older output, and the command to run in it."""

    def __init__(self, place: Path, phantoms: Path, run: Path, small: list[str], znormseg: Call) -> None:
        self.place, self._small, self._znormseg = place, small, znormseg
        for case in sorted(phantoms.iterdir())[:2]:
            shutil.copytree(case, place / "DATA" / case.name)
        (place / "SCANS" / CASE).mkdir(parents=True)
        for image in (place / "DATA" / CASE).iterdir():
            nib.save(
                nib.Nifti1Image.from_filename(image).slicer[24:36, 24:36, 14:24], place / "SCANS" / CASE / image.name
            )
        shutil.copytree(run, place / "RUN")
        self.fresh()

    def fresh(self) -> None:
        """An OUT and a cache as before any command."""
        for name in ("OUT", "cache"):
            shutil.rmtree(self.place / name, ignore_errors=True)
        (self.place / "OUT").mkdir()
        (self.place / "OUT" / "scores.csv").write_text(OLD)
        filesystem._warned.clear()

    def call(self, command: str) -> Any:
        """Run a command of the table."""
        words = [
            str(self.place / word) if word.split("/")[0] in (*INPUTS, "OUT") else word for word in COMMANDS[command]
        ]
        return self._znormseg(*[part for word in words for part in (self._small if word == "SMALL" else [word])])

    def inputs(self) -> dict[str, str]:
        """What the inputs hold."""
        files = [path for name in INPUTS for path in sorted((self.place / name).rglob("*")) if path.is_file()]
        return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    def calls(self, command: str, call: str) -> int:
        """How often a command makes a call, where nothing fails."""
        self.fresh()
        counted = self.failing(call, errno.EIO, first=1 << 30)
        with failing(counted):
            ended = self.call(command)
        assert ended.code == 0, ended.err
        return counted.seen

    def failing(self, call: str, number: int, *, first: int) -> Failing:
        """A fault where a command reads, or where it writes."""
        names = INPUTS if call == "read" else (*INPUTS, "OUT", "cache")
        return Failing(call, number, tuple(self.place / name for name in names), first)


@pytest.fixture
def scene(
    *,
    tmp_path: Path,
    phantoms: Path,
    tiny_run: Path,
    tiny_settings: list[str],
    znormseg: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    """The scene of every test here; its cache is its own. Registration opens no file, so it need not compute."""
    aligned = Registration(
        transform=sitk.Euler3DTransform(),
        metric_before=0.5,
        metric_after=0.5,
        contrast=2.0,
        overlap=1.0,
        cpu_seconds=0.0,
    )
    monkeypatch.setattr(to_brats, "register_rigid", lambda *_, **__: aligned)
    place = tmp_path / "scene"
    monkeypatch.setenv("ZNORMSEG_CACHE", str(place / "cache"))
    small = [word for setting in (*tiny_settings, "training.steps=2") for word in ("--set", setting)]
    return Scene(place, phantoms, tiny_run, [*small, "--split", str(split_in(place))], znormseg)


def split_in(place: Path) -> Path:
    """A split of the two cases."""
    place.mkdir()
    path = place / "split.json"
    path.write_text(json.dumps({"train": [CASE], "validation": ["BraTS2021_00001"]}))
    return path


def lines_about(fault: Failing, ended: Any) -> list[str]:
    """The lines that say what failed, at least one."""
    words = os.strerror(fault.number)
    if fault.number == errno.EISDIR:  # shutil.copyfile has its own message
        words = f"{words}|Directory does not exist"
    if fault.call == "flock" and fault.number in (errno.EAGAIN, errno.EACCES):
        words = f"{words}|another process"
    if fault.number in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF):  # for pathlib there is no such file
        words = f"{words}|[Nn]o such file|none are there"
    found = [line for line in f"{ended.err}{ended.out}".splitlines() if re.search(words, line)]
    assert found, f"{fault}: {ended}"
    return found


def assert_said_and_left_well(scene: Scene, ended: Any, fault: Failing, before: dict[str, str]) -> None:
    """The message has place, action and remedy; nothing is half-written, and what was there is whole."""
    name = errno.errorcode[fault.number]
    about = f"{fault.call} {name} -> {ended.code}\n{ended.err}\n{ended.out[-3000:]}"
    assert ended.code in {0, 3, 5, 6, 7}, about
    assert "Traceback" not in ended.err, about
    assert "internal error" not in ended.err, about
    for line in lines_about(fault, ended) if ended.code else ():
        assert str(scene.place) in line, about
        assert re.search("cannot be|another process|[Nn]o such file|none are there|does not exist", line), about
        assert re.search(
            f"{re.escape(filesystem.remedy(fault.number).rstrip('.'))}|another folder|Check|does not exist|Is .*\\?",
            line,
        ), about
    assert scene.inputs() == before, about
    left = [path for path in (scene.place / "OUT").rglob("*") if ".partial" in path.name]
    assert left == [], f"{left}\n{about}"
    table = (scene.place / "OUT" / "scores.csv").read_text()
    assert table == OLD or table.endswith("\n"), about
    for path in (scene.place / "OUT").rglob("*.nii.gz"):
        np.asarray(nib.Nifti1Image.from_filename(path).dataobj)
    for path in (scene.place / "OUT").rglob("*.json"):
        json.loads(path.read_text())


def meet(scene: Scene, command: str, call: str, name: str, first: int) -> Any:
    """Run a command in which a call fails, and judge what came of it."""
    scene.fresh()
    before = scene.inputs()
    fault = scene.failing(call, getattr(errno, name), first=first)
    with failing(fault):
        ended = scene.call(command)
    assert_said_and_left_well(scene, ended, fault, before)
    return ended


@pytest.mark.parametrize("call", ERRORS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_failing_call_is_reported_with_path_and_remedy_and_leaves_no_partial_file(
    command: str, call: str, scene: Scene
) -> None:
    count = scene.calls(command, call)
    for name, first in zip(TYPICAL[call], (0, count - 1), strict=True):
        if count:
            meet(scene, command, call, name, first)


@pytest.mark.slow
@pytest.mark.parametrize("call", ERRORS)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_documented_error_of_every_call_is_reported_with_path_and_remedy(
    command: str, call: str, scene: Scene
) -> None:
    count = scene.calls(command, call)
    wrong = []
    for number, name in enumerate(ERRORS[call].split() if count else ()):
        first = (0, count // 2, count - 1)[number % 3]
        try:
            meet(scene, command, call, name, first)
        except AssertionError as error:
            wrong.append(f"{name} from call {first} of {count} on: {error}")
    assert not wrong, "\n\n".join(wrong)
