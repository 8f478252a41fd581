"""A full disk: wait until there is room instead of ending a run."""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from app.progress import LOG

#: What a full disk says; a file that may grow no larger (EFBIG) says so for good, and is no reason to wait.
_FULL: Final = {errno.ENOSPC, errno.EDQUOT}


#: Between two tries.
RETRY_SECONDS = 5.0
#: Between two messages.
MESSAGE_SECONDS = 60.0


@dataclass(kw_only=True)
class RetryOnFullDisk:
    """Repeats a write that met a full disk until it fits."""

    stopped: Callable[[], bool]
    """Whether someone asked the run to stop; then the wait ends with the error."""
    waited_seconds: float = field(default=0.0, init=False)
    """Spent waiting so far."""

    def write(self, write: Callable[[], None], *, what: str, needed_bytes: int, folder: Path) -> None:
        """Call ``write`` until no full disk stops it.

        Args:
            write: leaves nothing half-written when it raises.
            what: for the message, such as ``the checkpoint of step 40``.
            needed_bytes: room that it takes.
            folder: where to.

        Raises:
            OSError: the disk is full and the run was asked to stop, or anything but a full disk.
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
        free = "free space unknown"
    return (
        f"{folder}: {error.strerror}. {what[0].upper()}{what[1:]} needs {needed_bytes / 1e6:.1f} MB, {free}. Training "
        "waits and goes on when there is room; Ctrl-C or SIGTERM ends it at its last checkpoint."
    )
