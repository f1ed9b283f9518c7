"""`/v1/completions` over a fake engine."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from door import CONTEXT, MODEL, on_loop, open_door

from phloem.core.messages import unpack_ids
from phloem.testing.byte_tokenizer import BOS
from phloem.testing.fake_engine import FakeEngine, logprob_of

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[256, 97, 98]]),
        (["ab", "c"], [[256, 97, 98], [256, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
        ("", [[256]]),
    ],
)
def test_prompts_come_as_text_or_ids(prompt: Any, expected: list[list[int]]) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            response = await door.post(PATH, {"model": MODEL, "prompt": prompt, "max_tokens": 2})
            assert response.status_code == 200, response.text
            assert [unpack_ids(submit.input_ids).tolist() for submit in door.engine.submits] == expected
            answer = response.json()
            assert [choice["index"] for choice in answer["choices"]] == list(range(len(expected)))
            assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
            assert answer["usage"]["completion_tokens"] == 2 * len(expected)
            assert answer["object"] == "text_completion"

    check()


@pytest.mark.parametrize("prompt", [[], ["a", 1], [[1], 2], [[]], [["a"]], {"a": 1}, 7, None, [10**6], [-1]])
def test_bad_prompts_are_refused(prompt: Any) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            response = await door.post(PATH, {"prompt": prompt})
            assert response.status_code == 400
            assert door.engine.submits == []

    check()


@on_loop
async def test_sixteen_tokens_by_default() -> None:
    async with open_door() as door:
        answer = (await door.post(PATH, {"prompt": "a"})).json()
        assert answer["usage"]["completion_tokens"] == 16
        assert answer["choices"][0]["finish_reason"] == "length"


@on_loop
async def test_n_times_prompts() -> None:
    async with open_door() as door:
        answer = (await door.post(PATH, {"prompt": ["a", "b"], "n": 2, "max_tokens": 3, "seed": 1})).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert len({choice["text"] for choice in answer["choices"]}) == 4
        assert answer["usage"]["prompt_tokens"] == 4 and answer["usage"]["completion_tokens"] == 12


@on_loop
async def test_echo_and_logprobs_score_a_prompt() -> None:
    async with open_door() as door:
        body = {"prompt": [97, 98, 99], "max_tokens": 0, "echo": True, "logprobs": 1}
        (choice,) = (await door.post(PATH, body)).json()["choices"]
        assert choice["text"] == "abc"
        logprobs = choice["logprobs"]
        assert logprobs["tokens"] == ["a", "b", "c"]
        assert logprobs["token_logprobs"] == [None, *map(pytest.approx, [logprob_of(98), logprob_of(99)])]
        assert logprobs["text_offset"] == [0, 1, 2]
        assert logprobs["top_logprobs"][0] is None
        assert logprobs["top_logprobs"][1] == {"\x00": pytest.approx(logprob_of(0))}


@on_loop
async def test_echo_puts_the_prompt_before_the_output() -> None:
    async with open_door() as door:
        body = {"prompt": "abc", "max_tokens": 4, "echo": True, "logprobs": 0}
        (choice,) = (await door.post(PATH, body)).json()["choices"]
        assert choice["text"].startswith("abc") and len(choice["text"]) == 7
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 8
        assert logprobs["top_logprobs"] is None
        assert "".join(logprobs["tokens"][1:]) == choice["text"]
        chunks = [json.loads(data) for data in (await door.events(PATH, body))[:-1]]
        assert chunks[0]["choices"][0]["text"].startswith("abc")
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks).startswith("abc")
        streamed = [token for chunk in chunks for token in chunk["choices"][0]["logprobs"]["tokens"]]
        assert streamed[:4] == logprobs["tokens"][:4] and len(streamed) == 8


@pytest.mark.parametrize("prompt", ["aé<eos>b", [97, 0xC3, 0xA9, 98], [BOS, 97]])
@pytest.mark.parametrize("logprobs", [None, 0, 2])
@pytest.mark.parametrize("max_tokens", [0, 5])
@pytest.mark.parametrize("echo", [True, False])
def test_echo_and_logprobs_stream_as_they_answer(
    prompt: str | list[int], logprobs: int | None, max_tokens: int, echo: bool
) -> None:
    @on_loop
    async def check() -> None:
        async with open_door(FakeEngine(mode="say", text="oé.")) as door:
            body = {"prompt": prompt, "logprobs": logprobs, "max_tokens": max_tokens, "echo": echo, "n": 2}
            whole = (await door.post(PATH, body)).json()["choices"]
            chunks = [json.loads(data)["choices"][0] for data in (await door.events(PATH, body))[:-1]]
            for at, choice in enumerate(whole):
                parts = [chunk for chunk in chunks if chunk["index"] == at]
                assert "".join(part["text"] for part in parts) == choice["text"]
                text = "".join(part["text"] for part in parts)
                if logprobs is None:
                    assert choice["logprobs"] is None and all(part["logprobs"] is None for part in parts)
                    continue
                for name, values in choice["logprobs"].items():
                    pieces = [part["logprobs"][name] for part in parts]
                    assert (values is None and not any(pieces)) or values == [*itertools.chain(*pieces)]
                tokens, offsets = choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
                for token, offset in zip(tokens, offsets, strict=True):
                    assert token.startswith("<") or token == "\ufffd" or text[offset : offset + len(token)] == token

    check()


@on_loop
async def test_only_output_logprobs_without_echo() -> None:
    async with open_door() as door:
        (choice,) = (await door.post(PATH, {"prompt": "abc", "max_tokens": 2, "logprobs": 2})).json()["choices"]
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert None not in choice["logprobs"]["token_logprobs"]
        assert all(len(top) == 2 for top in choice["logprobs"]["top_logprobs"])
        assert door.engine.submits[0].logprob_start == -1


@on_loop
async def test_stream_adds_up_and_tells_usage() -> None:
    async with open_door() as door:
        body = {
            "prompt": ["a", "b"],
            "max_tokens": 6,
            "temperature": 0,
            "stream_options": {"include_usage": True},
        }
        events = await door.events(PATH, body)
        assert events[-1] == "[DONE]"
        chunks = [json.loads(data) for data in events[:-1]]
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 12
        assert all(chunk["usage"] is None for chunk in chunks[:-1])
        whole = (await door.post(PATH, {**body, "stream_options": None})).json()
        for index in (0, 1):
            parts = [chunk["choices"][0] for chunk in chunks[:-1] if chunk["choices"][0]["index"] == index]
            assert "".join(part["text"] for part in parts) == whole["choices"][index]["text"]
            assert [part["finish_reason"] for part in parts if part["finish_reason"]] == ["length"]


@on_loop
async def test_matched_stop_is_told() -> None:
    async with open_door(FakeEngine(mode="echo")) as door:
        (choice,) = (await door.post(PATH, {"prompt": "one two", "max_tokens": 30, "stop": [" t"]})).json()["choices"]
        assert (choice["text"], choice["finish_reason"], choice["matched_stop"]) == ("one", "stop", " t")


@on_loop
async def test_too_many_prompts_and_too_long_ones() -> None:
    async with open_door(max_prompts_per_request=3) as door:
        response = await door.post(PATH, {"prompt": ["a"] * 4})
        assert response.status_code == 400 and "4 prompts" in response.text
        response = await door.post(PATH, {"prompt": ["a", "x" * 600]})
        assert response.status_code == 400
        message = response.json()["error"]["message"]
        assert "601" in message and str(CONTEXT) in message
        assert response.json()["error"]["code"] == "context_length_exceeded"
        assert door.engine.submits == [], "one bad prompt fails the whole request"
