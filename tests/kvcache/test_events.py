"""Cache events: a reader of its own follows the tree through storms, evictions, undone steps and full queues."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from phloem.core.errors import ConfigError
from phloem.kvcache.events import Cleared, Event, Feed, Removed, Stored, as_array, as_map
from phloem.kvcache.namespaces import namespace, parts
from phloem.kvcache.publisher import ZmqPublisher, binds, read_config
from phloem.testing.driver import Driver, random_tokens, storm

if TYPE_CHECKING:
    from phloem.core.batch import Batch

SIZE = 4


class Reader:
    """Knows what the events say, and that each of them makes sense after those before it."""

    def __init__(self) -> None:
        self.pages: dict[int, tuple[int | None, tuple[int, ...], str]] = {}

    def take(self, events: list[dict[str, Any]]) -> None:
        for event in events:
            if event["type"] == "AllBlocksCleared":
                self.pages.clear()
            elif event["type"] == "BlockRemoved":
                for key in event["block_hashes"]:
                    del self.pages[key]
            else:
                above, tokens = event["parent_block_hash"], event["token_ids"]
                assert above is None or above in self.pages, "a page before its parent"
                assert len(tokens) == event["block_size"] * len(event["block_hashes"])
                for at, key in enumerate(event["block_hashes"]):
                    assert key not in self.pages, "a page that is there already"
                    page = tuple(tokens[at * SIZE : (at + 1) * SIZE])
                    self.pages[key] = above, page, event.get("cache_salt", "")
                    above = key

    def prefixes(self) -> set[tuple[str, tuple[int, ...]]]:
        """Every prefix that it believes to be cached, by walking up from each page."""
        found: set[tuple[str, tuple[int, ...]]] = set()
        for key in self.pages:
            tokens: tuple[int, ...] = ()
            at: int | None = key
            while at is not None:
                above, page, _ = self.pages[at]
                tokens, at = page + tokens, above
            found.add((self.pages[key][2], tokens))
        return found


class Box:
    """A sink in this process; with `room` False it takes nothing."""

    def __init__(self) -> None:
        self.room = True
        self.messages: list[list[dict[str, Any]]] = []

    def put(self, events: list[Event]) -> bool:
        if self.room:
            self.messages.append([as_map(event, SIZE) for event in events])
        return self.room

    @property
    def sequence(self) -> int:
        return len(self.messages)


def in_tree(driver: Driver) -> set[tuple[str, tuple[int, ...]]]:
    found: set[tuple[str, tuple[int, ...]]] = set()
    for name, _, node in driver.cache.tree.everything():
        data, at = b"", node
        while at is not None:
            data, at = at.data + data, at.parent
        tokens = tuple(np.frombuffer(data, np.int32).tolist())
        salt = parts(name)[0]
        found |= {(salt, tokens[: len(tokens) - SIZE * back]) for back in range(node.count)}
    return found


def listening(driver: Driver) -> tuple[Box, Reader]:
    box = Box()
    driver.scheduler.feed = Feed(driver.cache.tree, box)
    return box, Reader()


def caught_up(box: Box, reader: Reader) -> None:
    for message in box.messages:
        reader.take(message)
    box.messages.clear()


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("pages", [40, 400])
def test_a_reader_knows_exactly_what_the_tree_has(overlap: bool, pages: int) -> None:
    rng = random.Random(pages)
    starved: list[int] = []

    def starve(batch: Batch) -> bool:
        """Now and then a step for which there is no memory, never of one token alone."""
        if batch.num_tokens < 3 or rng.random() > 0.2:
            return False
        starved.append(batch.num_tokens)
        return True

    driver = Driver(pages, SIZE, overlap=overlap, starve=starve)
    box, reader = listening(driver)
    for _ in range(4):
        storm(driver, 12, rng)
        driver.submit("salted", random_tokens(rng, 20), 4, namespace="tenant")
        driver.run()
        caught_up(box, reader)
        assert reader.prefixes() == in_tree(driver) and len(reader.pages) > 4
        assert any(salt == "tenant" for salt, _ in reader.prefixes()) or pages < 100
        driver.finish.clear()
    assert starved
    driver.control("flush_cache")
    driver.step()
    caught_up(box, reader)
    assert not reader.pages and not in_tree(driver)


def test_the_first_event_of_a_process_clears_what_an_earlier_one_said() -> None:
    driver = Driver(40, SIZE)
    box, _ = listening(driver)
    driver.submit("a", [10] * 9)
    driver.run()
    assert box.messages[0][0] == {"type": "AllBlocksCleared"}


def test_no_page_is_told_before_its_step_has_been_committed() -> None:
    driver = Driver(100, SIZE, overlap=True)
    box, _ = listening(driver)
    driver.submit("a", [20 + at for at in range(12)])
    driver.step()
    assert driver.scheduler.inflight and driver.cache.tree.pages == 3
    assert not any(event["type"] == "BlockStored" for message in box.messages for event in message)
    driver.run()
    stored = [event for message in box.messages for event in message if event["type"] == "BlockStored"]
    assert stored[0]["token_ids"] == [20 + at for at in range(12)] and stored[0]["medium"] == "GPU"


def test_a_step_that_is_taken_back_leaves_no_trace_behind_one_message() -> None:
    starving = iter([True])
    driver = Driver(100, SIZE, overlap=True, starve=lambda _: next(starving, False))
    box, reader = listening(driver)
    driver.submit("a", [20 + at for at in range(30)])
    driver.run()
    assert driver.stats[-1].out_of_memory == 1
    caught_up(box, reader)
    assert reader.prefixes() == in_tree(driver)


def test_a_full_queue_becomes_a_new_beginning_and_the_whole_tree() -> None:
    driver = Driver(200, SIZE)
    box, reader = listening(driver)
    driver.submit("a", list(range(10, 40)))
    driver.run()
    caught_up(box, reader)
    box.room = False
    driver.submit("b", list(range(50, 90)))
    driver.run()
    assert not box.messages
    box.room = True
    driver.submit("c", list(range(10, 40)))
    driver.run()
    assert box.messages[0][0]["type"] == "AllBlocksCleared"
    caught_up(box, reader)
    assert reader.prefixes() == in_tree(driver) and driver.scheduler.feed is not None
    assert driver.scheduler.feed.lost == 1


def test_a_dump_tells_the_tree_parents_first_and_where_to_go_on() -> None:
    driver = Driver(200, SIZE)
    assert (reply := driver.control("kv_events")) is not None and not reply.ok and "kv-events-config" in reply.message
    box, reader = listening(driver)
    for index in range(5):
        driver.submit(f"q{index}", [*range(10, 30), *([100 + index] * 9)])
    driver.run()
    reply = driver.control("kv_events")
    assert reply is not None and reply.ok
    reader.take(reply.data["events"])
    assert reader.prefixes() == in_tree(driver) and reply.data["sequence"] == len(box.messages)


def test_arrays_hold_the_fields_of_maps_in_the_order_that_older_readers_know() -> None:
    data = np.arange(8, dtype=np.int32).tobytes()
    event = Stored([5, -6], None, data, namespace("s", "style"))
    kind, hashes, parent, tokens, size, lora, medium, name, extra = as_array(event, SIZE)
    told = as_map(event, SIZE)
    assert (kind, hashes, parent, size, lora, medium) == ("BlockStored", [5, -6], None, SIZE, None, "GPU")
    assert (tokens, name, extra) == (list(range(8)), "style", ["s"])
    assert told["lora_name"] == "style" and told["cache_salt"] == "s"
    assert as_array(Removed([5]), SIZE) == ["BlockRemoved", [5], "GPU"] and as_array(Cleared(), SIZE) == [
        "AllBlocksCleared"
    ]


def test_wrong_settings_are_told_with_what_there_is() -> None:
    with pytest.raises(ConfigError, match=r"endpont.*known: publisher, endpoint"):
        read_config('{"endpont": "tcp://*:5557"}')
    with pytest.raises(ConfigError, match="publisher"):
        read_config('{"publisher": "kafka"}')
    with pytest.raises(ConfigError, match="hwm must be above 0"):
        read_config('{"hwm": 0}')
    assert not read_config('{"publisher": "null"}').wanted
    assert binds("tcp://*:5557") and binds("ipc:///tmp/a") and not binds("tcp://gateway:5557")


# over ZeroMQ


def test_a_publisher_that_connects_says_that_nobody_can_subscribe(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("zmq", reason="needs pyzmq")
    publisher = ZmqPublisher(read_config('{"endpoint": "tcp://127.0.0.1:9"}'), SIZE)
    try:
        assert publisher.info()["bound"] is False
        assert "nobody can subscribe here" in caplog.text
    finally:
        publisher.close()


@pytest.fixture
def published() -> Iterator[tuple[Driver, ZmqPublisher, Any]]:
    zmq = pytest.importorskip("zmq", reason="needs pyzmq")
    config = read_config('{"endpoint": "tcp://127.0.0.1:*", "replay_endpoint": "tcp://127.0.0.1:*", "bind": true}')
    publisher = ZmqPublisher(config, SIZE)
    driver = Driver(400, SIZE)
    driver.scheduler.feed = Feed(driver.cache.tree, publisher)
    context = zmq.Context()
    yield driver, publisher, context
    context.destroy(linger=0)
    publisher.close()


@pytest.mark.slow
def test_messages_are_framed_numbered_and_can_be_had_again(published: tuple[Driver, ZmqPublisher, Any]) -> None:
    driver, publisher, context = published
    import zmq

    sub = context.socket(zmq.SUB)
    sub.subscribe(b"")
    sub.connect(publisher.endpoint)
    time.sleep(0.2)  # a subscription takes a moment, and what was sent before is not heard
    storm(driver, 10, random.Random(3))
    driver.run()
    messages: list[tuple[int, Any]] = []
    while sub.poll(300):
        topic, number, payload = sub.recv_multipart()
        assert topic == b"" and len(number) == 8
        messages.append((int.from_bytes(number, "big"), msgspec.msgpack.decode(payload)))
    assert [number for number, _ in messages] == list(range(publisher.sequence)) and len(messages) > 3
    reader = Reader()
    for _, (seconds, events, rank) in messages:
        assert abs(seconds - time.time()) < 60 and rank == 0
        reader.take(events)
    assert reader.prefixes() == in_tree(driver)

    ask = context.socket(zmq.REQ)
    ask.connect(publisher.replay_endpoint)
    dealer = context.socket(zmq.DEALER)
    dealer.connect(publisher.replay_endpoint)
    dealer.send_multipart([b"", b"short"])  # is not answered, and harms nobody
    dealer.send_multipart([b"", (2).to_bytes(8, "big")])
    again: list[int] = []
    while dealer.poll(1000):
        _, number, payload = dealer.recv_multipart()
        again.append(int.from_bytes(number, "big", signed=True))
        if again[-1] < 0:
            break
        assert msgspec.msgpack.decode(payload) == messages[again[-1]][1]
    assert again == [*range(2, publisher.sequence), -1]


def test_an_address_that_cannot_be_had_is_told(published: tuple[Driver, ZmqPublisher, Any]) -> None:
    _, publisher, _ = published
    taken = msgspec.json.encode({"endpoint": publisher.endpoint, "bind": True}).decode()
    with pytest.raises(ConfigError, match="Address already in use"):
        ZmqPublisher(read_config(taken), SIZE)
