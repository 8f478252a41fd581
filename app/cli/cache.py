"""``znormseg data cache``."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli import options, terminal


def cache(
    *,
    info: Annotated[bool, typer.Option("--info", help="Show the location and size of the cache (default).")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Delete all entries that no running process uses.")] = False,
) -> None:
    """Show or clear the cache of prepared cases.

    train, crossval, compare, plan and demo cache prepared cases in $ZNORMSEG_CACHE or, by default, in the system's
    cache folder. The cache is limited to $ZNORMSEG_CACHE_GB gigabytes (default 50); the least recently used cases are
    deleted first.
    """
    options.refuse(info and clear, "--info and --clear cannot be combined; give one of them")
    from contextlib import closing

    from app.runs.case_cache import FOLDER_VARIABLE, cache_folder, open_cache

    with closing(open_cache(cache_folder() / ".overflow")) as opened:
        before = opened.info()
        left = opened.clear() if clear else before
    freed, content, lines = before.used_bytes - left.used_bytes, left.to_json(), []
    if clear:
        content["freed_bytes"] = freed
        lines = [f"{before.entries - left.entries} prepared cases deleted, {freed / 1e9:.2f} GB freed"]
    terminal.result(
        content,
        *lines,
        f"folder: {left.folder} (change it with ${FOLDER_VARIABLE})",
        f"{left.entries} prepared cases, {left.used_bytes / 1e9:.2f} of at most {left.most_bytes / 1e9:g} GB; "
        f"{left.in_use} in use by running processes",
    )
