"""What transports have in common by which decode reads rows out of the prefill server's memory.

Who is asked has a block of memory that others may read, and fills it; behind each `Pages` it says where rows lie, and
the first time what else must be known to reach them. Who asked reads them straight into its rows, and says so; while
that takes, it says that it is still there. What is said goes over a plain socket, as with `tcp`.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
import numpy as np

from phloem.disagg.wire import LinkLost
from phloem.utils import memory

if TYPE_CHECKING:
    from collections.abc import Callable

    from phloem.disagg.transports import Row
    from phloem.disagg.wire import Link

Block = np.ndarray[Any, np.dtype[np.uint8]]  # flat

MOST_OFFER = 16 << 20  # bytes of a description
SPARE = 8  # blocks that are kept for the next prompts
BEAT = 0.5  # seconds between two signs of life while a read runs
STALLED = 60.0  # seconds that a read may take
READING, DONE = b"\0", b"\1"
_LENGTH = struct.Struct(">I")


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """Where rows lie in whose memory. `meta`: what must be known of that; empty: as before."""

    agent: str
    address: int
    row_bytes: int
    meta: bytes = b""


_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Offer)


class Agent(Protocol):
    """This process among others. Every call raises LinkLost where something is refused."""

    name: str
    spare: Spare

    def register(self, block: Block) -> Any:
        """Others may read it, or others' memory be read into it; gives what `forget` takes."""
        ...

    def forget(self, registered: Any) -> None: ...

    def meta(self) -> bytes: ...

    def meet(self, name: str, meta: bytes) -> None:
        """Somebody is read from, until `leave`."""
        ...

    def leave(self, name: str, lost: bool) -> None:
        """Nothing more is read. `lost`: something went wrong, and it is to describe itself anew."""
        ...

    def read(self, peer: str, address: int, into: Block, alive: Callable[[], None]) -> None:
        """Fill `into` with what lies there. `alive` is called every now and then, and may raise."""
        ...


class Spare:
    """Registered blocks that no prompt has now."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: list[tuple[Block, Any]] = []

    def take(self, agent: Agent, nbytes: int) -> tuple[Block, Any]:
        """One of at least so many bytes, for `give_back`."""
        with self._lock:
            for at, (block, registered) in enumerate(self._blocks):
                if len(block) >= nbytes:
                    del self._blocks[at]
                    return block, registered
        block = memory.zeros(max(1, nbytes))
        return block, agent.register(block)

    def give_back(self, agent: Agent, block: Block, registered: Any) -> None:
        with self._lock:
            if len(self._blocks) < SPARE:
                self._blocks.append((block, registered))
                return
        agent.forget(registered)


class Receiver:
    """Rows that are read into."""

    def __init__(self, agent_of: Callable[[Link], Agent], row_bytes: int, count: int) -> None:
        self._agent_of, self._row_bytes = agent_of, row_bytes
        self._agent: Agent | None = None
        self._flat = memory.zeros(max(1, row_bytes * count))
        self._registered: Any = None
        self._block = self._flat[: row_bytes * count].reshape(count, row_bytes)
        self._peer = ""

    def greet(self, link: Link, seconds: float) -> None:
        self._agent = self._agent_of(link)
        self._registered = self._agent.register(self._flat)

    def take(self, link: Link, start: int, count: int, seconds: float) -> None:
        offer, agent = _offer(link, seconds), self._agent
        assert agent is not None, "greet comes first"
        if offer.row_bytes != self._row_bytes:
            raise LinkLost(f"rows of {offer.row_bytes} bytes came for rows of {self._row_bytes}")
        if not self._peer:
            agent.meet(offer.agent, offer.meta)
            self._peer = offer.agent
        elif offer.agent != self._peer:
            raise LinkLost("rows are offered by another agent than before")
        rows = self._block[start : start + count].reshape(-1)
        try:
            agent.read(self._peer, offer.address, rows, lambda: link.write(READING, seconds))
        except LinkLost:
            self._leave(lost=True)
            raise
        link.write(DONE, seconds)

    def row(self, index: int) -> Row:
        return self._block[index]

    def close(self) -> None:
        self._leave(lost=False)
        registered, self._registered = self._registered, None
        if registered is not None and self._agent is not None:
            self._agent.forget(registered)
        self._flat = np.empty(0, np.uint8)
        self._block = np.empty((0, 0), np.uint8)

    def _leave(self, lost: bool) -> None:
        peer, self._peer = self._peer, ""
        if peer and self._agent is not None:
            self._agent.leave(peer, lost)


class Sender:
    """A block of rows that others read."""

    def __init__(self, agent: Agent, row_bytes: int) -> None:
        self._agent, self._row_bytes = agent, row_bytes
        self._held: tuple[Block, Any] | None = None
        self._told: Any = None  # the memory that the peer knows of

    def rows(self, start: int, count: int) -> list[Row]:
        needed = count * self._row_bytes
        if self._held is None or len(self._held[0]) < needed:
            self.close()
            self._held = self._agent.spare.take(self._agent, needed)
        return list(self._held[0][:needed].reshape(count, self._row_bytes))

    def push(self, link: Link, start: int, count: int, seconds: float) -> None:
        assert self._held is not None
        block, registered = self._held
        meta = b"" if self._told is registered else self._agent.meta()
        data = _encoder.encode(Offer(self._agent.name, block.ctypes.data, self._row_bytes, meta))
        link.write(_LENGTH.pack(len(data)) + data, seconds)
        self._told = registered
        said = bytearray(1)
        while True:
            link.read_into(memoryview(said), max(seconds, 4 * BEAT))
            if bytes(said) == DONE:
                return
            if bytes(said) != READING:
                raise LinkLost("the peer says what cannot be understood")

    def close(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._agent.spare.give_back(self._agent, *held)


def _offer(link: Link, seconds: float) -> Offer:
    """Raises LinkLost: what comes is none."""
    head = bytearray(_LENGTH.size)
    link.read_into(memoryview(head), seconds)
    (size,) = _LENGTH.unpack(head)
    if size > MOST_OFFER:
        raise LinkLost(f"a description of {size} bytes is longer than {MOST_OFFER}")
    data = bytearray(size)
    link.read_into(memoryview(data), seconds)
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise LinkLost(f"a description that is none: {error}") from None
