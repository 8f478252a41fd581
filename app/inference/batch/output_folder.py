"""The output folder of ``predict``: concurrent writers, and partial files left behind by killed writers."""

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
    """Create the output folder if it is missing.

    Raises:
        DataError: ``output`` is a file.
        OSError: the folder cannot be created.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder for the label maps")
    with naming_the_place(output):
        output.mkdir(parents=True, exist_ok=True)


def require_place_of_its_own(output: Path, *, run: Path, source: Path, cases: Sequence[Case]) -> None:
    """Refuse an output folder that is the folder of the run or of the scans.

    Args:
        output: folder for the label maps.
        run: folder of the run, the model or the ensemble.
        source: folder in which the cases were found.
        cases: those cases.

    Raises:
        DataError: ``output`` is such a folder.
    """
    place = output.resolve()
    if place == run.resolve():
        raise DataError(f"{output} is the folder of the run. Give another OUTPUT for the label maps.")
    scans = {path.parent.resolve() for case in cases for path in case.contrasts.values()}
    if place in {source.resolve(), *scans}:
        raise DataError(
            f"{output} contains the scans, where label maps would be mistaken for the experts'. Give another OUTPUT."
        )


@contextmanager
def at_work(output: Path) -> Iterator[None]:
    """Register as a writer to a folder; the first writer removes partial files that killed writers left behind.

    Every writer holds a shared lock on the folder, which the kernel releases when the process ends, however it ends. A
    process that can briefly take the lock exclusively is the only writer on this machine, containers included. Partial
    files of other machines are recognised by their names and kept. On file systems without locks nothing is removed.
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
