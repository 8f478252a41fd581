"""Names of what is being written, beside the place it will take, and how long a name may be."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Final

#: What Linux, macOS and Windows take as the name of a file where the file system does not say.
MOST_NAME_BYTES: Final = 255
#: A name of more bytes is replaced by its hash, so that a prefix never makes it longer than it may be.
_LONGEST_KEPT: Final = 64


def partial_name(prefix: str, name: str) -> str:
    """The name of a file or folder while it is written: the prefix, then the name or, of a long one, its hash.

    It is never longer than a name that the file system takes, and it keeps the ending.

    Example:
        >>> partial_name(".partial-1-", "a.nii.gz"), len(partial_name(".partial-1-", "ä" * 124 + ".nii.gz"))
        ('.partial-1-a.nii.gz', 34)
    """
    if len(os.fsencode(name)) <= _LONGEST_KEPT:
        return f"{prefix}{name}"
    ending = ".nii.gz" if name.lower().endswith(".nii.gz") else Path(name).suffix
    ending = ending if len(os.fsencode(ending)) <= _LONGEST_KEPT // 2 else ""
    return f"{prefix}{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}{ending}"


def most_name_bytes(folder: Path) -> int:
    """How many bytes the name of a file in a folder may have: 255, on encrypted file systems down to 143."""
    try:
        return min(os.pathconf(folder, "PC_NAME_MAX"), MOST_NAME_BYTES)
    except (OSError, ValueError, AttributeError):
        return MOST_NAME_BYTES
