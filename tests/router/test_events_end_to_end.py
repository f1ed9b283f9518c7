"""Cache events from a scheduler's tree over ZeroMQ to those who read them: our gateway, and Dynamo's indexer."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gateway import Worker, gateway

pytest.importorskip("zmq", reason="needs pyzmq")

from phloem.kvcache.events import Feed, as_map
from phloem.kvcache.publisher import ZmqPublisher, read_config
from phloem.router.cached import Cached
from phloem.router.follow import Follower, endpoint_at
from phloem.testing.driver import Driver, storm
from phloem.utils.sockets import bind

SIZE = 4
HERE = "tcp://127.0.0.1:*"


def publisher(**more: Any) -> ZmqPublisher:
    return ZmqPublisher(
        read_config(json.dumps({"endpoint": HERE, "replay_endpoint": HERE, "bind": True, **more})), SIZE
    )


@pytest.fixture(params=["map", "array"])
def source(request: pytest.FixtureRequest) -> Iterator[tuple[Driver, ZmqPublisher]]:
    sink = publisher(format=request.param)
    driver = Driver(120, SIZE)
    driver.scheduler.feed = Feed(driver.cache.tree, sink)
    yield driver, sink
    sink.close()


def cached_in(driver: Driver, tokens: list[int]) -> int:
    return driver.cache.probe("", np.array(tokens, np.int32), len(tokens)).num_pages * SIZE


async def settled(true: Any, seconds: float = 30.0) -> None:
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.02)


async def dump_of(driver: Driver) -> tuple[int, list[Any]]:
    feed = driver.scheduler.feed
    assert feed is not None
    return feed.sink.sequence, [as_map(event, SIZE) for event in feed.dump()]


@pytest.mark.slow
async def test_a_follower_knows_what_the_tree_has_from_dump_or_replay(source: tuple[Driver, ZmqPublisher]) -> None:
    driver, sink = source
    storm(driver, 8, random.Random(1))
    driver.run()

    async def dump() -> tuple[int, list[Any]] | None:
        return await dump_of(driver)

    async def nothing() -> None:
        return None

    known = Cached()
    tasks = [
        asyncio.create_task(Follower(known, bit, "127.0.0.1", sink.info(), how).run())  # type: ignore[arg-type]
        for bit, how in enumerate((dump, nothing))
    ]
    await settled(lambda: known.pages(0) == known.pages(1) == driver.cache.tree.pages)
    rng = random.Random(2)
    for _ in range(3):
        driver.finish.clear()
        storm(driver, 10, rng)
        driver.run()
    await settled(lambda: known.pages(0) == known.pages(1) == driver.cache.tree.pages)
    asked = [list(np.frombuffer(node.data, np.int32)) for node in driver.cache.tree.nodes()][:20]
    for tokens in asked:
        found = known.match([int(token) for token in tokens], "", [0, 1])
        assert found.get(0, 0) == found.get(1, 0) == cached_in(driver, tokens)
    for task in tasks:
        task.cancel()


@pytest.mark.slow
async def test_a_gap_is_closed_and_a_new_process_begins_anew() -> None:
    driver, sink = Driver(200, SIZE), publisher()
    driver.scheduler.feed = Feed(driver.cache.tree, sink)
    driver.submit("a", list(range(10, 40)))
    driver.run()
    known = Cached()

    async def nothing() -> None:
        return None

    follower = Follower(known, 0, "127.0.0.1", sink.info(), nothing)  # type: ignore[arg-type]
    task = asyncio.create_task(follower.run())
    await settled(lambda: known.pages(0) == driver.cache.tree.pages)
    assert follower._next is not None
    follower._next -= 1  # as if the last message had not come
    driver.submit("b", list(range(50, 90)))
    driver.run()
    await settled(lambda: follower.gaps == 1 and known.pages(0) == driver.cache.tree.pages)
    place = sink.endpoint
    sink.close()
    settings = {"endpoint": place, "replay_endpoint": sink.replay_endpoint, "bind": True}
    again = ZmqPublisher(read_config(json.dumps(settings)), SIZE)
    fresh = Driver(200, SIZE)
    fresh.scheduler.feed = Feed(fresh.cache.tree, again)
    await asyncio.sleep(0.5)  # the subscription finds the new process by itself
    fresh.submit("c", list(range(10, 20)))
    fresh.run()
    await settled(lambda: follower.restarts == 1 and known.pages(0) == fresh.cache.tree.pages)
    task.cancel()
    again.close()


async def test_the_gateway_sends_a_prompt_of_tokens_where_its_pages_are() -> None:
    driver, sink = Driver(200, SIZE), publisher()
    driver.scheduler.feed = Feed(driver.cache.tree, sink)
    prompt = list(range(10, 90))
    driver.submit("a", prompt)
    driver.run()
    count, events = await dump_of(driver)
    has = Worker(facts={"kv_events": sink.info()}, dump={"sequence": count, "events": events})
    async with gateway(Worker(), has, Worker(), policy="cache_aware") as gate:
        bit = gate.router.fleet.workers[has.url].bit
        await gate.until(lambda: gate.router.fleet.cached.pages(bit) == driver.cache.tree.pages)
        for _ in range(3):
            answer = await gate.http.post("/generate", json={"input_ids": [*prompt, 7, 8]})
            assert answer.json()["by"] == has.port
        assert gate.router.metrics.cached_tokens == 3 * 80
        listed = (await gate.http.get("/workers")).json()["workers"]
        assert [bool(worker["kv_events"]) for worker in listed] == [False, True, False]
    sink.close()


async def test_a_server_that_takes_no_subscribers_is_guessed_at(caplog: pytest.LogCaptureFixture) -> None:
    """Its account would stay as it was when it was asked, and be believed."""
    away = ZmqPublisher(read_config('{"endpoint": "tcp://127.0.0.1:9"}'), SIZE)
    event = {"type": "BlockStored", "block_hashes": [1], "token_ids": [1, 2, 3, 4], "block_size": 4}
    one = Worker(facts={"kv_events": away.info()}, dump={"sequence": 0, "events": [event]})
    async with gateway(one, policy="cache_aware") as gate:
        await gate.until(lambda: "takes no subscribers" in caplog.text)
        fleet = gate.router.fleet
        assert not fleet.cached.knows(fleet.workers[one.url].bit)
        assert (await gate.http.delete(f"/workers/{fleet.workers[one.url].id}")).status_code == 202
    away.close()


def test_endpoints_are_reached_at_their_worker() -> None:
    assert endpoint_at("tcp://*:5557", "10.0.0.7") == "tcp://10.0.0.7:5557"
    assert endpoint_at("tcp://0.0.0.0:5557", "::1") == "tcp://[::1]:5557"
    assert endpoint_at("tcp://pod-1:5557", "10.0.0.7") == "tcp://pod-1:5557"
    assert endpoint_at("ipc:///tmp/e", "10.0.0.7") == "ipc:///tmp/e"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("dynamo") is None, reason="needs ai-dynamo-runtime")
def test_dynamos_indexer_answers_as_our_tree_does(source: tuple[Driver, ZmqPublisher]) -> None:
    driver, sink = source
    storm(driver, 8, random.Random(5))
    driver.run()
    sock = bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    sock.close()

    def call(path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as answer:
            return json.loads(answer.read())

    process = subprocess.Popen([sys.executable, "-m", "dynamo.indexer", "--port", str(port), "--threads", "1"])
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                call("/workers")
                break
            except OSError:
                time.sleep(0.1)
        about = {"endpoint": sink.endpoint, "replay_endpoint": sink.replay_endpoint, "block_size": SIZE}
        call("/register", {"instance_id": 1, "model_name": "m", **about})
        time.sleep(0.5)
        rng = random.Random(6)
        for _ in range(3):
            driver.finish.clear()
            storm(driver, 10, rng)
            driver.run()
        time.sleep(0.5)
        paths: list[list[int]] = []
        for node in driver.cache.tree.nodes():
            data, at = b"", node
            while at is not None:
                data, at = at.data + data, at.parent
            paths.append(np.frombuffer(data, np.int32).tolist())
        asked = [
            rng.choice(paths)[: rng.randrange(1, 60)] + [rng.randrange(900)] * rng.randrange(5) for _ in range(200)
        ]
        for tokens in [*paths[:50], *asked]:
            found = call("/query", {"token_ids": tokens, "model_name": "m"})["scores"].get("1", {}).get("0", 0)
            assert found == cached_in(driver, tokens), tokens
    finally:
        process.terminate()
        process.wait(10)


@pytest.mark.slow
async def test_a_new_process_that_has_published_more_than_the_old_one_is_noticed() -> None:
    """Its messages are numbered as if they followed: the broken connection tells, and what was known is asked anew."""
    driver, sink = Driver(200, SIZE), publisher()
    driver.scheduler.feed = Feed(driver.cache.tree, sink)
    driver.submit("a", list(range(10, 40)))
    driver.run()
    known, current = Cached(), driver

    async def dump() -> tuple[int, list[Any]]:
        return await dump_of(current)

    follower = Follower(known, 0, "127.0.0.1", sink.info(), dump)  # type: ignore[arg-type]
    task = asyncio.create_task(follower.run())
    await settled(lambda: known.pages(0) == driver.cache.tree.pages)
    place = sink.endpoint
    sink.close()
    await settled(lambda: known.pages(0) == 0)  # nobody is there: nothing is believed
    again = ZmqPublisher(read_config(json.dumps({"endpoint": place, "bind": True})), SIZE)
    assert again.info()["instance"] != sink.info()["instance"]
    current = fresh = Driver(200, SIZE)
    fresh.scheduler.feed = Feed(fresh.cache.tree, again)
    for at in range(5):  # more messages than the old process has sent, before anybody listens
        fresh.submit(str(at), list(range(100 * at, 100 * at + 20)))
        fresh.run()
    await asyncio.sleep(0.5)
    fresh.submit("last", list(range(700, 730)))
    fresh.run()
    await settled(lambda: known.pages(0) == fresh.cache.tree.pages)
    assert known.match(list(range(10, 40)), "", [0]).get(0, 0) == 0
    task.cancel()
    again.close()
