"""Location of prepared cases: the user's cache, with the run folder as the fallback."""

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

#: Environment variable with the path of the cache folder.
FOLDER_VARIABLE: Final = "ZNORMSEG_CACHE"
#: Environment variable with the maximum size of the cache, in gigabytes.
SIZE_VARIABLE: Final = "ZNORMSEG_CACHE_GB"
DEFAULT_GB: Final = 50.0


def cache_folder() -> Path:
    """Return ``$ZNORMSEG_CACHE`` or, if it is not set, ``znormseg`` in the system's cache folder.

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
    """Return the maximum size of the cache in bytes, from ``$ZNORMSEG_CACHE_GB`` (default 50 GB).

    Raises:
        ConfigError: the variable is not a number above 0.
    """
    text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e9:
        raise ConfigError(f"{SIZE_VARIABLE}: expected a number of gigabytes above 0, got {text!r}")
    return int(gigabytes * 1e9)


def open_cache(overflow: Path) -> SharedCache:
    """Open the user's cache; the caller closes it.

    Args:
        overflow: folder for cases that do not fit into the cache.

    Raises:
        ConfigError: ``$ZNORMSEG_CACHE_GB`` is not a number above 0.
        OSError: the cache folder cannot be used.
    """
    return SharedCache(cache_folder(), most_bytes=cache_bytes(), overflow=CaseFolder(overflow))


@contextmanager
def prepared_cases(own: Path) -> Iterator[CaseFolder]:
    """Open the store for a run's prepared cases: the user's cache, which evicts none of them until the block ends.

    Args:
        own: folder of the run for cases that do not fit into the cache, or for all cases if the cache is unusable.
    """
    try:
        shared = open_cache(own)
    except OSError as error:
        reason = f"{error.filename or cache_folder()}: {why(error)}"
        LOG.warning("prepared cases are stored in %s, as the cache cannot be used: %s", own, reason)
        yield CaseFolder(own)
        return
    with closing(shared):
        yield shared
