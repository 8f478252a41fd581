"""The run folder: resolved config, split, provenance and metrics.

A run folder contains::

    config.yaml     the resolved config
    split.json      case ids of each part
    labels.json     summary and hash of the label maps, which must be unchanged when the run is resumed
    intensities.json  intensity range of the training cases, for the flags of predict
    backgrounds.json  cases whose non-zero background was replaced with 0, if any
    run.json        data, conventions, versions, machine
    metrics.jsonl   one JSON object per line, of kind train, validation, gradients or overlap
    nonfinite/      batches with a non-finite loss, if any
    tensorboard/    the metrics for TensorBoard
    MODEL_CARD.md   data, configuration, metrics, limits; also as model.json; SHA256SUMS covers the files predict reads
    checkpoints/    best (weights) and last (weights and optimiser state), as safetensors and JSON
    cache/          prepared cases that do not fit into the user's cache; safe to delete
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TextIO

from app.errors import RunError
from app.progress import LOG
from data.files import naming_the_place, replacing
from data.filesystem import has_no_locks, in_words, lock, sync_file, sync_folder, warn_once

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch.utils.tensorboard import SummaryWriter


def write_json(path: Path, content: object) -> None:
    """Write a JSON file with :func:`write_durably`."""
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def write_durably(path: Path, content: bytes) -> None:
    """Write a file atomically, and sync it and its folder to disk, so that it survives a power cut."""
    with replacing(path) as partial, partial.open("wb") as file:
        file.write(content)
        file.flush()
        sync_file(file, path)
    sync_folder(path.parent)


def remove_partial_files(run: Path) -> None:
    """Remove partial files left in a run by a process that was killed while writing; the run must be locked."""
    for path in [*run.glob(".partial-*"), *(run / "checkpoints").glob(".partial-*")]:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read a JSON file of a run folder.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR):
            raise RunError(f"{path}: cannot be read: {in_words(error)}") from error
        raise RunError(f"{path}: missing or damaged ({error}). Is {path.parent} a run folder?") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path}: missing or damaged ({error}). Is {path.parent} a run folder?") from error


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read every record of a run's metrics.jsonl; a line truncated by a crash is skipped."""
    records = []
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def require_new(run: Path) -> None:
    """Check that a new run can start in a folder.

    Raises:
        RunError: the path is a file, or the folder is not empty.
    """
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file; give a folder for the run")
    if run.is_dir() and any(entry.name != LOCK for entry in run.iterdir()):
        raise RunError(f"{run} is not empty. Resume it with --resume, or give another folder.")


#: Minimum free space for metrics and TensorBoard events.
LEAST_ROOM_BYTES: Final = 1 << 16
#: After this many failed TensorBoard writers no new one is opened; the run continues without curves.
MOST_BOARDS_LOST: Final = 3
#: Lock file, held while a process trains in the folder.
LOCK = ".lock"


@contextmanager
def locked(run: Path, *, job: str = "", wait_seconds: float = 0.0) -> Iterator[None]:
    """Lock a run folder for this process; the system releases the lock when the process ends, however it ends.

    Args:
        run: folder to lock, created if missing.
        job: name of the job, to be recorded for :func:`job_of`.
        wait_seconds: how long to wait for another process to release the lock.

    Raises:
        RunError: another process is training in the folder.
    """
    with naming_the_place(run):
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("a", encoding="utf-8")
    with file:
        _lock(file, run, wait_seconds)
        with naming_the_place(run / LOCK):
            file.truncate(0)
            file.write(job)
            file.flush()
        yield


def _lock(file: TextIO, run: Path, wait_seconds: float) -> None:
    until = time.monotonic() + wait_seconds
    while True:
        try:
            lock(file, run)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise RunError(
                    f"{run}: another process is training in this folder. Wait for it, or give another folder."
                ) from None
        except OSError as error:
            if not has_no_locks(error):
                raise
            warn_once(run, "lock files", error, "Make sure that no second process trains in this folder.")
            return
        else:
            return
        time.sleep(0.2)


def job_of(run: Path) -> str:
    """Return the job name recorded by the last process that locked a run folder; empty if there is none."""
    try:
        return (run / LOCK).read_text(encoding="utf-8")
    except OSError:
        return ""


def _at_once(write: Callable[[], None]) -> None:
    write()


class MetricsLog:
    """Appends records to metrics.jsonl and TensorBoard."""

    def __init__(
        self,
        run: Path,
        *,
        keep_up_to_step: int,
        keep_validations_up_to_step: int,
        patiently: Callable[[Callable[[], None]], None] = _at_once,
        writes: bool = True,
    ) -> None:
        """Open the log and drop the records of steps and validations that will be repeated.

        Args:
            run: folder of the run.
            keep_up_to_step: records of later steps are dropped.
            keep_validations_up_to_step: validations of later steps are dropped.
            patiently: calls the function it is given, and retries it while the disk is full.
            writes: False discards all records, for those processes of a distributed run that must not write.
        """
        self._run = run
        self._patiently = patiently
        self._file: BinaryIO | None = None
        self._board: SummaryWriter | None = None
        self._boards_lost = 0
        if writes:
            self._open(keep_up_to_step, keep_validations_up_to_step)

    def _open(self, step: int, validated_step: int) -> None:
        last = {"validation": validated_step}
        kept = [r for r in read_metrics(self._run) if r["step"] <= last.get(r["kind"], step)]
        path = self._run / "metrics.jsonl"
        write_durably(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        _require_space(self._run)
        # Unbuffered, so that a write cut short by a full disk can be resumed at the exact byte.
        with naming_the_place(path):
            self._file = path.open("ab", buffering=0)
        self._board = _summary_writer(self._run / "tensorboard", step)

    def go_back(self, *, step: int, validated_step: int) -> None:
        """Drop the records of steps and validations that will be repeated."""
        if self._file is not None:
            self.close()
            self._patiently(lambda: self._open(step, validated_step))

    def train(
        self,
        *,
        step: int,
        loss: float,
        learning_rate: float,
        seconds: float,
        skipped_steps: int,
        waited_seconds: float,
        step_seconds: float,
        gradient_norm: float | None = None,
    ) -> None:
        """Record one training step.

        Args:
            step: number of the step, from 1.
            loss: mean over its micro-batches.
            learning_rate: learning rate of the step.
            seconds: time since the run began.
            skipped_steps: number of skipped steps in the run so far.
            waited_seconds: part of the step spent waiting for batches.
            step_seconds: duration of the step, including the wait.
            gradient_norm: global norm before the gradient rule, if it was measured.
        """
        measured = {"loss": loss, "learning_rate": learning_rate}
        norm = {} if gradient_norm is None else {"gradient_norm": gradient_norm}
        self._write(kind="train", step=step, **measured, seconds=seconds, waited_seconds=waited_seconds, **norm)
        waited_share = waited_seconds / max(step_seconds, 1e-9)
        more = {"skipped_steps": skipped_steps, "data_wait_share": waited_share}
        self._scalars("train", {**measured, **more, **norm}, step)

    def validation(
        self,
        *,
        step: int,
        measure: str,
        by_output: Mapping[str, float],
        mean: float,
        seconds: float,
        cases: Mapping[str, Mapping[str, float]],
        more: Mapping[str, Mapping[str, float | None]] | None = None,
    ) -> None:
        """Record a validation.

        Args:
            step: number of the step.
            measure: key of the measure, such as ``dice``.
            by_output: the measure by output of the network, such as the regions.
            mean: its mean over the outputs.
            seconds: time since the run began.
            cases: the measure by output for each case.
            more: further measures by output; None where one is not defined.
        """
        measures: dict[str, Mapping[str, float | None]] = {measure: by_output, **(more or {})}
        means = {f"mean_{measure}": mean}
        self._write(kind="validation", step=step, **measures, **means, seconds=seconds, cases=cases)
        scalars = {
            f"{name}_{output}": value
            for name, values in measures.items()
            for output, value in values.items()
            if value is not None
        }
        self._scalars("validation", {**scalars, **means}, step)

    def picture(self, *, step: int, rgb: npt.NDArray[np.uint8]) -> None:
        """Show a picture of a validation case in TensorBoard; uint8, shape (height, width, 3)."""
        self._to_board(lambda board: board.add_image("validation/first_case", rgb, step, dataformats="HWC"))

    def gradients(self, *, step: int, layers: Mapping[str, Mapping[str, float | None]], skipped_steps: int) -> None:
        """Record each layer's gradient at one step.

        Args:
            step: number of the step, from 1.
            layers: by parameter name: ``mean``, ``std`` and ``norm``, each with the suffix ``_before`` or ``_after``
                (the gradient rule); the latter are None if the step was skipped.
            skipped_steps: number of skipped steps in the run so far.
        """
        self._write(kind="gradients", step=step, layers=layers, skipped_steps=skipped_steps)
        self._tables("gradients", layers, step)

    def overlap(self, *, step: int, junctions: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record the gradient overlap at one step.

        Args:
            step: number of the step, from 1.
            junctions: by junction: ``cosine``, ``ratio``, ``norm_skip`` and ``norm_transformation``, as in
                :class:`znorm.overlap.Overlap`.
        """
        self._write(kind="overlap", step=step, junctions=junctions)
        self._tables("overlap", junctions, step)

    def sync(self) -> None:
        """Sync the records to disk; a checkpoint relies on them, so a power cut must not lose them."""
        if self._file is not None:
            sync_file(self._file, self._run / "metrics.jsonl")

    def close(self) -> None:
        """Flush and close."""
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            try:
                self._board.close()
            except OSError as error:
                self._lost_board(error)

    def _lost_board(self, error: OSError) -> None:
        self._boards_lost += 1
        if self._boards_lost == 1:
            _lacks_curves(self._run / "tensorboard", error)

    def _write(self, **record: object) -> None:
        if (file := self._file) is None:
            return
        # JSON has no NaN or infinity; non-finite numbers become null.
        left = memoryview((json.dumps(_finite(record), allow_nan=False) + "\n").encode())

        def write() -> None:
            nonlocal left
            with naming_the_place(self._run / "metrics.jsonl"):
                while left:
                    left = left[file.write(left) :]
            if _is_almost_full(self._run):
                _require_space(self._run)  # TensorBoard would fail without it

        self._patiently(write)

    def _tables(self, group: str, table: Mapping[str, Mapping[str, float | None]], step: int) -> None:
        for row, values in table.items():
            finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
            self._scalars(f"{group}/{row}", finite, step)

    def _scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._scalar(f"{group}/{name}", value, step)

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._to_board(lambda board: board.add_scalar(name, value, step))

    def _to_board(self, add: Callable[[SummaryWriter], None]) -> None:
        if self._board is None:
            return
        try:
            add(self._board)
        except OSError as error:
            # The writer's thread died on a full disk and lost up to two minutes of events; metrics.jsonl has them.
            self._lost_board(error)
            self._board = None
            if self._boards_lost < MOST_BOARDS_LOST:
                self._board = _summary_writer(self._run / "tensorboard", 0)
                self._to_board(add)


def _finite(value: object) -> object:
    """Replace non-finite numbers with None, at any depth."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_almost_full(run: Path) -> bool:
    try:
        return shutil.disk_usage(run).free < LEAST_ROOM_BYTES
    except OSError:  # some shared folders do not report their usage
        return False


def _require_space(run: Path) -> None:
    """Raise OSError if the disk is almost full: TensorBoard would fail in a background thread, with a traceback."""
    probe = run / f".partial-{os.getpid()}-space"
    try:
        with naming_the_place(run):
            probe.write_bytes(bytes(LEAST_ROOM_BYTES))
    finally:
        probe.unlink(missing_ok=True)


def _summary_writer(folder: Path, step: int) -> SummaryWriter | None:
    """Open a TensorBoard writer; None, with a warning, if its folder is not writable."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    except OSError as error:
        _lacks_curves(folder, error)
        return None


def _lacks_curves(folder: Path, error: OSError) -> None:
    LOG.warning(
        "%s: cannot be written, so TensorBoard lacks curves (metrics.jsonl is complete): %s", folder, in_words(error)
    )
