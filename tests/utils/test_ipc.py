"""The pipe between the two processes of a server: frames, order, nothing lost, and how its end is told."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable
from time import monotonic
from typing import Any

import pytest
import uvloop

from phloem.utils.ipc import DoorPipe, EnginePipe, Frames, frame


@pytest.fixture
async def pipes() -> AsyncIterator[tuple[DoorPipe, EnginePipe]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    door, engine = DoorPipe(ours), EnginePipe(theirs.detach())
    yield door, engine
    engine.close()
    door.close()


def test_frames_come_out_whole_however_they_are_cut() -> None:
    draw = random.Random(1)
    sent = [draw.randbytes(draw.choice([0, 1, 3, 4, 5, 300, 70_000])) for _ in range(200)]
    stream = b"".join(map(frame, sent))
    frames, got, at = Frames(), list[bytes](), 0
    while at < len(stream):
        size = draw.choice([1, 2, 3, 5, 100, 50_000])
        got += frames.cut(stream[at : at + size])
        at += size
    assert got == sent


async def take(door: DoorPipe, count: int) -> list[bytes]:
    """The first `count` messages; the door delivers once only."""
    got: list[bytes] = []

    def more(data: bytes) -> bool:
        got.append(data)
        return len(got) < count

    await asyncio.wait_for(door.deliver(more), 20)
    return got


async def test_messages_arrive_in_order_both_ways(pipes: tuple[DoorPipe, EnginePipe]) -> None:
    door, engine = pipes
    door.send(b"before the loop connects")
    reader = asyncio.create_task(take(door, 100))
    await asyncio.sleep(0.01)
    door.send(b"after")
    door.send(b"x" * 3_000_000)
    got: list[bytes] = []
    while len(got) < 3:
        got += await asyncio.to_thread(engine.poll, 1.0)
    assert got == [b"before the loop connects", b"after", b"x" * 3_000_000]
    for number in range(100):
        engine.send(b"%d" % number)
    assert await reader == [b"%d" % number for number in range(100)]


async def test_the_engine_never_waits_for_a_slow_door(pipes: tuple[DoorPipe, EnginePipe]) -> None:
    door, engine = pipes
    began = monotonic()
    large = [bytes([number]) * 1_000_000 for number in range(20)]  # far more than a socket takes
    for data in large:
        engine.send(data)
    assert monotonic() - began < 10.0
    assert engine.poll(0) == []
    # While it waits for messages, it sends what it kept.
    waiting = threading.Thread(target=lambda: engine.poll(20.0))
    waiting.start()
    assert await take(door, 20) == large
    door.send(b"that ends the wait")
    await asyncio.to_thread(waiting.join)


async def test_a_poll_ends_in_time_and_at_once_for_a_message(pipes: tuple[DoorPipe, EnginePipe]) -> None:
    door, engine = pipes
    reader = asyncio.create_task(take(door, 1))
    began = monotonic()
    assert engine.poll(0) == [] and engine.poll(0.05) == []
    assert 0.04 < monotonic() - began < 10.0
    asyncio.get_running_loop().call_later(0.05, door.send, b"now")
    assert await asyncio.to_thread(engine.poll, None) == [b"now"]
    engine.send(b"and back")
    assert await reader == [b"and back"]


async def test_the_end_of_the_engine_is_told_behind_its_last_words(pipes: tuple[DoorPipe, EnginePipe]) -> None:
    door, engine = pipes
    engine.send(b"last words")
    engine.close()
    got: list[bytes] = []
    with pytest.raises(EOFError):
        await door.deliver(lambda data: got.append(data) is None)
    assert got == [b"last words"]
    door.send(b"to nobody")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_what_is_sent_to_an_engine_that_has_gone_is_lost_and_no_error(run: Callable[[Any], None]) -> None:
    """It is killed, and requests still come for a moment, until that is seen."""

    async def sent() -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        door = DoorPipe(ours)
        theirs.close()
        with pytest.raises(EOFError):
            await door.deliver(lambda data: True)
        await asyncio.sleep(0.01)
        door.send(b"to nobody")
        door.close()

    run(sent())


async def test_the_engine_learns_that_the_door_has_gone(pipes: tuple[DoorPipe, EnginePipe]) -> None:
    door, engine = pipes
    reader = asyncio.create_task(take(door, 1))
    await asyncio.sleep(0.01)
    door.send(b"last words")
    door.close()
    with pytest.raises(EOFError):
        await reader
    assert engine.poll(1.0) == [b"last words"]
    with pytest.raises(EOFError):
        engine.poll(1.0)
    engine.send(b"to nobody")


async def test_what_a_taker_raises_ends_the_delivery(pipes: tuple[DoorPipe, EnginePipe]) -> None:
    door, engine = pipes
    for data in (b"1", b"2", b"x", b"3"):
        engine.send(data)
    got: list[int] = []
    with pytest.raises(ValueError, match="x"):
        await door.deliver(lambda data: got.append(int(data)) is None)
    assert got == [1, 2]
