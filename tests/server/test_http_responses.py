"""`/v1/responses` over a fake engine."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from door import MODEL, Door, die_at, make_info, on_loop, open_door, until

from phloem.core.messages import unpack_ids
from phloem.server.chat.body import Message
from phloem.server.responses.store import ResponseStore, Stored
from phloem.server.responses.write import ResponseAnswer
from phloem.testing.byte_tokenizer import ByteTokenizer
from phloem.testing.fake_engine import FakeEngine

PATH = "/v1/responses"
INFO = make_info(features=frozenset({"tools", "reasoning", "grammar"}), tool_parser="hermes", reasoning_parser="qwen3")
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": None}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>'
FULL = f"<think>\nHm.\n</think>\n\nLooking.\n{CALL}\n{CALL}"


def say(text: str, **more: Any) -> FakeEngine:
    return FakeEngine(mode="say", text=text, **more)


def prompt_of(door: Door, at: int = -1) -> str:
    ids = unpack_ids(door.engine.submits[at].input_ids).tolist()
    return ByteTokenizer().decode(ids, skip_special_tokens=False)


async def create(door: Door, given: Any = "hi", status: int = 200, **body: Any) -> dict[str, Any]:
    response = await door.post(PATH, {"model": MODEL, "input": given, **body})
    assert response.status_code == status, response.text
    return response.json()


async def events(door: Door, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    response = await door.post(PATH, {"input": "hi", "stream": True, **body})
    assert response.status_code == 200, response.text
    found: list[tuple[str, dict[str, Any]]] = []
    for block in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        told = json.loads(data.removeprefix("data: "))
        assert name == f"event: {told['type']}"
        found.append((told["type"], told))
    assert [told["sequence_number"] for _, told in found] == list(range(len(found)))
    return found


@on_loop
async def test_a_text() -> None:
    async with open_door(say("Hello.")) as door:
        answer = await create(door, instructions="Be short.", metadata={"a": "b"}, temperature=0.5)
        assert prompt_of(door) == "<bos><system>Be short.<end><user>hi<end><assistant>"
        assert answer["id"].startswith("resp_") and answer["object"] == "response"
        assert (answer["status"], answer["error"], answer["incomplete_details"]) == ("completed", None, None)
        (item,) = answer["output"]
        assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
        assert item["content"] == [{"type": "output_text", "text": "Hello.", "annotations": [], "logprobs": []}]
        assert answer["metadata"] == {"a": "b"} and answer["temperature"] == 0.5 and answer["store"] is True
        usage = answer["usage"]
        assert usage["output_tokens"] == 7 and usage["total_tokens"] == usage["input_tokens"] + 7
        assert usage["input_tokens_details"]["cached_tokens"] == usage["input_tokens"] // 2


@on_loop
async def test_a_limit_makes_it_incomplete() -> None:
    async with open_door(say("Hello.")) as door:
        answer = await create(door, max_output_tokens=3)
        assert (answer["status"], answer["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
        assert answer["output"][0]["status"] == "incomplete"
        assert answer["output"][0]["content"][0]["text"] == "Hel"


@on_loop
async def test_reasoning_text_and_calls_are_items_in_order() -> None:
    async with open_door(say(FULL), INFO) as door:
        answer = await create(door, tools=[TOOL])
        assert [item["type"] for item in answer["output"]] == [
            "reasoning",
            "message",
            "function_call",
            "function_call",
        ]
        reasoning, message, first, second = answer["output"]
        assert reasoning["content"] == [{"type": "reasoning_text", "text": "Hm."}] and reasoning["summary"] == []
        assert message["content"][0]["text"] == "Looking."
        assert json.loads(first["arguments"]) == {"city": "Rom"} and first["name"] == "weather"
        assert first["call_id"] != second["call_id"] and first["id"] != second["id"]
        assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
        assert answer["tools"] == [TOOL] and answer["tool_choice"] == "auto"


@on_loop
async def test_events_of_a_text_come_in_openais_order() -> None:
    async with open_door(say("Hello.")) as door:
        found = await events(door)
        names = [name for name, _ in found]
        assert names == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            *["response.output_text.delta"] * 6,
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert "".join(told["delta"] for name, told in found if name.endswith("text.delta")) == "Hello."
        first, last = found[0][1]["response"], found[-1][1]["response"]
        assert (first["status"], first["output"], first["usage"]) == ("in_progress", [], None)
        assert (await door.http.get(f"{PATH}/{first['id']}")).json() == last


@on_loop
async def test_events_tell_the_same_as_the_whole() -> None:
    async with open_door(say(FULL, per_step=3), INFO) as door:
        found = await events(door, tools=[TOOL])
        names = [name for name, _ in found]
        assert names[-1] == "response.completed"
        last = found[-1][1]["response"]
        done = [told["item"] for name, told in found if name == "response.output_item.done"]
        assert done == last["output"] and [item["type"] for item in done][2:] == ["function_call"] * 2
        for at, item in enumerate(done):
            own = [(name, told) for name, told in found if told.get("output_index") == at]
            assert own[0][0] == "response.output_item.added" and own[-1][0] == "response.output_item.done"
            assert {told.get("item_id", item["id"]) for _, told in own} == {item["id"]}
            text = "".join(told["delta"] for name, told in own if name.endswith(".delta"))
            assert text == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
        assert "response.reasoning_text.done" in names and "response.function_call_arguments.done" in names
        whole = await create(door, tools=[TOOL])
        assert [item.get("content") for item in whole["output"]] == [item.get("content") for item in done]


@on_loop
async def test_logprobs_are_those_of_the_text() -> None:
    async with open_door(say("Hi")) as door:
        answer = await create(door, include=["message.output_text.logprobs"], top_logprobs=2)
        logprobs = answer["output"][0]["content"][0]["logprobs"]
        assert [entry["token"] for entry in logprobs][:2] == ["H", "i"]
        assert all(len(entry["top_logprobs"]) == 2 and entry["bytes"] is not None for entry in logprobs)
        found = await events(door, top_logprobs=1)
        told = [entry for name, event in found if name.endswith("text.delta") for entry in event["logprobs"]]
        assert [entry["token"] for entry in told] == ["H", "i"]


# --- state


@on_loop
async def test_a_response_is_gone_on_from() -> None:
    async with open_door(say("One.")) as door:
        first = await create(door, "count", instructions="Aloud.")
        second = await create(door, "more", previous_response_id=first["id"])
        assert prompt_of(door) == "<bos><user>count<end><assistant>One.<end><user>more<end><assistant>"
        assert second["previous_response_id"] == first["id"]
        await create(door, "again", previous_response_id=second["id"], instructions="Low.")
        assert prompt_of(door).startswith("<bos><system>Low.<end><user>count<end><assistant>One.<end><user>more<end>")
        await create(door, "branch", previous_response_id=first["id"])
        assert prompt_of(door).endswith("One.<end><user>branch<end><assistant>")


@on_loop
async def test_calls_and_their_outputs_go_on() -> None:
    async with open_door(say(f"Looking.\n{CALL}"), INFO) as door:
        first = await create(door, tools=[TOOL])
        call = first["output"][1]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
        await create(door, [output], previous_response_id=first["id"], tools=[TOOL])
        assert prompt_of(door).endswith("<assistant>Looking.<end><tool>sunny<end><assistant>")
        echoed = [{"role": "user", "content": "hi"}, *first["output"], {**output, "id": None, "status": "completed"}]
        await create(door, echoed, tools=[TOOL])
        assert prompt_of(door).endswith("<user>hi<end><assistant>Looking.<end><tool>sunny<end><assistant>")


@on_loop
async def test_items_become_messages() -> None:
    given = [
        {"role": "developer", "content": "D."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "mhm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}], "status": "done"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        {"role": "user", "content": "c"},
    ]
    async with open_door(say("x")) as door:
        answer = await create(door, given, instructions="I.")
        assert prompt_of(door) == (
            "<bos><system>I.\n\nD.<end><user>a<end><assistant>b<end><assistant>no<end><user>c<end><assistant>"
        )
        listed = (await door.http.get(f"{PATH}/{answer['id']}/input_items")).json()
        assert listed["object"] == "list" and len(listed["data"]) == 6 and listed["data"][2]["id"] == "rs_1"
        assert listed["first_id"] == listed["data"][0]["id"] and listed["has_more"] is False


@on_loop
async def test_get_and_delete() -> None:
    async with open_door(say("x")) as door:
        answer = await create(door)
        where = f"{PATH}/{answer['id']}"
        assert (await door.http.get(where)).json() == answer
        assert (await door.http.get(where, params={"stream": True})).status_code == 400
        assert (await door.http.delete(where)).json() == {
            "id": answer["id"],
            "object": "response.deleted",
            "deleted": True,
        }
        for response in (
            await door.http.get(where),
            await door.http.delete(where),
            await door.http.get(where + "/input_items"),
            await door.post(where + "/cancel", {}),
            await door.post(PATH, {"input": "a", "previous_response_id": answer["id"]}),
        ):
            assert response.status_code == 404
            assert response.json()["error"]["code"] == "response_not_found"
        unstored = await create(door, store=False)
        assert (await door.http.get(f"{PATH}/{unstored['id']}")).status_code == 404


@on_loop
async def test_background_and_cancel() -> None:
    async with open_door(FakeEngine(delay=0.002)) as door:
        answer = await create(door, background=True, max_output_tokens=5)
        assert answer["status"] == "queued" and answer["background"] is True
        where = f"{PATH}/{answer['id']}"

        async def status() -> str:
            return (await door.http.get(where)).json()["status"]

        while await status() in ("queued", "in_progress"):
            await asyncio.sleep(0.01)
        done = (await door.http.get(where)).json()
        assert done["status"] == "incomplete" and len(done["output"][0]["content"][0]["text"]) == 5
        refused = await door.post(where + "/cancel", {})
        assert refused.status_code == 400 and "nothing to cancel" in refused.json()["error"]["message"]

        long = await create(door, background=True, max_output_tokens=400)
        early = await door.post(PATH, {"input": "a", "previous_response_id": long["id"]})
        assert early.status_code == 400
        await until(lambda: door.engine.running == 1)
        for _ in range(2):
            cancelled = await door.post(f"{PATH}/{long['id']}/cancel", {})
            assert cancelled.status_code == 200 and cancelled.json()["status"] == "cancelled"
        await until(lambda: door.client.in_flight == 0 and door.engine.running == 0)
        assert (await door.http.get(f"{PATH}/{long['id']}")).json()["status"] == "cancelled"


async def replay(door: Door, where: str, **query: Any) -> list[dict[str, Any]]:
    response = await door.http.get(where, params={"stream": "true", **query})
    assert response.status_code == 200, response.text
    return [json.loads(block.split("data: ", 1)[1]) for block in response.text.split("\n\n") if block]


@pytest.mark.slow
@on_loop
async def test_the_stream_of_a_background_response_can_be_taken_up_again() -> None:
    async with open_door(FakeEngine(delay=0.002)) as door:
        found = [data for _, data in await events(door, background=True, max_output_tokens=30)]
        assert [event["sequence_number"] for event in found] == list(range(len(found)))
        assert found[0]["type"] == "response.created" and found[0]["response"]["background"] is True
        assert found[-1]["type"] == "response.incomplete"
        where = f"{PATH}/{found[0]['response']['id']}"
        assert await replay(door, where) == found
        assert await replay(door, where, starting_after=7) == found[8:]
        assert await replay(door, where, starting_after=5000) == []
        after = await door.post(PATH, {"input": "b", "previous_response_id": found[0]["response"]["id"]})
        assert after.status_code == 200

        # One reader leaves, others follow to the end.
        body = {"input": "hi", "background": True, "stream": True, "max_output_tokens": 60}
        first = asyncio.create_task(door.post(PATH, body))
        await until(lambda: door.engine.running == 1)
        running = f"{PATH}/{door.engine.submits[-1].id}"
        early = asyncio.create_task(replay(door, running, starting_after=3))
        await asyncio.sleep(0.02)
        first.cancel()
        rest = await early
        assert rest[0]["sequence_number"] == 4 and rest[-1]["type"] == "response.incomplete"
        assert (await door.http.get(running)).json()["status"] == "incomplete" and door.engine.aborts == []


@on_loop
async def test_streams_that_cannot_be_taken_up() -> None:
    async with open_door() as door:
        answer = await create(door)
        for query in ({"stream": "true"}, {"starting_after": 3}, {"stream": "true", "starting_after": -1}):
            refused = await door.http.get(f"{PATH}/{answer['id']}", params=query)
            assert refused.status_code == 400, refused.text
        assert (await door.http.get(f"{PATH}/resp_x", params={"stream": "true"})).status_code == 404
    async with open_door(FakeEngine(refuse_all=(503, "the queue is full"))) as door:
        refused = await door.post(PATH, {"input": "a", "background": True, "stream": True})
        assert refused.status_code == 503 and "queue is full" in refused.text


@on_loop
async def test_a_background_response_may_fail() -> None:
    async with open_door(FakeEngine(refuse_all=(503, "the queue is full"))) as door:
        answer = await create(door, background=True)
        found: dict[str, Any] = {}
        while found.get("status") != "failed":
            await asyncio.sleep(0.01)
            found = (await door.http.get(f"{PATH}/{answer['id']}")).json()
        assert found["error"] == {"code": "server_error", "message": "the queue is full"}


@on_loop
async def test_errors_before_and_inside_a_stream() -> None:
    async with open_door(FakeEngine(refuse_all=(503, "the queue is full"))) as door:
        assert (await door.post(PATH, {"input": "a", "stream": True})).status_code == 503
        assert (await door.post(PATH, {"input": "a"})).status_code == 503
    engine = FakeEngine(delay=0.002)
    async with open_door(engine) as door:
        dying = asyncio.create_task(die_at(engine, 5, "killed by signal 9"))
        found = await events(door, max_output_tokens=400)
        await dying
        assert [name for name, _ in found][-2:] == ["error", "response.failed"]
        assert "killed by signal 9" in found[-2][1]["message"]
        failed = found[-1][1]["response"]
        assert failed["status"] == "failed" and "killed" in failed["error"]["message"]
        assert (await door.http.get(f"{PATH}/{failed['id']}")).json()["status"] == "failed"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "a", "inpt": 1}, "inpt"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "message", "content": "a"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].image_url"),
        ({"input": [{"role": "user", "content": "a", "colour": 1}]}, "input[0].colour"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
        ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": "a", "tools": [{"type": "function"}]}, "tools[0].name"),
        ({"input": "a", "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
        ({"input": "a", "truncation": "auto"}, "truncation"),
        ({"input": "a", "conversation": "c"}, "conversation"),
        ({"input": "a", "include": ["file_search_call.results"]}, "include"),
        ({"input": "a", "background": True, "store": False}, "background"),
        ({"input": "a", "temperature": -1}, "temperature"),
    ],
)
def test_refusals(body: dict[str, Any], param: str | None) -> None:
    @on_loop
    async def check() -> None:
        async with open_door(info=INFO) as door:
            response = await door.post(PATH, body)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param
            assert door.engine.submits == [] and door.client.in_flight == 0

    check()


@on_loop
async def test_a_format_becomes_a_constraint() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    async with open_door(say("{}"), INFO) as door:
        text = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}, "verbosity": "low"}
        answer = await create(door, text=text)
        assert json.loads(door.engine.submits[-1].sampling.json_schema or "") == schema
        assert answer["text"] == {"format": text["format"]}
    async with open_door(info=make_info()) as door:
        refused = await create(door, status=400, text=text)
        assert refused["error"]["code"] == "not_supported"


def test_the_store_is_bounded_and_keeps_what_runs() -> None:
    def entry(key: str, status: Any = "completed", size: int = 1) -> Stored:
        answer = ResponseAnswer(
            id=key,
            created_at=0,
            status=status,
            metadata={},
            model="m",
            parallel_tool_calls=True,
            reasoning={},
            store=True,
            temperature=1.0,
            text={},
            tool_choice="auto",
            tools=[],
            top_p=1.0,
        )
        return Stored(answer, [Message(role="user", content="x" * size)], [])

    store = ResponseStore(max_responses=3, max_bytes=2000)
    for key in "abc":
        store.put(entry(key, "in_progress" if key == "a" else "completed"))
    store.get("b")
    store.put(entry("d"))
    assert [key for key in "abcd" if key in store] == ["a", "b", "d"]
    store.put(entry("e", size=1500))
    store.put(entry("f", size=1500))
    assert "e" not in store and "f" in store and "a" in store
    full = ResponseStore(max_responses=1)
    full.put(entry("a", "queued"))
    with pytest.raises(Exception, match="in progress"):
        full.put(entry("b"))
    full.put(entry("a"))
    full.put(entry("b"))
    assert "a" not in full and len(full) == 1


@on_loop
async def test_numbers_with_more_digits_than_a_double_go_in_and_come_back() -> None:
    long = "0.12345678901234567890123"
    schema = f'{{"type":"object","properties":{{"a":{{"maximum":{long}}}}}}}'
    tool = f'{{"type":"function","name":"weather","parameters":{schema}}}'
    head = {"content-type": "application/json"}
    async with open_door(say("Hello."), INFO) as door:
        body = f'{{"input":"hi","tools":[{tool}],"max_output_tokens":16.0}}'
        told = (await door.http.post(PATH, content=body, headers=head)).json()
        assert told["tools"][0]["parameters"]["properties"]["a"]["maximum"] == float(long)
        body = f'{{"text":"hi","sampling_params":{{"max_new_tokens":2.0,"logit_bias":{{"65":{long}}}}}}}'
        answer = await door.http.post("/generate", content=body, headers=head)
        assert answer.status_code == 200, answer.text
        sampling = door.engine.submits[-1].sampling
        assert sampling.logit_bias == {"65": float(long)} and sampling.max_new_tokens == 2
