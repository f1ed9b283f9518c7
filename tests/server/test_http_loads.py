"""Loads by sections and forms, and the account of what is cached."""

from __future__ import annotations

import pytest
from door import open_door
from prometheus_client.parser import text_string_to_metric_families

from phloem.core.messages import ControlReply, Stats
from phloem.testing.fake_engine import FakeEngine


async def test_sections_are_those_that_are_asked_for() -> None:
    async with open_door() as door:
        door.engine.say(Stats(total_tokens=100, evicted_tokens=7, prefill_tokens=500, prefill_seconds=0.25))
        await door.client.control("state")
        everything = (await door.http.get("/v1/loads")).json()["loads"][0]
        assert {"memory", "queues", "disaggregation"} <= everything.keys()
        assert everything["memory"]["token_capacity"] == 100 and everything["evicted_tokens"] == 7
        assert everything["total_prefill_uncached_tokens"] == 500 and everything["total_prefill_busy_us"] == 250_000
        few = (await door.http.get("/v1/loads?include=core,queues")).json()["loads"][0]
        assert "queues" in few and "memory" not in few and "disaggregation" not in few
        assert (await door.http.get("/v1/loads?dp_rank=1")).json()["loads"] == []


@pytest.mark.parametrize(("query", "param"), [("include=core,ghosts", "include"), ("format=xml", "format")])
async def test_unknown_sections_and_forms_are_refused_by_name(query: str, param: str) -> None:
    async with open_door() as door:
        answer = await door.http.get(f"/v1/loads?{query}")
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param


async def test_loads_are_gauges_for_prometheus() -> None:
    async with open_door() as door:
        door.engine.say(Stats(total_tokens=100, used_tokens=25))
        await door.client.control("state")
        text = (await door.http.get("/v1/loads?format=prometheus")).text
        found = {family.name: family.samples[0].value for family in text_string_to_metric_families(text)}
        assert found["phloem_load_token_usage"] == 0.25 and found["phloem_load_max_total_num_tokens"] == 100


async def test_the_dump_is_the_engines_or_its_refusal() -> None:
    events = [
        {"type": "BlockStored", "block_hashes": [1], "parent_block_hash": None, "token_ids": [5], "block_size": 1}
    ]
    engine = FakeEngine(control_reply=ControlReply(id="", data={"sequence": 3, "events": events}))
    async with open_door(engine) as door:
        assert (await door.http.get("/kv_events/dump")).json() == {"sequence": 3, "events": events}
    refuses = FakeEngine(control_reply=ControlReply(id="", ok=False, message="no cache events are published"))
    async with open_door(refuses) as door:
        answer = await door.http.get("/kv_events/dump")
        assert answer.status_code == 400 and answer.json()["error"]["code"] == "not_supported"
