"""What is said through shared memory: in order, whole, of any size, at each reader's pace, and never lost."""

from __future__ import annotations

import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from phloem.core.errors import EngineDead
from phloem.launch import ring
from phloem.launch.ring import RingReader, RingWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cores are offered to others as Linux does")


class Ends:
    """A writer and its readers, with their sockets."""

    def __init__(self, folder: Path, readers: int, patience: float = 20.0) -> None:
        self.pairs = [socket.socketpair() for _ in range(readers)]
        self.woken = [0] * readers
        self.writer = RingWriter(folder / "told", readers, self._wake, patience)
        self.readers = [
            RingReader(folder / "told", readers, at, theirs) for at, (_, theirs) in enumerate(self.pairs)
        ]  # fmt: skip

    def _wake(self, reader: int, data: bytes) -> None:
        self.woken[reader] += data == ring.WAKE
        self.pairs[reader][0].sendall(data)

    def hang_up(self) -> None:
        for ours, _ in self.pairs:
            ours.close()

    def close(self) -> None:
        for pair in self.pairs:
            for end in pair:
                end.close()


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Ends]]:
    made: list[Ends] = []

    def one(*args: Any, **named: Any) -> Ends:
        made.append(Ends(tmp_path, *args, **named))
        return made[-1]

    yield one
    for ends in made:
        ends.close()


def nobody_has_gone() -> None:
    pass


def listen(reader: RingReader, into: list[bytes], pace: float = 0.0) -> threading.Thread:
    def work() -> None:
        while (data := reader.read()) is not None:
            into.append(data)
            if pace:
                time.sleep(pace)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("readers", [1, 3])
def test_all_is_read_in_order_by_each_reader_at_its_own_pace(
    readers: int, make: Callable[..., Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a ring so small that it is full often, of sizes that end anywhere in it, some of them by the sockets."""
    monkeypatch.setattr(ring, "SIZE", 256)
    ends, clock = make(readers), random.Random(3)
    sent = [bytes(clock.randbytes(clock.choice((0, 1, 7, 8, 9, 60, 119, 120, 121, 5000)))) for _ in range(300)]
    heard: list[list[bytes]] = [[] for _ in range(readers)]
    threads = [
        listen(reader, into, 0.0003 * at)
        for at, (reader, into) in enumerate(zip(ends.readers, heard, strict=True))
    ]  # fmt: skip
    for data in sent:
        ends.writer.write(data, nobody_has_gone)
    ends.hang_up()  # what was written is read all the same
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert heard == [sent] * readers


def test_who_sleeps_is_woken_and_who_is_awake_is_not(make: Callable[..., Ends]) -> None:
    ends, heard = make(1), list[bytes]()
    thread = listen(ends.readers[0], heard)
    for turn in range(20):
        until = time.monotonic() + 10
        while not ends.readers[0]._memory.numbers[ends.readers[0]._sleeps] and time.monotonic() < until:  # pyright: ignore[reportPrivateUsage]
            time.sleep(0.001)
        ends.writer.write(b"%d" % turn, nobody_has_gone)
    assert ends.woken[0] >= 10  # others have slept their while on a busy machine, and just look again
    for _ in range(500):
        ends.writer.write(b"more", nobody_has_gone)
    ends.hang_up()
    thread.join(20)
    assert heard == [b"%d" % turn for turn in range(20)] + [b"more"] * 500
    assert ends.woken[0] < 300


def test_a_reader_that_does_not_read_is_told_of_and_one_that_has_gone_too(
    make: Callable[..., Ends], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "SIZE", 256)
    ends = make(2, patience=0.05)
    heard: list[bytes] = []
    listen(ends.readers[0], heard)

    def write(check: Callable[[], None]) -> None:
        for _ in range(20):
            ends.writer.write(b"x" * 40, check)

    with pytest.raises(TimeoutError, match=r"has not read for 0\.05 s"):
        write(nobody_has_gone)

    def gone() -> None:
        raise EngineDead("rank 2 of 3 has gone")

    with pytest.raises(EngineDead, match="rank 2 of 3"):
        write(gone)
