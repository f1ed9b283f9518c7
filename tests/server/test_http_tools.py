"""Tools and reasoning through the HTTP door, over an engine that says what the test tells it to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from door import Door, make_info, on_loop, open_door

from phloem.client.info import ModelInfo
from phloem.core.messages import unpack_ids
from phloem.testing.byte_tokenizer import ByteTokenizer
from phloem.testing.fake_engine import FakeEngine

PATH = "/v1/chat/completions"
HI = [{"role": "user", "content": "weather?"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich"}}\n</tool_call>'


@dataclass
class Speaker(FakeEngine):
    """Says `text`, then stops."""

    text: str = ""

    def _next(self, running: Any) -> int:
        said = self.text.encode()
        at = len(running.out)
        return said[at] if at < len(said) else self.eos


def info(**changes: Any) -> ModelInfo:
    values: dict[str, Any] = {
        "features": frozenset({"tools", "reasoning", "grammar"}),
        "tool_parser": "hermes",
        "reasoning_parser": "qwen3",
    }
    return make_info(**{**values, **changes})


def prompt_of(door: Door) -> str:
    ids = unpack_ids(door.engine.submits[-1].input_ids).tolist()
    return ByteTokenizer().decode(ids, skip_special_tokens=False)


async def chat(door: Door, **body: Any) -> dict[str, Any]:
    response = await door.post(PATH, {"messages": HI, **body})
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


@on_loop
async def test_a_call_and_its_reasoning() -> None:
    async with open_door(Speaker(text=f"<think>\nHm.\n</think>\n\nLooking.\n{CALL}"), info()) as door:
        choice = await chat(door, tools=TOOLS)
        message = choice["message"]
        assert (message["content"], message["reasoning_content"]) == ("Looking.", "Hm.")
        (call,) = message["tool_calls"]
        assert call["id"].startswith("call_") and call["type"] == "function" and "index" not in call
        assert call["function"] == {"name": "weather", "arguments": '{"city": "Zürich"}'}
        assert choice["finish_reason"] == "tool_calls"


@on_loop
async def test_only_a_call_has_no_content() -> None:
    async with open_door(Speaker(text=CALL), info()) as door:
        choice = await chat(door, tools=TOOLS)
        assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) == 1


@on_loop
async def test_streams_say_the_same() -> None:
    async with open_door(Speaker(text=f"<think>\nHm.\n</think>\n\nLooking.\n{CALL}\n{CALL}"), info()) as door:
        data = await door.events(PATH, {"messages": HI, "tools": TOOLS})
        assert data[-1] == "[DONE]"
        choices = [json.loads(item)["choices"][0] for item in data[:-1]]
        deltas = [choice["delta"] for choice in choices]
        assert "".join(delta.get("content") or "" for delta in deltas) == "Looking."
        assert "".join(delta.get("reasoning_content") or "" for delta in deltas) == "Hm."
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
        for index in (0, 1):
            own = [call for call in calls if call["index"] == index]
            assert own[0]["function"]["name"] == "weather" and own[0]["id"] and own[0]["type"] == "function"
            assert json.loads("".join(call["function"]["arguments"] for call in own)) == {"city": "Zürich"}
        assert choices[-1]["finish_reason"] == "tool_calls"


@on_loop
async def test_reasoning_switches() -> None:
    async with open_door(Speaker(text="<think>\nHm, hm.\n</think>\n\nYes."), info()) as door:
        together = await chat(door, separate_reasoning=False)
        assert together["message"]["content"] == "<think>\nHm, hm.\n</think>\n\nYes."
        assert "reasoning_content" not in together["message"] or together["message"]["reasoning_content"] is None
        data = await door.events(PATH, {"messages": HI, "stream_reasoning": False})
        deltas = [json.loads(item)["choices"][0]["delta"] for item in data[:-1]]
        assert [delta["reasoning_content"] for delta in deltas if delta.get("reasoning_content")] == ["Hm, hm."]
        apart = await chat(door, max_tokens=9)
        assert apart["message"]["reasoning_content"] == "H" and apart["message"]["content"] == ""


@on_loop
async def test_without_tools_a_call_is_text() -> None:
    async with open_door(Speaker(text=CALL), info()) as door:
        for body in ({}, {"tools": TOOLS, "tool_choice": "none"}):
            choice = await chat(door, **body)
            assert choice["message"]["content"] == CALL and choice["finish_reason"] == "stop"


@on_loop
async def test_only_one_call_when_they_may_not_be_parallel() -> None:
    async with open_door(Speaker(text=CALL * 2), info()) as door:
        choice = await chat(door, tools=TOOLS, parallel_tool_calls=False)
        assert len(choice["message"]["tool_calls"]) == 1


@on_loop
async def test_a_required_call_is_enforced() -> None:
    async with open_door(Speaker(text=CALL), info()) as door:
        for tool_choice in ("required", {"type": "function", "function": {"name": "weather"}}):
            await chat(door, tools=TOOLS, tool_choice=tool_choice)
            tag = json.loads(door.engine.submits[-1].sampling.structural_tag or "")
            assert tag["format"]["type"] in ("tag", "sequence") and "weather" in json.dumps(tag)
        await chat(door, tools=TOOLS)
        assert door.engine.submits[-1].sampling.structural_tag is None
    async with open_door(
        Speaker(text='[{"name": "weather", "parameters": {"city": "x"}}]'), info(tool_parser="qwen3_coder")
    ) as door:
        parameters = {**TOOLS[0]["function"]["parameters"], "minProperties": 1}  # type: ignore[dict-item]
        tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters}}]
        choice = await chat(door, tools=tools, tool_choice="required")
        assert json.loads(door.engine.submits[-1].sampling.json_schema or "")["type"] == "array"
        assert choice["message"]["tool_calls"][0]["function"]["arguments"] == '{"city": "x"}'
    async with open_door(info=info(features=frozenset({"tools"}))) as door:
        response = await door.post(PATH, {"messages": HI, "tools": TOOLS, "tool_choice": "required"})
        assert response.status_code == 400 and response.json()["error"]["code"] == "not_supported"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_wrong_tools_are_named(body: dict[str, Any], param: str) -> None:
    @on_loop
    async def check() -> None:
        async with open_door(info=info()) as door:
            response = await door.post(PATH, {"messages": HI, **body})
            assert response.status_code == 400 and response.json()["error"]["param"] == param
            assert door.engine.submits == []

    check()


OTHER = {"type": "function", "function": {"name": "elsewhere", "parameters": {"type": "object"}}}


@on_loop
async def test_tools_are_told_to_a_model_whose_template_knows_none() -> None:
    async with open_door(Speaker(text=CALL), info(explain_tools=True, spell_calls=True, context_length=4096)) as door:
        called = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
        talk = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "1", "content": "sunny"},
        ]
        response = await door.post(PATH, {"messages": talk, "tools": TOOLS})
        assert response.status_code == 200 and response.json()["choices"][0]["message"]["tool_calls"]
        prompt = prompt_of(door)
        assert prompt.startswith("<bos><system>") and '"name": "weather"' in prompt
        assert "<tool_response>\nsunny\n</tool_response>" in prompt and '"arguments": {}' in prompt
        shown = await door.post("/tokenize", {"messages": talk, "tools": TOOLS})
        assert ByteTokenizer().decode(shown.json()["tokens"], skip_special_tokens=False) == prompt
        # Tools that may not be called are not shown, nor counted.
        for choice in ("none", {"type": "function", "function": {"name": "weather"}}):
            asked = {"messages": talk, "tools": [*TOOLS, OTHER], "tool_choice": choice}
            assert (await door.post(PATH, asked)).status_code == 200
            shown = await door.post("/tokenize", asked)
            assert ByteTokenizer().decode(shown.json()["tokens"], skip_special_tokens=False) == prompt_of(door)
            assert "elsewhere" not in prompt_of(door)
        refused = await door.post("/tokenize", {"messages": talk, "tools": TOOLS, "tool_choice": "often"})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"


@on_loop
async def test_a_constraint_waits_for_reasoning_only_where_that_is_parted() -> None:
    async with open_door(Speaker(text="{}"), info()) as door:
        for path, body, at_once in (
            (PATH, {"messages": HI, "json_schema": "{}"}, False),
            (PATH, {"messages": HI, "json_schema": "{}", "separate_reasoning": False}, True),
            ("/generate", {"text": "x", "sampling_params": {"json_schema": "{}"}}, True),
        ):
            assert (await door.post(path, body)).status_code == 200
            assert door.engine.submits[-1].grammar_at_once is at_once


@on_loop
async def test_the_openai_client_reads_it() -> None:
    import openai

    async with open_door(Speaker(text=f"<think>Hm.</think>{CALL}"), info()) as door:
        client = openai.AsyncOpenAI(base_url="http://door/v1", api_key="-", http_client=door.http)
        answer = await client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS)  # type: ignore[arg-type]
        calls = answer.choices[0].message.tool_calls
        assert calls is not None and calls[0].function.name == "weather"  # type: ignore[union-attr]
        assert answer.choices[0].message.reasoning_content == "Hm."  # type: ignore[attr-defined]
        name, arguments = "", ""
        stream = await client.chat.completions.create(model="tiny", messages=HI, tools=TOOLS, stream=True)  # type: ignore[call-overload]
        async for chunk in stream:
            for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
                name += call.function.name or ""
                arguments += call.function.arguments or ""
        assert (name, json.loads(arguments)) == ("weather", {"city": "Zürich"})


@on_loop
async def test_texts_are_taken_apart_on_request() -> None:
    async with open_door(info=info()) as door:
        response = await door.post(
            "/parse_function_call", {"text": f"a {CALL}", "tools": TOOLS, "tool_call_parser": "qwen25"}
        )
        assert response.json() == {
            "normal_text": "a",
            "calls": [{"tool_index": 0, "name": "weather", "parameters": '{"city": "Zürich"}'}],
        }
        response = await door.post("/separate_reasoning", {"text": "Hm.</think>Yes", "reasoning_parser": "deepseek-r1"})
        assert response.json() == {"reasoning_text": "Hm.", "text": "Yes"}
        assert (await door.post("/parse_function_call", {"text": CALL})).json()["calls"][0]["name"] == "weather"
        assert (await door.post("/separate_reasoning", {"text": "Yes"})).json() == {"reasoning_text": "", "text": "Yes"}
        for path, field in (("/parse_function_call", "tool_call_parser"), ("/separate_reasoning", "reasoning_parser")):
            response = await door.post(path, {"text": "x", field: "klingon"})
            assert response.status_code == 400 and response.json()["error"]["param"] == field
            assert "known:" in response.json()["error"]["message"]
        model = (await door.http.get("/model_info")).json()
        assert (model["tool_call_parser"], model["reasoning_parser"]) == ("hermes", "qwen3")
    async with open_door(info=info(tool_parser=None, reasoning_parser=None)) as door:
        assert (await door.post("/parse_function_call", {"text": "x"})).status_code == 400
        assert (await door.post("/separate_reasoning", {"text": "x"})).status_code == 400
