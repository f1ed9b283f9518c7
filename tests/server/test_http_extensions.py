"""Fields beside the usual ones: best_of, suffix, ids in chat, stop strings kept, processors by name."""

from __future__ import annotations

import json
from typing import Any

import pytest
from door import THINKS, Door, Marked, make_info, on_loop, open_door

from phloem.core.messages import unpack_ids
from phloem.testing.byte_tokenizer import BOS, SYSTEM, USER
from phloem.testing.fake_engine import FakeEngine
from phloem.text import infill

HI = [{"role": "user", "content": "hi"}]
REASONS = make_info(features=frozenset({"tools", "reasoning"}), reasoning_parser="qwen3")


def prompt_of(door: Door, at: int = -1) -> list[int]:
    return unpack_ids(door.engine.submits[at].input_ids).tolist()


# --- best_of


@on_loop
async def test_the_best_of_several_by_logprob_per_token() -> None:
    async with open_door() as door:
        body = {"prompt": ["a", "b"], "max_tokens": 6, "best_of": 4, "n": 2, "seed": 3}
        answer = (await door.post("/v1/completions", body)).json()
        assert len(door.engine.submits) == 8
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert all(choice["logprobs"] is None for choice in answer["choices"])
        assert answer["usage"]["completion_tokens"] == 48
        several = (await door.post("/v1/completions", {**body, "n": 4, "logprobs": 0})).json()["choices"]
        for prompt in (0, 1):
            own = several[4 * prompt : 4 * prompt + 4]
            # What the fake engine says is more likely the smaller its token ids are.
            best = sorted(own, key=lambda choice: -sum(choice["logprobs"]["token_logprobs"]))[:2]
            shown = answer["choices"][2 * prompt : 2 * prompt + 2]
            assert [choice["text"] for choice in shown] == [choice["text"] for choice in best]


@pytest.mark.parametrize("body", [{"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}, {"best_of": 1000}])
def test_best_of_that_cannot_be(body: dict[str, Any]) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            response = await door.post("/v1/completions", {"prompt": "a", **body})
            assert response.status_code == 400
            assert response.json()["error"]["param"] in ("best_of", "n")
            assert door.engine.submits == []

    check()


@on_loop
async def test_best_of_equal_to_n_streams() -> None:
    async with open_door() as door:
        data = await door.events("/v1/completions", {"prompt": "a", "max_tokens": 2, "n": 2, "best_of": 2})
        assert len(data) >= 3 and data[-1] == "[DONE]"


# --- suffix


NAMES: tuple[str, ...] = ("<user>", "<assistant>", "<system>")


@pytest.mark.parametrize("form", infill.FORMATS, ids=lambda form: form.prefix)
def test_a_suffix_in_every_format(form: infill.InfillFormat) -> None:
    marks = dict(zip(form.marks, NAMES, strict=False))

    @on_loop
    async def check() -> None:
        tokenizer = Marked(marks)
        async with open_door(tokenizer=tokenizer) as door:
            ids = {mark: tokenizer.encode(mark, False)[0] for mark in form.marks}
            for prompt in ("ab", [*b"ab"]):
                response = await door.post("/v1/completions", {"prompt": prompt, "suffix": "cd", "max_tokens": 1})
                assert response.status_code == 200, response.text
                before, after = [ids[form.prefix], *b"ab"], [ids[form.suffix], *b"cd"]
                middle = [ids[form.middle]] if form.middle else []
                ordered = after + before if form.suffix_first else before + after
                assert prompt_of(door) == [BOS, *ordered, *middle]
            echo = await door.post("/v1/completions", {"prompt": "a", "suffix": "b", "echo": True})
            assert echo.status_code == 400 and echo.json()["error"]["param"] == "suffix"

    check()


@on_loop
async def test_a_model_without_infill_says_so() -> None:
    async with open_door() as door:
        response = await door.post("/v1/completions", {"prompt": "a", "suffix": "b"})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "suffix" and "fill-in-the-middle" in error["message"]
        assert (await door.post("/v1/completions", {"prompt": "a", "suffix": "", "max_tokens": 1})).status_code == 200


# --- stop strings that stay


@pytest.mark.parametrize("name", ["include_stop_str_in_output", "no_stop_trim"])
def test_a_stop_string_is_kept_when_asked_for(name: str) -> None:
    @on_loop
    async def check() -> None:
        async with open_door(FakeEngine(mode="say", text="one. two.")) as door:
            common = {"stop": ". ", "temperature": 0}
            for value, text in ((True, "one. "), (False, "one"), (None, "one")):
                chat = {"messages": HI, "max_tokens": 20, **common, name: value}
                answer = (await door.post("/v1/chat/completions", chat)).json()["choices"][0]
                assert (answer["message"]["content"], answer["matched_stop"]) == (text, ". ")
                native = {"text": "a", "sampling_params": {**common, name: value}}
                assert (await door.post("/generate", native)).json()["text"] == text

    check()


# --- ids in chat


@on_loop
async def test_ids_stand_for_the_messages() -> None:
    async with open_door(FakeEngine(mode="say", text="ok")) as door:
        body = {"input_ids": [1, 2, 3], "max_tokens": 5}
        assert (await door.post("/v1/chat/completions", body)).json()["choices"][0]["message"]["content"] == "ok"
        assert prompt_of(door) == [1, 2, 3]
        await door.post("/v1/chat/completions", {**body, "messages": HI})
        assert prompt_of(door) == [1, 2, 3]
        for bad in ({}, {"messages": []}, {"input_ids": [10**6]}, {"input_ids": []}):
            assert (await door.post("/v1/chat/completions", bad)).status_code == 400


@on_loop
async def test_ids_that_end_inside_a_block() -> None:
    async with open_door(FakeEngine(mode="say", text="hm</think>ok"), REASONS) as door:
        body = {"input_ids": [65, *b"<think>\n"], "max_tokens": 50}
        message = (await door.post("/v1/chat/completions", body)).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hm", "ok")


# --- processors


@on_loop
async def test_processors_are_named_on_every_route() -> None:
    custom = {"custom_params": {"token_ids": [5]}}
    async with open_door() as door:
        for path, body in (
            ("/v1/chat/completions", {"messages": HI, "max_tokens": 1, **custom}),
            ("/v1/completions", {"prompt": "a", "max_tokens": 1, **custom}),
            ("/v1/responses", {"input": "a", "max_output_tokens": 1, **custom}),
            ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 1, **custom}}),
        ):
            named = {**body, "custom_logit_processor": "disallowed_tokens"}
            assert (await door.post(path, named)).status_code == 200
            assert door.engine.submits[-1].sampling.processors == {"disallowed_tokens": {"token_ids": [5]}}
            wrong = await door.post(path, {**body, "custom_logit_processor": '{"callable": "8004"}'})
            assert wrong.status_code == 400
            assert "never executed" in wrong.json()["error"]["message"]
            assert (await door.post(path, body)).json()["error"]["param"] == "custom_params"


@on_loop
async def test_a_batch_names_processors_one_by_one() -> None:
    async with open_door() as door:
        params = [{"max_new_tokens": 1, "custom_params": {"token_ids": [5]}}, {"max_new_tokens": 1}]
        body = {"text": ["a", "b"], "sampling_params": params, "custom_logit_processor": ["allowed_tokens", None]}
        assert (await door.post("/generate", body)).status_code == 200
        assert [len(submit.sampling.processors) for submit in door.engine.submits] == [1, 0]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", {"inside": False, "start_ids": [USER]}),
        ("a<think>\n", {"inside": True}),
        ("a<think>x</think>", None),
    ],
)
def test_a_budget_for_reasoning(prompt: str, expected: dict[str, Any] | None) -> None:
    @on_loop
    async def check() -> None:
        async with open_door(info=REASONS, tokenizer=THINKS) as door:
            body = {"text": prompt, "max_thinking_tokens": 7, "sampling_params": {"max_new_tokens": 1}}
            assert (await door.post("/generate", body)).status_code == 200
            found = door.engine.submits[-1].sampling.processors
            if expected is None:
                assert found == {}
            else:
                assert found["thinking_budget"] == {"thinking_budget": 7, "end_ids": [SYSTEM], **expected}
            assert (await door.post("/generate", {**body, "max_thinking_tokens": -1})).status_code == 400

    check()


@on_loop
async def test_a_budget_needs_a_token_that_ends_reasoning() -> None:
    for info, why in ((REASONS, "no token for"), (make_info(), "no known reasoning format")):
        async with open_door(info=info) as door:
            response = await door.post("/generate", {"text": "a", "max_thinking_tokens": 5})
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["param"] == "max_thinking_tokens" and why in error["message"]


# --- hidden states

SHOWS = make_info(features=frozenset({"hidden_states"}))


@on_loop
async def test_hidden_states_come_with_their_tokens() -> None:
    async with open_door(FakeEngine(mode="say", text="one. two", per_step=2), SHOWS) as door:
        params = {"max_new_tokens": 9, "stop": ". "}
        body = {"text": "a", "sampling_params": params, "return_hidden_states": True}
        answer = (await door.post("/generate", body)).json()
        assert answer["output_ids"] == [*b"one. "]
        assert answer["meta_info"]["hidden_states"] == [[float(token), 0.5] for token in b"one. "]
        last = json.loads((await door.events("/generate", body))[-2])
        assert last["meta_info"]["hidden_states"] == answer["meta_info"]["hidden_states"]
        chat = {"messages": HI, "max_tokens": 3, "return_hidden_states": True}
        choice = (await door.post("/v1/chat/completions", chat)).json()["choices"][0]
        assert choice["hidden_states"] == [float(ord("e")), 0.5]
        text = {"prompt": "a", "max_tokens": 2, "return_hidden_states": True}
        events = await door.events("/v1/completions", text)
        assert json.loads(events[-2])["choices"][0]["hidden_states"] == [float(ord("n")), 0.5]
        plain = (await door.post("/v1/completions", {**text, "return_hidden_states": False})).json()
        assert "hidden_states" not in plain["choices"][0]


# --- where cached tokens came from


@on_loop
async def test_cached_tokens_details() -> None:
    async with open_door() as door:
        details = {"cached_tokens_details": {"device": 1, "host": 0}}
        for path, body in (
            ("/v1/completions", {"prompt": "ab"}),
            ("/v1/chat/completions", {"input_ids": [97, 98, 99]}),
        ):
            body |= {"max_tokens": 3, "temperature": 0}
            plain = (await door.post(path, body)).json()
            told = (await door.post(path, {**body, "return_cached_tokens_details": True})).json()
            assert "sglext" not in plain and told["sglext"] == details
            assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
            body |= {"return_cached_tokens_details": True, "stream_options": {"include_usage": True}}
            chunks = [json.loads(data) for data in (await door.events(path, body))[:-1]]
            assert [chunk.get("sglext") for chunk in chunks[-3:]] == [None, details, None]
            assert chunks[-2]["choices"] == [] and chunks[-1]["usage"]["prompt_tokens"] == 3
        native = (await door.post("/generate", {"text": "ab", "sampling_params": {"max_new_tokens": 2}})).json()
        assert native["meta_info"]["cached_tokens_details"] == {"device": 1, "host": 0}


# --- reasoning that is required


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_requiring_reasoning_of_a_model_without_a_format(path: str) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            body = {"text": "a"} if path == "/generate" else {"messages": HI}
            response = await door.post(path, {**body, "require_reasoning": True})
            assert response.status_code == 400
            error = response.json()["error"]
            assert error["param"] == "require_reasoning" and "no reasoning format is known" in error["message"]
            assert (await door.post(path, {**body, "require_reasoning": False})).status_code == 200

    check()


@on_loop
async def test_a_constraint_waits_for_required_reasoning_that_stays_in_the_text() -> None:
    features = frozenset({"tools", "reasoning", "grammar", "require_reasoning"})
    info = make_info(features=features, reasoning_parser="qwen3")
    async with open_door(info=info) as door:
        body = {"messages": HI, "regex": "[0-9]+", "max_tokens": 2, "separate_reasoning": False}
        for wanted in (False, True):
            assert (await door.post("/v1/chat/completions", {**body, "require_reasoning": wanted})).status_code == 200
            assert door.engine.submits[-1].grammar_at_once is not wanted
