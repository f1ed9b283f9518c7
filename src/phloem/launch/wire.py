"""What node 0 and a further node say to each other: one TCP stream of frames of plain data, opened by the further node.

Both show that they know the secret, where there is one, before anything else is read: each answers the other's random
bytes. What follows is neither sealed nor hidden: a network of one's own is assumed, as gloo and NCCL assume it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import select
import socket
import threading
from typing import Literal

import msgspec

from phloem.core.errors import ConfigError
from phloem.utils.ipc import READ_BYTES, Frames, frame
from phloem.utils.sockets import send_steadily

PROTOCOL = 1
NONCE = 32  # bytes
FIRST_BYTES = 1 << 20  # the most of a frame before its sender is known
HELLO_SECONDS = 10.0  # how long a handshake may take
BEAT = 0.5  # seconds between two signs of life
LOOK = 0.25  # seconds of one look at a stream
SILENT_NODE, SILENT_LEAD = 8, 60  # looks without a sign; node 0's process reads weights and compiles meanwhile
FOR_RANKS = b"\x00"  # before what is passed on to a node's ranks as it is: nothing packed begins so


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """Node 0's first word."""

    protocol: int
    version: str
    nonce: bytes
    secret: bool  # whether one is asked for


class Hello(msgspec.Struct, frozen=True, tag=True):
    """A node's answer: which one it is, and what must be alike. `proof`: see `proof_of`; `problem`: why it does not
    start, of one that has come to say that alone."""

    protocol: int
    version: str
    nonce: bytes
    proof: bytes
    node: int
    nodes: int
    facts: dict[str, str]
    problem: str = ""


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """It is let in; the others are waited for."""

    proof: bytes


class Refused(msgspec.Struct, frozen=True, tag=True):
    why: str


class Begin(msgspec.Struct, frozen=True, tag=True):
    """All are there: start ranks. They meet by `comm` on this node, and find those of others at `port` of node 0."""

    comm: str
    port: int


class Beat(msgspec.Struct, frozen=True, tag=True):
    """A sign of life."""


class Bye(msgspec.Struct, frozen=True, tag=True):
    """Node 0's last word: `again`, it starts again and waits for this node; otherwise it has done its work, or ends
    because of `why`."""

    why: str
    again: bool


class Word(msgspec.Struct, frozen=True, tag=True):
    """What a rank has said (`launch.child.Said`), or what became of it. `memory`: (free, all) bytes of the machine,
    once all ranks of the node have their weights; of a rank that has `measured`, of its device."""

    rank: int
    what: Literal["here", "loaded", "measured", "gone"]
    why: str = ""
    bytes_read: int = 0
    memory: tuple[int, int] | None = None


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Of `phloem doctor`: how long is it to a node and back, with these bytes?"""

    number: int
    data: bytes


class Echo(msgspec.Struct, frozen=True, tag=True):
    """The same back, with the node's clock, in seconds since 1970."""

    number: int
    clock: float
    data: bytes


FromLead = Challenge | Welcome | Refused | Begin | Beat | Bye | Ping
FromNode = Hello | Beat | Word | Echo
_FROM_LEAD: msgspec.msgpack.Decoder[FromLead] = msgspec.msgpack.Decoder(FromLead)
_FROM_NODE: msgspec.msgpack.Decoder[FromNode] = msgspec.msgpack.Decoder(FromNode)
from_lead, from_node = _FROM_LEAD.decode, _FROM_NODE.decode
_encode = msgspec.msgpack.Encoder().encode


def fresh() -> bytes:
    return os.urandom(NONCE)


def proof_of(secret: str, who: Literal["lead", "node"], theirs: bytes, own: bytes) -> bytes:
    """That one knows the secret, for both sides' random bytes."""
    return hmac.digest(secret.encode(), b"phloem " + who.encode() + theirs + own, hashlib.sha256)


def proves(proof: bytes, secret: str, who: Literal["lead", "node"], theirs: bytes, own: bytes) -> bool:
    """`theirs`, `own`: as the one who proves has them."""
    return hmac.compare_digest(proof, proof_of(secret, who, theirs, own))


class Lost(ConnectionError):
    """The other side has gone, or says what nobody understands."""


class Stream:
    """One end. Frames are sent from any thread, and read by one."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(HELLO_SECONDS)
        self._socket, self._sending = sock, threading.Lock()
        self._frames, self._ahead = Frames(FIRST_BYTES), list[bytes]()
        self.here: str = sock.getsockname()[0]
        self.there = "{}:{}".format(*sock.getpeername()[:2])

    def trust(self, seconds: float) -> None:
        """Who is there is known: frames of any size, and that many seconds for one to be taken."""
        self._frames.most = None
        self._socket.settimeout(seconds)

    def send(self, message: FromLead | FromNode) -> None:
        """Raises OSError when the other side has gone, or takes nothing."""
        self.send_raw(frame(_encode(message)))

    def finish(self, message: FromLead | FromNode) -> None:
        """The last message; what the other side says is still read. Raises OSError, as `send`."""
        self.send(message)
        self._socket.shutdown(socket.SHUT_WR)

    def send_raw(self, framed: bytes) -> None:
        with self._sending:
            send_steadily(self._socket, framed)

    def read(self, seconds: float) -> bytes | None:
        """The next frame; None: nothing has come within that time. Raises Lost."""
        while not self._ahead:
            # Asked once more where the time is over: this process may have slept longer than the other was silent.
            if not (self._waits(seconds) or self._waits(0)):
                return None
            try:
                data = self._socket.recv(READ_BYTES)
                found = self._frames.cut(data)
            except TimeoutError:
                return None
            except (OSError, ValueError) as error:
                raise Lost(str(error)) from None
            if not data:
                raise Lost("it closed the connection")
            self._ahead += found
        return self._ahead.pop(0)

    def close(self) -> None:
        """From any thread; who reads is told."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _waits(self, seconds: float) -> bool:
        try:
            ready = select.poll()
            ready.register(self._socket, select.POLLIN)
            return bool(ready.poll(seconds * 1000))
        except (OSError, ValueError) as error:  # closed meanwhile
            raise Lost(str(error)) from None


def resolve(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[str, int]]]:
    """Where a name lies. Raises ConfigError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # the latter: what no name can be
        raise ConfigError(f"dist_init_addr: {host!r}: {error}", param="dist_init_addr") from None
    return [(family, address[:2]) for family, _, _, _, address in found]  # pyright: ignore
