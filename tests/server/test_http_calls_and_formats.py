"""On every route: a format for the answer together with tools, forced calls from their first token, and cut ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from door import Door, on_loop, open_door
from test_http_tools import CALL, HI, TOOLS, Speaker, info

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"summary": {"type": "string"}},
    "required": ["summary"],
    "additionalProperties": False,
}
FUNCTION: Any = TOOLS[0]["function"]
JSON = '{"summary":"<tool_call> is a marker"}'
Choice = str | None


def body_of(path: str, choice: Choice = None, form: bool = True, limit: int = 400) -> dict[str, Any]:
    """A request with the tool, and with the format; `choice` is auto, required or named."""
    if path == CHAT:
        forced: dict[str, Any] = {
            "required": "required",
            "named": {"type": "function", "function": {"name": "weather"}},
        }
        shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA, "strict": True}}
        body: dict[str, Any] = {"messages": HI, "tools": TOOLS, "max_tokens": limit}
        more = {"response_format": shape}
    elif path == RESPONSES:
        forced = {"required": "required", "named": {"type": "function", "name": "weather"}}
        shape = {"type": "json_schema", "name": "s", "schema": SCHEMA, "strict": True}
        body = {"input": "a", "tools": [{"type": "function", **FUNCTION}], "max_output_tokens": limit}
        more = {"text": {"format": shape}}
    else:
        forced = {"required": {"type": "any"}, "named": {"type": "tool", "name": "weather"}, "auto": {"type": "auto"}}
        tool = {"name": "weather", "input_schema": FUNCTION["parameters"]}
        body = {"messages": HI, "tools": [tool], "max_tokens": limit}
        more = {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}}
    if choice is not None:
        body["tool_choice"] = forced.get(choice, choice)
    return {**body, **(more if form else {})}


@dataclass
class Told:
    """An answer in one shape: its pieces in order, and why it ended."""

    pieces: list[tuple[str, str]]
    reason: str


def read(path: str, answer: dict[str, Any]) -> Told:
    pieces: list[tuple[str, str]] = []
    if path == CHAT:
        choice = answer["choices"][0]
        pieces += [("text", choice["message"]["content"])] if choice["message"]["content"] else []
        pieces += [("call", call["function"]["arguments"]) for call in choice["message"]["tool_calls"] or []]
        return Told(pieces, choice["finish_reason"])
    if path == RESPONSES:
        for item in answer["output"]:
            call = item["type"] == "function_call"
            pieces.append(("call", item["arguments"]) if call else ("text", item["content"][0]["text"]))
        return Told(pieces, answer["status"])
    for block in answer["content"]:
        call = block["type"] == "tool_use"
        pieces.append(("call", json.dumps(block["input"])) if call else ("text", block["text"]))
    return Told(pieces, answer["stop_reason"])


async def streamed(door: Door, path: str, body: dict[str, Any]) -> tuple[Told, list[str]]:
    """The same from a stream, and what came first of calls: names and pieces of arguments."""
    response = await door.http.post(path, json={**body, "stream": True})
    assert response.status_code == 200, response.text
    events = [json.loads(part.split("data: ", 1)[1]) for part in response.text.split("\n\n") if "{" in part]
    pieces: list[list[str]] = []
    heard: list[str] = []
    reason = ""

    def more(kind: str, text: str, fresh: bool = False) -> None:
        if fresh or not pieces or pieces[-1][0] != kind:
            pieces.append([kind, ""])
        pieces[-1][1] += text

    for event in events:
        kind = event.get("type", "")
        if path == CHAT:
            for choice in event["choices"]:
                if choice["delta"].get("content"):
                    more("text", choice["delta"]["content"])
                for call in choice["delta"].get("tool_calls", []):
                    heard += [call["function"].get("name") or "", call["function"]["arguments"]]
                    more("call", call["function"]["arguments"], "id" in call)
                reason = choice["finish_reason"] or reason
        elif kind == "response.output_item.added":
            call = event["item"]["type"] == "function_call"
            heard += [event["item"]["name"]] if call else []
            more("call" if call else "text", "", True)
        elif kind in ("response.output_text.delta", "response.function_call_arguments.delta"):
            heard += [event["delta"]] if "arguments" in kind else []
            more(pieces[-1][0], event["delta"])
        elif kind == "content_block_start":
            call = event["content_block"]["type"] == "tool_use"
            heard += [event["content_block"]["name"]] if call else []
            more("call" if call else "text", "", True)
        elif kind == "content_block_delta":
            delta = event["delta"].get("text", event["delta"].get("partial_json"))
            heard += [delta] if "partial_json" in event["delta"] else []
            more(pieces[-1][0], delta)
        elif kind == "message_delta":
            reason = event["delta"]["stop_reason"]
        elif kind.startswith("response.") and "response" in event:
            reason = event["response"]["status"]
            if kind not in ("response.created", "response.in_progress"):
                assert read(path, event["response"]).pieces == [tuple(piece) for piece in pieces], "order of items"
    return Told([(kind, text) for kind, text in pieces], reason), [text for text in heard if text]


ROUTES = [CHAT, RESPONSES, MESSAGES]


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("choice", [None, "auto"])
@on_loop
async def test_the_format_binds_the_text_and_a_call_may_come_instead(path: str, choice: Choice) -> None:
    for text, kind, value in ((JSON, "text", JSON), (CALL, "call", '{"city": "Zürich"}')):
        async with open_door(Speaker(text=text), info(reasoning_parser=None)) as door:
            answer = await door.post(path, body_of(path, choice))
            assert answer.status_code == 200, answer.text
            sampling = door.engine.submits[-1].sampling
            tag = json.loads(sampling.structural_tag or "")
            assert sampling.json_schema is None and tag["format"]["type"] == "or"
            assert "summary" in json.dumps(tag) and "weather" in json.dumps(tag)
            told = read(path, answer.json())
            assert [(name, json.loads(said)) for name, said in told.pieces] == [(kind, json.loads(value))]
            again, _ = await streamed(door, path, body_of(path, choice))
            assert again.pieces == [(kind, value)] and again.reason == told.reason


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("choice", ["required", "named"])
@on_loop
async def test_a_forced_call_wins_over_the_format(path: str, choice: str) -> None:
    async with open_door(Speaker(text=CALL), info(reasoning_parser=None)) as door:
        answers = [await door.post(path, body_of(path, choice, form)) for form in (True, False)]
        assert [answer.status_code for answer in answers] == [200, 200]
        first, second = (submit.sampling for submit in door.engine.submits)
        assert first.structural_tag == second.structural_tag and "summary" not in (first.structural_tag or "")
        assert first.json_schema is None
        assert read(path, answers[0].json()).pieces[0][0] == "call"


@pytest.mark.parametrize("path", ROUTES)
@on_loop
async def test_without_tools_in_play_the_format_stands_alone(path: str) -> None:
    none: Any = {"type": "none"} if path == MESSAGES else "none"
    async with open_door(Speaker(text=JSON), info(reasoning_parser=None)) as door:
        for body in ({**body_of(path), "tool_choice": none}, {**body_of(path), "tools": []}):
            assert (await door.post(path, body)).status_code == 200
            sampling = door.engine.submits[-1].sampling
            assert sampling.structural_tag is None and "summary" in (sampling.json_schema or "")


@on_loop
async def test_other_spellings_of_a_constraint_go_with_tools_too() -> None:
    async with open_door(Speaker(text="yes"), info(reasoning_parser=None)) as door:
        for field, value in (
            ("regex", "yes|no"),
            ("guided_choice", ["yes", "no"]),
            ("ebnf", 'root ::= "yes" | "no"'),
            ("response_format", {"type": "json_object"}),
            ("json_schema", '{"enum": [12345678901234567890123]}'),
        ):
            for choice, shape in (("auto", "or"), ("required", "sequence")):
                body = {"messages": HI, "tools": TOOLS, "tool_choice": choice, "max_tokens": 9, field: value}
                answer = await door.post(CHAT, body)
                assert answer.status_code == 200, answer.text
                assert json.loads(door.engine.submits[-1].sampling.structural_tag or "")["format"]["type"] == shape
        strict = [{"type": "function", "function": {**FUNCTION, "strict": True}}]
        tag = {"structures": [{"begin": "<a>", "schema": {}, "end": "</a>"}], "triggers": ["<a>"]}
        answer = await door.post(CHAT, {"messages": HI, "tools": strict, "structural_tag": tag})
        assert answer.status_code == 400 and "structural_tag" in answer.json()["error"]["message"]
        assert (await door.post(CHAT, {"messages": HI, "tools": TOOLS, "structural_tag": tag})).status_code == 200


@on_loop
async def test_output_format_of_messages_is_another_name() -> None:
    async with open_door(Speaker(text=JSON), info(reasoning_parser=None)) as door:
        body = {"messages": HI, "max_tokens": 50, "output_format": {"type": "json_schema", "schema": SCHEMA}}
        assert (await door.post(MESSAGES, body)).status_code == 200
        assert json.loads(door.engine.submits[-1].sampling.json_schema or "") == SCHEMA
        for wrong in ({"output_format": {"type": "yaml"}}, body_of(MESSAGES)):
            answer = await door.post(MESSAGES, {**body, **wrong})
            assert answer.status_code == 400 and "output_format" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("choice", ["required", "named"])
@on_loop
async def test_a_forced_call_streams_from_its_name(path: str, choice: str) -> None:
    async with open_door(Speaker(text=CALL, per_step=1), info(reasoning_parser=None)) as door:
        told, heard = await streamed(door, path, body_of(path, choice))
        assert told.pieces == [("call", '{"city": "Zürich"}')]
        assert heard[0] == "weather" and len(heard) > 10, "the arguments come as they are written"


@pytest.mark.slow
@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("choice", [None, "required", "named"])
@on_loop
async def test_a_call_that_the_limit_cuts_is_a_part_of_one(path: str, choice: Choice) -> None:
    reasons = {CHAT: "length", RESPONSES: "incomplete", MESSAGES: "max_tokens"}
    async with open_door(Speaker(text=CALL), info(reasoning_parser=None)) as door:
        for limit in range(38 if choice != "named" else 3, len(CALL.encode()) - 13):
            body = body_of(path, choice, form=False, limit=limit)
            told = read(path, (await door.post(path, body)).json())
            assert [kind for kind, _ in told.pieces] == ["call"], (limit, told)
            assert told.reason == reasons[path]
            again, _ = await streamed(door, path, body)
            assert [kind for kind, _ in again.pieces] == ["call"] and again.reason == reasons[path]
            assert '{"city": "Zürich"}'.startswith(again.pieces[0][1].rstrip("\ufffd")), "half a character at the end"
            assert path == MESSAGES or again.pieces == told.pieces


@pytest.mark.parametrize(
    ("reasoning", "text"),
    [
        (None, f"{CALL}\nDone."),
        ("qwen3", f"<think>Hm</think>Well.\n{CALL}\nDone.{CALL}"),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>commentary<|message|>First<|end|>"
            "<|start|>assistant<|channel|>analysis<|message|>B<|end|><|start|>assistant<|channel|>final<|message|>Last",
        ),
    ],
)
@on_loop
async def test_items_stream_in_the_order_of_the_whole_answer(reasoning: str | None, text: str) -> None:
    async with open_door(Speaker(text=text), info(reasoning_parser=reasoning)) as door:
        body = body_of(RESPONSES, form=False)
        kinds = [item["type"] for item in (await door.post(RESPONSES, body)).json()["output"]]
        response = await door.http.post(RESPONSES, json={**body, "stream": True})
        events = [json.loads(part.split("data: ", 1)[1]) for part in response.text.split("\n\n") if part]
        added = [event["item"]["type"] for event in events if event["type"] == "response.output_item.added"]
        assert added == kinds == [item["type"] for item in events[-1]["response"]["output"]]
        assert len(kinds) > 1
        blocks = (await door.post(MESSAGES, body_of(MESSAGES, form=False))).json()["content"]
        names = {"text": "message", "thinking": "reasoning", "tool_use": "function_call"}
        assert [names[block["type"]] for block in blocks] == kinds
