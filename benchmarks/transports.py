"""Rows of pages from one process to another of this machine, without engines: what each way of them takes.

    python benchmarks/transports.py [--backends shm,tcp] [--row-bytes 737280] [--rows 64] [--times 8]

One transfer is a prompt of `--rows` pages in parts of 16: the sender fills rows from its memory, the receiver copies
them to memory of its own, as engines do. Told are the first transfer, in fresh memory, and the median of the later
ones, until all is copied and (`there_`) until the last row can be; beside them a copy in memory and a plain socket.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import statistics
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from phloem.disagg.transports import TRANSPORTS
from phloem.disagg.wire import Link, Pages
from phloem.utils import memory

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

PART, SECONDS = 16, 60.0


def send(backend: str, row_bytes: int, rows: int, times: int, told: Connection) -> None:
    """The process that is asked."""
    transport = TRANSPORTS.get(backend)()
    sock, address = transport.listen("127.0.0.1")
    told.send(address)
    pages = memory.zeros(row_bytes * rows).reshape(rows, row_bytes)
    pages[:] = np.arange(rows, dtype=np.uint8)[:, None]
    for _ in range(times):
        link = Link(sock.accept()[0])
        sender = transport.sender(link, row_bytes, rows, SECONDS)
        for start in range(0, rows, PART):
            count = min(PART, rows - start)
            for row, page in zip(sender.rows(start, count), pages[start:], strict=False):
                row[:] = page
            link.send(Pages(start, count), SECONDS)
            sender.push(link, start, count, SECONDS)
        link.receive(SECONDS)
        sender.close()
        link.close()


def measure(backend: str, row_bytes: int, rows: int, times: int) -> dict[str, Any]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=send, args=(backend, row_bytes, rows, times, theirs))
    process.start()
    try:
        address, transport = ours.recv(), TRANSPORTS.get(backend)()
        pages = memory.zeros(row_bytes * rows).reshape(rows, row_bytes)
        pages[:] = 0
        seconds: list[float] = []
        there: list[float] = []
        for _ in range(times):
            begun = time.perf_counter()
            link = Link(transport.connect(address, "127.0.0.1", SECONDS))
            receiver = transport.receiver(row_bytes, rows)
            receiver.greet(link, SECONDS)
            at = 0
            while at < rows:
                message = link.receive(SECONDS)
                assert isinstance(message, Pages)
                receiver.take(link, message.start, message.count, SECONDS)
                at += message.count
            there.append(time.perf_counter() - begun)
            for row in range(rows):
                pages[row] = receiver.row(row)
            seconds.append(time.perf_counter() - begun)
            assert (pages == np.arange(rows, dtype=np.uint8)[:, None]).all()
            receiver.close()
            link.send(Pages(0, 0), SECONDS)
            link.close()
    finally:
        process.join(SECONDS)
    found: dict[str, Any] = {}
    for name, times_of in (("", seconds), ("there_", there)):
        speeds = [row_bytes * rows / one / 1e9 for one in times_of]
        found |= {f"{name}first_gb_s": round(speeds[0], 2)}
        found |= {f"{name}later_gb_s": round(statistics.median(speeds[1:]), 2)}
    return found


def copied(nbytes: int) -> float:
    one, other = memory.zeros(nbytes), memory.zeros(nbytes)
    one[:], other[:] = 1, 2
    times: list[float] = []
    for _ in range(8):
        begun = time.perf_counter()
        other[:] = one
        times.append(time.perf_counter() - begun)
    return nbytes / statistics.median(times) / 1e9


def through_a_socket(nbytes: int) -> float:
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    data, into = bytes(nbytes), memoryview(bytearray(nbytes))
    begun, at = time.perf_counter(), 0
    thread = threading.Thread(target=ours.sendall, args=(data,))
    thread.start()
    while at < nbytes:
        at += theirs.recv_into(into[at:])
    thread.join()
    return nbytes / (time.perf_counter() - begun) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backends", default="shm,tcp")
    parser.add_argument("--row-bytes", type=int, default=737280)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--times", type=int, default=8)
    args = parser.parse_args()
    nbytes = args.row_bytes * args.rows
    print(json.dumps({"copy_gb_s": round(copied(nbytes), 2), "socket_gb_s": round(through_a_socket(nbytes), 2)}))
    for backend in args.backends.split(","):
        print(json.dumps({backend: measure(backend, args.row_bytes, args.rows, args.times)}), flush=True)


if __name__ == "__main__":
    main()
