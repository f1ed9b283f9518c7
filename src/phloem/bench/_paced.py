"""A server without a model for `bench router`: answers every request with a stream of so many events at a steady pace.

Run as `python -m phloem.bench._paced PORT EVENTS PAUSE`; port 0 takes a free one, which is printed.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from typing import cast

import httptools

from phloem.bench._http import run

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENT = (
    b'data: {"id":"chatcmpl-0","object":"chat.completion.chunk","created":0,"model":"paced",'
    b'"choices":[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
LAST = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
PLAIN = {
    b"/health": b'{"status":"ok"}',
    b"/v1/models": b'{"data":[{"id":"paced"}]}',
    b"/v1/loads": b'{"loads":[]}',
    b"/server_info": b"{}",
}


class Paced(asyncio.Protocol):
    """One connection; answers come in the order of their requests."""

    def __init__(self, events: int, pause: float) -> None:
        self._events, self._pause = events, pause
        self._parser = httptools.HttpRequestParser(self)
        self._path = b""
        self._waiting: deque[bytes] = deque()
        self._transport: asyncio.Transport | None = None
        self._left = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        self._path = url

    def on_message_complete(self) -> None:
        if self._transport is None:
            return
        plain = PLAIN.get(self._path)
        if plain is not None:
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(plain), plain))
            return
        self._transport.write(HEAD + CHUNK)
        self._left = self._events - 1
        asyncio.get_running_loop().call_later(self._pause, self._next)

    def _next(self) -> None:
        if self._transport is None:
            return
        if self._left <= 0:
            self._transport.write(LAST)
            return
        self._left -= 1
        self._transport.write(CHUNK)
        asyncio.get_running_loop().call_later(self._pause, self._next)


async def main(port: int, events: int, pause: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Paced(events, pause), "127.0.0.1", port, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    run(main(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
