"""Sessions: what a request goes on from, over HTTP and alone."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from door import Door, on_loop, open_door, until

from phloem.client import sessions
from phloem.client.sessions import Sessions, SessionStep
from phloem.core.errors import BadRequest, NotFound
from phloem.core.messages import unpack_ids
from phloem.testing.byte_tokenizer import BOS
from phloem.testing.fake_engine import FakeEngine

SHORT = {"max_new_tokens": 3}


def prompt_of(door: Door) -> list[int]:
    return unpack_ids(door.engine.submits[-1].input_ids).tolist()


async def generate(door: Door, text: str, **step: Any) -> dict[str, Any]:
    body = {"text": text, "sampling_params": SHORT, "session_params": step}
    response = await door.post("/generate", body)
    assert response.status_code == 200, response.text
    return response.json()


@on_loop
async def test_a_request_goes_on_from_another() -> None:
    async with open_door() as door:
        key = (await door.post("/open_session", {"capacity_of_str_len": 1000})).json()
        assert isinstance(key, str) and key
        first = await generate(door, "ab", id=key)
        assert prompt_of(door) == [BOS, *b"ab"]
        one, out = first["meta_info"]["id"], first["output_ids"]
        second = await generate(door, "cd", id=key, rid=one)
        assert prompt_of(door) == [BOS, *b"ab", *out, *b"cd"]
        assert second["meta_info"]["prompt_tokens"] == 8
        await generate(door, "e", id=key, rid=second["meta_info"]["id"])
        assert prompt_of(door) == [BOS, *b"ab", *out, *b"cd", *second["output_ids"], *b"e"]
        await generate(door, "f", id=key, rid=one, offset=2)
        assert prompt_of(door) == [BOS, *b"a", *b"f"]
        await generate(door, "g", id=key, rid=one, drop_previous_output=True)
        assert prompt_of(door) == [BOS, *b"abg"]
        assert (await door.post("/close_session", {"session_id": key})).json()["success"] is True
        assert (await door.post("/close_session", {"session_id": key})).status_code == 404


@on_loop
async def test_replacing_forgets_what_went_on() -> None:
    async with open_door() as door:
        key = (await door.post("/open_session", {"session_id": "mine"})).json()
        assert key == "mine"
        root = (await generate(door, "a", id=key))["meta_info"]["id"]
        child = (await generate(door, "b", id=key, rid=root))["meta_info"]["id"]
        leaf = (await generate(door, "c", id=key, rid=child))["meta_info"]["id"]
        other = (await generate(door, "d", id=key, rid=root, replace=True))["meta_info"]["id"]
        for gone in (child, leaf):
            body = {"text": "x", "session_params": {"id": key, "rid": gone}}
            refused = await door.post("/generate", body)
            assert refused.status_code == 400 and refused.json()["error"]["param"] == "session_params.rid"
        await generate(door, "e", id=key, rid=other)
        await generate(door, "f", id=key, replace=True)
        refused = await door.post("/generate", {"text": "x", "session_params": {"id": key, "rid": root}})
        assert refused.status_code == 400


@on_loop
async def test_running_and_aborted_requests() -> None:
    async with open_door(FakeEngine(delay=0.005)) as door:
        key = (await door.post("/open_session", {})).json()
        body = {"text": "a", "rid": "slow", "sampling_params": {"max_new_tokens": 400}, "session_params": {"id": key}}
        slow = asyncio.create_task(door.post("/generate", body))
        await until(lambda: door.client.in_flight == 1)
        on = {"text": "b", "sampling_params": SHORT, "session_params": {"id": key, "rid": "slow"}}
        refused = await door.post("/generate", on)
        assert refused.status_code == 400 and "still runs" in refused.json()["error"]["message"]
        await door.post("/abort_request", {"rid": "slow"})
        assert (await slow).json()["meta_info"]["finish_reason"]["type"] == "abort"
        gone = await door.post("/generate", on)
        assert gone.status_code == 400 and "has no request" in gone.json()["error"]["message"]


@on_loop
async def test_chat_and_completions_take_sessions_too() -> None:
    async with open_door() as door:
        key = (await door.post("/open_session", {})).json()
        body = {"prompt": "ab", "max_tokens": 2, "rid": "r1", "session_params": {"id": key}}
        out = (await door.post("/v1/completions", body)).json()["choices"][0]["text"]
        chat = {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 2,
            "session_params": {"id": key, "rid": "r1"},
        }
        assert (await door.post("/v1/chat/completions", chat)).status_code == 200
        assert prompt_of(door)[:5] == [BOS, *b"ab", *out.encode()]
        echo = {**body, "rid": "r3", "session_params": {"id": key, "rid": "r1"}, "echo": True, "logprobs": 0}
        (choice,) = (await door.post("/v1/completions", echo)).json()["choices"]
        assert choice["text"].startswith("ab" + out + "ab")
        assert len(choice["logprobs"]["tokens"]) == len(choice["text"]) + 1  # the BOS


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/open_session", {"session_id": "x" * 300}, "session_id"),
        ("/open_session", {"timeout": 0}, "timeout"),
        ("/open_session", {"streaming": 1}, "streaming"),
        ("/open_session", {"name": "x"}, "name"),
        ("/close_session", {}, "session_id"),
        ("/generate", {"text": "a", "session_params": {"rid": "x"}}, "session_params.id"),
        ("/generate", {"text": "a", "session_params": {"id": "x", "sid": 1}}, "session_params.sid"),
    ],
)
def test_refusals(path: str, body: dict[str, Any], param: str | None) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            response = await door.post(path, body)
            assert response.status_code == 400, response.text
            assert response.json()["error"]["param"] == param

    check()


@on_loop
async def test_an_engine_that_dies_leaves_no_running_request_behind() -> None:
    engine = FakeEngine(delay=0.005)
    async with open_door(engine) as door:
        key = (await door.post("/open_session", {})).json()
        body = {"text": "a", "rid": "r", "sampling_params": {"max_new_tokens": 400}, "session_params": {"id": key}}
        slow = asyncio.create_task(door.post("/generate", body))
        await until(lambda: door.client.in_flight == 1)
        engine.die()
        assert (await slow).status_code == 503
        with pytest.raises(BadRequest, match="has no request"):
            door.client.sessions.extend(SessionStep(key, "r"), [1], None)


@pytest.mark.slow
@on_loop
async def test_each_continuation_can_be_gone_on_from() -> None:
    async with open_door() as door:
        key = (await door.post("/open_session", {})).json()
        root = (await generate(door, "a", id=key))["meta_info"]["id"]
        body = {"text": "b", "rid": "r", "sampling_params": {**SHORT, "n": 2}}
        step = {"id": key, "rid": root, "replace": True}
        several = (await door.post("/generate", {**body, "session_params": step})).json()
        assert [one["meta_info"]["id"] for one in several] == ["r-0", "r-1"]
        assert several[0]["output_ids"] != several[1]["output_ids"]
        start = unpack_ids(door.engine.submits[-1].input_ids).tolist()
        for one in several:
            await generate(door, "c", id=key, rid=one["meta_info"]["id"])
            assert prompt_of(door) == [*start, *one["output_ids"], *b"c"]


async def step_error(door: Door, key: str, body: dict[str, Any] | None = None, **step: Any) -> dict[str, Any]:
    sent = {"text": "x", "sampling_params": SHORT, **(body or {}), "session_params": {"id": key, **step}}
    response = await door.post("/generate", sent)
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.mark.slow
@on_loop
async def test_a_streaming_session_is_one_line() -> None:
    async with open_door() as door:
        key = (await door.post("/open_session", {"capacity_of_str_len": 1000, "streaming": True})).json()
        known: list[int] = [BOS]
        for text in ("ab", "cd", "e"):
            answer = await generate(door, text, id=key)
            assert prompt_of(door) == [*known, *text.encode()]
            known = [*prompt_of(door), *answer["output_ids"]]
        # Only the last request is kept, and a rid changes nothing.
        await generate(door, "f", id=key, rid="unknown")
        assert prompt_of(door) == [*known, *b"f"]
        (session,) = door.client.sessions._sessions.values()
        assert len(session.nodes) == 1 and door.client.sessions._bytes == 4 * (len(known) + 4)
        for name, value in (("replace", True), ("drop_previous_output", True), ("offset", 2)):
            assert (await step_error(door, key, None, **{name: value}))["param"] == f"session_params.{name}"
        assert "(n 1)" in (await step_error(door, key, {"sampling_params": {"n": 2}}))["message"]
        assert (await step_error(door, key, {"text": ["a", "b"]}))["param"] == "session_params"
        assert door.client.in_flight == 0


@on_loop
async def test_a_failed_request_leaves_a_streaming_session_as_it_was() -> None:
    async with open_door(FakeEngine(delay=0.005)) as door:
        key = (await door.post("/open_session", {"streaming": True})).json()
        first = {"text": "a", "rid": "same", "sampling_params": SHORT, "session_params": {"id": key}}
        out = (await door.post("/generate", first)).json()["output_ids"]
        slow = asyncio.create_task(door.post("/generate", {**first, "sampling_params": {"max_new_tokens": 400}}))
        await until(lambda: door.client.in_flight == 1)
        assert "still runs" in (await step_error(door, key))["message"]
        await door.post("/abort_request", {"rid": "same"})
        assert (await slow).json()["meta_info"]["finish_reason"]["type"] == "abort"
        await generate(door, "b", id=key)
        assert prompt_of(door) == [BOS, *b"a", *out, *b"b"]


# --- alone


def test_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "MAX_SESSIONS", 2)
    monkeypatch.setattr(sessions, "MAX_BYTES", 40)
    store = Sessions()
    store.open("a")
    with pytest.raises(BadRequest, match="open already"):
        store.open("a")
    store.open("b")
    with pytest.raises(BadRequest, match="close some"):
        store.open("c")
    step = SessionStep("a")
    store.begin(step, "r", [1] * 11)
    with pytest.raises(BadRequest, match="too many tokens"):
        store.extend(step, [1], None)
    store.end(step, "r", None)
    assert store.extend(step, [1], None) == [1]
    store.begin(step, "r", [1] * 11)
    store.end(step, "r", [1])
    store.close("a")
    assert store.extend(SessionStep("b"), [1], None) == [1] and len(store) == 1
    with pytest.raises(NotFound):
        store.close("a")


def test_a_session_closes_by_itself() -> None:
    now = 0.0
    store = Sessions(clock=lambda: now)
    store.open("a", timeout=5)
    now = 4.0
    store.begin(SessionStep("a"), "r", [1])
    now = 8.0
    assert store.extend(SessionStep("a"), [2], None) == [2]
    now = 10.0
    with pytest.raises(BadRequest, match="there is no session"):
        store.extend(SessionStep("a"), [2], None)


def test_offsets_and_bos() -> None:
    store = Sessions()
    store.open("a")
    store.begin(SessionStep("a"), "r", [9, 1, 2])
    store.end(SessionStep("a"), "r", [3])
    assert store.extend(SessionStep("a", "r"), [9, 4], 9) == [9, 1, 2, 3, 4]
    assert store.extend(SessionStep("a", "r"), [9, 4], None) == [9, 1, 2, 3, 9, 4]
    assert store.extend(SessionStep("a", "r", offset=-1), [4], 9) == [9, 1, 2, 4]
    assert store.extend(SessionStep("a", "r"), [], 9) == [9, 1, 2, 3]
    with pytest.raises(BadRequest, match="beyond the 4 tokens"):
        store.extend(SessionStep("a", "r", offset=5), [4], 9)
