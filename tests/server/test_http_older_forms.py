"""Forms that clients of other servers still use, or already: functions, counts of input tokens, threads."""

from __future__ import annotations

import json
from typing import Any

import pytest
from door import on_loop, open_door
from test_http_tools import CALL, HI, TOOLS, Speaker, info, prompt_of

CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
COUNT = "/v1/responses/input_tokens"
FUNCTIONS: list[Any] = [TOOLS[0]["function"]]
ANSWER = '{"city": "Zürich"}'


@on_loop
async def test_functions_are_answered_in_their_own_form() -> None:
    async with open_door(Speaker(text=CALL), info(reasoning_parser=None)) as door:
        for choice in (None, "auto", {"name": "weather"}):
            body = {"messages": HI, "functions": FUNCTIONS, "function_call": choice}
            answer = await door.post(CHAT, body)
            assert answer.status_code == 200, answer.text
            (found,) = answer.json()["choices"]
            assert found["message"]["function_call"] == {"name": "weather", "arguments": ANSWER}
            assert found["message"]["tool_calls"] is None and found["finish_reason"] == "function_call"
            tag = door.engine.submits[-1].sampling.structural_tag
            assert (tag is not None) == isinstance(choice, dict)
            data = [json.loads(item)["choices"][0] for item in (await door.events(CHAT, body))[:-1]]
            deltas = [choice["delta"].get("function_call", {}) for choice in data]
            assert [delta["name"] for delta in deltas if delta.get("name")] == ["weather"]
            assert "".join(delta.get("arguments", "") for delta in deltas) == ANSWER
            assert data[-1]["finish_reason"] == "function_call"
        none = {"messages": HI, "functions": FUNCTIONS, "function_call": "none"}
        assert (await door.post(CHAT, none)).json()["choices"][0]["message"]["content"] == CALL
        cut = {"messages": HI, "functions": FUNCTIONS, "function_call": {"name": "weather"}, "max_tokens": 50}
        (found,) = (await door.post(CHAT, cut)).json()["choices"]
        assert found["finish_reason"] == "length" and found["message"]["function_call"]["name"] == "weather"
        assert "function_call" not in (await door.post(CHAT, {"messages": HI, "tools": TOOLS})).json()["choices"][0]


@on_loop
async def test_calls_and_results_of_functions_reach_the_template_as_those_of_tools_do() -> None:
    call = {"name": "weather", "arguments": "{}"}
    old = [*HI, {"role": "assistant", "content": None, "function_call": call}]
    old.append({"role": "function", "name": "weather", "content": "sun"})
    new: list[dict[str, Any]] = [*HI, {"role": "assistant", "content": None, "tool_calls": []}]
    new[1]["tool_calls"].append({"id": "call_1", "type": "function", "function": call})
    new.append({"role": "tool", "name": "weather", "tool_call_id": "call_1", "content": "sun"})
    async with open_door(Speaker(text="Sunny."), info(spell_calls=True, context_length=2048)) as door:
        prompts: list[str] = []
        for messages, more in ((old, {"functions": FUNCTIONS}), (old, {}), (new, {"tools": TOOLS})):
            answer = await door.post(CHAT, {"messages": messages, "max_tokens": 20, **more})
            assert answer.status_code == 200, answer.text
            prompts.append(prompt_of(door))
        assert prompts[0] == prompts[1] == prompts[2] and "<tool_response>\nsun" in prompts[0]
        shown = [(await door.post("/tokenize", {"messages": messages})).json()["tokens"] for messages in (old, new)]
        assert shown[0] == shown[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"functions": FUNCTIONS, "tools": TOOLS}, "functions"),
        ({"function_call": {"name": "weather"}}, "function_call"),
        ({"functions": FUNCTIONS, "function_call": {"name": "other"}}, "tool_choice"),
        ({"functions": FUNCTIONS, "function_call": "required"}, "function_call"),
        ({"functions": FUNCTIONS, "function_call": {"nom": "weather"}}, "function_call"),
        ({"functions": [{"description": "no name"}]}, "functions[0].name"),
    ],
)
@on_loop
async def test_wrong_functions_are_named(body: dict[str, Any], param: str) -> None:
    async with open_door(info=info()) as door:
        answer = await door.post(CHAT, {"messages": HI, **body})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        broken = [*HI, {"role": "assistant", "function_call": {"name": 1}}]
        answer = await door.post(CHAT, {"messages": broken})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "messages[1].function_call"


@on_loop
async def test_input_tokens_of_a_response_are_counted() -> None:
    flat = [{"type": "function", **FUNCTIONS[0]}]
    async with open_door(Speaker(text="Hello."), info(explain_tools=True, context_length=4096)) as door:
        for body in (
            {"input": "hi"},
            {"input": [{"role": "user", "content": "hi"}], "instructions": "Be short."},
            {"input": "hi", "tools": flat, "tool_choice": "required", "text": {"format": {"type": "text"}}},
        ):
            counted = await door.post(COUNT, body)
            assert counted.status_code == 200, counted.text
            made = (await door.post(RESPONSES, {**body, "max_output_tokens": 20})).json()
            assert counted.json() == {"object": "response.input_tokens", "input_tokens": made["usage"]["input_tokens"]}
            more = await door.post(COUNT, {"previous_response_id": made["id"], "input": "and?"})
            alone = await door.post(COUNT, {"previous_response_id": made["id"]})
            assert more.json()["input_tokens"] > alone.json()["input_tokens"] > 0
        submits = len(door.engine.submits)
        for wrong, status in (({}, 400), ({"input": "a", "previous_response_id": "resp_no"}, 404)):
            assert (await door.post(COUNT, wrong)).status_code == status
        assert len(door.engine.submits) == submits, "nothing is generated"


@on_loop
async def test_threads_are_refused_so_that_clients_go_on_without_them() -> None:
    async with open_door(info=info()) as door:
        for thread in ({"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}):
            for path in (MESSAGES, MESSAGES + "/count_tokens"):
                body: dict[str, Any] = {"messages": HI, "thread": thread}
                answer = await door.post(path, body | ({"max_tokens": 5} if path == MESSAGES else {}))
                error = answer.json()["error"]
                assert answer.status_code == 400 and error["type"] == "invalid_request_error"
                assert error["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        answer = await door.post(MESSAGES, {"messages": HI, "max_tokens": 5, "thread": None})
        assert answer.status_code == 200
        wrong = await door.post(MESSAGES, {"messages": HI, "max_tokens": 0})
        assert "details" not in wrong.json()["error"]


@on_loop
async def test_logprobs_of_a_request_that_generates_nothing_are_of_its_prompt() -> None:
    """What sglang's `unconditional_likelihood_normalized` asks for."""
    async with open_door() as door:
        ids = [[5, 6, 7], [8], [9, 10]]
        body = {"input_ids": ids, "sampling_params": {"max_new_tokens": 0}, "return_logprob": True}
        metas = [item["meta_info"] for item in (await door.post("/generate", body)).json()]
        assert [[token[1] for token in meta["input_token_logprobs"]] for meta in metas] == ids
        assert all(meta["input_token_logprobs"][0][0] is None for meta in metas)
        assert all(isinstance(token[0], float) for meta in metas for token in meta["input_token_logprobs"][1:])
        for more in ({"logprob_start_len": -1}, {"sampling_params": {"max_new_tokens": 1}}):
            metas = [item["meta_info"] for item in (await door.post("/generate", {**body, **more})).json()]
            assert all(not meta["input_token_logprobs"] for meta in metas)
