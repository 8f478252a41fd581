"""What tests of the application share: phantoms, a tiny run trained once, and two ways to call the command line.

Under ``--import-mode=importlib`` test files cannot import each other; everything here is a fixture.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

# A shell starts what it puts in the background with Ctrl-C ignored, and the processes under test would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SCRIPT = Path(sys.executable).with_name("znormseg")


class Outcome(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache of prepared cases that all tests share, and the processes they start; the user's own stays as it is."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZNORMSEG_CACHE", str(folder))
        patch.delenv("ZNORMSEG_CACHE_GB", raising=False)
        yield folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six phantoms at 4 mm; tests read it and leave it as it is."""
    from data.phantoms import write_phantoms

    folder = tmp_path_factory.mktemp("phantoms")
    write_phantoms(folder, 6, seed=0, spacing_mm=4.0)
    return folder


@pytest.fixture(scope="session")
def tiny_settings() -> list[str]:
    """Overrides, as ``--set`` takes them, that make a run of the laptop config last a second."""
    return [
        "network.channels=[4, 8]",
        "network.residual_units=1",
        "training.patch_voxels=[16, 16, 16]",
        "training.batch_size=1",
        "training.steps=4",
        "training.validations=1",
        "training.learning_rate=1e-2",
        "runtime.device=cpu",
    ]


@pytest.fixture(scope="session")
def tiny_run(phantoms: Path, tiny_settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the tiny settings, 60 steps long; tests read it and leave it as it is."""
    from app.config import load_config
    from app.training.train import start

    run = tmp_path_factory.mktemp("tiny") / "run"
    start(phantoms, run, load_config("laptop", [*tiny_settings, "training.steps=60", "training.validations=3"]))
    return run


@pytest.fixture(scope="session")
def real_cases() -> Path:
    """Folder of real cases, where the environment variable ZNORMSEG_CASES names one."""
    folder = os.environ.get("ZNORMSEG_CASES")
    if not folder:
        pytest.skip("ZNORMSEG_CASES is not set")
    return Path(folder)


@pytest.fixture
def znormseg(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the command line's entry point in this process: ``znormseg("train", data, run) -> (code, out, err)``."""
    from app.cli.main import run

    propagate = logging.getLogger("znormseg").propagate

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["znormseg", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run()
        logging.getLogger("znormseg").propagate = propagate
        assert isinstance(ended.value.code, int)
        return Outcome(ended.value.code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def znormseg_process() -> Callable[..., subprocess.Popen[str]]:
    """Start the installed script as a process of its own; the caller waits for it."""

    def start(*arguments: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [SCRIPT, *map(str, arguments)], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


@pytest.fixture(scope="session")
def shell() -> Callable[..., Outcome]:
    """Run a command to its end; ``znormseg`` and ``python`` as the first word are those under test."""

    def call(
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        timeout: float = 300,
    ) -> Outcome:
        first = {"znormseg": str(SCRIPT), "python": sys.executable}.get(str(command[0]), str(command[0]))
        ended = subprocess.run(
            [first, *map(str, command[1:])],
            cwd=cwd,
            env={**os.environ, "PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}", **(environment or {})},
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return Outcome(ended.returncode, ended.stdout, ended.stderr)

    return call
