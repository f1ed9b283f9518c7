"""`/v1/chat/completions` over a fake engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from door import CONTEXT, MODEL, make_info, on_loop, open_door

from phloem.core import request
from phloem.core.messages import unpack_ids
from phloem.testing.byte_tokenizer import ByteTokenizer
from phloem.testing.fake_engine import FakeEngine, logprob_of

HI = [{"role": "user", "content": "hi"}]
PATH = "/v1/chat/completions"


def prompt_of(engine: FakeEngine, at: int = -1) -> str:
    return ByteTokenizer().decode(unpack_ids(engine.submits[at].input_ids).tolist(), skip_special_tokens=False)


@on_loop
async def test_answer_has_the_shape_that_clients_read() -> None:
    async with open_door() as door:
        response = await door.post(PATH, {"model": MODEL, "messages": HI, "max_tokens": 5})
        assert response.status_code == 200
        answer = response.json()
        assert answer["id"].startswith("chatcmpl-")
        assert (answer["object"], answer["model"]) == ("chat.completion", MODEL)
        (choice,) = answer["choices"]
        assert choice["message"]["role"] == "assistant" and len(choice["message"]["content"]) == 5
        assert (choice["finish_reason"], choice["index"], choice["logprobs"]) == ("length", 0, None)
        usage = answer["usage"]
        assert usage["completion_tokens"] == 5
        assert usage["total_tokens"] == usage["prompt_tokens"] + 5
        assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] // 2
        assert prompt_of(door.engine) == "<bos><user>hi<end><assistant>"


@on_loop
async def test_the_limit_defaults_to_the_context_and_has_two_names() -> None:
    async with open_door() as door:
        for body, expected in (
            ({}, CONTEXT - 6),
            ({"max_tokens": 3}, 3),
            ({"max_completion_tokens": 4}, 4),
            ({"max_completion_tokens": 4, "max_tokens": None}, 4),
            ({"max_tokens": 10**6}, CONTEXT - 6),
        ):
            response = await door.post(PATH, {"messages": HI, **body})
            assert response.json()["usage"]["completion_tokens"] == expected, body


@on_loop
async def test_null_means_unset_everywhere() -> None:
    names = (
        "model max_completion_tokens temperature top_p n stop stream stream_options seed tools tool_choice top_k "
        "response_format logit_bias logprobs top_logprobs bootstrap_host bootstrap_port bootstrap_room regex ebnf "
        "json_schema rid priority cache_salt user reasoning_effort separate_reasoning chat_template_kwargs lora_path"
    )
    async with open_door() as door:
        body = dict.fromkeys(names.split(), None)
        response = await door.post(PATH, {"messages": HI, "max_tokens": 2, **body})
        assert response.status_code == 200, response.text


@on_loop
async def test_content_may_be_parts() -> None:
    async with open_door() as door:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        await door.post(PATH, {"messages": [{"role": "user", "content": parts}], "max_tokens": 1})
        assert prompt_of(door.engine) == "<bos><user>one\ntwo<end><assistant>"
        image = [{"type": "image_url", "image_url": {"url": "data:"}}]
        response = await door.post(PATH, {"messages": [{"role": "user", "content": image}]})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["message"], error["param"]) == (
            "this model takes no pictures",
            "messages[0].content[0].image_url.url",
        )


@on_loop
async def test_earlier_answers_can_be_sent_back() -> None:
    async with open_door() as door:
        answer = (await door.post(PATH, {"messages": HI, "max_tokens": 3})).json()
        message = {**answer["choices"][0]["message"], "refusal": None, "annotations": [], "audio": None}
        again = {"role": "user", "content": "more"}
        response = await door.post(PATH, {"messages": [*HI, message, again], "max_tokens": 1})
        assert response.status_code == 200, response.text
        assert prompt_of(door.engine).endswith(f"<assistant>{message['content']}<end><user>more<end><assistant>")


@on_loop
async def test_the_last_message_can_be_continued() -> None:
    async with open_door() as door:
        messages = [*HI, {"role": "assistant", "content": "Once"}]
        await door.post(PATH, {"messages": messages, "continue_final_message": True, "max_tokens": 1})
        assert prompt_of(door.engine) == "<bos><user>hi<end><assistant>Once"
        response = await door.post(
            PATH, {"messages": messages, "continue_final_message": True, "add_generation_prompt": True}
        )
        assert response.status_code == 400


@on_loop
async def test_sampling_fields_reach_the_engine() -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "min_tokens": 2,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"65": 5.0},
        "seed": 99,
        "stop_token_ids": [1],
        "ignore_eos": True,
    }
    async with open_door() as door:
        response = await door.post(
            PATH, {"messages": HI, "max_tokens": 4, "priority": 3, "cache_salt": "s", "rid": "me", **fields}
        )
        assert response.status_code == 200
        assert response.json()["id"] == "me"
        (submit,) = door.engine.submits
        renamed = {"min_tokens": "min_new_tokens", "seed": "sampling_seed"}
        for name, value in fields.items():
            assert getattr(submit.sampling, renamed.get(name, name)) == value, name
        assert (submit.id, submit.priority) == ("me", 3) and "s" in submit.namespace


@on_loop
async def test_unset_fields_take_the_models_own_defaults() -> None:
    recommended = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "eos_token_id": 2, "do_sample": True}
    checked = request.recommended(recommended, 100)
    async with open_door(info=make_info(generation_config=checked)) as door:
        await door.post(PATH, {"messages": HI, "max_tokens": 1})
        await door.post(PATH, {"messages": HI, "max_tokens": 1, "temperature": 0, "top_p": 1.0})
        first, second = (submit.sampling for submit in door.engine.submits)
        assert (first.temperature, first.top_p, first.top_k) == (0.6, 0.95, -1)
        assert (second.temperature, second.top_p) == (0.0, 1.0)


@on_loop
async def test_n_and_stop_and_matched_stop() -> None:
    async with open_door(FakeEngine(mode="echo")) as door:
        body = {"messages": HI, "max_tokens": 50, "n": 3, "stop": "i", "skip_special_tokens": False}
        answer = (await door.post(PATH, body)).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
        assert all(choice["matched_stop"] == "i" for choice in answer["choices"])
        assert all(choice["finish_reason"] == "stop" for choice in answer["choices"])
        assert answer["choices"][0]["message"]["content"] == "<bos><user>h"
        assert answer["usage"]["prompt_tokens"] == 6, "a prompt counts once"


@on_loop
async def test_logprobs_carry_texts_and_bytes() -> None:
    async with open_door() as door:
        body = {"messages": HI, "max_tokens": 3, "logprobs": True, "top_logprobs": 2}
        answer = (await door.post(PATH, body)).json()
        (choice,) = answer["choices"]
        content = choice["logprobs"]["content"]
        assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
        for entry in content:
            assert entry["bytes"] == list(entry["token"].encode())
            assert entry["logprob"] == pytest.approx(logprob_of(entry["bytes"][0]))
            assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx([logprob_of(0), logprob_of(1)])
        streamed: list[Any] = []
        for data in (await door.events(PATH, body))[:-1]:
            logprobs = json.loads(data)["choices"][0]["logprobs"]
            streamed += logprobs["content"] if logprobs else []
        assert len(streamed) == 3 and set(streamed[0]) == set(content[0])


@pytest.mark.parametrize(
    "field",
    [
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"reasoning_effort": "high"},
        {"separate_reasoning": False},
        {"regex": "a+"},
        {"json_schema": "{}"},
        {"ebnf": "root ::= 'a'"},
        {"data_parallel_rank": 1},
        {"bootstrap_host": "h"},
        {"return_hidden_states": True},
        {"modalities": ["audio"]},
    ],
)
def test_what_does_not_exist_yet_is_refused_by_name(field: dict[str, Any]) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            response = await door.post(PATH, {"messages": HI, **field})
            assert response.status_code == 400
            error = response.json()["error"]
            alone = "bootstrap_host: this server shares no prompts: start with --disaggregation-mode"
            assert error["message"] in (f"not supported yet: {next(iter(field))}", alone)
            assert error["param"] == next(iter(field)) and error["code"] == "not_supported"
            assert door.engine.submits == []

    check()


@on_loop
async def test_harmless_values_of_what_does_not_exist_yet_are_taken() -> None:
    body = {
        "tools": [],
        "tool_choice": "auto",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "separate_reasoning": True,
        "stream_reasoning": True,
        "data_parallel_rank": 0,
        "modalities": ["text"],
        "user": "someone",
        "metadata": {"a": "b"},
        "store": False,
        "service_tier": "auto",
    }
    async with open_door() as door:
        response = await door.post(PATH, {"messages": HI, "max_tokens": 1, **body})
        assert response.status_code == 200, response.text


@on_loop
async def test_a_feature_that_exists_lets_its_fields_through() -> None:
    async with open_door(info=make_info(features=frozenset({"grammar"}))) as door:
        response = await door.post(PATH, {"messages": HI, "max_tokens": 1, "json_schema": {"type": "object"}})
        assert response.status_code == 200
        assert json.loads(door.engine.submits[0].sampling.json_schema or "") == {"type": "object"}


@on_loop
async def test_the_template_refuses_and_is_guarded() -> None:
    async with open_door() as door:
        response = await door.post(PATH, {"messages": HI, "chat_template_kwargs": {"messages": []}})
        assert response.status_code == 400
        door.client.template = None
        response = await door.post(PATH, {"messages": HI})
        assert response.status_code == 400 and "no chat template" in response.text
