"""PNG files of red, green, blue, a byte each."""

from __future__ import annotations

import zlib
from struct import pack

import numpy as np


def png(pixels: bytes, width: int, height: int) -> bytes:
    """Rows of pixels as a PNG file; each byte is stored as its difference from the one above (filter 2)."""
    rows_HS = np.frombuffer(pixels, np.uint8).reshape(height, width * 3)
    stored_HS = np.full((height, width * 3 + 1), 2, np.uint8)
    stored_HS[:, 1:] = rows_HS
    stored_HS[1:, 1:] -= rows_HS[:-1]
    head = pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = (b"IHDR", head), (b"IDAT", zlib.compress(stored_HS.tobytes(), 6)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return pack(">I", len(data)) + name + data + pack(">I", zlib.crc32(name + data))
