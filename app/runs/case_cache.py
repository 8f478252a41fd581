"""Where prepared cases are kept: the user's cache, or the run's own folder where that cannot be used."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from app.errors import ConfigError
from app.progress import LOG
from data.filesystem import why
from data.patches.cache import CaseFolder, SharedCache

#: Names the cache folder.
FOLDER_VARIABLE: Final = "ZNORMSEG_CACHE"
#: Bounds it, in gigabytes.
SIZE_VARIABLE: Final = "ZNORMSEG_CACHE_GB"
DEFAULT_GB: Final = 50.0


def cache_folder() -> Path:
    """``$ZNORMSEG_CACHE``, else ``znormseg`` in the system's folder for caches.

    Raises:
        OSError: there is no home folder.
    """
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(named)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "znormseg"
    try:
        home = Path.home()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, "there is no home folder", f"${FOLDER_VARIABLE}") from error
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "znormseg"


def cache_bytes() -> int:
    """The most that the cache may take, from ``$ZNORMSEG_CACHE_GB``.

    Raises:
        ConfigError: it is not a number above 0.
    """
    text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e9:
        raise ConfigError(f"{SIZE_VARIABLE}: a number of gigabytes above 0 is expected, got {text!r}")
    return int(gigabytes * 1e9)


def open_cache(overflow: Path) -> SharedCache:
    """The user's cache; close it after use.

    Args:
        overflow: folder for the cases that it does not take.

    Raises:
        ConfigError: the bound is no number.
        OSError: the folder cannot be used.
    """
    return SharedCache(cache_folder(), most_bytes=cache_bytes(), overflow=CaseFolder(overflow))


@contextmanager
def prepared_cases(own: Path) -> Iterator[CaseFolder]:
    """Where a run keeps its prepared cases: the user's cache, which lets go of none of them before the block ends.

    Args:
        own: folder of the run for the cases that the cache does not take; for all where it cannot be used at all.
    """
    try:
        shared = open_cache(own)
    except OSError as error:
        reason = f"{error.filename or cache_folder()}: {why(error)}"
        LOG.warning("prepared cases go to %s, as the cache cannot be used: %s", own, reason)
        yield CaseFolder(own)
        return
    with closing(shared):
        yield shared
