"""How pages get from a prefill server to a decode server: a file for each way, with `Transport`.

Who is asked has pages in its pool, and copies them into rows that `Sender` gives; who asked finds them in the rows of
its `Receiver`. A row holds one page, layer behind layer (`kvcache/tiers/_copies.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from phloem.utils.registry import Registry

if TYPE_CHECKING:
    import socket

    from phloem.disagg.wire import Link

Row = np.ndarray[Any, np.dtype[np.uint8]]  # [page bytes]

MOST_ROOM = 16 << 30  # bytes of one prompt's pages that are taken from a peer


class Receiver(Protocol):
    """Rows for `count` pages, at the server that asks. Nothing is resident before it is written."""

    def greet(self, link: Link, seconds: float) -> None:
        """Behind the `Ask`: whatever the sender must be given. Raises LinkLost."""
        ...

    def take(self, link: Link, start: int, count: int, seconds: float) -> None:
        """Behind a `Pages`: these rows are to be filled. Raises LinkLost."""
        ...

    def row(self, index: int) -> Row: ...

    def close(self) -> None: ...


class Sender(Protocol):
    """At the server that is asked."""

    def rows(self, start: int, count: int) -> list[Row]:
        """To be filled, for `push`."""
        ...

    def push(self, link: Link, start: int, count: int, seconds: float) -> None:
        """Behind a `Pages`: bring these rows to the receiver. Raises LinkLost."""
        ...

    def close(self) -> None: ...


class Transport(Protocol):
    name: str
    near: bool  # only between processes of one machine

    def listen(self, host: str) -> tuple[socket.socket, str]:
        """A socket that accepts, and the address that peers know it by."""
        ...

    def connect(self, address: str, host: str, seconds: float) -> socket.socket:
        """`host`: what the peer's bootstrap server is called here. Raises OSError."""
        ...

    def receiver(self, row_bytes: int, count: int) -> Receiver: ...

    def sender(self, link: Link, row_bytes: int, count: int, seconds: float) -> Sender:
        """Behind the `Ask`. Raises LinkLost."""
        ...


TRANSPORTS: Registry[type[Any]] = Registry("phloem.disagg.transports", "transfer backend", "Transport")
