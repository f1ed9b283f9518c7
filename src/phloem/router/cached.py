"""What servers have cached by their own word: an index over the pages that their events name.

Whatever a server calls its pages, here a page's key is made of its tokens and the key before it, so that servers of
different makes are compared alike. Where a page begins is told by its parent; one whose parent is not known is of no
use and is dropped.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from phloem.router.prefixes import match

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = 0


WORD = 8  # bytes of a token in keys


def pack(tokens: Sequence[int]) -> bytes:
    """Raises OverflowError or TypeError: these are no token ids."""
    return array("q", tokens).tobytes()


def link(above: int, page: bytes, salt: str = "") -> int:
    """The key of a page (of packed tokens) behind the key `above`."""
    before = salt.encode() if above == ROOT else b""
    return int.from_bytes(blake2b(before + above.to_bytes(8, "big") + page, digest_size=8).digest(), "big")


def chain(tokens: Sequence[int], size: int, salt: str = "") -> list[int]:
    """The keys of a prompt's whole pages; none where it holds what is no token id."""
    try:
        data = pack(tokens)
    except (OverflowError, TypeError):
        return []
    at, found, width = ROOT, list[int](), size * WORD
    for start in range(0, len(data) - width + 1, width):
        at = link(at, data[start : start + width], salt)
        found.append(at)
    return found


class Cached:
    """All workers' pages. Sets of bits have no bounds: what is cached is bounded where it is cached."""

    def __init__(self) -> None:
        self._bits: dict[int, int] = {}
        self._pages: dict[int, dict[Any, int]] = {}  # bit -> the server's hash -> our key
        self._sizes: dict[int, int] = {}  # bit -> tokens of its pages

    def knows(self, bit: int) -> bool:
        return bit in self._sizes

    def pages(self, bit: int) -> int:
        return len(self._pages.get(bit, ()))

    def match(self, tokens: Sequence[int], salt: str, bits: Sequence[int]) -> dict[int, int]:
        """Bit -> how many leading tokens that worker has, of those whose events are followed."""
        sizes = {self._sizes[bit] for bit in bits if bit in self._sizes}
        found: dict[int, int] = {}
        for size in sizes:
            alive = sum(1 << bit for bit in bits if self._sizes.get(bit) == size)
            depths = match(self._bits, chain(tokens, size, salt), alive)
            found |= {bit: depth * size for bit, depth in depths.items()}
        return found

    # events

    def take(self, bit: int, events: Sequence[Any]) -> None:
        """One message's events, as maps or arrays. What is no event is passed over."""
        for event in events:
            told = _as_map(event)
            kind = told.get("type")
            if kind == "BlockStored":
                self._stored(bit, told)
            elif kind == "BlockRemoved":
                self._removed(bit, told)
            elif kind == "AllBlocksCleared":
                self.clear(bit)

    def _stored(self, bit: int, told: dict[str, Any]) -> None:
        if told.get("medium") not in (None, "GPU"):
            return  # of a lower tier: it has been told of before
        hashes, tokens, size = told.get("block_hashes") or [], told.get("token_ids") or [], told.get("block_size")
        if not isinstance(size, int) or size < 1 or len(tokens) < size * len(hashes):
            return
        pages = self._pages.setdefault(bit, {})
        self._sizes[bit] = size
        parent = told.get("parent_block_hash")
        above = ROOT if parent is None else pages.get(_key(parent))
        if above is None:
            return
        salt = "\0".join(str(told[name]) for name in ("cache_salt", "lora_name") if told.get(name))
        try:
            data, width = pack(tokens), size * WORD
        except (OverflowError, TypeError):
            return
        for at, name in enumerate(hashes):
            above = link(above, data[at * width : (at + 1) * width], salt)
            pages[_key(name)] = above
            self._bits[above] = self._bits.get(above, 0) | 1 << bit

    def _removed(self, bit: int, told: dict[str, Any]) -> None:
        if told.get("medium") not in (None, "GPU"):
            return
        pages = self._pages.get(bit, {})
        for name in told.get("block_hashes") or []:
            key = pages.pop(_key(name), None)
            if key is not None:
                self._drop(key, bit)

    def _drop(self, key: int, bit: int) -> None:
        left = self._bits.get(key, 0) & ~(1 << bit)
        if left:
            self._bits[key] = left
        else:
            self._bits.pop(key, None)

    def clear(self, bit: int) -> None:
        for key in self._pages.pop(bit, {}).values():
            self._drop(key, bit)
        if bit in self._sizes:
            self._pages[bit] = {}

    def forget(self, bit: int) -> None:
        """The worker has gone, or its events cannot be followed any more."""
        self.clear(bit)
        self._pages.pop(bit, None)
        self._sizes.pop(bit, None)


def _key(name: Any) -> Any:
    return bytes(name) if isinstance(name, bytearray | memoryview) else name


_ARRAYS: dict[str, tuple[str, ...]] = {
    "BlockStored": ("block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium", "lora_name"),
    "BlockRemoved": ("block_hashes", "medium"),
    "AllBlocksCleared": (),
}


def _as_map(event: Any) -> dict[str, Any]:
    if isinstance(event, dict):
        return event
    if isinstance(event, list | tuple) and len(event) > 0 and event[0] in _ARRAYS:
        found: dict[str, Any] = dict(zip(_ARRAYS[event[0]], event[1:], strict=False))
        if event[0] == "BlockStored" and len(event) > 8 and isinstance(event[8], list | tuple) and event[8]:
            found["cache_salt"] = event[8][0]
        return {"type": event[0], **found}
    return {}
