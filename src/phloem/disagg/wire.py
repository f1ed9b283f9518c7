"""What a decode server and a prefill server say to each other: frames of msgpack behind their length, never pickles.

decode                                    prefill
Ask: room, facts, pages that it has  ->
                                     <-   Refused, and why
                                     <-   Pages: those from `start` on have been computed, and are there
                                     <-   Alive: nothing new, every half second
                                     <-   Done: the first token, and what belongs to it
Got: all of it is here               ->
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from dataclasses import dataclass
from hashlib import blake2b
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from phloem.utils.sockets import PIECE, send_steadily

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

VERSION = 2
MOST_BYTES = 64 << 20  # of a frame: log probabilities of a long prompt are the longest
MOST_ASKED = 64 << 10  # of the frame that begins a connection
_LENGTH = struct.Struct(">I")


class LinkLost(Exception):
    """The peer has gone, is silent, or says what cannot be understood."""


class Ask(msgspec.Struct, tag=True, frozen=True):
    """Decode wants a room's pages [start, end). `digest`: of the prompt and its adapter, so that no room is taken for
    another."""

    room: str
    digest: bytes
    start: int
    end: int
    facts: dict[str, str]
    version: int = VERSION


class Refused(msgspec.Struct, tag=True, frozen=True):
    reason: str


class Pages(msgspec.Struct, tag=True, frozen=True):
    start: int
    count: int


class Alive(msgspec.Struct, tag=True, frozen=True):
    pass


class Position(msgspec.Struct, frozen=True, array_like=True):
    """As `core.batch.PositionLogprobs`."""

    token: float
    top: list[tuple[float, int]] = []
    chosen: list[tuple[float, int]] = []


class Done(msgspec.Struct, tag=True, frozen=True, omit_defaults=True):
    """`weights`: the version of those that computed it. `cached`: prompt tokens that prefill had already."""

    token: int
    weights: str
    cached: int = 0
    logprobs: list[Position] = []
    prompt_logprobs: list[Position] = []
    hidden: list[bytes] = []


class Got(msgspec.Struct, tag=True, frozen=True):
    pass


Message = Ask | Refused | Pages | Alive | Done | Got

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def digest_of(prompt: NDArray[Any], adapter: str = "") -> bytes:
    """`adapter`: what it is (`core.adapters.Lent.content`); "": none."""
    found = blake2b(prompt.astype("<i4").tobytes(), digest_size=16)
    if adapter:
        found.update(b"\0" + adapter.encode())
    return found.digest()


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    """What keeps two servers from sharing pages, by name; "": nothing."""
    names = sorted(ours.keys() | theirs.keys())
    wrong = [
        f"{name} is {theirs.get(name, 'not told')!r:.100} there and {ours.get(name, 'not told')!r:.100} here"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]
    return "; ".join(wrong)


@dataclass(eq=False)
class Link:
    """Frames over a socket. Every call raises `LinkLost` where the peer has gone."""

    sock: socket.socket

    def send(self, message: Message, seconds: float) -> None:
        data = _encoder.encode(message)
        self.write(_LENGTH.pack(len(data)) + data, seconds)

    def write(self, data: bytes | memoryview, seconds: float) -> None:
        """`seconds`: how long the peer may take nothing. How long all of it takes is a matter of the network."""
        try:
            self.sock.settimeout(seconds)
            send_steadily(self.sock, data)
        except OSError as error:
            raise LinkLost(f"the peer takes nothing: {error.strerror or error}") from None

    def receive(self, seconds: float) -> Message:
        """The next frame; `seconds`: how long the peer may be silent."""
        return self._frame(MOST_BYTES, seconds, float("inf"))

    def receive_first(self, seconds: float) -> Message:
        """The frame that begins a connection, from who may be anybody; `seconds`: how long all of it may take."""
        return self._frame(MOST_ASKED, seconds, monotonic() + seconds)

    def _frame(self, most: int, seconds: float, deadline: float) -> Message:
        head = bytearray(_LENGTH.size)
        self.read_into(memoryview(head), seconds, deadline)
        (size,) = _LENGTH.unpack(head)
        if size > most:
            raise LinkLost(f"a frame of {size} bytes is longer than {most}")
        data = bytearray()
        while len(data) < size:  # memory is taken for what has come, not for what is promised
            piece = bytearray(min(PIECE, size - len(data)))
            self.read_into(memoryview(piece), seconds, deadline)
            data += piece
        try:
            return _decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise LinkLost(f"a frame that is none: {error}") from None

    def read_into(self, view: memoryview, seconds: float, deadline: float = float("inf")) -> None:
        at = 0
        try:
            while at < len(view):
                self.sock.settimeout(min(seconds, left(deadline)))
                count = self.sock.recv_into(view[at:])
                if not count:
                    raise LinkLost("the peer has closed the connection")
                at += count
        except TimeoutError:
            raise LinkLost(f"nothing was heard for {seconds:g} s") from None
        except OSError as error:
            raise LinkLost(f"the connection broke: {error.strerror or error}") from None

    def gone(self) -> bool:
        """Whether the peer has closed it, or says what it should not."""
        try:
            return bool(select.select([self.sock], [], [], 0)[0])
        except (OSError, ValueError):
            return True

    def hang_up(self) -> None:
        """From another thread: whoever reads or writes here stops at once."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.sock.close()


def left(deadline: float) -> float:
    return max(0.001, deadline - monotonic())
