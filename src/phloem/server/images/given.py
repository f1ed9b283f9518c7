"""Pictures that come with a request, decoded: their headers say how large they are before anything is."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from phloem.client.start import media_rules
from phloem.core.errors import BadRequest
from phloem.core.messages import Pixels
from phloem.multimodal import _pixels
from phloem.multimodal._fetch import fetch

if TYPE_CHECKING:
    from phloem.multimodal._fetch import Rules
    from phloem.server.door import Door

MOST_PIXELS = 16 << 20  # of one picture: models read far smaller ones
# How many times a side is the other. Models widen the shorter side of a picture to what they read at least, and the
# longer one grows along: a column of millions of pixels, a file of a few kilobytes, would be read as gigabytes.
MOST_SHAPE = 100


async def pixels_of(door: Door, source: bytes | str, where: str) -> Pixels:
    """A file, or what a client says where one is.

    Raises:
        BadRequest: it cannot be had, is no picture, is broken or too large.
    """
    rules = media_rules(door.config.media)
    return await asyncio.to_thread(lambda: decoded(_fetched(source, where, rules), where))


def _fetched(source: bytes | str, where: str, rules: Rules) -> bytes:
    return source if isinstance(source, bytes) else fetch(source, where, rules)


def decoded(data: bytes, where: str) -> Pixels:
    """Raises BadRequest: it is no picture, is broken, too large or too narrow; or Pillow is missing."""
    if not _pixels.available():
        raise BadRequest(f"{where}: pictures need Pillow: pip install 'phloem[vision]'", param=where)
    image = _pixels.decode(data, where, MOST_PIXELS)
    if max(image.size) > MOST_SHAPE * min(image.size):
        what = f"{image.width} x {image.height} pixels: no side may be over {MOST_SHAPE} times the other"
        raise BadRequest(f"{where}: {what}", param=where, code="bad_image")
    return Pixels(image.width, image.height, image.tobytes())
