"""What is done for a traced request, step by step, and the spans that are made of it, in memory."""

from __future__ import annotations

import random
from typing import Any

import pytest
from disagg_support import Pair

from phloem.client import traces
from phloem.client.continuation import Continuation
from phloem.client.request import Item
from phloem.core.messages import Chunk
from phloem.core.request import SamplingParams
from phloem.testing.driver import Driver, random_tokens
from phloem.utils.tracing import Tracer

PROMPT = random_tokens(random.Random(5), 150)
ABOVE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


def did(driver: Driver, name: str) -> list[Any]:
    return [item for chunk in driver.chunks[name] for item in chunk.did]


def test_the_steps_of_a_prompt_are_told_with_the_first_token() -> None:
    driver = Driver(chunked_prefill_size=64, num_pages=400)
    driver.submit("a", PROMPT, 3, traced=True, ignore_eos=True)
    driver.submit("b", PROMPT[:9], 3, ignore_eos=True)
    driver.run()
    chunks = did(driver, "a")
    assert [name for name, *_ in chunks] == ["prefill_chunk"] * 3 and sum(count for *_, count in chunks) == 150
    assert driver.chunks["a"][0].did and not driver.chunks["a"][-1].did
    times = [time for _, begun, ended, _ in chunks for time in (begun, ended)]
    assert times == sorted(times) and times[0] < times[-1]
    assert not did(driver, "b") and driver.tokens["b"] == driver.expected(PROMPT[:9], 3)


def test_what_the_cache_has_is_no_step() -> None:
    driver = Driver(num_pages=400)
    driver.submit("a", PROMPT, 3)
    driver.run()
    driver.submit("b", PROMPT, 3, traced=True)
    driver.run()
    cached = driver.chunks["b"][0].cached_tokens
    assert cached == 148 and [count for *_, count in did(driver, "b")] == [150 - cached]


def test_pages_that_come_from_a_prefill_server_are_told() -> None:
    pair = Pair("tcp")
    try:
        pair.both("a", PROMPT, traced=True)
        pair.run()
        found = did(pair.decode, "a")
        names = [name for name, *_ in found]
        assert {"bootstrap", "transfer", "wait"} <= set(names)
        sent = sum(count for name, _, _, count in found if name == "transfer")
        assert sent == pair.arrivals.state()["kv_transfer_bytes"] > 0
        assert all(begun <= ended for _, begun, ended, _ in found)
        assert {name for name, *_ in did(pair.prefill, "a")} == {"prefill_chunk"}
    finally:
        pair.close()


@pytest.fixture
def memory() -> Any:
    export = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter", reason="phloem[trace]")
    return export.InMemorySpanExporter()


def finished(tracer: Tracer, memory: Any) -> list[Any]:
    tracer.provider.force_flush()
    return list(memory.get_finished_spans())


def begun(tracer: Tracer, sampled: str) -> Any:
    scope: Any = {"method": "POST", "path": "/generate", "headers": [(b"traceparent", (ABOVE + sampled).encode())]}
    return tracer.begin(scope)


def continued(span: Any) -> Continuation:
    params = SamplingParams(max_new_tokens=2)
    consumer: Any = None
    found = Continuation("r", Item(params), 0, 0, PROMPT, [], params, 10.0, consumer, trace=span)
    found.take(Chunk(id="r", tokens=[9], queue_seconds=1.0, did=[("bootstrap", 10.1, 10.2, 0), ("transfer", 10.2, 10.5, 4096)]))  # fmt: skip  # noqa: E501
    found.first_at = 13.0
    found.take(Chunk(id="r", tokens=[9], did=[("prefill_chunk", 11.0, 12.0, 100), ("prefill_chunk", 12.0, 13.0, 50)]))
    found.last_at = 14.0
    return found


def test_spans_form_a_tree_below_the_request(memory: Any) -> None:
    tracer = Tracer("", "test", memory)
    span = begun(tracer, "01")
    traces.tell(continued(span), "length")
    span.end(200)
    spans = finished(tracer, memory)
    ids = {one.context.span_id: one.name for one in spans}
    tree = {(one.name, ids.get(one.parent.span_id, "client")) for one in spans}
    assert tree == {
        ("POST /generate", "client"), ("llm_request", "POST /generate"), ("queue", "llm_request"),
        ("bootstrap", "llm_request"), ("transfer", "llm_request"), ("prefill", "llm_request"),
        ("prefill_chunk", "prefill"), ("decode", "llm_request"),
    }  # fmt: skip
    assert {format(one.context.trace_id, "032x") for one in spans} == {ABOVE[3:35]}
    chunks = [one for one in spans if one.name == "prefill_chunk"]
    assert [one.attributes["phloem.tokens"] for one in chunks] == [100, 50]
    assert all(one.end_time - one.start_time == pytest.approx(1e9) for one in chunks)
    assert next(one for one in spans if one.name == "transfer").attributes["phloem.bytes"] == 4096
    tracer.close()


def test_nothing_is_kept_of_requests_that_a_sampler_leaves_out(memory: Any) -> None:
    tracer = Tracer("", "test", memory)
    span = begun(tracer, "00")
    assert not span.recorded and begun(tracer, "01").recorded
    span.end(200)
    assert not finished(tracer, memory)
    tracer.close()
