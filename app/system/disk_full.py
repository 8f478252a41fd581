"""Retry writes while the disk is full, instead of ending the run."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from app.progress import LOG

#: Error numbers of a full disk. EFBIG is not among them: waiting does not lift a limit on file size.
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


#: Seconds between attempts.
RETRY_SECONDS = 5.0
#: Seconds between messages.
MESSAGE_SECONDS = 60.0


def is_disk_full(error: BaseException) -> bool:
    """Whether a system error means that the disk is full or the quota is used up."""
    return isinstance(error, OSError) and error.errno in _FULL


@dataclass(kw_only=True)
class RetryOnFullDisk:
    """Retries a write that failed because the disk is full, until it succeeds."""

    stopped: Callable[[], bool]
    """Returns whether the run was asked to stop; the write error is then raised."""
    waited_seconds: float = field(default=0.0, init=False)
    """Total seconds spent waiting so far."""

    def write(self, write: Callable[[], None], *, what: str, needed_bytes: int, folder: Path) -> None:
        """Call ``write`` until it succeeds or fails for a reason other than a full disk.

        Args:
            write: must leave nothing half-written when it raises.
            what: what is written, for the message, such as ``the checkpoint of step 40``.
            needed_bytes: size of what is written, for the message.
            folder: its destination, for the message.

        Raises:
            OSError: the disk is full and the run was asked to stop, or ``write`` failed for another reason.
        """
        said_at: float | None = None
        while True:
            try:
                write()
            except OSError as error:
                if error.errno not in _FULL or self.stopped():
                    raise
                now = time.monotonic()
                if said_at is None or now - said_at >= MESSAGE_SECONDS:
                    said_at = now
                    LOG.warning("%s", _message(what, needed_bytes, folder, error))
                self._wait(error)
            else:
                return

    def _wait(self, error: OSError) -> None:
        began = time.monotonic()
        try:
            while time.monotonic() - began < RETRY_SECONDS:
                if self.stopped():
                    raise error
                time.sleep(min(0.05, RETRY_SECONDS))
        finally:
            self.waited_seconds += time.monotonic() - began


def _message(what: str, needed_bytes: int, folder: Path, error: OSError) -> str:
    try:
        free = f"{shutil.disk_usage(folder).free / 1e6:.1f} MB are free"
    except OSError:
        free = "the free space is unknown"
    return (
        f"{folder}: {error.strerror}. {what[0].upper()}{what[1:]} needs {needed_bytes / 1e6:.1f} MB, {free}. Training "
        "waits until there is enough space; Ctrl-C or SIGTERM stops it at its last checkpoint."
    )
