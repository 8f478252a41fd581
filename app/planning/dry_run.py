"""The parent's side of a dry run: start :mod:`app.planning.trial`, watch its memory, and report what it needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

import app
from app.errors import EXIT_CONFIG, EXIT_DATA, EXIT_MACHINE, ConfigError, DeviceError
from app.planning.trial import Asked, TrialReport, told_from_json
from app.system.resources import Memory, memory_of
from data.errors import DataError

#: Interval at which the trial's memory is sampled.
_SECONDS: Final = 0.005
#: Share of a bound that a run may need; the memory of a long run varies a little.
SHARE: Final = 0.9
#: Own memory of a long run relative to that of a trial: allocators keep more over time. Measurements are in
#: docs/how-to/plan-and-doctor.md.
_LONGER: Final = 1.05
_LAST_LINES: Final = 5


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Resources that a trial took."""

    told: TrialReport
    own_bytes: int | None
    """RAM that a long run needs: its own memory at its peak plus a margin, and the program's files."""

    @property
    def step_seconds(self) -> float:
        """Duration of a step in a long run: the median of the steps, or the loader's time per step if longer."""
        return max(median(self.told.step_seconds), self.told.loader_seconds)


@dataclass(frozen=True, kw_only=True)
class TooMuch:
    """A trial that did not fit."""

    why: str
    needed_bytes: int | None
    """The most memory that it held, if known; it may have needed more."""


def try_out(asked: Asked, work: Path, *, most_bytes: int | None) -> Needed | TooMuch:
    """Run a trial in a separate process.

    Args:
        asked: what to try.
        work: an existing folder to exchange files in.
        most_bytes: a trial that holds more than this is killed and counts as too much; None sets no bound.

    Raises:
        DataError, ConfigError: a case or the config cannot be used.
        DeviceError: the device is not available, or another fault of the machine that less memory would not fix.
        RuntimeError: the trial failed for another reason.
    """
    ended = _watched(replace(asked, prepare_only=False), work, most_bytes=most_bytes)
    if isinstance(ended, TooMuch):
        return ended
    content, samples = ended
    told = told_from_json(content["told"])
    needed = Needed(told=told, own_bytes=_needed(told, samples))
    if most_bytes is not None and needed.own_bytes is not None and needed.own_bytes > SHARE * most_bytes:
        return TooMuch(why=_over(needed.own_bytes, most_bytes), needed_bytes=needed.own_bytes)
    if told.gpu_bytes is not None and told.gpu_free_bytes is not None and told.gpu_bytes > SHARE * told.gpu_free_bytes:
        return TooMuch(why=_over(told.gpu_bytes, told.gpu_free_bytes, "of GPU memory "), needed_bytes=needed.own_bytes)
    return needed


def _needed(told: TrialReport, samples: Sequence[Memory]) -> int | None:
    """RAM that a run needs at least. Samples from outside may miss a short peak, the system's own record does not."""
    looks = [sample.own for sample in samples]
    own = max([*looks, *([told.own_bytes] if told.own_bytes is not None else [])], default=None)
    return None if own is None else int(_LONGER * own) + (told.program_files_bytes or 0)


def prepare_trial(asked: Asked, work: Path, *, most_bytes: int | None) -> float | TooMuch:
    """Prepare the cases of a trial, also in a separate process, and return the seconds it took.

    Arguments and errors are those of :func:`try_out`.
    """
    began = time.monotonic()
    ended = _watched(replace(asked, prepare_only=True), work, most_bytes=most_bytes)
    return ended if isinstance(ended, TooMuch) else time.monotonic() - began


def _watched(asked: Asked, work: Path, *, most_bytes: int | None) -> tuple[dict[str, Any], list[Memory]] | TooMuch:
    asked_path, told_path, log_path = work / "asked.json", work / "told.json", work / "trial.log"
    told_path.unlink(missing_ok=True)
    asked_path.write_text(json.dumps(asdict(asked)), encoding="utf-8")
    samples: list[Memory] = []
    stopped = False
    with log_path.open("w", encoding="utf-8") as log:
        # -P: data/ or models.py in the current folder must not shadow this program's packages.
        command = [sys.executable, "-P", "-m", "app.planning.trial", str(asked_path), str(told_path)]
        with subprocess.Popen(command, env=_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log) as trial:  # noqa: S603
            try:
                while trial.poll() is None:
                    if (sample := memory_of(trial.pid)) is not None:
                        samples.append(sample)
                        if most_bytes is not None and sample.own > most_bytes:
                            stopped = True
                            break
                    time.sleep(_SECONDS)
            finally:
                if trial.poll() is None:
                    trial.kill()
    held = max((sample.own for sample in samples), default=None)
    if stopped:
        assert most_bytes is not None
        return TooMuch(why=f"it was ended when it held {held_words(held)}", needed_bytes=held)
    if trial.returncode < 0:  # an unexpected lack of memory often ends a process this way
        name = signal.Signals(-trial.returncode).name
        return TooMuch(why=f"it was killed ({name}) when it held {held_words(held)}", needed_bytes=held)
    content: Mapping[str, Any] = json.loads(told_path.read_text(encoding="utf-8")) if told_path.exists() else {}
    if "told" in content:
        return dict(content), samples
    if content.get("memory") or "bad_alloc" in log_path.read_text(encoding="utf-8", errors="replace"):
        return TooMuch(why=f"memory ran out when it held {held_words(held)}", needed_bytes=held)
    raise _fault(content, trial.returncode, log_path)


def _environment() -> dict[str, str]:
    """This process's environment, with a path from which the trial imports the same program, wherever it is."""
    paths = [str(Path(app.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _fault(content: Mapping[str, Any], code: int, log: Path) -> Exception:
    kinds = {EXIT_DATA: DataError, EXIT_CONFIG: ConfigError, EXIT_MACHINE: DeviceError}
    if "error" in content:
        return kinds.get(content["code"], RuntimeError)(content["error"])
    last = " / ".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])
    return RuntimeError(f"the dry run ended with code {code}: {last}")


def held_words(held: int | None) -> str:
    """Bytes in words, or an unknown amount."""
    return "an unknown amount" if held is None else f"{held / 1e9:.2f} GB"


def _over(needed: int, bound: int, of: str = "") -> str:
    return f"it needs {needed / 1e9:.2f} GB {of}and {SHARE:.0%} of {bound / 1e9:.2f} GB may be taken"
