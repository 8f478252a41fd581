"""Write an RGB picture as a PNG file in memory, with the standard library alone."""

from __future__ import annotations

import struct
import zlib
from typing import Final

import numpy as np
import numpy.typing as npt

_SIGNATURE: Final = b"\x89PNG\r\n\x1a\n"
_SUB_FILTER: Final = 1  # each byte minus the same channel of the pixel to its left: small files for smooth pictures


def encode_png(rgb: npt.NDArray[np.uint8]) -> bytes:
    r"""Encode a picture losslessly as PNG.

    Args:
        rgb: uint8, shape (height, width, 3), row 0 at the top.

    Returns:
        the bytes of the file.

    Raises:
        ValueError: another shape or type, or no pixel at all.

    Example:
        >>> encode_png(np.zeros((2, 3, 3), dtype=np.uint8))[:4]
        b'\x89PNG'

    Source: W3C, Portable Network Graphics Specification (Third Edition), sections 5, 9 and 11.
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or rgb.size == 0:
        raise ValueError(f"a picture is uint8 of shape (height, width, 3), not {rgb.dtype} of shape {rgb.shape}")
    height, width, _ = rgb.shape
    left = np.pad(rgb, ((0, 0), (1, 0), (0, 0)))[:, :-1]
    rows = np.full((height, 1 + 3 * width), _SUB_FILTER, dtype=np.uint8)
    rows[:, 1:] = (rgb - left).reshape(height, -1)  # uint8 wraps round, as the filter wants
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, colour type 2 = RGB
    pixels = zlib.compress(rows.tobytes(), 9)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload)) + kind + payload + struct.pack(">I", zlib.crc32(kind + payload))
