"""Over HTTP, with a model that knows nothing: forced calls in the models' own notations, and grammars that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from engine_door import http_door

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

pytest.importorskip("llguidance")

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"$ref": "#/$defs/Unit"},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "where": {
            "type": "object",
            "properties": {"near": {"type": "boolean"}},
            "required": ["near"],
            "additionalProperties": False,
        },
    },
    "required": ["city", "unit", "days", "where"],
    "additionalProperties": False,
    "$defs": {"Unit": {"enum": ["celsius", "kelvin"]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": SCHEMA, "strict": True}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
WEATHER = {"type": "function", "function": {"name": "weather"}}
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "?"}], "tools": TOOLS, "max_tokens": 500, "seed": 5}
# They go wrong on the way: stuck, or with more readings than the engine follows.
STUCK = "start: A X\nA: /[a-d]{9}/\nX: /c+/ & /d+/\n"
HUGE = 'start: "ab" (' + " | ".join(f"x{i}" for i in range(1500)) + ")\n"
HUGE += "\n".join(f'x{i}: "b" /[a-z]{{{i + 1}}}/ "c{i}"' for i in range(1500))


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("glm45", "minimax_m2")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=4096)


@pytest.fixture(
    scope="module",
    params=["qwen3_coder", *OTHERS],
)
def url(request: pytest.FixtureRequest, model: Path) -> Iterator[str]:
    settings: dict[str, Any] = {"model_path": str(model), "dtype": "float32", "max_total_tokens": 8192}
    with Engine(tool_call_parser=request.param, **settings) as engine, http_door(engine) as found:
        yield found


def post(url: str, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(url + path, json=body, timeout=120)


def valid(name: str, arguments: str) -> None:
    value = json.loads(arguments)
    if name == "weather":
        jsonschema.validate(value, SCHEMA)
    else:
        assert name == "now" and value == {}


def test_forced_calls(url: str) -> None:
    for choice in (WEATHER, "required"):
        response = post(url, "/v1/chat/completions", {**BODY, "tool_choice": choice, "parallel_tool_calls": False})
        assert response.status_code == 200, response.text
        (found,) = response.json()["choices"]
        (call,) = found["message"]["tool_calls"]
        valid(call["function"]["name"], call["function"]["arguments"])
        assert found["finish_reason"] == "tool_calls" and not found["message"]["content"]
        assert choice == "required" or call["function"]["name"] == "weather"


def test_forced_calls_in_a_stream(url: str) -> None:
    body = {**BODY, "tool_choice": WEATHER, "stream": True}
    data = [line.removeprefix("data: ") for line in post(url, "/v1/chat/completions", body).text.split("\n\n") if line]
    assert data[-1] == "[DONE]"
    choices = [choice for item in data[:-1] for choice in json.loads(item)["choices"]]
    calls = [call for choice in choices for call in choice["delta"].get("tool_calls") or []]
    assert {call["index"] for call in calls} == {0}
    names = [call["function"]["name"] for call in calls if call["function"].get("name")]
    assert names == ["weather"]
    valid("weather", "".join(call["function"].get("arguments", "") for call in calls))
    assert choices[-1]["finish_reason"] == "tool_calls"
    assert not any(choice["delta"].get("content") for choice in choices)


@pytest.mark.slow
def test_several_forced_calls_only_where_they_are_allowed(url: str) -> None:
    body = {**BODY, "tool_choice": "required", "temperature": 1.0}
    for seed in range(4):
        response = post(url, "/v1/chat/completions", {**body, "seed": seed, "max_tokens": 300})
        (choice,) = response.json()["choices"]
        calls = choice["message"]["tool_calls"]
        assert calls and choice["message"]["content"] is None, "nothing but calls comes, however many"
        assert choice["finish_reason"] in ("tool_calls", "length")
        for call in calls[: -1 if choice["finish_reason"] == "length" else None]:
            valid(call["function"]["name"], call["function"]["arguments"])


@pytest.mark.slow
def test_a_format_beside_tools_makes_answers_calls_or_texts_of_that_format(url: str) -> None:
    schema = {**SCHEMA["properties"]["where"], "properties": {"near": {"type": "boolean"}, "n": {"type": "integer"}}}
    shape = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    flat = [{"type": "function", **tool["function"]} for tool in TOOLS]
    seen = set[str]()
    for seed in range(8):
        body = {**BODY, "response_format": shape, "temperature": 1.0, "seed": seed, "max_tokens": 300}
        (choice,) = post(url, "/v1/chat/completions", body).json()["choices"]
        message, calls = choice["message"], choice["message"]["tool_calls"] or []
        assert bool(message["content"]) != bool(calls), message
        seen.add("calls" if calls else "text")
        if choice["finish_reason"] == "length":
            continue
        for call in calls:
            valid(call["function"]["name"], call["function"]["arguments"])
        if not calls:
            jsonschema.validate(json.loads(message["content"]), schema)
    assert "text" in seen
    form = {"type": "json_schema", "name": "s", "schema": schema}
    asked = {"input": "?", "tools": flat, "text": {"format": form}, "max_output_tokens": 300}
    response = post(url, "/v1/responses", {**asked, "tool_choice": {"type": "function", "name": "weather"}}).json()
    assert [item["type"] for item in response["output"]] == ["function_call"], "a forced call wins"


def test_what_cannot_be_enforced_is_refused(url: str) -> None:
    parameters = {**SCHEMA, "minProperties": 2}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": parameters, "strict": True}}]
    response = post(url, "/v1/chat/completions", {**BODY, "tools": tools})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == "tools[0].function.parameters"
    assert "minProperties" in error["message"]


@pytest.mark.slow
@pytest.mark.parametrize(("grammar", "why"), [(STUCK, "goes on from here"), (HUGE, "over a limit")])
def test_a_grammar_that_fails_on_the_way_is_the_clients(url: str, grammar: str, why: str) -> None:
    plain = {"text": "hello", "sampling_params": {"max_new_tokens": 24, "ignore_eos": True, "temperature": 0}}
    alone = post(url, "/generate", plain).json()["text"]
    wrong = {"text": "hello", "sampling_params": {"ebnf": grammar, "max_new_tokens": 24}}
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(post, url, "/generate", plain) for _ in range(2)]
        failed = pool.submit(post, url, "/generate", wrong).result()
        assert [future.result().json()["text"] for future in beside] == [alone, alone]
    assert failed.status_code == 400, failed.text
    error = failed.json()["error"]
    assert (
        error["type"] == "invalid_request_error" and error["message"].startswith("ebnf: ") and why in error["message"]
    )
    chat = {"messages": BODY["messages"], "ebnf": grammar, "max_tokens": 24, "stream": True}
    response = post(url, "/v1/chat/completions", chat)
    events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    if grammar == STUCK:  # pieces were sent before
        assert response.status_code == 200 and events[-1] == "[DONE]" and len(events) > 3
        error = json.loads(events[-2])["error"]
    else:
        assert response.status_code == 400
        error = response.json()["error"]
    assert error["type"] == "invalid_request_error" and why in error["message"]
    assert post(url, "/generate", plain).json()["text"] == alone
