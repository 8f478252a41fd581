"""Read arrays from .npy files safely in any number of threads.

numpy parses the header of a .npy file as Python, and CPython 3.11 may fail if two threads do so at once (SystemError:
AST constructor recursion depth mismatch). Arrays that threads read are therefore parsed here, one at a time.
"""

from __future__ import annotations

import io
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

_PARSING: Final = Lock()


def load_npy(path: Path, mode: Literal["r", "c"] | None) -> npt.NDArray[Any]:
    """Map a file in a mode of ``numpy.memmap``, or read it if the mode is None.

    Raises:
        OSError, EOFError, ValueError: the file is unreadable or truncated.
    """
    with _PARSING:
        array: npt.NDArray[Any] = np.load(path, mmap_mode=mode)
    return array


def parse_npy(content: bytes) -> npt.NDArray[Any]:
    """Return the array of a file's content, such as a member of an npz archive.

    Raises:
        ValueError: the content is not that of a .npy file, or is truncated.
    """
    with _PARSING:
        array: npt.NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return array
