"""A language model of diffusion through HTTP: chat, completions and `/generate`, streamed block by block."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from dense_denoisers import DENSE, How, decode
from engine_door import http_door

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

NAMES = ["sdar", pytest.param("llada2_moe", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=NAMES)
def served(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Any]]:
    """A client of its server, and the dense reference of what it serves."""
    path: Path = tiny_checkpoint(request.param, tmp_path_factory.mktemp("tiny"))
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 4096, "threads": 1, "served_model_name": "tiny"}
    with (
        Engine(model_path=str(path), **settings) as engine,
        http_door(engine) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client, DENSE[request.param](path)


def events(answer: str) -> list[Any]:
    return [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]


def sampling(count: int, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": count, "temperature": 0, "ignore_eos": True, **more}


def test_a_stream_brings_whole_blocks_and_in_all_the_tokens_of_the_dense_reference(served: Any) -> None:
    client, dense = served
    prompt = [9, 40, 41, 5, 200, 77]
    body = {"input_ids": prompt, "sampling_params": sampling(21), "stream": True}
    seen = [len(event["output_ids"]) for event in events(client.post("/generate", json=body).text)]
    last = events(client.post("/generate", json=body).text)[-1]
    assert last["output_ids"] == decode(dense, prompt, 21, How())[0]
    borders = {count for count in range(22) if (len(prompt) + count) % dense.block == 0} | {21}
    assert set(seen) <= borders and len(set(seen)) > 2
    assert last["meta_info"]["tokens_per_forward"] == 21 / last["meta_info"]["dllm_passes"]


def test_chat_and_completions_answer_and_are_the_same_streamed(served: Any) -> None:
    client, _ = served
    talk = {"messages": [{"role": "user", "content": "What is the capital of France?"}]}
    body = {"model": "tiny", "max_tokens": 18, "temperature": 0.8, "seed": 4, "logprobs": True, **talk}
    whole = client.post("/v1/chat/completions", json=body).json()
    choice = whole["choices"][0]
    assert whole["usage"]["completion_tokens"] == len(choice["logprobs"]["content"]) <= 18
    pieces = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    text = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])
    assert text == choice["message"]["content"]
    body = {"model": "tiny", "prompt": "The quick brown", "max_tokens": 10, "n": 2, "temperature": 1.0, "seed": 1}
    found = client.post("/v1/completions", json=body).json()["choices"]
    assert len(found) == 2 and found[0]["text"] != found[1]["text"]


def test_a_stop_string_within_a_block_ends_the_answer_there(served: Any) -> None:
    client, _ = served
    body: dict[str, Any] = {"text": "Sap moves through", "sampling_params": sampling(40)}
    plain = client.post("/generate", json=body).json()["text"]
    stop = next(plain[at] for at in range(6, len(plain)) if plain[at].isascii() and plain[at] not in plain[:at])
    body["sampling_params"]["stop"] = [stop]
    found = client.post("/generate", json=body).json()
    assert found["text"] == plain[: plain.index(stop)]
    assert found["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


def test_a_client_that_leaves_ends_its_request(served: Any) -> None:
    client, _ = served
    body = {"text": "The", "sampling_params": sampling(400), "stream": True}
    with client.stream("POST", "/generate", json=body) as answer:
        next(answer.iter_lines())
    states = (client.get("/server_info").json()["internal_states"][0]["running"] for _ in range(100))
    assert 0 in states


@pytest.mark.parametrize(
    ("field", "more"),
    [
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("presence_penalty", {"presence_penalty": 1.0}),
        ("logit_bias", {"logit_bias": {"7": 2}}),
    ],
)
def test_what_it_cannot_do_is_a_400_with_the_field(served: Any, field: str, more: dict[str, Any]) -> None:
    client, _ = served
    body = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}], **more}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400, answer.text
    assert "by diffusion" in answer.json()["error"]["message"] and answer.json()["error"]["param"] == field


_CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "model": "tiny"}


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [
        ("/v1/chat/completions", {**_CHAT, "max_tokens": 0}, "max_tokens"),
        ("/v1/chat/completions", {**_CHAT, "max_completion_tokens": 0}, "max_completion_tokens"),
        ("/v1/chat/completions", {**_CHAT, "max_tokens": 4, "min_tokens": 2}, "min_tokens"),
        ("/v1/chat/completions", {**_CHAT, "max_tokens": 4, "prompt_logprobs": 1}, "prompt_logprobs"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 0}, "max_tokens"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "min_tokens": 2, "stream": True}, "min_tokens"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "echo": True, "logprobs": 1}, "echo"),
        ("/v1/completions", {"model": "tiny", "prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
        ("/v1/responses", {"model": "tiny", "input": "a", "max_output_tokens": 0}, "max_output_tokens"),
        ("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens"),
        ("/generate", {"text": "a", "sampling_params": {"min_new_tokens": 2}}, "min_new_tokens"),
    ],
)
def test_a_refusal_names_the_field_that_the_client_sent(
    served: Any, route: str, body: dict[str, Any], field: str
) -> None:
    client, _ = served
    answer = client.post(route, json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["param"], error["code"]) == (field, "not_supported")
    assert error["message"].startswith(f"{field}: this model writes by diffusion")


def test_messages_name_their_own_field(served: Any) -> None:
    """Its answers have no `param`: the text names it."""
    client, _ = served
    for more, field in (({"max_tokens": 0}, "max_tokens"), ({"max_tokens": 4, "min_tokens": 2}, "min_tokens")):
        answer = client.post("/v1/messages", json={**_CHAT, **more})
        assert answer.status_code == 400 and field in answer.json()["error"]["message"]
        assert "max_new_tokens" not in answer.text and "min_new_tokens" not in answer.text


def test_metrics_tell_how_many_tokens_a_pass_gives(served: Any) -> None:
    client, _ = served
    client.post("/generate", json={"text": "The quick", "sampling_params": sampling(30)})
    state = client.get("/server_info").json()["internal_states"][0]
    assert 0 < state["dllm_tokens_per_forward"] == state["output_tokens"] / state["dllm_passes"]
    names = client.get("/metrics").text
    assert "dllm_tokens_per_forward" in names and "dllm_passes_total" in names


def test_a_penalty_that_the_checkpoint_recommends_is_left_out_and_one_that_a_client_sends_is_refused(
    tmp_path: Path,
) -> None:
    path = tiny_checkpoint("sdar", tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.2, "top_k": 7}))
    body: dict[str, Any] = {"max_tokens": 4, "messages": [{"role": "user", "content": "Hi"}]}
    settings: dict[str, Any] = {"dtype": "float32", "max_total_tokens": 1024, "threads": 1}
    with Engine(model_path=str(path), **settings) as engine, http_door(engine) as url:
        answers = [
            httpx.post(f"{url}/v1/chat/completions", json={**body, **more}, timeout=30)
            for more in ({}, {"repetition_penalty": 1.2})
        ]
        decisions = httpx.get(f"{url}/server_info").json()["decisions"]
    assert [answer.status_code for answer in answers] == [200, 400], answers[0].text
    assert answers[1].json()["error"]["param"] == "repetition_penalty"
    assert ["repetition_penalty", "left out"] in [decision[:2] for decision in decisions]
