"""Refusals name what the client sent, on each route; tools without parameters take none; no grammar of ours shows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engine_door import http_door

from phloem import Engine
from phloem.core.errors import BadRequest
from phloem.protocol.body import Parser
from phloem.server.messages.body import MessagesBody
from phloem.server.responses.body import ResponsesBody
from phloem.testing.checkpoints import tiny_checkpoint

pytest.importorskip("llguidance")

GOOD = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}}, "required": ["n"]}
BAD = {"type": "object", "properties": {"x": {"type": "string", "not": {"pattern": "a"}}}, "required": ["x"]}
LATE = {"type": "object", "properties": {"x": {"type": "string", "pattern": "(?=a)b"}}, "required": ["x"]}
USER = [{"role": "user", "content": "Hi"}]
ROUTES = ("chat", "responses", "messages")
SOURCE = ("%json", "start:", "%llguidance", " | ", "structural_tag", "x-guidance")


@pytest.fixture(scope="module", params=["hermes", "qwen3_coder"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 8192, "tool_call_parser": request.param}
    with Engine(model_path=str(model), **settings) as made:
        yield made


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with http_door(engine) as found:
        yield found


def tool(name: str, schema: Any, strict: bool | None = None) -> dict[str, Any]:
    made: dict[str, Any] = {"name": name, "description": "it"}
    made |= {} if schema is ... else {"parameters": schema}
    return made | ({} if strict is None else {"strict": strict})


def ask(
    url: str,
    route: str,
    tools: list[dict[str, Any]],
    choice: str | None = None,
    shape: Any = None,
    limit: int = 300,
) -> Any:
    """`choice`: required, or the name of a tool."""
    named = choice not in (None, "required")
    body: dict[str, Any]
    if route == "chat":
        body = {
            "messages": USER,
            "max_tokens": limit,
            "tools": [{"type": "function", "function": one} for one in tools],
        }
        body["tool_choice"] = {"type": "function", "function": {"name": choice}} if named else choice
        body["parallel_tool_calls"] = False
        if shape is not None:
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "a", "schema": shape}}
        return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    if route == "responses":
        body = {"input": "Hi", "max_output_tokens": limit, "tools": [{"type": "function", **one} for one in tools]}
        body["tool_choice"] = {"type": "function", "name": choice} if named else choice
        body["parallel_tool_calls"] = False
        if shape is not None:
            body["text"] = {"format": {"type": "json_schema", "name": "a", "schema": shape}}
        return httpx.post(f"{url}/v1/responses", json=body, timeout=120)
    choices: dict[str, Any] = {"type": "tool", "name": choice} if named else {"type": "any"}
    renamed = [{"input_schema" if key == "parameters" else key: one[key] for key in one} for one in tools]
    body = {"messages": USER, "max_tokens": limit, "tools": renamed}
    if choice is not None:
        body["tool_choice"] = {**choices, "disable_parallel_tool_use": True}
    if shape is not None:
        body["output_config"] = {"format": {"type": "json_schema", "schema": shape}}
    return httpx.post(f"{url}/v1/messages", json=body, timeout=120)


def calls_of(answer: httpx.Response, route: str) -> list[tuple[str, Any]]:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if route == "chat":
        found = [call["function"] for call in body["choices"][0]["message"]["tool_calls"]]
        return [(call["name"], json.loads(call["arguments"])) for call in found]
    if route == "responses":
        found = [item for item in body["output"] if item["type"] == "function_call"]
        return [(call["name"], json.loads(call["arguments"])) for call in found]
    return [(block["name"], block["input"]) for block in body["content"] if block["type"] == "tool_use"]


def told(answer: httpx.Response) -> tuple[str, str | None]:
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert not any(word in error["message"] for word in SOURCE), error["message"]
    return error["message"], error.get("param")


NAMES = {
    "chat": "tools[1].function.parameters",
    "responses": "tools[1].parameters",
    "messages": "tools[1].input_schema",
}
FORMATS = {"chat": "response_format", "responses": "text.format", "messages": "output_config.format"}


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_a_strict_tool_that_cannot_be_enforced_is_named_with_the_place(url: str, route: str) -> None:
    for schema, place in ((BAD, "#/properties/x/not"), (LATE, "#/properties/x: ")):
        for choice in (None, "required", "f"):
            answer = ask(url, route, [tool("g", GOOD), tool("f", schema, True)], choice)
            message, param = told(answer)
            assert message.startswith(NAMES[route]) and place in message and "'f'" in message, message
            assert param == NAMES[route] or route == "messages"


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_one_that_is_not_strict_fails_nothing(url: str, route: str) -> None:
    for schema in (BAD, LATE):
        assert ask(url, route, [tool("g", GOOD, True), tool("f", schema)], limit=16).status_code == 200
        found = calls_of(ask(url, route, [tool("g", GOOD, True), tool("f", schema)], "g"), route)
        assert [name for name, _ in found] == ["g"] and set(found[0][1]) == {"n"}


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_a_format_is_called_what_the_route_calls_it(url: str, route: str) -> None:
    for schema, place in ((BAD, "#/properties/x/not"), (LATE, "#/properties/x: "), ({"type": "wat"}, "#/type")):
        message, param = told(ask(url, route, [], shape=schema))
        assert message.startswith(f"{FORMATS[route]}: ") and place in message, message
        assert param == FORMATS[route] or route == "messages"


@pytest.mark.slow
def test_other_spellings_of_a_constraint_are_told_as_sent(url: str) -> None:
    for body, name in (
        ({"guided_json": LATE}, "guided_json"),
        ({"structured_outputs": {"json": LATE}}, "structured_outputs.json"),
        ({"json_schema": json.dumps(LATE)}, "json_schema"),
        ({"regex": "(?=a)b"}, "regex"),
        ({"guided_regex": "a("}, "guided_regex"),
        ({"guided_grammar": 'root ::= "a" b'}, "guided_grammar"),
    ):
        answer = httpx.post(f"{url}/v1/completions", json={"prompt": "Hi", "max_tokens": 9, **body}, timeout=120)
        assert answer.status_code == 400, answer.text
        error = answer.json()["error"]
        assert error["param"] == name and error["message"].startswith(f"{name}: "), error
    body = {"text": "Hi", "sampling_params": {"json_schema": json.dumps(LATE), "max_new_tokens": 9}}
    answer = httpx.post(f"{url}/generate", json=body, timeout=120)
    assert answer.status_code == 400 and "json_schema: #/properties/x" in answer.text, answer.text


def test_tags_show_the_clients_part_alone(url: str) -> None:
    shape = {"type": "tag", "begin": "<a>", "content": {"type": "regex", "pattern": "(?=a)b"}, "end": "</a>"}
    body = {"prompt": "Hi", "max_tokens": 9, "structural_tag": {"type": "structural_tag", "format": shape}}
    error = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["error"]
    assert error["param"] == "structural_tag" and "(?=a)b" in error["message"], error
    assert not any(word in error["message"] for word in ("start:", "%llguidance", " | ", "r0")), error


def test_the_engine_in_process_names_the_field(engine: Engine) -> None:
    with pytest.raises(BadRequest) as caught:
        engine.generate("Hi", {"json_schema": json.dumps(LATE), "max_new_tokens": 9})
    assert caught.value.param == "json_schema" and "#/properties/x" in caught.value.message


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_a_tool_without_parameters_is_called_without_any(url: str, route: str) -> None:
    for schema in (
        ...,
        None,
        {"type": "object", "properties": {}},
        {"properties": {}, "type": "object", "title": "No"},
    ):
        for choice in ("now", "required"):
            found = calls_of(ask(url, route, [tool("now", schema)], choice), route)
            assert found and all(call == ("now", {}) for call in found), (schema, found)


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_arguments_and_answers_have_the_numbers_of_the_schema(url: str, route: str) -> None:
    schema = {
        "type": "object",
        "properties": {"id": {"const": 2**53 + 1}, "n": {"enum": [1234567890123456789]}},
        "required": ["id", "n"],
        "additionalProperties": False,
    }
    want = {"id": 2**53 + 1, "n": 1234567890123456789}
    for strict in (True, None):
        assert calls_of(ask(url, route, [tool("f", schema, strict)], "f"), route) == [("f", want)]
    answer = ask(url, route, [], shape=schema)
    assert answer.status_code == 200 and json.dumps(json.dumps(want, separators=(",", ":"))) in answer.text, answer.text


def test_a_field_that_is_missing_is_named() -> None:
    for kind, data, field in ((ResponsesBody, b"{}", "input"), (MessagesBody, b"{}", "messages")):
        with pytest.raises(BadRequest, match=f"^{field}: missing required field") as told:
            Parser(kind).parse(data)
        assert told.value.param == field
