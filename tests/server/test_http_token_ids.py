"""Token ids in the answers of the OpenAI routes, by vLLM's names: what trainers read instead of text."""

from __future__ import annotations

import json
from typing import Any

import pytest
from door import Door, on_loop, open_door

from phloem.core.messages import unpack_ids

HI = [{"role": "user", "content": "hi"}]
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "abc", "max_tokens": 6, "seed": 3}),
    ("/v1/chat/completions", {"messages": HI, "max_tokens": 6, "seed": 3}),
]


def prompt_of(door: Door) -> list[int]:
    return unpack_ids(door.engine.submits[-1].input_ids).tolist()


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_ids_of_prompt_and_answer_are_told_whole_and_in_chunks(path: str, body: dict[str, Any]) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            plain = (await door.post(path, body)).json()
            assert "token_ids" not in json.dumps(plain)
            whole = (await door.post(path, {**body, "return_token_ids": True})).json()
            (choice,) = whole["choices"]
            ids = choice["token_ids"]
            assert len(ids) == 6
            assert (whole if "chat" in path else choice)["prompt_token_ids"] == prompt_of(door)
            events = await door.events(path, {**body, "return_token_ids": True})
            chunks = [json.loads(one) for one in events[:-1]]
            told = [one for chunk in chunks for choice in chunk["choices"] for one in choice.get("token_ids", [])]
            assert told == ids
            holders = chunks if "chat" in path else [chunk["choices"][0] for chunk in chunks]
            assert [one["prompt_token_ids"] for one in holders if "prompt_token_ids" in one] == [prompt_of(door)]

    check()


@on_loop
async def test_several_choices_have_their_own_ids() -> None:
    async with open_door() as door:
        body = {"prompt": ["ab", "c"], "max_tokens": 3, "n": 2, "return_token_ids": True}
        choices = (await door.post("/v1/completions", body)).json()["choices"]
        lengths = [len(choice["prompt_token_ids"]) for choice in choices]
        assert lengths[0] == lengths[1] and lengths[2] == lengths[3] == lengths[0] - 1
        assert [len(choice["token_ids"]) for choice in choices] == [3] * 4


@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_tokens_of_logprobs_are_named_by_their_ids(path: str, body: dict[str, Any]) -> None:
    more = {"logprobs": True, "top_logprobs": 2} if "chat" in path else {"logprobs": 2}

    @on_loop
    async def check() -> None:
        async with open_door() as door:
            asked = {**body, **more, "return_token_ids": True, "return_tokens_as_token_ids": True}
            (choice,) = (await door.post(path, asked)).json()["choices"]
            named = [f"token_id:{token}" for token in choice["token_ids"]]
            if "chat" in path:
                content = choice["logprobs"]["content"]
                assert [entry["token"] for entry in content] == named
                assert all(len(entry["top_logprobs"]) == 2 for entry in content)
                assert all(top["token"].startswith("token_id:") for entry in content for top in entry["top_logprobs"])
            else:
                assert choice["logprobs"]["tokens"] == named
                assert all(
                    len(row) == 2 and all("token_id:" in one for one in row)
                    for row in choice["logprobs"]["top_logprobs"]
                )

    check()


@on_loop
async def test_without_others_the_token_itself_is_told_as_vllm_does() -> None:
    """TRL's client sends all of this, and reads `top_logprobs` whatever it has asked for."""
    async with open_door() as door:
        asked = {"prompt": [[65, 66]], "max_tokens": 2, "logprobs": 0, "top_k": 0, "min_p": 0.0}
        more = {"return_token_ids": True, "return_tokens_as_token_ids": True, "repetition_penalty": 1.0}
        (choice,) = (await door.post("/v1/completions", {**asked, **more})).json()["choices"]
        told = choice["logprobs"]
        assert told["top_logprobs"] == [{a: b} for a, b in zip(told["tokens"], told["token_logprobs"], strict=True)]
        (plain,) = (await door.post("/v1/completions", asked)).json()["choices"]
        assert plain["logprobs"]["top_logprobs"] is None


@on_loop
async def test_top_k_of_0_is_off_on_the_openai_routes_alone() -> None:
    async with open_door() as door:
        for path, body in ROUTES:
            assert (await door.post(path, {**body, "top_k": 0})).status_code == 200
            assert door.engine.submits[-1].sampling.top_k == -1
        native = await door.post("/generate", {"text": "a", "sampling_params": {"top_k": 0}})
        assert native.status_code == 400 and "top_k" in native.text


@pytest.mark.parametrize("most", [0, 3])
@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_logprobs_of_the_prompt(path: str, body: dict[str, Any], most: int) -> None:
    """Those of the answer are as many as were asked for, whatever is asked of the prompt."""
    one = {"logprobs": True, "top_logprobs": 1} if "chat" in path else {"logprobs": 1}

    @on_loop
    async def check() -> None:
        async with open_door() as door:
            answer = (await door.post(path, {**body, **one, "prompt_logprobs": most})).json()
            (choice,) = answer["choices"]
            rows, ids = (answer if "chat" in path else choice)["prompt_logprobs"], prompt_of(door)
            assert len(rows) == len(ids) and rows[0] is None
            for token, row in zip(ids[1:], rows[1:], strict=True):
                assert str(token) in row and most <= len(row) <= most + 1
                assert sorted(value["rank"] for value in row.values()) == list(range(1, len(row) + 1))
            tops = (
                [entry["top_logprobs"] for entry in choice["logprobs"]["content"]]
                if "chat" in path
                else choice["logprobs"]["top_logprobs"]
            )
            assert [len(row) for row in tops] == [1] * 6
            bare = (await door.post(path, {**body, "prompt_logprobs": most})).json()
            assert bare["choices"][0]["logprobs"] is None

    check()


@pytest.mark.parametrize(
    "more", [{"prompt_logprobs": -1}, {"prompt_logprobs": 1, "stream": True}, {"prompt_logprobs": 1025}]
)
@pytest.mark.parametrize(("path", "body"), ROUTES)
def test_logprobs_of_a_prompt_that_cannot_be_had(path: str, body: dict[str, Any], more: dict[str, Any]) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            answer = await door.post(path, {**body, **more})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "prompt_logprobs"
            assert door.engine.submits == []

    check()


@on_loop
async def test_the_cache_is_emptied_by_the_name_that_vllm_has_for_it() -> None:
    async with open_door() as door:
        answer = await door.post("/reset_prefix_cache", {})
        assert answer.status_code == 200 and answer.json()["success"] is True


@on_loop
async def test_too_many_alternatives_are_refused_by_the_fields_name() -> None:
    async with open_door() as door:
        answer = await door.post("/v1/completions", {"prompt": "ab", "max_tokens": 1, "logprobs": 1025})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "logprobs"


@on_loop
async def test_a_chat_choice_has_what_generate_says_of_it() -> None:
    """SGLang's `return_meta_info` and `return_prompt_token_ids`, from which Miles' sessions take ids and logprobs."""
    async with open_door() as door:
        asked = {"return_meta_info": True, "return_prompt_token_ids": True, "logprobs": True}
        body = {"messages": HI, "max_tokens": 6, "seed": 3, "n": 2, **asked}
        whole = (await door.post("/v1/chat/completions", {**body, "return_token_ids": True})).json()
        assert len(whole["choices"]) == 2
        for choice in whole["choices"]:
            meta = choice["meta_info"]
            triples = meta["output_token_logprobs"]
            assert [token for _, token, _ in triples] == choice["token_ids"]
            assert [value for value, *_ in triples] == [one["logprob"] for one in choice["logprobs"]["content"]]
            assert meta["finish_reason"]["type"] == choice["finish_reason"] and meta["completion_tokens"] == 6
            assert choice["prompt_token_ids"] == prompt_of(door) and "weight_version" in meta
        events = await door.events("/v1/chat/completions", {**body, "n": 1})
        choices = [one for event in events[:-1] for one in json.loads(event)["choices"]]
        assert ["prompt_token_ids" in one for one in choices] == [True] + [False] * (len(choices) - 1)
        told = [one["meta_info"] for one in choices if "meta_info" in one]
        assert len(told) == 1 and "meta_info" in choices[-1] and told[0]["completion_tokens"] == 6
        plain = (await door.post("/v1/chat/completions", {"messages": HI, "max_tokens": 2})).text
        assert "meta_info" not in plain and "prompt_token_ids" not in plain
