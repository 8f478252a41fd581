"""``znormseg data cache``."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli import terminal


def cache(
    *,
    info: Annotated[bool, typer.Option("--info", help="Show the location and size of the cache (default).")] = False,
    clear: Annotated[bool, typer.Option("--clear", help="Delete all entries that no running process uses.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Show or clear the cache of prepared cases.

    train, compare and demo cache prepared cases in $ZNORMSEG_CACHE or, by default, in the system's cache folder. The
    cache is limited to $ZNORMSEG_CACHE_GB gigabytes (default 50); the least recently used cases are deleted first.
    """
    if info and clear:
        raise typer.BadParameter("give either --info or --clear")
    from contextlib import closing

    from app.runs.case_cache import FOLDER_VARIABLE, cache_folder, open_cache

    with closing(open_cache(cache_folder() / ".overflow")) as opened:
        before = opened.info()
        left = opened.clear() if clear else before
    if as_json:
        freed = {"freed_bytes": before.used_bytes - left.used_bytes} if clear else {}
        terminal.json_result({**left.to_json(), **freed})
        return
    if clear:
        gone = before.entries - left.entries
        terminal.result(f"{gone} prepared cases deleted, {(before.used_bytes - left.used_bytes) / 1e9:.2f} GB freed")
    terminal.result(f"folder: {left.folder} (another: ${FOLDER_VARIABLE})")
    terminal.result(
        f"{left.entries} prepared cases, {left.used_bytes / 1e9:.2f} of at most {left.most_bytes / 1e9:g} GB; "
        f"{left.in_use} in use by running processes"
    )
