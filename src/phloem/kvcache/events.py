"""What gateways are told of the prefix tree: pages that it gained and lost, in order, and only of steps that happened.

A page enters the tree when its step is launched, and may leave it again if that step is taken back. What the tree says
(`Feed`, its `watch`) therefore waits here until the step is committed: the stored page of an undone step and its
removal then go out in one message. With nobody listening there is no `Feed`, and the tree asks one `is None`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from phloem.kvcache.namespaces import parts
from phloem.kvcache.node import hashes

if TYPE_CHECKING:
    from phloem.kvcache.node import Node
    from phloem.kvcache.radix import RadixCache

# Of the tier that the device computes from, whatever the device: readers know this word.
MEDIUM = "GPU"


class Stored(NamedTuple):
    """Pages behind one another that the tree has gained. `data`: their token ids as int32 bytes."""

    hashes: list[int]
    parent: int | None
    data: bytes
    namespace: str


class Removed(NamedTuple):
    hashes: list[int]


class Cleared(NamedTuple):
    pass


Event = Stored | Removed | Cleared


class Sink(Protocol):
    """Takes events, in order, without ever waiting."""

    def put(self, events: list[Event]) -> bool:
        """False, and nothing is taken, where there is no room."""
        ...

    @property
    def sequence(self) -> int:
        """The number that the next message will have."""
        ...


class Feed:
    """The tree's changes, held until their step is committed. The scheduler's thread calls it.

    Where the sink has no room, readers get `Cleared` and the whole tree once it has: they never miss a change
    unnoticed.
    """

    def __init__(self, tree: RadixCache, sink: Sink) -> None:
        self.tree, self.sink = tree, sink
        self.lost = 0  # times that there was no room
        self._events: list[Event] = [Cleared()]  # whoever knew an earlier process forgets it
        self._gone = 0  # events that have left `_events`
        self._behind = False
        tree.watch = self

    # what the tree says

    def added(self, node: Node) -> None:
        self._events.append(_stored(node))

    def removed(self, node: Node, left: int) -> None:
        """All pages of the node behind its first `left` are about to go."""
        self._events.append(Removed([number(key) for key in hashes(node)[left:]]))

    def cleared(self) -> None:
        self._events.append(Cleared())

    # what the scheduler says

    @property
    def mark(self) -> int:
        """Everything that has happened up to now."""
        return self._gone + len(self._events)

    def publish(self, mark: int | None = None) -> None:
        """Tell what happened before the mark; without one, everything."""
        count = len(self._events) if mark is None else mark - self._gone
        if count <= 0 and not self._behind:
            return
        told, self._events = self._events[:count], self._events[count:]
        self._gone += len(told)
        if self._behind:
            told = [Cleared(), *self.dump()]
        if self.sink.put(told):
            self._behind = False
            return
        self.lost += not self._behind
        self._behind = True

    def dump(self) -> list[Event]:
        """The whole tree, parents first."""
        return [_stored(node) for node in self.tree.nodes()]


def _stored(node: Node) -> Stored:
    chain = [number(key) for key in hashes(node)]
    at, above = node.parent, None
    if at is not None and at.parent is not None:
        above = number(hashes(at)[-1])
    while at is not None and at.parent is not None:
        at = at.parent
    return Stored(chain, above, node.data, "" if at is None else at.name)


def number(key: bytes) -> int:
    """A page's hash as readers know it: 64 bits with a sign."""
    return int.from_bytes(key[:8], "big", signed=True)


# as messages


def as_map(event: Event, page_size: int) -> dict[str, Any]:
    """As vLLM and SGLang write it today."""
    if isinstance(event, Removed):
        return {"type": "BlockRemoved", "block_hashes": event.hashes, "medium": MEDIUM}
    if isinstance(event, Cleared):
        return {"type": "AllBlocksCleared"}
    found: dict[str, Any] = {
        "type": "BlockStored",
        "block_hashes": event.hashes,
        "parent_block_hash": event.parent,
        "token_ids": np.frombuffer(event.data, np.int32).tolist(),
        "block_size": page_size,
        "lora_id": None,
        "medium": MEDIUM,
    }
    salt, adapter, version = parts(event.namespace)
    if adapter:
        found["lora_name"] = adapter
    if salt or version:
        found["cache_salt"] = f"{salt}@{version}" if version else salt
    return found


def as_array(event: Event, page_size: int) -> list[Any]:
    """As older readers expect it."""
    fields = as_map(event, page_size)
    if not isinstance(event, Stored):
        return list(fields.values())
    lora, salt = fields.pop("lora_name", None), fields.pop("cache_salt", None)
    return [*fields.values(), lora, [salt] if salt else None]
