"""Prompts that were encoded, the least used forgotten first: an encoder may take as long as several steps."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.diffusion.request import Condition

MAX_BYTES = 512 << 20


class Conditions:
    """Text -> what the encoders make of it. The empty text, which most negative prompts are, is never forgotten."""

    def __init__(self, encode: Callable[[str], Condition], max_bytes: int = MAX_BYTES) -> None:
        self._encode, self._max = encode, max_bytes
        self._held: OrderedDict[str, Condition] = OrderedDict()
        self._bytes = 0
        self.hits = self.misses = 0

    def of(self, text: str) -> Condition:
        found = self._held.get(text)
        if found is not None:
            self.hits += 1
            self._held.move_to_end(text)
            return found
        self.misses += 1
        made = self._encode(text)
        self._held[text] = made
        self._bytes += made.nbytes
        for old in list(self._held):
            if self._bytes <= self._max:
                break
            if old not in ("", text):
                self._bytes -= self._held.pop(old).nbytes
        return made
