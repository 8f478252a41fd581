"""Run ``brats-evaluate``, the scorer of the 2026 BraTS challenges, one process per case.

It belongs to the package brats-evaluation, which is not a dependency and is never imported: it has a different licence
and a separate environment. This module finds and runs the command, and parses its output in the format of
brats-evaluation 0.0.10 with panoptica 2.1.7.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from threading import Lock
from typing import Any, Final

from app.errors import MissingToolError
from app.system.process import granted_processors, how_it_ended
from app.system.resources import memory_limits, threads
from data.errors import DataError

COMMAND: Final = "brats-evaluate"
PACKAGE: Final = "brats-evaluation"
#: Packages that determine the scores, and the versions this project was tested with.
TESTED: Final[Mapping[str, str]] = {PACKAGE: "0.0.10", "panoptica": "2.1.7"}
#: A case of 240 x 240 x 155 voxels takes seconds; thousands of small components can take far longer.
TIMEOUT_S: Final = 3600.0
#: The command pairs files by the five digits in their names; with one case per folder, any digits work.
FILE: Final = "00000.nii.gz"

_PINNED: Final = " ".join(f"{name}=={version}" for name, version in TESTED.items())
_INSTALL: Final = (
    f"Install it into its own environment, python -m venv ENV && ENV/bin/pip install {_PINNED}, and put "
    f"ENV/bin/{COMMAND} on the PATH. Its metadata say AGPL-3.0, but its licence file is Apache-2.0; "
    "znormseg contains no part of it and only runs the command"
)
_TAIL_LINES, _TAIL_CHARACTERS = 3, 400
#: Memory reserved for one process; 0.4 GB were measured on 240 x 240 x 155 voxels.
_BYTES_EACH: Final = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Installed:
    """The installed command."""

    command: Path
    """The executable."""
    versions: Mapping[str, str | None]
    """Versions of the packages in :data:`TESTED`; None if the command's environment has no metadata for them."""

    @property
    def doubt(self) -> str | None:
        """A sentence on versions that differ from those tested; None if all are the same."""
        others = {name: version for name, version in self.versions.items() if version != TESTED[name]}
        if not others:
            return None
        found = " and ".join(f"{name} {version or 'of unknown version'}" for name, version in others.items())
        return (
            f"{self.command} belongs to {found}; znormseg was tested with {_PINNED}. The numbers are those of your "
            "version."
        )


def find_installed() -> Installed:
    """Find the command on the PATH.

    Raises:
        MissingToolError: the command is missing; the message explains how to install it, and its licence.
    """
    found = shutil.which(COMMAND)
    if found is None:
        raise MissingToolError(
            f"--rules brats2026: the command {COMMAND} is not on the PATH. The challenges of 2026 are scored by "
            f"the package {PACKAGE}. {_INSTALL}."
        )
    return Installed(command=Path(found), versions=_versions(Path(found)))


def _versions(command: Path) -> dict[str, str | None]:
    """Read versions from the metadata files of the command's environment, without running or importing any of it."""
    root = command.resolve().parent.parent
    folders = [str(found) for pattern in _SITES for found in sorted(root.glob(pattern))]
    return {
        name: next((one.version for one in metadata.distributions(name=name, path=folders)), None) for name in TESTED
    }


_SITES: Final = ("lib*/python3*/site-packages", "lib*/python3*/dist-packages", "Lib/site-packages")


def processes_at_once() -> int:
    """Return how many processes fit on the machine: one per processor, with a gigabyte of memory for each."""
    free = min((limit.free_bytes for limit in memory_limits()), default=None)
    processors = min(threads(), granted_processors())
    return processors if free is None else max(1, min(processors, free // _BYTES_EACH))


class Runner:
    """Runs the command, one process per case."""

    def __init__(self, installed: Installed, config: str, *, timeout_s: float = TIMEOUT_S) -> None:
        """Set up a runner; no process is started yet.

        Args:
            installed: the command from :func:`find_installed`.
            config: name of the package's configuration, e.g. ``gli``.
            timeout_s: time limit for one case in seconds; default: one hour.
        """
        self._installed, self._config, self._timeout_s = installed, config, timeout_s
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock, self._closed = Lock(), False

    def stop(self) -> None:
        """Kill all running processes and start no more; callable from any thread."""
        with self._lock:
            self._closed = True
            for process in self._running:
                _kill(process)

    def score(self, folder: Path) -> dict[str, Any]:
        """Score one case with the command; callable from any thread.

        Args:
            folder: contains ``prediction/`` and ``reference/``, each with the label map as :data:`FILE`; output is
                written next to them.

        Returns:
            the command's values, keyed by its own names for regions and metrics.

        Raises:
            DataError: the command crashed, timed out, refused the case or wrote no valid summary; the message quotes
                its last output.
            MissingToolError: the command cannot be started.
        """
        summary, out, err = (folder / name for name in ("summary.json", "stdout", "stderr"))
        words = ("--config", self._config, "--ref_path", folder / "reference", "--pred_path", folder / "prediction")
        with out.open("wb") as stdout, err.open("wb") as stderr:
            status = self._run([*words, "--summary_json", summary], folder, stdout=stdout, stderr=stderr)
        output = _tail(err) or _tail(out) or "it printed nothing"
        if status is None:
            raise DataError(
                f"{COMMAND} was stopped after {self._timeout_s:g} s without a result: {output}. "
                "Are there thousands of small components? Clean the label map, or leave the case out."
            )
        if status != 0:
            raise DataError(f"{COMMAND} {how_it_ended(status)}: {output}. Run it by hand on this case to see more.")
        try:
            content = json.loads(summary.read_bytes())
            (entry,) = content["metrics"]
            if not isinstance(entry, dict):
                raise TypeError("an entry of metrics is not an object")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{COMMAND} wrote no readable summary of one case ({type(error).__name__}): {output}. Run it "
                "by hand on this case to see more."
            ) from error
        if "error" in entry:
            raise DataError(f"{COMMAND} refused the case: {_shortened(str(entry['error']))}")
        return entry

    def _run(self, words: list[Any], folder: Path, **outputs: Any) -> int | None:
        """Run the command, and return its exit status, or None after a timeout."""
        # Our Python paths would shadow the command's packages. It gets one thread, because cases run in parallel.
        given = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
        with self._lock:
            if self._closed:
                raise KeyboardInterrupt
            try:
                # The command comes from the PATH and its arguments from us; no shell is involved. It gets a new
                # session, so that its children can be killed with it.
                process = subprocess.Popen(  # noqa: S603
                    [self._installed.command, *words],
                    cwd=folder,
                    env={**given, "OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                    **outputs,
                )
            except OSError as error:
                raise MissingToolError(
                    f"{self._installed.command}: cannot be started ({error.strerror}). Is its environment intact? "
                    f"{_INSTALL}."
                ) from error
            self._running.add(process)
        try:
            return process.wait(self._timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with self._lock:
                _kill(process)
                self._running.discard(process)
            process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children; do nothing if all have ended."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _tail(path: Path) -> str:
    """Return the last lines of an output file as one line."""
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    return _shortened(" / ".join([line for line in lines if line][-_TAIL_LINES:]))


def _shortened(text: str) -> str:
    """Return a text as one line of limited length, keeping the end of a text that is too long."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= _TAIL_CHARACTERS else f"...{line[-_TAIL_CHARACTERS:]}"
