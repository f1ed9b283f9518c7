"""What rank 0 says to the other ranks of its node, through memory that they share: one write, however many they are.

A ring of bytes has one writer and several readers, each of which goes at its own pace; the writer waits for the slowest
before it writes over what that one has not read. Writing is no system call, so that whoever writes keeps the
interpreter's lock and wakes nobody who is awake. A reader looks for the next message for about a millisecond, then
sleeps on its socket, on which it is woken by a frame without bytes. What is larger than half the ring goes by the
sockets, in its turn.

Written bytes are seen in the order of writing on x86 alone, as those of `distributed.shm`: elsewhere messages go by the
sockets. What a sleeper must not miss needs more: it says that it sleeps and looks once more, the writer writes and
looks for sleepers, and each has a full barrier between the two, which taking a lock is.
"""

from __future__ import annotations

import mmap
import os
import select
import threading
from time import monotonic
from typing import TYPE_CHECKING

from phloem.utils.ipc import READ_BYTES, Frames, frame

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from pathlib import Path

SIZE = 1 << 20  # bytes of the ring
WORD, LINE = 8, 64  # bytes of a number, and between two that different processes write
ELSEWHERE = -1  # in the place of a length: the message comes by the socket
SPINS, YIELDS = 300, 2500  # looks before the core is offered to others, and before a reader sleeps
DOZE = 0.5  # seconds of one sleep: a wake-up that was lost costs no more
NAP = 0.0002  # seconds between two looks of a writer at a full ring
WAKE = frame(b"")  # of a sleeping reader


class _Memory:
    """A line with how much was written so far; of each reader a line with how much it has read, and whether it sleeps;
    then the ring."""

    def __init__(self, place: Path, readers: int, *, new: bool) -> None:
        head = LINE * (1 + readers)
        if new:
            with place.open("xb") as file:
                file.truncate(head + SIZE)
        descriptor = os.open(place, os.O_RDWR)
        try:
            whole = memoryview(mmap.mmap(descriptor, head + SIZE))
        finally:
            os.close(descriptor)
        self.numbers, self.data = whole[:head].cast("q"), whole[head:]
        self.lengths = self.data.cast("q")
        self._lock = threading.Lock()

    def barrier(self) -> None:
        """What was written before is seen by all before anything is read after."""
        with self._lock:
            pass


def _read_at(reader: int) -> int:
    return (reader + 1) * (LINE // WORD)


def _sleeps_at(reader: int) -> int:
    return _read_at(reader) + 1


def _room(size: int) -> int:
    """Bytes that a message takes, its length included; messages begin at whole numbers."""
    return WORD + -(-size // WORD) * WORD


class RingWriter:
    """Rank 0's end; used under a lock.

    Args:
        place: a file that does not exist yet, in memory.
        readers: how many there are.
        wake: sends `WAKE`, or a large message's frame, to one of them. Raises OSError when it has gone.
        patience: seconds that a reader may let the ring be full.
    """

    def __init__(self, place: Path, readers: int, wake: Callable[[int, bytes], None], patience: float) -> None:
        self._memory = _Memory(place, readers, new=True)
        self._wake, self._patience = wake, patience
        self._read_at = [_read_at(reader) for reader in range(readers)]
        self._sleeps_at = list(enumerate(_sleeps_at(reader) for reader in range(readers)))
        self._written = self._slowest = 0  # `_slowest`: what all have read, when that was last looked at

    def write(self, data: bytes, check: Callable[[], None]) -> None:
        """To all readers. `check` raises where one of them has gone, and is asked while the ring is full.

        Raises:
            TimeoutError: a reader does not read.
            OSError: it has gone.
        """
        whole = _room(len(data))
        large = whole > SIZE // 2
        if self._written + whole - self._slowest > SIZE:
            self._wait_for(WORD if large else whole, check)
        memory, at = self._memory, self._written % SIZE
        memory.lengths[at // WORD] = ELSEWHERE if large else len(data)
        if not large:
            first = (at + WORD) % SIZE
            end = SIZE - first
            if len(data) <= end:
                memory.data[first : first + len(data)] = data
            else:
                memory.data[first:], memory.data[: len(data) - end] = data[:end], data[end:]
        self._written += WORD if large else whole
        numbers = memory.numbers
        numbers[0] = self._written
        memory.barrier()
        for reader, at in self._sleeps_at:
            if numbers[at]:
                numbers[at] = 0
                self._wake(reader, WAKE)
        if large:
            framed = frame(data)
            for reader, _ in self._sleeps_at:
                self._wake(reader, framed)

    def _wait_for(self, size: int, check: Callable[[], None]) -> None:
        """Until the slowest reader has left so much room."""
        numbers, until = self._memory.numbers, 0.0
        while True:
            self._slowest = min(numbers[at] for at in self._read_at)
            if self._written + size - self._slowest <= SIZE:
                return
            check()
            until = until or monotonic() + self._patience
            if monotonic() > until:
                raise TimeoutError(f"it has not read for {self._patience:g} s")
            threading.Event().wait(NAP)


class RingReader:
    """A rank's end. `sock`: where it is woken, and where the writer's end is seen."""

    def __init__(self, place: Path, readers: int, reader: int, sock: socket.socket) -> None:
        self._memory = _Memory(place, readers, new=False)
        self._mine, self._sleeps = _read_at(reader), _sleeps_at(reader)
        self._socket, self._ready = sock, select.poll()
        self._ready.register(sock, select.POLLIN)
        self._frames = Frames()
        self._aside: list[bytes] = []  # large messages
        self._read = 0

    def read(self) -> bytes | None:
        """The next message; None when the writer has gone and all that it wrote was read."""
        numbers, looks = self._memory.numbers, 0
        while numbers[0] == self._read:
            looks += 1
            if looks < SPINS:
                continue
            if looks < YIELDS:
                os.sched_yield()
            elif not self._sleep():
                return None
        return self._take()

    def _take(self) -> bytes | None:
        memory, at = self._memory, self._read % SIZE
        size = memory.lengths[at // WORD]
        if size == ELSEWHERE:
            self._read += WORD
            memory.numbers[self._mine] = self._read
            while not self._aside:
                if not self._hear():
                    return None
            return self._aside.pop(0)
        first = (at + WORD) % SIZE
        end = min(SIZE - first, size)
        data = bytes(memory.data[first : first + end])
        if end < size:
            data += bytes(memory.data[: size - end])
        self._read += _room(size)
        memory.numbers[self._mine] = self._read
        return data

    def _sleep(self) -> bool:
        """Until something was written, or for a while. False: nobody writes any more."""
        numbers = self._memory.numbers
        numbers[self._sleeps] = 1
        self._memory.barrier()
        if numbers[0] == self._read and self._ready.poll(DOZE * 1000) and not self._hear():
            return numbers[0] != self._read
        numbers[self._sleeps] = 0
        return True

    def _hear(self) -> bool:
        """What has come by the socket. False: it was closed."""
        data = self._socket.recv(READ_BYTES)
        self._aside += [item for item in self._frames.cut(data) if item] if data else []
        return bool(data)
