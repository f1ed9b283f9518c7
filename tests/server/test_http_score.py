"""`/v1/score` over a fake engine."""

from __future__ import annotations

import math
from typing import Any

import pytest
from door import MODEL, on_loop, open_door

from phloem.core.messages import unpack_ids
from phloem.testing.fake_engine import FakeEngine, logprob_of

PATH = "/v1/score"


@pytest.mark.parametrize(
    ("query", "items", "first", "expected"),
    [
        ("a", ["b", "c"], False, [b"ab", b"ac"]),
        ("a", ["b", "c"], True, [b"ba", b"ca"]),
        ("a", "bc", False, [b"abc"]),
        ([1], [[2], [3, 4]], False, [[1, 2], [1, 3, 4]]),
        ([1], [2, 3], True, [[2, 3, 1]]),
    ],
)
def test_prompts_are_query_and_item(query: Any, items: Any, first: bool, expected: list[Any]) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            body = {"query": query, "items": items, "label_token_ids": [5, 9], "item_first": first, "model": MODEL}
            response = await door.post(PATH, body)
            assert response.status_code == 200, response.text
            prompts = [unpack_ids(submit.input_ids).tolist() for submit in door.engine.submits]
            assert prompts == [[256, *ids] if isinstance(ids, bytes) else ids for ids in expected]
            answer = response.json()
            assert answer["object"] == "scoring" and answer["model"] == MODEL
            weights = [math.exp(logprob_of(token)) for token in (5, 9)]
            assert answer["scores"] == [pytest.approx(weights)] * len(expected)
            assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == sum(map(len, prompts))

    check()


@on_loop
async def test_softmax_is_over_the_labels_in_their_order() -> None:
    async with open_door() as door:
        body = {"query": "a", "items": ["b"], "label_token_ids": [9, 5, 9], "apply_softmax": True}
        (scores,) = (await door.post(PATH, body)).json()["scores"]
        weights = [math.exp(logprob_of(token)) for token in (9, 5, 9)]
        assert scores == pytest.approx([weight / sum(weights) for weight in weights])
        assert sum(scores) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "label_token_ids"),
        ({"query": "a", "items": ["b"], "label_token_ids": []}, "label_token_ids"),
        ({"items": ["b"], "label_token_ids": [1]}, "query"),
        ({"query": "a", "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": [], "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": [[1]], "label_token_ids": [1]}, "items"),
        ({"query": [1], "items": ["a", [2]], "label_token_ids": [1]}, "items"),
        ({"query": "a", "items": ["b"], "label_token_ids": [10**6]}, "token_ids_logprob"),
        ({"query": [10**6], "items": [[1]], "label_token_ids": [1]}, "input_ids"),
        ({"query": [], "items": [[]], "label_token_ids": [1]}, "prompt"),
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
async def test_a_refusal_of_the_engine_keeps_its_status() -> None:
    async with open_door(FakeEngine(refuse_all=(503, "the queue is full"))) as door:
        response = await door.post(PATH, {"query": "a", "items": ["b"], "label_token_ids": [1]})
        assert response.status_code == 503
        unknown = await door.post(PATH, {"query": "a", "items": ["b"], "label_token_ids": [1], "model": "other"})
        assert unknown.status_code == 404
