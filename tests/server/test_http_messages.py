"""`/v1/messages` over a fake engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from door import MODEL, THINKS, Door, die_at, make_info, on_loop, open_door

from phloem.core.messages import unpack_ids
from phloem.testing.byte_tokenizer import SYSTEM, ByteTokenizer
from phloem.testing.fake_engine import FakeEngine

PATH = "/v1/messages"
INFO = make_info(features=frozenset({"tools", "reasoning", "grammar"}), tool_parser="hermes", reasoning_parser="qwen3")
HI = [{"role": "user", "content": "hi"}]
TOOL = {"name": "weather", "description": "Tells it.", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
FULL = f"<think>\nHm.\n</think>\n\nLooking.\n{CALL}"


def say(text: str, **more: Any) -> FakeEngine:
    return FakeEngine(mode="say", text=text, **more)


def prompt_of(door: Door) -> str:
    ids = unpack_ids(door.engine.submits[-1].input_ids).tolist()
    return ByteTokenizer().decode(ids, skip_special_tokens=False)


async def create(door: Door, **body: Any) -> dict[str, Any]:
    response = await door.post(PATH, {"model": MODEL, "messages": HI, "max_tokens": 200, **body})
    assert response.status_code == 200, response.text
    return response.json()


async def events(door: Door, **body: Any) -> list[dict[str, Any]]:
    response = await door.post(PATH, {"messages": HI, "max_tokens": 200, "stream": True, **body})
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


@on_loop
async def test_a_text() -> None:
    async with open_door(say("Hello.")) as door:
        answer = await create(door, system=[{"type": "text", "text": "Be short.", "cache_control": {"type": "x"}}])
        assert prompt_of(door) == "<bos><system>Be short.<end><user>hi<end><assistant>"
        assert answer["id"].startswith("msg_") and (answer["type"], answer["role"]) == ("message", "assistant")
        assert answer["content"] == [{"type": "text", "text": "Hello.", "citations": None}]
        assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
        usage, count = answer["usage"], len(unpack_ids(door.engine.submits[-1].input_ids))
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] == count
        assert usage["cache_read_input_tokens"] == count // 2 and usage["output_tokens"] == 7


@on_loop
async def test_why_it_stopped() -> None:
    async with open_door(say("One, two.")) as door:
        cut = await create(door, max_tokens=3)
        assert (cut["stop_reason"], cut["content"][0]["text"]) == ("max_tokens", "One")
        met = await create(door, stop_sequences=[", "])
        assert (met["stop_reason"], met["stop_sequence"]) == ("stop_sequence", ", ")
        assert met["content"][0]["text"] == "One"


@on_loop
async def test_thinking_text_and_calls_are_blocks() -> None:
    async with open_door(say(FULL), INFO) as door:
        answer = await create(door, tools=[TOOL])
        thinking, text, call = answer["content"]
        assert (thinking["type"], thinking["thinking"], thinking["signature"]) == ("thinking", "Hm.", "")
        assert text["text"] == "Looking."
        assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Rom"})
        assert call["id"] and answer["stop_reason"] == "tool_use"


@on_loop
async def test_events_come_in_order() -> None:
    async with open_door(say(FULL, per_step=4), INFO) as door:
        found = await events(door, tools=[TOOL])
        names = [event["type"] for event in found]
        assert names[0] == "message_start" and names[-2:] == ["message_delta", "message_stop"]
        start = found[0]["message"]
        assert (start["content"], start["stop_reason"]) == ([], None) and start["usage"]["input_tokens"] > 0
        whole = (await create(door, tools=[TOOL]))["content"]
        inside = [event for event in found if "index" in event]
        assert sorted(event["index"] for event in inside) == [event["index"] for event in inside]
        for at, block in enumerate(whole):
            own = [event for event in inside if event["index"] == at]
            kinds = [event["type"].removeprefix("content_block_") for event in own]
            assert kinds == ["start", *["delta"] * (len(own) - 2), "stop"]
            deltas = [event["delta"] for event in own[1:-1]]
            match block["type"]:
                case "text":
                    assert "".join(delta["text"] for delta in deltas) == block["text"]
                    assert own[0]["content_block"]["text"] == ""
                case "thinking":
                    assert "".join(delta["thinking"] for delta in deltas) == block["thinking"]
                case _:
                    assert json.loads("".join(delta["partial_json"] for delta in deltas)) == block["input"]
                    assert own[0]["content_block"]["input"] == {}
        assert found[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
        assert found[-2]["usage"]["output_tokens"] > 10


@on_loop
async def test_conversations_with_tools_and_thoughts() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "mhm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Looking."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Rom"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    async with open_door(say("ok"), INFO) as door:
        await create(door, messages=messages, tools=[TOOL])
        assert prompt_of(door) == (
            "<bos><user>a\nb<end><assistant>Looking.<end><tool>sunny<end><user>And?<end><assistant>"
        )
        await create(door, messages=[*HI, {"role": "assistant", "content": "Well"}])
        assert prompt_of(door) == "<bos><user>hi<end><assistant>Well"


@on_loop
async def test_tool_choice_and_formats_become_constraints() -> None:
    async with open_door(say("x"), INFO) as door:
        for choice in ({"type": "any"}, {"type": "tool", "name": "weather", "disable_parallel_tool_use": True}):
            await create(door, tools=[TOOL], tool_choice=choice)
            assert "weather" in (door.engine.submits[-1].sampling.structural_tag or "")
        for choice in ({"type": "auto"}, {"type": "none"}):
            await create(door, tools=[TOOL], tool_choice=choice)
            assert door.engine.submits[-1].sampling.structural_tag is None
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        await create(door, output_config={"format": {"type": "json_schema", "schema": schema}})
        assert json.loads(door.engine.submits[-1].sampling.json_schema or "") == schema


@on_loop
async def test_thinking_budgets() -> None:
    async with open_door(say("x"), INFO, THINKS) as door:
        await create(door, thinking={"type": "enabled", "budget_tokens": 9})
        params = door.engine.submits[-1].sampling.processors["thinking_budget"]
        assert params["thinking_budget"] == 9 and params["end_ids"] == [SYSTEM]
        for thinking in ({"type": "disabled"}, {"type": "adaptive"}):
            await create(door, thinking=thinking)
            assert door.engine.submits[-1].sampling.processors == {}
    async with open_door() as door:
        response = await door.post(PATH, {"messages": HI, "max_tokens": 5, "thinking": {"type": "enabled"}})
        assert response.status_code == 400 and "reasoning format" in response.json()["error"]["message"]


@on_loop
async def test_tokens_are_counted() -> None:
    async with open_door() as door:
        body = {"model": MODEL, "messages": HI, "system": "Be short."}
        counted = (await door.post(PATH + "/count_tokens", body)).json()
        answer = await create(door, system="Be short.")
        usage = answer["usage"]
        assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
        assert len(door.engine.submits) == 1


# --- errors


def check_error(response: Any, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error"
    assert body["error"]["type"] == kind and body["request_id"] == response.headers["x-request-id"]
    return body["error"]["message"]


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({}, "missing required field"),
        ({"max_tokens": 5, "messages": []}, "messages"),
        ({"messages": HI}, "max_tokens"),
        ({"messages": HI, "max_tokens": 0}, "max_tokens"),
        ({"messages": HI, "max_tokens": 5, "max_token": 1}, "unknown field 'max_token'"),
        ({"messages": [{"role": "tool", "content": "a"}], "max_tokens": 5}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 5}, "content[0].source"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_use"}]}], "max_tokens": 5}, "not supported"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}], "max_tokens": 5}, "text is missing"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "b": 1}]}], "max_tokens": 5}, ".b'"),
        ({"messages": HI, "max_tokens": 5, "tools": [{"type": "web_search_20250305"}]}, "only tools that the client"),
        ({"messages": HI, "max_tokens": 5, "tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"messages": HI, "max_tokens": 5, "output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"messages": HI, "max_tokens": 5, "mcp_servers": [{}]}, "not supported yet: mcp_servers"),
        ({"messages": HI, "max_tokens": 5, "temperature": -1}, "temperature"),
    ],
)
def test_refusals(body: dict[str, Any], text: str) -> None:
    @on_loop
    async def check() -> None:
        async with open_door(info=INFO) as door:
            assert text in check_error(await door.post(PATH, body), 400, "invalid_request_error")
            assert door.engine.submits == []

    check()


@on_loop
async def test_errors_have_anthropics_shape_here_and_openais_elsewhere() -> None:
    body = {"messages": HI, "max_tokens": 5}
    async with open_door(FakeEngine(refuse_all=(503, "the queue is full")), api_key="k", max_body_bytes=2000) as door:
        check_error(await door.post(PATH, body), 401, "authentication_error")
        other = await door.post("/v1/chat/completions", body)
        assert other.status_code == 401 and other.json()["error"]["object"] == "error"
        key = {"x-api-key": "k"}
        check_error(await door.post(PATH, {**body, "model": "claude"}, headers=key), 404, "not_found_error")
        check_error(await door.post(PATH, {**body, "system": "x" * 3000}, headers=key), 413, "request_too_large")
        check_error(await door.post(PATH, body, headers=key), 503, "overloaded_error")
        check_error(await door.post(PATH, {**body, "stream": True}, headers=key), 503, "overloaded_error")
        check_error(await door.http.get(PATH + "/nothing", headers=key), 404, "not_found_error")
        assert (await door.post(PATH, body, headers={"x-api-key": "wrong"})).status_code == 401


@on_loop
async def test_an_error_inside_a_stream_is_its_last_event() -> None:
    engine = FakeEngine(delay=0.002)
    async with open_door(engine) as door:
        dying = asyncio.create_task(die_at(engine, 5, "killed by signal 9"))
        found = await events(door, max_tokens=400)
        await dying
        assert found[0]["type"] == "message_start" and found[-1]["type"] == "error"
        assert found[-1]["error"]["type"] == "overloaded_error" and "killed" in found[-1]["error"]["message"]
