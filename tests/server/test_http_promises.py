"""Targets, classes, users and keys on their way from HTTP to the engine."""

from __future__ import annotations

from typing import Any

import pytest
from door import make_info, open_door

from phloem.core.messages import Submit
from phloem.llm import Engine
from phloem.testing.checkpoints import tiny_checkpoint

SAID = {"slo_ttft_ms": 300, "slo_itl_ms": 25.5, "service_tier": "flex", "user": "ann"}
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": "a", "max_tokens": 2}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
    ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 2}}),
    ("/v1/responses", {"input": "a", "max_output_tokens": 2, "store": False}),
    ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}),
]


def promised(submit: Submit) -> tuple[float, float, str, str]:
    return submit.ttft, submit.itl, submit.tier, submit.user


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[path for path, _ in BODIES])
async def test_what_a_body_says_reaches_the_engine(path: str, body: dict[str, Any]) -> None:
    said = {name: value for name, value in SAID.items() if (path, name) != ("/v1/messages", "user")}
    async with open_door(info=make_info()) as door:
        answer = await door.post(path, {**body, **said})
        assert answer.status_code == 200, answer.text
        user = "" if path == "/v1/messages" else "ann"
        assert promised(door.engine.submits[-1]) == (0.3, 0.0255, "flex", user)
        assert (await door.post(path, body)).status_code == 200
        assert promised(door.engine.submits[-1]) == (0, 0, "", "") and door.engine.submits[-1].key == ""


async def test_a_head_says_it_too_and_a_body_knows_better() -> None:
    body = {"text": ["a", "b"], "sampling_params": {"max_new_tokens": 2}}
    async with open_door() as door:
        head = {"x-slo-ttft-ms": "400", "x-slo-itl-ms": "20.5"}
        assert (await door.post("/generate", body, headers=head)).status_code == 200
        assert [promised(one)[:2] for one in door.engine.submits] == [(0.4, 0.0205)] * 2
        assert (await door.post("/generate", {**body, "slo_ttft_ms": 100}, headers=head)).status_code == 200
        assert promised(door.engine.submits[-1])[:2] == (0.1, 0.0205)


@pytest.mark.parametrize("value", ["0", "-3", "soon", "nan", "inf", "1e12", ""])
async def test_times_that_are_none_are_refused(value: str) -> None:
    async with open_door() as door:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 2}}
        for name in ("x-slo-ttft-ms", "x-slo-itl-ms"):
            answer = await door.post("/generate", body, headers={name: value})
            assert answer.status_code == 400 and name in answer.json()["error"]["message"]
        assert not door.engine.submits
    if value in ("0", "-3", "1e12"):
        async with open_door() as door:
            answer = await door.post("/generate", {**body, "slo_itl_ms": float(value)})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "slo_itl_ms"


async def test_keys_are_told_apart_where_that_is_asked_for() -> None:
    body = {"text": "a", "sampling_params": {"max_new_tokens": 2}}
    heads = [
        {"authorization": "Bearer one"},
        {"authorization": "Bearer two"},
        {"x-api-key": "three"},
        {"authorization": "Bearer one", "x-client-key": "as the gateway says"},
        {},
    ]

    async def keys(**config: Any) -> list[str]:
        async with open_door(**config) as door:
            for head in heads:
                assert (await door.post("/generate", body, headers=head)).status_code == 200
            return [submit.key for submit in door.engine.submits]

    found = await keys(fair_queueing="key")
    assert len(set(found)) == 5 and found[-1] == "" and all(len(key) == 16 for key in found[:-1])
    assert not any("one" in key for key in found)
    assert await keys() == [""] * 5


@pytest.mark.slow
def test_an_engine_of_a_policy_answers_as_any_other(tmp_path: Any) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    ids = [[5, 6, 7, 8], [9, 10, 11]]
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}

    def answers(**config: Any) -> list[Any]:
        with Engine(model_path=str(path), device="cpu", ops="reference", **config) as engine:
            found = engine.generate(input_ids=ids, sampling_params=params)
            return [one["output_ids"] for one in found]

    slo = '{"itl_ms": 5, "ttft_ms": 100, "tiers": {"flex": {"ttft_ms": 9000}}}'
    assert answers() == answers(schedule_policy="deadline", slo=slo, fair_queueing="user")
