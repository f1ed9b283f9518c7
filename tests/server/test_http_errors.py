"""Bad input: 4xx in the common shape, and nobody else is harmed."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from door import MODEL, on_loop, open_door, until

from phloem.testing.fake_engine import FakeEngine

HI = [{"role": "user", "content": "hi"}]
ROUTES = {
    "/v1/chat/completions": {"messages": HI},
    "/v1/completions": {"prompt": "a"},
    "/generate": {"text": "a"},
}


def check_error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "object", "retryable"}
    assert error["message"] and error["type"] and error["object"] == "error"
    assert "Traceback" not in response.text and "phloem/" not in response.text
    return error


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"   ",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"{}x",
        b'{"temperature": NaN}',
        b'{"temperature": 1e999}',
        b'{"temperature": Infinity}',
        b"\xff\xfe",
        b'{"text": "\xff"}',
        b'{"user": "\\ud800"}',
        b'{"a":' * 5000,
        b'{"metadata":{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}}",
        b"a=1&b=2",
    ],
    ids=range(16),
)
def test_malformed_bodies(path: str, body: bytes) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            check_error(await door.http.post(path, content=body), 400)
            assert door.engine.submits == []

    check()


BAD_FIELDS: list[dict[str, Any]] = [
    {"temperature": "hot"},
    {"temperature": -1},
    {"temperature": 1e300},
    {"top_p": 0},
    {"top_p": 2},
    {"top_k": -5},
    {"top_k": 10**30},
    {"min_p": 1.5},
    {"n": 0},
    {"n": 10**9},
    {"n": -1},
    {"n": 1.5},
    {"n": True},
    {"presence_penalty": 3},
    {"frequency_penalty": -3},
    {"repetition_penalty": 0},
    {"stop": [""]},
    {"stop": ["a"] * 100},
    {"stop": 5},
    {"stop_token_ids": [-1]},
    {"stop_token_ids": [10**6]},
    {"stop_token_ids": [10**30]},
    {"stop_regex": "("},
    {"logit_bias": {"a": 1}},
    {"logit_bias": {"1": 1000}},
    {"logit_bias": {"-1": 1}},
    {"logit_bias": {"9" * 40: 1}},
    {"logit_bias": [1]},
]


@pytest.mark.parametrize("field", BAD_FIELDS, ids=str)
def test_wrong_types_and_values_name_the_field(field: dict[str, Any]) -> None:
    (name,) = field

    @on_loop
    async def check() -> None:
        async with open_door() as door:
            for path, body in ROUTES.items():
                sent = {**body, "sampling_params": field} if path == "/generate" else {**body, **field}
                error = check_error(await door.post(path, sent), 400)
                assert error["type"] == "invalid_request_error"
                assert name in error["param"], error
            assert door.engine.submits == [] and door.client.in_flight == 0

    check()


@pytest.mark.parametrize(
    "field",
    [
        {"max_tokens": -1},
        {"max_tokens": 10**30},
        {"max_tokens": "5"},
        {"seed": 2**70},
        {"seed": 1.5},
        {"priority": 2**60},
        {"stream": "yes"},
        {"stream": 1},
        {"stream_options": {"include": True}},
        {"rid": 7},
        {"model": 5},
    ],
    ids=str,
)
def test_wrong_fields_of_the_openai_routes(field: dict[str, Any]) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            for path in ("/v1/chat/completions", "/v1/completions"):
                error = check_error(await door.post(path, {**ROUTES[path], **field}), 400)
                assert error["param"].startswith(next(iter(field)))

    check()


@on_loop
async def test_unknown_fields_are_named_with_the_nearest() -> None:
    async with open_door() as door:
        for path, body in ROUTES.items():
            error = check_error(await door.post(path, {**body, "steam": True}), 400)
            assert error["message"] == "unknown field 'steam'; did you mean 'stream'?" and error["param"] == "steam"
        error = check_error(
            await door.post("/v1/chat/completions", {"messages": [{"role": "user", "contents": "x"}]}), 400
        )
        assert error["message"] == "unknown field 'messages[0].contents'; did you mean 'content'?"
        error = check_error(await door.post("/generate", {"text": "a", "zzzz": 1}), 400)
        assert error["message"] == "unknown field 'zzzz'"


@on_loop
async def test_extreme_but_valid_values_are_served() -> None:
    async with open_door() as door:
        for field in (
            {"temperature": 0},
            {"temperature": 1e-9},
            {"temperature": 1000},
            {"top_k": 2**31 - 1},
            {"seed": -(2**63)},
            {"seed": 2**63 - 1},
            {"max_tokens": 2**31 - 1},
            {"max_tokens": 0},
            {"stop": ["x" * 10_000]},
            {"n": 128, "max_tokens": 1},
            {"n": 1.0, "max_tokens": 2.0, "temperature": 1},
        ):
            response = await door.post("/v1/completions", {"prompt": "a", "max_tokens": 3, **field})
            assert response.status_code == 200, (field, response.text)


@on_loop
async def test_unknown_models_paths_and_methods() -> None:
    async with open_door() as door:
        for path in ("/v1/chat/completions", "/v1/completions"):
            error = check_error(await door.post(path, {**ROUTES[path], "model": "gpt-x"}), 404)
            assert error["code"] == "model_not_found" and "gpt-x" in error["message"] and MODEL in error["message"]
            for name in (MODEL, "/models/tiny", "default", "", None):
                assert (await door.post(path, {**ROUTES[path], "model": name, "max_tokens": 1})).status_code == 200
        check_error(await door.http.get("/v1/nothing"), 404)
        response = await door.http.get("/generate")
        check_error(response, 405)
        assert response.headers["allow"] == "POST"


@on_loop
async def test_long_bodies_are_refused_without_being_kept() -> None:
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(50):
            sent += 1
            yield b" " * 2**20

    async with open_door(max_body_bytes=2**20) as door:
        error = check_error(await door.http.post("/generate", content=b"x" * (2**20 + 1)), 413)
        assert error["code"] == "body_too_large"
        error = check_error(await door.http.post("/generate", content=pieces()), 413)
        assert sent == 50, "what is too much is read and dropped, so that the client comes to read the answer"
        fits = json.dumps({"text": "a", "sampling_params": {"max_new_tokens": 1}}).ljust(2**20).encode()
        assert (await door.http.post("/generate", content=fits)).status_code == 200


@on_loop
async def test_the_api_key_guards_all_but_health() -> None:
    async with open_door(api_key="secret") as door:
        for path in ("/health", "/ready", "/ping"):
            assert (await door.http.get(path)).status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "secret"},
            {"authorization": "Basic secret"},
            {"authorization": "Bearer "},
            {"authorization": "Bearer secretx"},
            {"authorization": "Bearer sécret".encode()},
        ):
            for path in ("/v1/models", "/metrics", "/server_info", "/openapi.json", "/nothing"):
                response = await door.http.get(path, headers=headers)
                error = check_error(response, 401)
                assert error["type"] == "authentication_error"
                assert response.headers["www-authenticate"] == "Bearer"
        for scheme in ("Bearer", "bearer"):
            assert (await door.http.get("/v1/models", headers={"authorization": f"{scheme} secret"})).status_code == 200


@on_loop
async def test_request_ids() -> None:
    async with open_door() as door:
        given = (await door.http.get("/health", headers={"x-request-id": "abc-1.2"})).headers["x-request-id"]
        assert given == "abc-1.2"
        for bad in ("a b", "x" * 200, "a<b>"):
            made = (await door.http.get("/health", headers={"x-request-id": bad})).headers["x-request-id"]
            assert len(made) == 32
        assert (await door.http.get("/nothing")).headers["x-request-id"]


@on_loop
async def test_an_unexpected_exception_is_a_500_with_an_id_and_a_log_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from phloem.server.chat import route as chat

    def broken(*args: Any) -> None:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(chat, "to_request", broken)
    async with open_door() as door:
        with caplog.at_level(logging.ERROR):
            response = await door.post("/v1/chat/completions", {"messages": HI}, headers={"x-request-id": "look-here"})
        error = check_error(response, 500)
        assert "look-here" in error["message"] and "secret detail" not in response.text
        assert any("look-here" in record.getMessage() and record.exc_info for record in caplog.records)
        assert (await door.http.get("/health")).status_code == 200


@on_loop
async def test_errors_harm_no_other_request() -> None:
    async with open_door(FakeEngine(delay=0.002)) as door:
        body = {"prompt": "a", "max_tokens": 60, "temperature": 0}
        good = asyncio.create_task(door.post("/v1/completions", body))
        await until(lambda: door.client.in_flight == 1)
        for bad in ({"prompt": "x" * 5000}, {"prompt": [10**6]}, {"prompt": "a", "n": 0}, {"prompt": None}):
            assert (await door.post("/v1/completions", bad)).status_code == 400
        answer = (await good).json()
        assert answer["usage"]["completion_tokens"] == 60


@on_loop
async def test_a_dead_engine_is_a_503_that_says_why() -> None:
    async with open_door(FakeEngine(delay=0.002)) as door:
        running = asyncio.create_task(door.post("/generate", {"text": "a", "sampling_params": {"max_new_tokens": 400}}))
        await until(lambda: door.client.in_flight == 1)
        door.engine.die("killed by signal 9")
        for response in (await running, await door.post("/generate", {"text": "a"})):
            error = check_error(response, 503)
            assert error["message"] == "killed by signal 9" and error["type"] == "engine_unavailable"
            assert response.headers["retry-after"] and error["retryable"] is True


@on_loop
async def test_draining_is_a_503_with_retry_after() -> None:
    async with open_door() as door:
        door.client.draining = True
        response = await door.post("/generate", {"text": "a"})
        error = check_error(response, 503)
        assert error["code"] == "draining" and response.headers["retry-after"]
