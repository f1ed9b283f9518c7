"""NIXL: decode reads rows out of the prefill server's memory, over whatever UCX finds between the two machines.

Who is asked registers a block of memory with its agent, once, and fills it; behind each `Pages` it says where the rows
lie, and the first time what others must know to reach its memory. Who asked reads them (`READ`) straight into its rows,
and says so; while that takes, it says that it is still there. What is said goes over a plain socket, as with `tcp`.

https://github.com/ai-dynamo/nixl; an agent may be called from any thread.
"""

from __future__ import annotations

import contextlib
import struct
import threading
import time
import uuid
from collections import OrderedDict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from phloem.core.errors import ConfigError
from phloem.disagg.transports.tcp import Transport as Sockets
from phloem.disagg.wire import LinkLost
from phloem.utils import log, memory

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from phloem.disagg.transports import Row
    from phloem.disagg.wire import Link

_log = log.get("disagg")

MOST_OFFER = 16 << 20  # bytes of an agent's description
SPARE = 8  # blocks that are kept for the next prompts
PEERS = 64  # agents that are remembered while nothing is read from them
BEAT = 0.5  # seconds between two signs of life while a read runs
STALLED = 60.0  # seconds that a read may take
READING, DONE = b"\0", b"\1"
_LENGTH = struct.Struct(">I")
# Of reads that could be neither finished nor stopped: somebody may write there until the end of the process.
_lost: list[Any] = []


class Offer(msgspec.Struct, array_like=True, frozen=True):
    """Where rows lie in whose memory. `meta`: the agent's own description of it; empty: as before."""

    agent: str
    address: int
    row_bytes: int
    meta: bytes = b""


_encoder, _decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(Offer)


class Agent:
    """This process among others. Its calls raise LinkLost where NIXL refuses something."""

    def __init__(self) -> None:
        from nixl._api import nixl_agent, nixl_agent_config  # pyright: ignore[reportMissingImports]

        self.name = f"phloem-{uuid.uuid4().hex}"
        config: Any = nixl_agent_config(backends=["UCX"])
        self._agent: Any = nixl_agent(self.name, config)
        self._lock = threading.Lock()
        self._spare: list[tuple[np.ndarray[Any, Any], Any]] = []
        self._peers: OrderedDict[str, tuple[bytes, int]] = OrderedDict()  # what they said, and how many read from them

    def register(self, block: np.ndarray[Any, Any]) -> Any:
        return _tried("memory was not registered", lambda: self._agent.register_memory(_region(block), "DRAM"))

    def forget(self, registered: Any) -> None:
        with contextlib.suppress(Exception):
            self._agent.deregister_memory(registered)

    def meta(self) -> bytes:
        return _tried("it does not describe itself", self._agent.get_agent_metadata)

    def block(self, nbytes: int) -> tuple[np.ndarray[Any, Any], Any]:
        """Registered memory of at least so many bytes, for `give_back`."""
        with self._lock:
            for at, (block, registered) in enumerate(self._spare):
                if len(block) >= nbytes:
                    del self._spare[at]
                    return block, registered
        block = memory.zeros(max(1, nbytes))
        return block, self.register(block)

    def give_back(self, block: np.ndarray[Any, Any], registered: Any) -> None:
        with self._lock:
            if len(self._spare) < SPARE:
                self._spare.append((block, registered))
                return
        self.forget(registered)

    def meet(self, name: str, meta: bytes) -> None:
        """Somebody is read from, until `leave`."""
        if name == self.name:
            return  # both servers are this process
        with self._lock:
            known, users = self._peers.pop(name, (b"", 0))
            if meta and meta != known:
                found = _tried("the peer's description is of no use", lambda: self._agent.add_remote_agent(meta))
                found = found.decode() if isinstance(found, bytes) else found
                if found != name:
                    raise LinkLost(f"the peer calls itself {name!r:.80}, and {found!r:.80} in its description")
            elif not known:
                raise LinkLost("the peer has not described its memory")
            self._peers[name] = meta or known, users + 1
            idle = [name for name, (_, users) in self._peers.items() if not users]
            for other in idle[: max(0, len(self._peers) - PEERS)]:
                self._remove(other)

    def leave(self, name: str, lost: bool) -> None:
        """Nothing more is read. `lost`: something went wrong, and it is to describe itself anew."""
        if name == self.name:
            return
        with self._lock:
            meta, users = self._peers.get(name, (b"", 1))
            self._peers[name] = meta, max(0, users - 1)
            if lost and users <= 1:
                self._remove(name)

    def _remove(self, name: str) -> None:
        del self._peers[name]
        with contextlib.suppress(Exception):
            self._agent.remove_remote_agent(name)

    def read(self, peer: str, address: int, into: np.ndarray[Any, Any], alive: Callable[[], None]) -> None:
        """Fill `into` with what lies there. `alive` is called every now and then, and may raise."""
        local = self._agent.get_xfer_descs([(into.ctypes.data, into.nbytes, 0)], "DRAM")
        remote = self._agent.get_xfer_descs([(address, into.nbytes, 0)], "DRAM")
        handle = _tried("nothing can be read there", lambda: self._agent.initialize_xfer("READ", local, remote, peer))
        done = False
        try:
            state = _tried("the read failed", lambda: self._agent.transfer(handle))
            begun = beat = time.monotonic()
            while state == "PROC":
                now = time.monotonic()
                if now - begun > STALLED:
                    raise LinkLost(f"a read took more than {STALLED:g} s")
                if now - beat > BEAT:
                    alive()
                    beat = now
                time.sleep(0 if now - begun < 0.001 else 0.0002)
                state = _tried("the read failed", lambda: self._agent.check_xfer_state(handle))
            done = state == "DONE"
            if not done:
                raise LinkLost(f"the read ended as {state}")
        finally:
            try:
                self._agent.release_xfer_handle(handle)
            except Exception as error:
                if not done:
                    _log.warning("a read could not be stopped, and its memory stays: %s", error)
                    _lost.append(into)


class Receiver:
    """Rows that are read into."""

    def __init__(self, agent: Agent, row_bytes: int, count: int) -> None:
        self._agent, self._row_bytes = agent, row_bytes
        self._flat = memory.zeros(max(1, row_bytes * count))
        self._registered = agent.register(self._flat)
        self._block = self._flat[: row_bytes * count].reshape(count, row_bytes)
        self._peer = ""

    def greet(self, link: Link, seconds: float) -> None:
        pass

    def take(self, link: Link, start: int, count: int, seconds: float) -> None:
        offer = _offer(link, seconds)
        if offer.row_bytes != self._row_bytes:
            raise LinkLost(f"rows of {offer.row_bytes} bytes came for rows of {self._row_bytes}")
        if not self._peer:
            self._agent.meet(offer.agent, offer.meta)
            self._peer = offer.agent
        elif offer.agent != self._peer:
            raise LinkLost("rows are offered by another agent than before")
        rows = self._block[start : start + count].reshape(-1)
        try:
            self._agent.read(self._peer, offer.address, rows, lambda: link.write(READING, seconds))
        except LinkLost:
            self._leave(lost=True)
            raise
        link.write(DONE, seconds)

    def row(self, index: int) -> Row:
        return self._block[index]

    def close(self) -> None:
        self._leave(lost=False)
        registered, self._registered = self._registered, None
        if registered is not None:
            self._agent.forget(registered)
        self._flat = np.empty(0, np.uint8)
        self._block = np.empty((0, 0), np.uint8)

    def _leave(self, lost: bool) -> None:
        peer, self._peer = self._peer, ""
        if peer:
            self._agent.leave(peer, lost)


class Sender:
    """A block of rows that others read."""

    def __init__(self, agent: Agent, row_bytes: int) -> None:
        self._agent, self._row_bytes = agent, row_bytes
        self._held: tuple[np.ndarray[Any, Any], Any] | None = None
        self._told: Any = None  # the memory that the peer knows of

    def rows(self, start: int, count: int) -> list[Row]:
        needed = count * self._row_bytes
        if self._held is None or len(self._held[0]) < needed:
            self.close()
            self._held = self._agent.block(needed)
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
            self._agent.give_back(*held)


class Transport:
    name, near = "nixl", False

    def __init__(self) -> None:
        if find_spec("nixl") is None:
            name = "disaggregation_transfer_backend"
            raise ConfigError(f"{name}: nixl is not installed: pip install 'phloem[nixl]'", param=name)
        self._sockets = Sockets()
        try:
            self._agent = Agent()  # now, as UCX looks at all networks of the machine: peers would not wait for that
        except Exception as error:
            name = "disaggregation_transfer_backend"
            raise ConfigError(f"{name}: nixl: {type(error).__name__}: {error}", param=name) from None

    def listen(self, host: str) -> tuple[socket.socket, str]:
        return self._sockets.listen(host)

    def connect(self, address: str, host: str, seconds: float) -> socket.socket:
        return self._sockets.connect(address, host, seconds)

    def receiver(self, row_bytes: int, count: int) -> Receiver:
        return Receiver(self._agent, row_bytes, count)

    def sender(self, link: Link, row_bytes: int, count: int, seconds: float) -> Sender:
        return Sender(self._agent, row_bytes)


def _region(block: np.ndarray[Any, Any]) -> list[tuple[int, int, int, str]]:
    return [(block.ctypes.data, block.nbytes, 0, "")]


def _tried(what: str, work: Callable[[], Any]) -> Any:
    """NIXL's errors as the peer's or the network's fault. Raises LinkLost."""
    try:
        return work()
    except Exception as error:
        raise LinkLost(f"nixl: {what}: {type(error).__name__} {error}".rstrip()) from None


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
