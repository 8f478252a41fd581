"""Standard output and error that survive the loss of their reader.

The reader may disappear at any time: ``znormseg train ... 2>&1 | head``, a closed terminal, a lost connection. Messages
are then dropped and the job continues. A result that nobody reads is not an error either, but failing to write it to a
file, for example because the disk is full, is one.
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

#: Error numbers of a pipe or socket whose reader is gone.
_READER_GONE: Final = frozenset({errno.EPIPE, errno.ECONNRESET, errno.ENXIO})


class _Outlasting(io.FileIO):
    """The descriptor of a standard stream, redirected to the null device once its reader is gone."""

    def __init__(self, descriptor: int, *, messages: bool) -> None:
        """Wrap a descriptor; with ``messages``, writing never fails."""
        super().__init__(descriptor, "w", closefd=False)
        self._messages = messages
        self._is_terminal = os.isatty(descriptor)

    def write(self, content: Any) -> int:
        """Write, or drop the content if there is no reader.

        Raises:
            OSError: a result could not be written, for example to a full disk.
        """
        try:
            while (written := super().write(content)) is None:  # a non-blocking pipe that is full
                select.select([], [self.fileno()], [])
        except OSError as error:
            # A closed terminal raises EIO, as does a failing disk.
            is_gone = error.errno in _READER_GONE or (error.errno == errno.EIO and self._is_terminal)
            if is_gone or not self._messages:
                self._discard_output()  # so that buffered content is not written again either
            if not is_gone and not self._messages:
                raise OSError(error.errno, f"cannot be written: {error.strerror}", "standard output") from error
            return memoryview(content).nbytes
        return written

    def _discard_output(self) -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self.fileno())
        os.close(null)


@contextmanager
def outlasting_streams() -> Iterator[None]:
    """Let ``sys.stdout`` and ``sys.stderr`` survive the loss of their readers; replaced streams are untouched."""
    _open_closed_ones()
    before = sys.stdout, sys.stderr
    if sys.stdout is sys.__stdout__:
        sys.stdout = _outlasting(sys.stdout, 1, messages=False)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _outlasting(sys.stderr, 2, messages=True)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name that cannot be encoded must not prevent a result
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


def _outlasting(stream: TextIO | None, descriptor: int, *, messages: bool) -> TextIO:
    """Wrap a stream; ``stream`` is None if the process was started without it."""
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
    """Open descriptors 0 to 2 if they are closed (``2>&-``).

    Otherwise the next file to be opened would get the free number, and messages would be written to it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
