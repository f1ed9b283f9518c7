"""The native `/generate` over a fake engine."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from door import make_info, on_loop, open_door

from phloem.testing.byte_tokenizer import EOS
from phloem.testing.fake_engine import FakeEngine, logprob_of

PATH = "/generate"
SHORT = {"max_new_tokens": 4}


@on_loop
async def test_single_answer() -> None:
    async with open_door(FakeEngine(mode="echo")) as door:
        response = await door.post(PATH, {"text": "hey", "rid": "r1", "model": None})
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["text"] == "hey"
        assert answer["output_ids"] == [256, *b"hey", EOS]
        meta = answer["meta_info"]
        assert meta["id"] == "r1"
        assert meta["finish_reason"] == {"type": "stop", "matched": EOS}
        assert (meta["prompt_tokens"], meta["completion_tokens"], meta["cached_tokens"]) == (4, 5, 2)
        assert meta["e2e_latency"] > 0 and meta["queue_time"] == pytest.approx(0.001)
        assert meta["weight_version"] == "default"
        assert "output_token_logprobs" not in meta and "index" not in answer


@on_loop
async def test_the_default_is_128_tokens() -> None:
    async with open_door() as door:
        answer = (await door.post(PATH, {"input_ids": [1, 2, 3]})).json()
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 128}


@on_loop
async def test_batches_by_text_and_by_ids() -> None:
    async with open_door() as door:
        for body in ({"text": ["a", "b"]}, {"input_ids": [[1], [2]]}):
            answers = (
                await door.post(PATH, {**body, "sampling_params": [SHORT, {"max_new_tokens": 2}], "rid": ["x", "y"]})
            ).json()
            assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [4, 2]
            assert [answer["meta_info"]["id"] for answer in answers] == ["x", "y"]
        one = (await door.post(PATH, {"text": ["a"], "sampling_params": SHORT})).json()
        assert isinstance(one, list) and len(one) == 1
        several = (await door.post(PATH, {"text": "a", "sampling_params": {**SHORT, "n": 3}})).json()
        assert len(several) == 3


@on_loop
async def test_per_item_lists() -> None:
    body = {
        "text": ["a", "bc"],
        "sampling_params": SHORT,
        "return_logprob": [True, False],
        "logprob_start_len": [0, -1],
        "top_logprobs_num": [2, 0],
        "token_ids_logprob": [[7, 8], None],
        "cache_salt": ["s", None],
        "return_text_in_logprobs": True,
    }
    async with open_door() as door:
        first, second = (await door.post(PATH, body)).json()
        meta = first["meta_info"]
        assert meta["input_token_logprobs"] == [[None, 256, "<bos>"], [pytest.approx(logprob_of(97)), 97, "a"]]
        assert len(meta["output_token_logprobs"]) == 4
        assert [row[1:] for row in meta["output_top_logprobs"][0]] == [[0, "\x00"], [1, "\x01"]]
        assert meta["input_top_logprobs"][0] is None and len(meta["input_top_logprobs"]) == 2
        assert [row[1] for row in meta["output_token_ids_logprobs"][3]] == [7, 8]
        assert len(meta["input_token_ids_logprobs"]) == 2
        assert "output_token_logprobs" not in second["meta_info"]
        namespaces = [submit.namespace for submit in door.engine.submits]
        assert namespaces[0] != namespaces[1] == ""


@on_loop
async def test_output_logprobs_only_by_default() -> None:
    async with open_door() as door:
        meta = (await door.post(PATH, {"text": "abc", "return_logprob": True, "sampling_params": SHORT})).json()[
            "meta_info"
        ]
        assert meta["input_token_logprobs"] == []
        assert [row[2] for row in meta["output_token_logprobs"]] == [None] * 4
        ids = (await door.post(PATH, {"text": "abcd", "return_logprob": True, "logprob_start_len": 2})).json()
        assert [row[1] for row in ids["meta_info"]["input_token_logprobs"]] == list(b"bcd")


@on_loop
async def test_scoring_a_prompt_makes_no_tokens() -> None:
    async with open_door() as door:
        body = {"text": "abc", "return_logprob": True, "logprob_start_len": 0, "sampling_params": {"max_new_tokens": 0}}
        answer = (await door.post(PATH, body)).json()
        assert answer["output_ids"] == [] and answer["text"] == ""
        assert len(answer["meta_info"]["input_token_logprobs"]) == 4
        assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 0}


@on_loop
async def test_stream_is_cumulative() -> None:
    async with open_door() as door:
        body = {
            "text": 'q"\n',
            "sampling_params": {"max_new_tokens": 12},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 1,
        }
        events = await door.events(PATH, body)
        assert events[-1] == "[DONE]"
        answers = [json.loads(data) for data in events[:-1]]
        for before, after in itertools.pairwise(answers):
            assert after["text"].startswith(before["text"])
            assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        last = answers[-1]
        assert [len(answer["output_ids"]) for answer in answers] == list(range(1, 13))
        assert all(answer["meta_info"]["finish_reason"] is None for answer in answers[:-1])
        assert last["meta_info"]["finish_reason"]["type"] == "length"
        assert bytes(last["output_ids"]).decode() == last["text"]
        assert len(last["meta_info"]["output_token_logprobs"]) == len(last["meta_info"]["output_top_logprobs"]) == 12
        assert len(last["meta_info"]["input_token_logprobs"]) == 4
        assert "index" not in last


@on_loop
async def test_stream_can_be_incremental_and_batches_carry_an_index() -> None:
    async with open_door(FakeEngine(mode="echo"), incremental_streaming_output=True) as door:
        body = {"text": ["héé", "x"], "return_logprob": True, "logprob_start_len": 0}
        answers = [json.loads(data) for data in (await door.events(PATH, body))[:-1]]
        for index, text in ((0, "héé"), (1, "x")):
            mine = [answer for answer in answers if answer["index"] == index]
            assert "".join(answer["text"] for answer in mine) == text
            assert sum(len(answer["meta_info"]["output_token_logprobs"]) for answer in mine) == len(text.encode()) + 2
            assert ["input_token_logprobs" in answer["meta_info"] for answer in mine] == [True] + [False] * (
                len(mine) - 1
            )


@on_loop
async def test_stream_interval_and_prompt_ids() -> None:
    async with open_door() as door:
        body = {
            "text": "a",
            "sampling_params": {"max_new_tokens": 21, "stream_interval": 10},
            "return_prompt_token_ids": True,
        }
        answers = [json.loads(data) for data in (await door.events(PATH, body))[:-1]]
        assert [len(answer["output_ids"]) for answer in answers] == [1, 11, 21]
        assert answers[0]["meta_info"]["prompt_token_ids"] == [256, 97]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "text"),
        ({"text": "a", "input_ids": [1]}, "text"),
        ({"text": []}, "text"),
        ({"input_ids": []}, "prompt"),
        ({"input_ids": [[1], 2]}, "input_ids"),
        ({"text": ["a", "b"], "rid": ["one"]}, "rid"),
        ({"text": "a", "rid": ["x", "y"]}, "rid"),
        ({"text": ["a", "b"], "rid": ["same", "same"]}, "rid"),
        ({"text": "a", "sampling_params": {"max_new_token": 1}}, "sampling_params.max_new_token"),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature"),
        ({"text": "a", "sampling_params": {"beam_width": 4}}, "sampling_params.beam_width"),
        ({"text": "a", "sampling_params": {"regex": "a"}}, "sampling_params.regex"),
        ({"text": "a", "sampling_params": {"custom_params": {"a": 1}}}, "custom_params"),
        ({"text": "a", "token_ids_logprob": [1, [2]]}, "token_ids_logprob"),
        ({"text": "a", "image_data": "x"}, "image_data"),
        ({"text": "a", "lora_path": "x"}, "lora_path"),
        ({"text": "a", "session_params": {"id": "1"}}, "session_params.id"),
        ({"text": "a", "max_thinking_tokens": 5}, "max_thinking_tokens"),
        ({"text": "a", "bootstrap_room": 5}, "bootstrap_room"),
    ],
)
def test_refusals(body: dict[str, Any], param: str) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            response = await door.post(PATH, body)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param
            assert door.engine.submits == []

    check()


@on_loop
async def test_one_id_for_a_batch_names_all_its_items() -> None:
    async with open_door() as door:
        answers = (await door.post(PATH, {"text": ["a", "b"], "rid": "r", "sampling_params": SHORT})).json()
        assert [answer["meta_info"]["id"] for answer in answers] == ["r-0", "r-1"]


@on_loop
async def test_the_engines_refusal_is_the_status() -> None:
    engine = FakeEngine(refuse={"full": (503, "the queue is full"), "long": (400, "too long")}, failing={"ill"})
    async with open_door(engine, info=make_info(weight_version="v2")) as door:
        for rid, status in (("full", 503), ("long", 400), ("ill", 500)):
            for stream in (False, True):
                response = await door.post(PATH, {"text": "a", "rid": rid, "stream": stream})
                if rid == "ill" and stream:
                    assert response.status_code == 200 and '"the step failed for this request"' in response.text
                    assert response.text.endswith("data: [DONE]\n\n")
                    continue
                assert response.status_code == status
                assert ("retry-after" in response.headers) == (status == 503)
                assert response.json()["error"]["retryable"] == (status == 503)
        good = await door.post(PATH, {"text": "a"})
        assert good.json()["meta_info"]["weight_version"] == "v2"
