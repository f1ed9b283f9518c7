"""What is told of prompt, cache and output, where a grammar forces tokens before a request is admitted."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engine_door import http_door

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

pytest.importorskip("llguidance")

LONG = "a property name that takes very many more tokens than the question does, said over and over again, " * 2
SCHEMA = {
    "type": "object",
    "properties": {LONG: {"const": "as long as its name, and as sure"}, "b": {"type": "boolean"}},
    "required": [LONG, "b"],
    "additionalProperties": False,
}
PATTERN = "(?:the same words each time, and many of them; the same words each time): (yes|no)"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 900}
FORMAT = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
FLAT = {"type": "json_schema", "name": "a", "schema": SCHEMA}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    with Engine(model_path=str(model), dtype="float32", max_total_tokens=8192) as made:
        yield made


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with http_door(engine) as found:
        yield found


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    answer = httpx.post(url + path, json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return answer.json()


def pair(usage: dict[str, Any]) -> tuple[int, int]:
    """Prompt tokens and those of them that were in the cache, whatever the API calls them."""
    if "cache_read_input_tokens" in usage:
        return usage["input_tokens"] + usage["cache_read_input_tokens"], usage["cache_read_input_tokens"]
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    details = usage.get("prompt_tokens_details") or {"cached_tokens": usage.get("cached_tokens")}
    return usage["prompt_tokens"], int(details["cached_tokens"] or 0)


def asked(url: str, route: str) -> dict[str, Any]:
    match route:
        case "chat":
            return post(url, "/v1/chat/completions", {**CHAT, "response_format": FORMAT})["usage"]
        case "several":
            return post(url, "/v1/chat/completions", {**CHAT, "response_format": FORMAT, "n": 2})["usage"]
        case "completions":
            return post(url, "/v1/completions", {"prompt": "Hi", "regex": PATTERN, "max_tokens": 200})["usage"]
        case "responses":
            return post(url, "/v1/responses", {"input": "Hi", "text": {"format": FLAT}})["usage"]
        case "background":
            key = post(url, "/v1/responses", {"input": "Hi", "text": {"format": FLAT}, "background": True})["id"]
            for _ in range(600):
                answer = httpx.get(f"{url}/v1/responses/{key}").json()
                if answer["status"] not in ("queued", "in_progress"):
                    return answer["usage"]
                time.sleep(0.05)
            raise AssertionError("the response is never made")
        case "messages":
            return post(url, "/v1/messages", {**CHAT, "output_config": {"format": FLAT}})["usage"]
        case "session":
            key = post(url, "/open_session", {"capacity_of_str_len": 4096})
            body = {"text": "Hi", "sampling_params": {"regex": PATTERN, "max_new_tokens": 200}}
            first = post(url, "/generate", {**body, "session_params": {"id": key}})["meta_info"]
            second = post(url, "/generate", {**body, "session_params": {"id": key, "rid": first["id"]}})["meta_info"]
            assert second["prompt_tokens"] > first["prompt_tokens"] + first["completion_tokens"] - 2
            return second
        case _:
            body = {"text": "Hi", "sampling_params": {"regex": PATTERN, "max_new_tokens": 200}}
            return post(url, "/generate", body)["meta_info"]


@pytest.mark.slow
def test_tokens_that_a_grammar_forces_are_output_on_every_route(url: str) -> None:
    for route in ("chat", "several", "completions", "responses", "background", "messages", "session", "generate"):
        for _ in range(2):
            usage = asked(url, route)
            prompt, cached = pair(usage)
            assert 0 <= cached <= prompt, (route, usage)
            assert all(value >= 0 for value in usage.values() if isinstance(value, int)), (route, usage)
            forced = usage["output_tokens"] if "output_tokens" in usage else usage["completion_tokens"]
            assert forced > 20, (route, usage)


@pytest.mark.slow
def test_streams_tell_the_same(url: str) -> None:
    body = {**CHAT, "output_config": {"format": FLAT}, "stream": True}
    for _ in range(2):
        text = httpx.post(url + "/v1/messages", json=body, timeout=120).text
        found = [json.loads(item) for item in re.findall(r"\"usage\":(\{[^}]*\})", text)]
        assert found and all(usage["input_tokens"] >= 0 for usage in found), found
        body_text = {"text": "Hi", "sampling_params": {"regex": PATTERN, "max_new_tokens": 200}, "stream": True}
        for line in httpx.post(url + "/generate", json=body_text, timeout=120).text.split("\n\n"):
            if line.startswith("data: {"):
                meta = json.loads(line[6:])["meta_info"]
                assert 0 <= meta["cached_tokens"] <= meta["prompt_tokens"], meta


def test_the_engine_and_the_metrics_agree(url: str, engine: Engine) -> None:
    for _ in range(3):
        answer: Any = engine.generate("Hi", {"regex": PATTERN, "max_new_tokens": 200})
        meta = answer["meta_info"]
        assert 0 <= meta["cached_tokens"] <= meta["prompt_tokens"]
    text = httpx.get(url + "/metrics").text
    rates = [float(line.split()[-1]) for line in text.splitlines() if "cache_hit_rate" in line and line[0] != "#"]
    assert rates and all(0 <= rate <= 1 for rate in rates), rates
    totals = {
        name: sum(float(line.split()[-1]) for line in text.splitlines() if re.match(rf"\w+[:_]{name}_total\b", line))
        for name in ("prompt_tokens", "cached_tokens")
    }
    assert 0 < totals["cached_tokens"] <= totals["prompt_tokens"], totals
