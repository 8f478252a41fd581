"""The folder that ``predict`` writes to: who is at work there, and what killed ones left."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from data.datasets.layouts import Case
from data.errors import DataError
from data.files import naming_the_place, remove_stale
from data.filesystem import lock


def make_output(output: Path) -> None:
    """Make the folder where it is missing.

    Raises:
        DataError: it is a file.
        OSError: it cannot be made.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder for the label maps")
    with naming_the_place(output):
        output.mkdir(parents=True, exist_ok=True)


def require_place_of_its_own(output: Path, *, run: Path, source: Path, cases: Sequence[Case]) -> None:
    """Refuse a folder in which label maps would lie among the files of the run or among scans.

    Args:
        output: where label maps are to be written.
        run: folder of the run, the model or the ensemble.
        source: where the cases were found.
        cases: those.

    Raises:
        DataError: it is such a folder.
    """
    place = output.resolve()
    if place == run.resolve():
        raise DataError(f"{output} is the folder of the run. Give another OUTPUT for the label maps.")
    scans = {path.parent.resolve() for case in cases for path in case.contrasts.values()}
    if place in {source.resolve(), *scans}:
        raise DataError(
            f"{output} holds the scans: among them label maps would be taken for the experts'. Give another OUTPUT."
        )


@contextmanager
def at_work(output: Path) -> Iterator[None]:
    """Be one of those who write to a folder; the first of them removes what killed ones left half written.

    All hold a shared lock on the folder itself, which the kernel takes back when a process ends, however it ends. Who
    gets it exclusively for a moment is alone on this machine, also beside containers; the names of partial files tell
    those of other machines. Where the file system has no locks nothing is removed.
    """
    with naming_the_place(output):
        folder = os.open(output, os.O_RDONLY)
    try:
        with suppress(OSError):
            lock(folder, output)
            remove_stale(output)
        with suppress(OSError):
            lock(folder, output, shared=True, wait=True)
        yield
    finally:
        os.close(folder)
