"""Standard output and error that outlast their reader.

Whoever reads may leave at any time: ``znormseg train ... 2>&1 | head``, a closed terminal, a lost connection. Messages
are then dropped and the job carries on. A result that nobody wants to read is no error either; one that a full disk
does not take is.
"""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, TextIO

#: The reader of a pipe or a socket has left.
_LEFT: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENXIO})


class _Outlasting(io.FileIO):
    """A standard stream's descriptor, which leads nowhere once its reader has left."""

    def __init__(self, descriptor: int, *, messages: bool) -> None:
        """``messages`` are never a reason to fail."""
        super().__init__(descriptor, "w", closefd=False)
        self._messages = messages
        self._is_terminal = os.isatty(descriptor)

    def write(self, content: Any) -> int:
        """Write, or drop what has no reader.

        Raises:
            OSError: a result could not be written, such as on a full disk.
        """
        try:
            while (written := super().write(content)) is None:  # a pipe that does not block, and is full
                select.select([], [self.fileno()], [])
        except OSError as error:
            # A terminal that is gone says EIO, as does a disk that fails.
            left = error.errno in _LEFT or (error.errno == errno.EIO and self._is_terminal)
            if left or not self._messages:
                self._lead_nowhere()  # what a buffer still has is not tried again either
            if not left and not self._messages:
                raise OSError(error.errno, f"cannot be written: {error.strerror}", "standard output") from error
            return memoryview(content).nbytes
        return written

    def _lead_nowhere(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


@contextmanager
def outlasting_streams() -> Iterator[None]:
    """Have ``sys.stdout`` and ``sys.stderr`` outlast their readers; those that were put in their place stay."""
    _open_closed_ones()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _outlasting(sys.stdout, 1, messages=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _outlasting(sys.stderr, 2, messages=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that cannot be shown stops no result
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _outlasting(stream: TextIO | None, descriptor: int, *, messages: bool) -> TextIO:
    """A stream like the one given, which is None where the process was started without."""
    descriptor = descriptor if stream is None else stream.fileno()
    if stream is not None:
        with suppress(OSError):
            stream.flush()
    raw = _Outlasting(descriptor, messages=messages)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding="utf-8" if stream is None else stream.encoding,
        errors="backslashreplace",
        line_buffering=messages or os.isatty(descriptor),
    )


def _open_closed_ones() -> None:
    """Occupy 0, 1 and 2 where they are closed (``2>&-``): else the next file gets their number, and messages in it."""
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
