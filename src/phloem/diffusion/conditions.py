"""Prompts that were encoded, the least used forgotten first: an encoder may take as long as several steps."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from phloem.core.messages import Pixels
    from phloem.diffusion.request import Condition

MAX_BYTES = 512 << 20


class Conditions:
    """Text -> what the encoders make of it, with the pictures that they are shown where they see any. The empty text,
    which most negative prompts are, is never forgotten."""

    def __init__(self, encode: Callable[[str, Sequence[Pixels]], Condition], max_bytes: int = MAX_BYTES) -> None:
        self._encode, self._max = encode, max_bytes
        self._held: OrderedDict[Any, Condition] = OrderedDict()
        self._bytes = 0
        self.hits = self.misses = 0

    def of(self, text: str, pictures: Sequence[Pixels] = ()) -> Condition:
        key: Any = (text, *map(_digest, pictures)) if pictures else text
        found = self._held.get(key)
        if found is not None:
            self.hits += 1
            self._held.move_to_end(key)
            return found
        self.misses += 1
        made = self._encode(text, pictures)
        self._held[key] = made
        self._bytes += made.nbytes
        for old in list(self._held):
            if self._bytes <= self._max:
                break
            if old not in ("", key):
                self._bytes -= self._held.pop(old).nbytes
        return made


def _digest(picture: Pixels) -> bytes:
    return hashlib.sha256(f"{picture.width}x{picture.height}".encode() + picture.data).digest()
