"""Mooncake's transfer engine: decode reads rows out of the prefill server's memory, by its TCP transport.

An engine is known by a host and a port of its own, at which others ask it where its memory lies (`P2PHANDSHAKE`: no
metadata server). It answers for memory that was registered and for none else.

https://github.com/kvcache-ai/Mooncake; its calls give 0, or a negative number, and let other threads run meanwhile.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from phloem.core.errors import ConfigError
from phloem.disagg.transports._reading import BEAT, STALLED, Receiver, Sender, Spare
from phloem.disagg.transports.tcp import Transport as Sockets
from phloem.disagg.wire import LinkLost
from phloem.utils import log

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from phloem.disagg.transports._reading import Block
    from phloem.disagg.wire import Link

_log = log.get("disagg")

PARAM = "disaggregation_transfer_backend"
_lost: list[Any] = []  # memory that a read which did not end may still be written to


class Agent:
    """An engine at one of this machine's addresses. `kind`: its class."""

    def __init__(self, kind: Any, host: str) -> None:
        self._engine: Any = kind()
        if self._engine.initialize(host, "P2PHANDSHAKE", "tcp", ""):
            raise LinkLost(f"mooncake: no transfer engine begins at {host}")
        self.name = f"{host}:{self._engine.get_rpc_port()}"
        self.spare = Spare()

    def register(self, block: Block) -> int:
        if code := self._engine.register_memory(block.ctypes.data, block.nbytes):
            raise LinkLost(f"mooncake: memory was not registered: {code}")
        return block.ctypes.data

    def forget(self, registered: int) -> None:
        self._engine.unregister_memory(registered)

    def meta(self) -> bytes:
        return b""  # its name is enough

    def meet(self, name: str, meta: bytes) -> None:
        if not name.rpartition(":")[2].isdigit():
            raise LinkLost(f"{name!r:.80} is no transfer engine")

    def leave(self, name: str, lost: bool) -> None:
        pass

    def read(self, peer: str, address: int, into: Block, alive: Callable[[], None]) -> None:
        codes: list[int] = []
        place = into.ctypes.data, address, into.nbytes

        def work() -> None:
            codes.append(self._engine.transfer_sync_read(peer, *place))

        # Apart, as the call has no limit of time.
        thread = threading.Thread(target=work, name="phloem-mooncake", daemon=True)
        thread.start()
        end = time.monotonic() + STALLED
        try:
            thread.join(BEAT)
            while thread.is_alive():
                if time.monotonic() > end:
                    raise LinkLost(f"a read took more than {STALLED:g} s")
                alive()
                thread.join(BEAT)
        finally:
            if thread.is_alive():
                _log.warning("a read could not be stopped, and its memory stays")
                _lost.append(into)
        if codes != [0]:
            raise LinkLost(f"mooncake: the read from {peer} failed: {codes}")


class Transport:
    name, near = "mooncake", False

    def __init__(self) -> None:
        try:
            from mooncake.engine import TransferEngine  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            wheel, libraries = "mooncake-transfer-engine-non-cuda", "libibverbs1 librdmacm1"
            text = f"{PARAM}: mooncake: {error}: pip install {wheel}, and {libraries} of the system"
            raise ConfigError(text, param=PARAM) from None
        self._kind: Any = TransferEngine
        self._sockets = Sockets()
        self._lock = threading.Lock()
        self._agents: dict[str, Agent] = {}

    def listen(self, host: str) -> tuple[socket.socket, str]:
        return self._sockets.listen(host)

    def connect(self, address: str, host: str, seconds: float) -> socket.socket:
        return self._sockets.connect(address, host, seconds)

    def receiver(self, row_bytes: int, count: int) -> Receiver:
        return Receiver(self._agent, row_bytes, count)

    def sender(self, link: Link, row_bytes: int, count: int, seconds: float) -> Sender:
        return Sender(self._agent(link), row_bytes)

    def _agent(self, link: Link) -> Agent:
        """The one at the address by which this peer knows this machine. Raises LinkLost."""
        try:
            host = str(link.sock.getsockname()[0]).removeprefix("::ffff:")
        except OSError as error:
            raise LinkLost(f"the connection broke: {error.strerror or error}") from None
        with self._lock:
            found = self._agents.get(host)
            if found is None:
                found = self._agents[host] = Agent(self._kind, f"[{host}]" if ":" in host else host)
            return found
