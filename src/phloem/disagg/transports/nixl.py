"""NIXL: decode reads rows out of the prefill server's memory, over whatever UCX finds between the two machines.

Memory is registered with an agent, whose description of itself is what others must know to reach it.

https://github.com/ai-dynamo/nixl
"""

from __future__ import annotations

import contextlib
import threading
import time
import uuid
from collections import OrderedDict
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError
from phloem.disagg.transports._reading import BEAT, STALLED, Receiver, Sender, Spare
from phloem.disagg.transports.tcp import Transport as Sockets
from phloem.disagg.wire import LinkLost
from phloem.utils import log
from phloem.utils.nixl_agent import agent

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from phloem.disagg.transports._reading import Block
    from phloem.disagg.wire import Link

_log = log.get("disagg")

PEERS = 64  # agents that are remembered while nothing is read from them
# Of reads that could be neither finished nor stopped: somebody may write there until the end of the process.
_lost: list[Any] = []


class Agent:
    """This process among others. Its calls raise LinkLost where NIXL refuses something."""

    def __init__(self) -> None:
        self.name = f"phloem-{uuid.uuid4().hex}"
        self._agent: Any = agent(self.name, "UCX")
        self._lock = threading.Lock()
        self.spare = Spare()
        self._peers: OrderedDict[str, tuple[bytes, int]] = OrderedDict()  # what they said, and how many read from them

    def register(self, block: Block) -> Any:
        return _tried("memory was not registered", lambda: self._agent.register_memory(_region(block), "DRAM"))

    def forget(self, registered: Any) -> None:
        with contextlib.suppress(Exception):
            self._agent.deregister_memory(registered)

    def meta(self) -> bytes:
        return _tried("it does not describe itself", self._agent.get_agent_metadata)

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

    def read(self, peer: str, address: int, into: Block, alive: Callable[[], None]) -> None:
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
        return Receiver(lambda _: self._agent, row_bytes, count)

    def sender(self, link: Link, row_bytes: int, count: int, seconds: float) -> Sender:
        return Sender(self._agent, row_bytes)


def _region(block: Block) -> list[tuple[int, int, int, str]]:
    return [(block.ctypes.data, block.nbytes, 0, "")]


def _tried(what: str, work: Callable[[], Any]) -> Any:
    """NIXL's errors as the peer's or the network's fault. Raises LinkLost."""
    try:
        return work()
    except Exception as error:
        raise LinkLost(f"nixl: {what}: {type(error).__name__} {error}".rstrip()) from None
