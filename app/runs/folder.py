"""The run folder: resolved config, split, provenance, metrics.

A run folder holds::

    config.yaml     the resolved config
    split.json      case ids by part
    labels.json     what the label maps hold, and their hash: a resumed run must find the same
    intensities.json  range of the training cases' intensities, for the flags of predict
    backgrounds.json  cases whose background was not 0 in the files and was taken as 0, where there were any
    run.json        data, conventions, versions, machine
    metrics.jsonl   one JSON object a line: kind train, validation, gradients or overlap
    nonfinite/      batches whose loss was not finite, where there were any
    tensorboard/    the same for TensorBoard
    MODEL_CARD.md   data, configuration, metrics, limits; model.json has the same, SHA256SUMS sums of what predict takes
    checkpoints/    best (weights) and last (weights and optimiser), safetensors with JSON beside
    cache/          prepared cases that the user's cache does not take; may be deleted
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
    """Write JSON as :func:`write_durably`."""
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def write_durably(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; when this returns, a power cut takes neither the file nor its name away."""
    with replacing(path) as beside, beside.open("wb") as file:
        file.write(content)
        file.flush()
        sync_file(file, path)
    sync_folder(path.parent)


def remove_partial_files(run: Path) -> None:
    """Remove what a process that was killed while it wrote left in a run. Holds for a locked run."""
    for path in [*run.glob(".partial-*"), *(run / "checkpoints").glob(".partial-*")]:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """Read JSON of a run folder.

    Raises:
        RunError: missing or damaged.
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
    """Every record of a run's metrics.jsonl; a line cut short by a crash is left out."""
    records = []
    path = run / "metrics.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def require_new(run: Path) -> None:
    """Make sure that a run can start in a folder.

    Raises:
        RunError: it is a file, or holds something.
    """
    if run.exists() and not run.is_dir():
        raise RunError(f"{run} is a file; give a folder for the run")
    if run.is_dir() and any(entry.name != LOCK for entry in run.iterdir()):
        raise RunError(f"{run} is not empty. Go on with --resume, or give another folder.")


#: What metrics and TensorBoard's events need at the very least.
LEAST_ROOM_BYTES: Final = 1 << 16
#: Writers of TensorBoard's events that may fail before there is no other; curves are no reason to end a run.
MOST_BOARDS_LOST: Final = 3
#: Held while a process trains in the folder.
LOCK = ".lock"


@contextmanager
def locked(run: Path, *, job: str = "", wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold a run folder for this process; the lock goes with the process, however it ends.

    Args:
        run: made where it is missing.
        job: what :func:`job_of` tells from now on.
        wait_seconds: for another process to let go of it.

    Raises:
        RunError: another process trains there.
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
                    f"{run}: another process is training there. Wait for it, or give another folder."
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
    """The job of the process that held a run folder last; empty where there is none."""
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
        """Open the log; records of steps and validations that will be done again are dropped.

        Args:
            run: the run's folder.
            keep_up_to_step: records of later steps go.
            keep_validations_up_to_step: validations of later steps go.
            patiently: calls what it is given, and again while the disk is full.
            writes: without, records are taken and forgotten, for a process that is not the one to write.
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
        _require_room(self._run)
        # Not buffered: what a full disk did not take is known to the byte, and written again.
        with naming_the_place(path):
            self._file = path.open("ab", buffering=0)
        self._board = _summary_writer(self._run / "tensorboard", step)

    def go_back(self, *, step: int, validated_step: int) -> None:
        """Drop the records of steps and validations that will be done again."""
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
            step: its number, from 1.
            loss: mean over its micro-batches.
            learning_rate: at this step.
            seconds: since the run began.
            skipped_steps: of the run so far.
            waited_seconds: of this step, for batches that were not ready.
            step_seconds: that the step took, waiting included.
            gradient_norm: global, before the gradient rule, where it was measured.
        """
        measured = {} if gradient_norm is None else {"gradient_norm": gradient_norm}
        self._write(
            kind="train",
            step=step,
            loss=loss,
            learning_rate=learning_rate,
            seconds=seconds,
            waited_seconds=waited_seconds,
            **measured,
        )
        self._scalar("train/loss", loss, step)
        self._scalar("train/learning_rate", learning_rate, step)
        self._scalar("train/skipped_steps", skipped_steps, step)
        self._scalar("train/data_wait_share", waited_seconds / max(step_seconds, 1e-9), step)
        if gradient_norm is not None:
            self._scalar("train/gradient_norm", gradient_norm, step)

    def validation(
        self,
        *,
        step: int,
        dice: dict[str, float],
        mean_dice: float,
        seconds: float,
        cases: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Record a validation: Dice by region, their mean, and Dice by region of each case."""
        self._write(kind="validation", step=step, dice=dice, mean_dice=mean_dice, seconds=seconds, cases=cases)
        for region, value in dice.items():
            self._scalar(f"validation/dice_{region}", value, step)
        self._scalar("validation/mean_dice", mean_dice, step)

    def picture(self, *, step: int, rgb: npt.NDArray[np.uint8]) -> None:
        """Show a validation case in TensorBoard; uint8 of shape (height, width, 3)."""
        self._to_board(lambda board: board.add_image("validation/first_case", rgb, step, dataformats="HWC"))

    def gradients(self, *, step: int, layers: Mapping[str, Mapping[str, float | None]], skipped_steps: int) -> None:
        """Record each layer's gradient at one step.

        Args:
            step: its number, from 1.
            layers: by name of the parameter: ``mean``, ``std`` and ``norm``, each with ``_before`` and ``_after`` the
                gradient rule; None after it where the step was skipped.
            skipped_steps: of the run so far.
        """
        self._write(kind="gradients", step=step, layers=layers, skipped_steps=skipped_steps)
        self._scalars("gradients", layers, step)

    def overlap(self, *, step: int, junctions: Mapping[str, Mapping[str, float | None]]) -> None:
        """Record the gradient overlap at one step.

        Args:
            step: its number, from 1.
            junctions: by name: ``cosine``, ``ratio``, ``norm_skip`` and ``norm_transformation``, as in
                :class:`znorm.overlap.Overlap`.
        """
        self._write(kind="overlap", step=step, junctions=junctions)
        self._scalars("overlap", junctions, step)

    def sync(self) -> None:
        """Have what was recorded on the disk, so that a power cut does not take what a checkpoint counts on."""
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
        # JSON has no NaN or infinity; a number that is not finite becomes null.
        left = memoryview((json.dumps(_finite(record), allow_nan=False) + "\n").encode())

        def write() -> None:
            nonlocal left
            with naming_the_place(self._run / "metrics.jsonl"):
                while left:
                    left = left[file.write(left) :]
            if _is_short_of_room(self._run):
                _require_room(self._run)  # for TensorBoard

        self._patiently(write)

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._to_board(lambda board: board.add_scalar(name, value, step))

    def _to_board(self, add: Callable[[SummaryWriter], None]) -> None:
        if self._board is None:
            return
        try:
            add(self._board)
        except OSError as error:
            # Its thread met a full disk and is gone, and the events of up to two minutes; metrics.jsonl has them.
            self._lost_board(error)
            self._board = None
            if self._boards_lost < MOST_BOARDS_LOST:
                self._board = _summary_writer(self._run / "tensorboard", 0)
                self._to_board(add)

    def _scalars(self, group: str, table: Mapping[str, Mapping[str, float | None]], step: int) -> None:
        for row, values in table.items():
            for name, value in values.items():
                if value is not None and math.isfinite(value):
                    self._scalar(f"{group}/{row}/{name}", value, step)


def _finite(value: object) -> object:
    """The same with None for numbers that are not finite, however deep they lie."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_short_of_room(run: Path) -> bool:
    try:
        return shutil.disk_usage(run).free < LEAST_ROOM_BYTES
    except OSError:  # some shared folders do not say
        return False


def _require_room(run: Path) -> None:
    """Refuse a disk with next to nothing left: TensorBoard would meet it in a thread of its own, with a traceback."""
    probe = run / f".partial-{os.getpid()}-room"
    try:
        with naming_the_place(run):
            probe.write_bytes(bytes(LEAST_ROOM_BYTES))
    finally:
        probe.unlink(missing_ok=True)


def _summary_writer(folder: Path, step: int) -> SummaryWriter | None:
    """A writer of TensorBoard's events; None, with a warning, where its folder cannot be written to."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    try:
        return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
    except OSError as error:
        _lacks_curves(folder, error)
        return None


def _lacks_curves(folder: Path, error: OSError) -> None:
    LOG.warning("%s: cannot be written, TensorBoard lacks curves (metrics.jsonl has all): %s", folder, in_words(error))
