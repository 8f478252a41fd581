"""The parent's side of a dry run: start :mod:`app.planning.trial`, watch its memory, and report what it needs."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Final

from app.errors import EXIT_CONFIG, EXIT_DATA, EXIT_MACHINE, ConfigError, DeviceError
from app.planning.trial import OUTCOME, REQUEST, TrialOutcome, TrialReport, TrialRequest
from app.system.process import own_environment
from app.system.resources import memory_of
from data.errors import DataError

#: Interval at which the trial's memory is sampled.
_SECONDS: Final = 0.005
#: Share of the limit that a run may use; the memory of a long run varies a little.
SHARE: Final = 0.9
#: Own memory of a long run divided by that of a trial: allocators keep more as time passes. Measurements are in
#: docs/how-to/plan-and-doctor.md.
_LONGER: Final = 1.05
_LAST_LINES: Final = 5


@dataclass(frozen=True, kw_only=True)
class Needed:
    """Resources that a run needs, as measured by a trial."""

    report: TrialReport
    own_bytes: int | None
    """RAM that a long run needs: its peak of own memory, with a margin, plus the program's files."""

    @property
    def step_seconds(self) -> float:
        """Duration of a step in a long run: the median of the steps, or the loader's time per step if longer."""
        return max(median(self.report.step_seconds), self.report.loader_seconds)


@dataclass(frozen=True, kw_only=True)
class TooMuch:
    """A trial that did not fit."""

    why: str
    needed_bytes: int | None
    """Peak memory until the trial ended, if known; it may have needed more."""


def try_out(request: TrialRequest, work: Path, *, most_bytes: int | None) -> Needed | TooMuch:
    """Run a trial in a separate process.

    Args:
        request: what to try.
        work: an existing folder to exchange files in.
        most_bytes: a trial that holds more than this is killed and does not fit; None sets no limit.

    Raises:
        DataError, ConfigError: a case or the config cannot be used.
        DeviceError: the device is not available, or the machine has another fault that a smaller config would not fix.
        RuntimeError: the trial failed for another reason.
    """
    ended = _watched(request, work, most_bytes=most_bytes)
    if isinstance(ended, TooMuch):
        return ended
    report, held = ended
    assert report is not None
    # Samples from outside may miss a short peak; the system's own record does not.
    peaks = [peak for peak in (held, report.own_bytes) if peak is not None]
    own_bytes = int(_LONGER * max(peaks)) + (report.program_files_bytes or 0) if peaks else None
    if most_bytes is not None and own_bytes is not None and own_bytes > SHARE * most_bytes:
        return TooMuch(why=_over(own_bytes, most_bytes), needed_bytes=own_bytes)
    gpu, free = report.gpu_bytes, report.gpu_free_bytes
    if gpu is not None and free is not None and gpu > SHARE * free:
        return TooMuch(why=_over(gpu, free, "of GPU memory "), needed_bytes=own_bytes)
    return Needed(report=report, own_bytes=own_bytes)


def prepare_trial(request: TrialRequest, work: Path, *, most_bytes: int | None) -> float | TooMuch:
    """Prepare the cases of a trial, also in a separate process, and return the seconds it took.

    Arguments and errors are those of :func:`try_out`.
    """
    began = time.monotonic()
    ended = _watched(replace(request, prepare_only=True), work, most_bytes=most_bytes)
    return ended if isinstance(ended, TooMuch) else time.monotonic() - began


def _watched(
    request: TrialRequest, work: Path, *, most_bytes: int | None
) -> tuple[TrialReport | None, int | None] | TooMuch:
    """Run a trial; return its report and the highest own memory that was sampled."""
    request_path, outcome_path, log_path = work / "request.json", work / "outcome.json", work / "trial.log"
    outcome_path.unlink(missing_ok=True)
    request_path.write_bytes(REQUEST.dump_json(request))
    held: int | None = None
    stopped = False
    with log_path.open("w", encoding="utf-8") as log:
        # -P: data/ or models.py in the current folder must not shadow this program's packages.
        command = [sys.executable, "-P", "-m", "app.planning.trial", str(request_path), str(outcome_path)]
        with subprocess.Popen(  # noqa: S603
            command, env=own_environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as trial:
            try:
                while trial.poll() is None and not stopped:
                    if (sample := memory_of(trial.pid)) is not None:
                        held = max(held or 0, sample.own)
                        stopped = most_bytes is not None and sample.own > most_bytes
                    time.sleep(_SECONDS)
            finally:
                if trial.poll() is None:
                    trial.kill()

    def too_much(how: str) -> TooMuch:
        return TooMuch(why=f"{how} when it held {memory_in_words(held)}", needed_bytes=held)

    if stopped:
        return too_much("it was stopped")
    if trial.returncode < 0:  # typical if memory runs out unexpectedly
        return too_much(f"it was killed ({signal.Signals(-trial.returncode).name})")
    output = log_path.read_text(encoding="utf-8", errors="replace")
    outcome = TrialOutcome()
    if outcome_path.exists():
        outcome = OUTCOME.validate_json(outcome_path.read_bytes())
        if outcome.error is None:
            return outcome.report, held
    if outcome.out_of_memory or "bad_alloc" in output:
        return too_much("memory ran out")
    if outcome.error is not None:
        kinds = {EXIT_DATA: DataError, EXIT_CONFIG: ConfigError, EXIT_MACHINE: DeviceError}
        raise kinds.get(outcome.code, RuntimeError)(outcome.error)
    last = " / ".join(output.splitlines()[-_LAST_LINES:])
    raise RuntimeError(f"the dry run exited with status {trial.returncode}: {last}")


def memory_in_words(held: int | None) -> str:
    """Format a number of bytes, which may be unknown."""
    return "an unknown amount" if held is None else f"{held / 1e9:.2f} GB"


def _over(needed: int, bound: int, of: str = "") -> str:
    return f"it needs {needed / 1e9:.2f} GB {of}but may use {SHARE:.0%} of {bound / 1e9:.2f} GB"
