"""Information, control, tokens and metrics routes."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest
from door import CONTEXT, MODEL, make_info, on_loop, open_door, until

from phloem.core.messages import ControlReply, Stats
from phloem.protocol.body import Body
from phloem.testing.fake_engine import FakeEngine
from phloem.utils.log import Lines


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping"])
def test_health_follows_the_engine(path: str) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            assert (await door.http.get(path)).status_code == 200
            door.engine.die("killed")
            await until(lambda: door.client.dead is not None)
            response = await door.http.get(path)
            assert response.status_code == 503
            assert response.json()["error"]["message"] == "killed"
            door.client.attach(FakeEngine())
            await door.client.wait_ready()
            assert (await door.http.get(path)).status_code == 200
            door.client.draining = True
            assert (await door.http.get(path)).status_code == 503

    check()


@on_loop
async def test_health_generate_makes_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    from phloem.server.routes import info

    async with open_door() as door:
        assert (await door.http.get("/health_generate")).status_code == 200
        (submit,) = door.engine.submits
        assert submit.sampling.max_new_tokens == 1
        monkeypatch.setattr(info, "PROBE_SECONDS", 0.05)
        door.engine.paused = True
        response = await door.http.get("/health_generate")
        assert response.status_code == 503 and "no token" in response.text
        await until(lambda: not door.engine.running)
        assert len(door.engine.aborts) == 1


@on_loop
async def test_models() -> None:
    async with open_door() as door:
        listing = (await door.http.get("/v1/models")).json()
        assert listing["object"] == "list"
        (card,) = listing["data"]
        assert (card["id"], card["max_model_len"], card["object"]) == (MODEL, CONTEXT, "model")
        assert (await door.http.get(f"/v1/models/{MODEL}")).json() == card
        assert (await door.http.get("/v1/models//models/tiny")).json() == card
        missing = await door.http.get("/v1/models/org/other")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(path: str) -> None:
    @on_loop
    async def check() -> None:
        async with open_door() as door:
            facts = (await door.http.get(path)).json()
            assert facts["model_path"] == "/models/tiny" and facts["served_model_name"] == MODEL
            assert facts["is_generation"] is True and facts["architectures"] == ["LlamaForCausalLM"]
            names = (
                "tokenizer_path preferred_sampling_params weight_version reasoning_parser tool_call_parser model_type"
            )
            assert set(names.split()) <= set(facts)

    check()


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info(path: str) -> None:
    @on_loop
    async def check() -> None:
        key = {"authorization": "Bearer open-sesame"}
        async with open_door(api_key="open-sesame", page_size=16) as door:
            facts = (await door.http.get(path, headers=key)).json()
            assert "sesame" not in str(facts) and facts["api_key"] == "***"
            assert facts["page_size"] == 1, "what the engine chose goes before what was asked"
            assert facts["max_total_num_tokens"] == door.engine.capacity
            assert facts["served_model_name"] == MODEL and facts["version"] and facts["decisions"] == []
            (state,) = facts["internal_states"]
            assert {"last_gen_throughput", "memory_usage", "avg_spec_accept_length", "num_running_reqs"} <= set(state)
            assert state["memory_usage"]["graph"] == 0
            door.engine.die("gone")
            await until(lambda: door.client.dead is not None)
            facts = (await door.http.get(path, headers=key)).json()
            assert facts["status"] == "gone" and len(facts["internal_states"]) == 1

    check()


@on_loop
async def test_server_info_does_not_wait_for_a_hung_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    from phloem.server.routes import info

    monkeypatch.setattr(info, "STATE_SECONDS", 0.05)
    async with open_door(FakeEngine(silent_controls=True)) as door:
        (state,) = (await door.http.get("/server_info")).json()["internal_states"]
        assert "did not answer" in state["stale"]


@on_loop
async def test_load_routes() -> None:
    async with open_door(FakeEngine(paused=True)) as door:
        asked = [asyncio.create_task(door.post("/generate", {"text": "a"})) for _ in range(5)]
        await until(lambda: door.client.in_flight == 5)
        door.engine.say(Stats(running=3, waiting=2, used_tokens=50, total_tokens=100))
        await until(lambda: door.client.connection.stats.running == 3)
        (load,) = (await door.http.get("/get_load")).json()
        assert (load["num_reqs"], load["num_waiting_reqs"], load["dp_rank"]) == (5, 2, 0)
        loads = (await door.http.get("/v1/loads?include=core,queues")).json()
        assert loads["loads"][0]["token_usage"] == 0.5 and loads["dp_rank_count"] == 1
        assert loads["aggregate"]["total_running_reqs"] == 3
        # Fields and forms without which smg takes no load of a worker.
        assert isinstance(loads["timestamp"], str) and loads["loads"][0]["num_total_reqs"] == 5
        assert {"utilization", "max_running_requests", "active_token_usage"} <= loads["loads"][0].keys()
        assert (await door.http.get("/loads")).status_code == 200
        assert (await door.http.get("/version")).json()["version"]
        for task in asked:
            task.cancel()


@on_loop
async def test_tokenize_and_back() -> None:
    async with open_door() as door:
        for prefix in ("", "/v1"):
            answer = (await door.post(f"{prefix}/tokenize", {"prompt": "ab", "model": MODEL})).json()
            assert answer == {"tokens": [256, 97, 98], "count": 3, "max_model_len": CONTEXT}
            answer = (
                await door.post(f"{prefix}/tokenize", {"prompt": ["a", "bc"], "add_special_tokens": False})
            ).json()
            assert answer["tokens"] == [[97], [98, 99]] and answer["count"] == [1, 2]
            chat = {"messages": [{"role": "user", "content": "x"}], "add_generation_prompt": False}
            assert (await door.post(f"{prefix}/tokenize", chat)).json()["tokens"] == [256, 259, 120, 262]
            answer = (await door.post(f"{prefix}/detokenize", {"tokens": [256, 97, 98]})).json()
            assert answer == {"text": "ab"}
            answer = (await door.post(f"{prefix}/detokenize", {"tokens": [256], "skip_special_tokens": False})).json()
            assert answer == {"text": "<bos>"}
            assert (await door.post(f"{prefix}/detokenize", {"tokens": [[97], [98]]})).json() == {"text": ["a", "b"]}
            assert (await door.post(f"{prefix}/detokenize", {"tokens": []})).json() == {"text": ""}
        for path, body in (
            ("/detokenize", {"tokens": [9999]}),
            ("/detokenize", {"tokens": [1, [2]]}),
            ("/detokenize", {}),
            ("/tokenize", {}),
            ("/tokenize", {"prompt": "a", "messages": []}),
        ):
            assert (await door.post(path, body)).status_code == 400, (path, body)
        assert (await door.post("/tokenize", {"prompt": "a", "model": "x"})).status_code == 404


@on_loop
async def test_flush_cache() -> None:
    async with open_door() as door:
        assert (await door.http.get("/flush_cache")).json()["success"] is True
        assert (await door.http.post("/flush_cache?timeout=2.5")).json()["success"] is True
        assert [control.args for control in door.engine.controls] == [{"timeout": 0.0}, {"timeout": 2.5}]
        door.engine.control_reply = ControlReply(id="", ok=False, message="requests are running")
        response = await door.http.post("/flush_cache")
        assert response.status_code == 400 and response.json()["error"]["message"] == "requests are running"
        for bad in ("-1", "x", "nan", "1e9"):
            response = await door.http.get(f"/flush_cache?timeout={bad}")
            assert response.status_code == 400 and response.json()["error"]["param"] == "timeout"


@on_loop
async def test_how_often_experts_are_chosen() -> None:
    async with open_door() as door:
        for verb in ("start", "stop"):
            assert (await door.post(f"/{verb}_expert_distribution_record", {})).json()["success"] is True
        door.engine.control_reply = ControlReply(id="", data={"logical_count": [[1, 2], [3, 0]]})
        found = await door.http.get("/dump_expert_distribution_record")
        assert found.json() == {"logical_count": [[1, 2], [3, 0]]}
        assert [call.args for call in door.engine.controls] == [{"action": what} for what in ("start", "stop", "dump")]
        door.engine.control_reply = ControlReply(id="", ok=False, message="experts are not counted")
        response = await door.http.post("/start_expert_distribution_record")
        assert response.status_code == 400 and "not counted" in response.json()["error"]["message"]


@on_loop
async def test_get_weights_by_name() -> None:
    async with open_door() as door:
        path, name = "/get_weights_by_name", "model.norm.weight"
        door.engine.control_reply = ControlReply(id="", data={"weight": [[1.0, 2.0], [3.0, float("nan")]]})
        answers = [
            await door.post(path, {"name": name}),
            await door.http.get(f"{path}?name={name}&truncate_size=3"),
            await door.http.request("GET", path, json={"name": name, "truncate_size": 2}),
        ]
        assert all(answer.json() == [[1.0, 2.0], [3.0, None]] for answer in answers)
        assert [control.args["rows"] for control in door.engine.controls] == [100, 3, 2]
        assert {control.args["name"] for control in door.engine.controls} == {name}
        for response, param in (
            (await door.http.get(path), "name"),
            (await door.http.get(f"{path}?name=a&truncate_size=x"), "truncate_size"),
            (await door.post(path, {"name": "a", "truncate_size": 0}), "truncate_size"),
        ):
            assert response.status_code == 400 and response.json()["error"]["param"] == param
        door.engine.control_reply = ControlReply(id="", ok=False, message="no weight is called 'a'")
        response = await door.http.get(f"{path}?name=a")
        assert response.status_code == 400 and response.json()["error"]["message"] == "no weight is called 'a'"


@on_loop
async def test_abort_request() -> None:
    async with open_door(FakeEngine(delay=0.002)) as door:
        body = {"text": "a", "rid": "mine", "sampling_params": {"max_new_tokens": 400}}
        running = asyncio.create_task(door.post("/generate", body))
        await until(lambda: door.client.in_flight == 1)
        assert (await door.post("/abort_request", {"rid": "other"})).json()["message"] == "0 aborted"
        assert (await door.post("/abort_request", {"rid": "mine"})).json()["message"] == "1 aborted"
        answer = (await running).json()
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert [abort.id for abort in door.engine.aborts] == ["mine"]
        several = [asyncio.create_task(door.post("/generate", {**body, "rid": None})) for _ in range(3)]
        await until(lambda: door.client.in_flight == 3)
        assert (await door.post("/abort_request", {"abort_all": True, "rid": ""})).status_code == 200
        assert {(await task).json()["meta_info"]["finish_reason"]["type"] for task in several} == {"abort"}
        assert (await door.http.post("/abort_request")).status_code == 400


@on_loop
async def test_pause_and_continue() -> None:
    async with open_door(FakeEngine(delay=0.002)) as door:
        body = {"text": "a", "sampling_params": {"max_new_tokens": 30}}
        running = asyncio.create_task(door.post("/generate", body))
        await until(lambda: door.client.in_flight == 1)
        assert (await door.post("/pause_generation", {"mode": "in_place"})).status_code == 200
        await asyncio.sleep(0.05)
        assert not running.done()
        assert (await door.http.post("/continue_generation")).status_code == 200
        assert (await running).json()["meta_info"]["completion_tokens"] == 30
        running = asyncio.create_task(door.post("/generate", {**body, "sampling_params": {"max_new_tokens": 400}}))
        await until(lambda: door.client.in_flight == 1)
        assert (await door.http.post("/pause_generation")).status_code == 200
        assert (await running).json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert [control.name for control in door.engine.controls] == ["pause", "resume", "pause"]
        assert (await door.post("/pause_generation", {"mode": "gently"})).status_code == 400


@on_loop
async def test_metrics_carry_the_names_that_dashboards_scrape() -> None:
    names = (
        "num_running_reqs num_queue_reqs num_used_tokens token_usage cache_hit_rate gen_throughput prompt_tokens_total "
        "generation_tokens_total cached_tokens_total evicted_tokens_total time_to_first_token_seconds_bucket "
        "inter_token_latency_seconds_bucket e2e_request_latency_seconds_bucket num_requests_total "
        "num_aborted_requests_total kv_available_tokens kv_evictable_tokens kv_used_tokens "
        "grammar_compilation_time_seconds_bucket"
    )
    async with open_door(sglang_metric_names=True) as door:
        await door.post("/generate", {"text": "abc", "sampling_params": {"max_new_tokens": 5}})
        door.engine.say(Stats(grammar_seconds=[0.25, 0.5]))
        await until(lambda: door.client.connection.stats.grammar_seconds)
        response = await door.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        lines = response.text.splitlines()
        for name in names.split():
            for prefix in ("phloem:", "sglang:"):
                assert any(line.startswith(prefix + name + "{") for line in lines), prefix + name
        assert f'phloem:prompt_tokens_total{{model_name="{MODEL}"}} 4.0' in lines
        assert f'phloem:generation_tokens_total{{model_name="{MODEL}"}} 5.0' in lines
        assert f'phloem:grammar_compilation_time_seconds_sum{{model_name="{MODEL}"}} 0.75' in lines
        assert f'phloem:time_to_first_token_seconds_count{{model_name="{MODEL}"}} 1.0' in lines
        assert f'phloem:inter_token_latency_seconds_count{{model_name="{MODEL}"}} 4.0' in lines
    async with open_door(info=make_info(served_model_name='a"b')) as door:
        text = (await door.http.get("/metrics")).text
        assert "sglang:" not in text and 'model_name="a\\"b"' in text


@on_loop
async def test_the_document_describes_every_route() -> None:
    async with open_door() as door:
        document = (await door.http.get("/openapi.json")).json()
        assert "422" not in str(document["paths"])
        chat = document["paths"]["/v1/chat/completions"]["post"]
        schema = chat["requestBody"]["content"]["application/json"]["schema"]
        body = document["components"]["schemas"][schema["$ref"].split("/")[-1]]
        assert body["additionalProperties"] is False and {"messages", "input_ids"} <= set(body["properties"])
        assert document["components"]["schemas"]["CompletionBody"]["required"] == ["prompt"]
        messages = document["paths"]["/v1/messages"]["post"]["responses"]["400"]["content"]["application/json"]
        assert messages["schema"]["$ref"].endswith("/MessagesErrorAnswer")
        assert {"200", "400", "401", "404", "413", "500", "503"} == set(chat["responses"])
        assert "text/event-stream" in chat["responses"]["200"]["content"]


def bodies(base: type[Body] = Body) -> list[type[Body]]:
    """Of every route, and what they are built on."""
    below = [kind for kind in base.__subclasses__() if kind.__module__.startswith("phloem.")]
    return [item for kind in below for item in (kind, *bodies(kind))]


def test_every_ignored_field_stands_in_the_documentation() -> None:
    text = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    kinds = bodies()
    ignored = {(name, reason) for kind in kinds for name, reason in kind.ignored.items()}
    assert len(ignored) > 15
    for name, reason in ignored:
        assert any(line.startswith(f"| `{name}` |") and reason in line for line in text.splitlines()), name


def test_ignored_and_later_fields_are_fields() -> None:
    kinds = bodies()
    for kind in kinds:
        assert set(kind.ignored) <= set(kind.__struct_fields__), kind
        assert set(kind.later) <= set(kind.__struct_fields__), kind
        assert not set(kind.ignored) & set(kind.later), kind
        if kind is not Body:
            assert kind.__struct_config__.forbid_unknown_fields, kind


@on_loop
async def test_a_line_for_each_request_when_asked(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "phloem.server")
    async with open_door(FakeEngine(mode="echo"), log_requests=True) as door:
        await door.post("/generate", {"text": "private words", "rid": "logged"})
    (line,) = [record.getMessage() for record in caplog.records if "logged" in record.getMessage()]
    assert "14 prompt tokens (7 cached), 15 output tokens, stop" in line and "private" not in caplog.text
    (told,) = [json.loads(Lines("").format(record)) for record in caplog.records if "logged" in record.getMessage()]
    assert told["request_id"] == "logged" and told["message"] == line and told["level"] == "info"
    assert (told["prompt_tokens"], told["cached_tokens"], told["output_tokens"]) == (14, 7, 15)
    assert told["finish"] == "stop" and 0 <= told["first_token_seconds"] <= told["seconds"]
