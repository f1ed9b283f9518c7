"""Cache events over ZeroMQ, framed as vLLM, SGLang and Dynamo frame them.

PUB: [topic, sequence number (8 bytes, big-endian), msgpack [seconds, events, rank]]. ROUTER, for who missed some:
[id, "", first wanted (8 bytes)] is answered by [id, "", number, payload] of each that is still known, and by number -1.
One thread encodes and sends; the scheduler only hands lists over.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import uuid
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from phloem.core.errors import ConfigError
from phloem.kvcache.events import as_array, as_map
from phloem.utils import log

if TYPE_CHECKING:
    from phloem.kvcache.events import Event

_log = log.get("events")

END = (-1).to_bytes(8, "big", signed=True)
LINGER_MS = 200  # at the end, for what has been sent already


class EventsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`--kv-events-config` as vLLM and SGLang spell it."""

    publisher: Literal["zmq", "null"] = "zmq"
    endpoint: str = "tcp://*:5557"
    replay_endpoint: str | None = None
    topic: str = ""
    buffer_steps: int = 10_000  # messages that can be had again
    hwm: int = 100_000  # messages that wait for slow readers
    max_queue_size: int = 100_000  # events that wait for the thread that sends them
    bind: bool | None = None  # default: where the host is *, 0.0.0.0, :: or no host at all
    format: Literal["default", "map", "array"] = "default"
    enable_kv_cache_events: bool = True

    @property
    def wanted(self) -> bool:
        return self.publisher == "zmq" and self.enable_kv_cache_events


def read_config(text: str) -> EventsConfig:
    """From its JSON.

    Raises:
        ConfigError: naming what is wrong, or that pyzmq is missing.
    """
    try:
        config = msgspec.json.decode(text, type=EventsConfig)
    except msgspec.DecodeError as error:
        known = ", ".join(EventsConfig.__struct_fields__)
        raise ConfigError(f"kv_events_config: {error}; known: {known}", param="kv_events_config") from None
    for name in ("buffer_steps", "hwm", "max_queue_size"):
        if getattr(config, name) < 1:
            raise ConfigError(f"kv_events_config: {name} must be above 0", param="kv_events_config")
    return config


def binds(endpoint: str) -> bool:
    """Whether a PUB socket listens there, or else connects."""
    scheme, _, rest = endpoint.partition("://")
    host = rest.rpartition(":")[0].strip("[]")
    return scheme in ("ipc", "inproc") or host in ("*", "0.0.0.0", "::")


class ZmqPublisher:
    """A sink that sends. Raises ConfigError where an endpoint cannot be had."""

    def __init__(self, config: EventsConfig, page_size: int, rank: int = 0) -> None:
        try:
            import zmq
        except ImportError:
            text = "kv_events_config needs pyzmq: pip install 'phloem[events]'"
            raise ConfigError(text, param="kv_events_config") from None
        self._zmq = zmq
        self._config, self._page_size, self._rank = config, page_size, rank
        self._instance = uuid.uuid4().hex  # tells whoever follows that another process has begun
        self._encode = msgspec.msgpack.Encoder().encode
        self._shape = as_array if config.format == "array" else as_map
        self._waiting: deque[list[Event]] = deque()
        self._room = config.max_queue_size
        self._count = 0  # events in `_waiting`
        self._sequence = 0  # of messages that were handed over
        self._sent = 0
        self._kept: deque[tuple[bytes, bytes]] = deque(maxlen=config.buffer_steps)
        self._closing = False
        self._context = zmq.Context()
        self._pub = self._context.socket(zmq.PUB)
        self._pub.setsockopt(zmq.SNDHWM, config.hwm)
        self._router: Any = None
        self.bound = binds(config.endpoint) if config.bind is None else config.bind
        self.endpoint = self._open(self._pub, config.endpoint, self.bound)
        if not self.bound:
            text = (
                "cache events go to whoever listens at %s: nobody can subscribe here; with a host of * or bind they can"
            )
            _log.warning(text, self.endpoint)
        self.replay_endpoint: str | None = None
        if config.replay_endpoint:
            self._router = self._context.socket(zmq.ROUTER)
            self.replay_endpoint = self._open(self._router, config.replay_endpoint, True)
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="phloem-kv-events", daemon=True)
        self._thread.start()

    def _open(self, sock: Any, endpoint: str, bind: bool) -> str:
        place = _with_rank(endpoint, self._rank)
        try:
            if bind:
                sock.bind(place)
                return sock.getsockopt_string(self._zmq.LAST_ENDPOINT) if place.endswith(":*") else place
            sock.connect(place)
        except self._zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise ConfigError(f"kv_events_config: {place}: {error}", param="kv_events_config") from None
        return place

    # the scheduler's thread

    @property
    def sequence(self) -> int:
        return self._sequence

    def put(self, events: list[Event]) -> bool:
        """One message; refused where too much waits. The first one is always taken, however long."""
        if self._count and self._count + len(events) > self._room:
            return False
        self._count += len(events)
        self._sequence += 1
        self._waiting.append(events)
        self._ring()
        return True

    def _ring(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been rung often enough
            self._bell.send(b"!")

    def close(self) -> None:
        """What was handed over is sent first. Harmless when repeated."""
        if self._closing:
            return
        self._closing = True
        self._ring()
        self._thread.join(timeout=5.0)

    def info(self) -> dict[str, Any]:
        """What `/server_info` advertises."""
        host, _, port = self.endpoint.rpartition(":")
        found: dict[str, Any] = {
            "publisher": "zmq",
            "instance": self._instance,
            "endpoint": self.endpoint,
            "bound": self.bound,
            "endpoint_host": host.partition("://")[2],
            "endpoint_port_base": int(port) - self._rank if port.isdigit() else None,
            "topic": self._config.topic,
            "block_size": self._page_size,
            "dp_size": 1,
            "format": "array" if self._config.format == "array" else "map",
        }
        if self.replay_endpoint is not None:
            port = self.replay_endpoint.rpartition(":")[2]
            found["replay_endpoint"] = self.replay_endpoint
            found["replay_endpoint_port_base"] = int(port) - self._rank if port.isdigit() else None
        return found

    # the thread of its own

    def _run(self) -> None:
        zmq, poller = self._zmq, self._zmq.Poller()
        poller.register(self._ear, zmq.POLLIN)
        if self._router is not None:
            poller.register(self._router, zmq.POLLIN)
        try:
            while not (self._closing and not self._waiting):
                ready = dict(poller.poll())
                if self._ear.fileno() in ready or self._ear in ready:
                    self._ear.recv(4096)
                self._send_all()
                if self._router is not None and self._router in ready:
                    self._replay()
        except Exception:
            _log.exception("the publisher of cache events ended; none are sent any more")
        finally:
            self._context.destroy(linger=LINGER_MS)
            self._bell.close()
            self._ear.close()

    def _send_all(self) -> None:
        while self._waiting:
            events = self._waiting.popleft()
            self._count -= len(events)
            number = self._sent.to_bytes(8, "big")
            self._sent += 1
            size = self._page_size
            payload = self._encode([time.time(), [self._shape(event, size) for event in events], self._rank])
            self._kept.append((number, payload))
            self._pub.send_multipart((self._config.topic.encode(), number, payload))

    def _replay(self) -> None:
        frames = self._router.recv_multipart()
        if len(frames) != 3 or len(frames[2]) != 8:
            _log.warning("a request for cache events has %d frames, not [id, '', 8 bytes]", len(frames))
            return
        client, first = frames[0], int.from_bytes(frames[2], "big")
        for number, payload in list(self._kept):
            if int.from_bytes(number, "big") >= first:
                self._router.send_multipart((client, b"", number, payload))
        self._router.send_multipart((client, b"", END, b""))


def _with_rank(endpoint: str, rank: int) -> str:
    """Rank r has the port behind that of rank r - 1."""
    if rank == 0:
        return endpoint
    head, _, port = endpoint.rpartition(":")
    return f"{head}:{int(port) + rank}" if port.isdigit() else f"{endpoint}_dp{rank}"
