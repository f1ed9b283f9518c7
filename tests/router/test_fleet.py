"""Workers that come, go, fall ill and speak; models; limits and keys; the gateway's own routes."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest
from gateway import Request, Worker, gateway, say, stream
from prometheus_client.parser import text_string_to_metric_families

from phloem.core.errors import ConfigError
from phloem.router.app import Router
from phloem.router.limits import Buckets, Gate, TooMany
from phloem.router.settings import Settings
from phloem.router.upstream import UpstreamError


async def test_workers_are_added_and_removed_while_it_runs() -> None:
    first, second = Worker(), Worker()
    await second.start()
    async with gateway(first) as gate:
        added = await gate.http.post(f"/add_worker?url={second.url}")
        assert added.status_code == 200 and second.url in added.json()["message"]
        await gate.until(lambda: gate.router.fleet.workers[second.url].healthy)
        assert {await gate.by() for _ in range(4)} == {first.port, second.port}
        assert (await gate.http.get("/list_workers")).json() == {"urls": [first.url, second.url]}
        again = await gate.http.post("/workers", json={"url": second.url})
        assert again.status_code == 400 and again.json()["error"]["code"] == "worker_exists"
        assert (await gate.http.post(f"/remove_worker?url={first.url}")).status_code == 200
        assert {await gate.by() for _ in range(4)} == {second.port}
        name = gate.router.fleet.workers[second.url].id
        assert (await gate.http.get(f"/workers/{name}")).json()["url"] == second.url
        changed = await gate.http.put(f"/workers/{name}", json={"labels": {"zone": "a"}, "priority": 2})
        assert changed.json()["labels"] == {"zone": "a"} and changed.json()["priority"] == 2
        assert (await gate.http.delete(f"/workers/{name}")).status_code == 202
        assert (await gate.http.get(f"/workers/{name}")).status_code == 404
        response = await gate.chat()
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["retryable"]) == (503, "no_worker", True)
        assert response.headers["retry-after"] == "1"
        made = await gate.http.post("/workers", json={"url": first.url, "model_id": "tiny", "labels": {"a": 1}})
        assert made.status_code == 202 and made.json()["location"].startswith("/workers/")
        await gate.until(lambda: gate.router.fleet.workers[first.url].healthy)
        assert await gate.by() == first.port
        for wrong in ({"url": "ftp://x"}, {}, {"url": 5}):
            assert (await gate.http.post("/workers", json=wrong)).status_code == 400
    await second.kill()


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/loads"])
async def test_an_answer_from_before_a_worker_went_does_not_make_it_well(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with gateway(Worker()) as gate:
        fleet = gate.router.fleet
        worker, get = fleet.workers[gate.workers[0].url], fleet.get
        answered, gone, over = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def late(*args: Any) -> tuple[int, bytes]:
            mine = asyncio.current_task() is look
            found = await get(*args)
            if mine and args[1] != path:
                return found
            if mine:
                answered.set()
            await (gone if mine else over).wait()  # other looks are not this test's
            return found

        monkeypatch.setattr(fleet, "get", late)
        look = asyncio.create_task(fleet._look(worker, 0))  # pyright: ignore[reportPrivateUsage]
        await answered.wait()
        fleet.broke(worker, UpstreamError("connection refused", refused=True))
        assert not worker.healthy
        gone.set()
        await look
        assert worker not in fleet._followers  # pyright: ignore[reportPrivateUsage]
        assert not worker.healthy and worker.fails == 1 and worker.passes == 0
        over.set()
        await gate.until(lambda: worker.healthy)


@pytest.mark.slow
async def test_a_removed_worker_ends_what_it_has_begun() -> None:
    async def speaks(request: Request) -> None:
        await stream(request, [b"data: %d\n\n" % at for at in range(10)], pause=0.03)

    async with gateway(Worker(answer=speaks)) as gate, gate.http.stream("POST", "/generate", json={}) as response:
        parts = response.aiter_raw()
        await anext(parts)
        await gate.http.post(f"/remove_worker?url={gate.workers[0].url}")
        assert b"data: 9" in b"".join([part async for part in parts])


async def test_without_workers_it_starts_and_says_what_is_missing() -> None:
    async with gateway() as gate:
        assert (await gate.http.get("/health")).status_code == 503
        assert (await gate.http.get("/liveness")).status_code == 200
        assert "no worker has been added" in (await gate.chat()).json()["error"]["message"]


@pytest.mark.slow
async def test_an_ill_worker_gets_nothing_until_it_is_well_again() -> None:
    async with gateway(Worker(), Worker(), health_failure_threshold=2) as gate:
        first, second = gate.workers
        first.ill = True
        await gate.until(lambda: not gate.router.fleet.workers[first.url].healthy)
        assert {await gate.by() for _ in range(4)} == {second.port}
        listed = (await gate.http.get("/workers")).json()
        assert listed["stats"]["healthy_count"] == 1 and "503" in listed["workers"][0]["reason"]
        second.ill = True
        await gate.until(lambda: not gate.router.fleet.workers[second.url].healthy)
        error = (await gate.chat()).json()["error"]
        assert error["code"] == "no_worker" and "/health: 503" in error["message"]
        first.ill = False
        await gate.until(lambda: gate.router.fleet.workers[first.url].healthy)
        assert await gate.by() == first.port


@pytest.mark.slow
async def test_a_worker_that_fails_often_is_left_alone_for_a_while() -> None:
    broken = True

    async def sometimes(request: Request) -> None:
        await say(request, 500 if broken else 200, {"by": gate.workers[0].port})

    settings: dict[str, Any] = {"cb_failure_threshold": 3, "cb_timeout_duration_secs": 0.3, "cb_success_threshold": 1}
    async with gateway(Worker(answer=sometimes), Worker(), **settings) as gate:
        for _ in range(20):
            await gate.by()
        assert len(gate.workers[0].seen) == 3
        broken = False
        await asyncio.sleep(0.35)
        assert gate.workers[0].port in {await gate.by() for _ in range(4)}
        gate.idle()


async def test_models_go_to_their_workers_and_unknown_ones_are_named() -> None:
    async with gateway(Worker(["a", "a-style"]), Worker(["b"])) as gate:

        async def asks(model: str) -> Any:
            return await gate.chat(model=model)

        assert (await asks("a")).json()["by"] == gate.workers[0].port
        assert (await asks("a-style")).json()["by"] == (await asks("a:x")).json()["by"] == gate.workers[0].port
        assert {(await asks("b")).json()["by"] for _ in range(3)} == {gate.workers[1].port}
        response = await asks("c")
        assert response.status_code == 404 and "'a', 'a-style', 'b'" in response.json()["error"]["message"]
        ids = [item["id"] for item in (await gate.http.get("/v1/models")).json()["data"]]
        assert ids == ["a", "a-style", "b"]
    async with gateway(Worker(["only"])) as gate:
        assert (await gate.chat(model="whatever")).status_code == 200  # its server decides


async def test_no_more_than_allowed_run_and_the_important_ones_go_first() -> None:
    go, order = asyncio.Event(), list[str]()

    async def waits(request: Request) -> None:
        order.append(request.headers.get("x-name", ""))
        await go.wait()
        await say(request, 200, {})

    limits: dict[str, Any] = {"max_concurrent_requests": 1, "queue_size": 3}
    async with gateway(Worker(answer=waits), **limits) as gate:

        def ask(name: str, priority: int = 0) -> asyncio.Task[Any]:
            return asyncio.create_task(gate.chat(headers={"x-name": name, "x-priority": str(priority)}))

        tasks = [ask("first")]
        await gate.until(lambda: len(order) == 1)
        for at, (name, priority) in enumerate((("low", -1), ("usual", 0), ("high", 5))):
            tasks.append(ask(name, priority))
            await gate.until(lambda at=at: gate.router.gate.waiting == at + 1)  # type: ignore[misc]
        refused = await gate.chat()
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
        assert refused.json()["error"]["retryable"] and refused.headers["retry-after"] == "1"
        go.set()
        assert {(await task).status_code for task in tasks} == {200}
        assert order == ["first", "high", "usual", "low"]
        gate.idle()


@pytest.mark.slow
async def test_a_wait_in_the_queue_has_an_end_and_a_client_that_leaves_gives_up_its_place() -> None:
    never = asyncio.Event()

    async def hangs(request: Request) -> None:
        await never.wait()

    async with gateway(Worker(answer=hangs), max_concurrent_requests=1, queue_timeout_secs=0.3) as gate:
        first = asyncio.create_task(gate.chat())
        await gate.until(lambda: gate.router.gate.inside == 1)
        late = await gate.chat()
        assert late.status_code == 408 and "no turn within 0.3 s" in late.json()["error"]["message"]
        assert gate.router.gate.waiting == 0
        leaves = asyncio.create_task(gate.chat())
        await gate.until(lambda: gate.router.gate.waiting == 1)
        leaves.cancel()
        await gate.until(lambda: gate.router.gate.waiting == 0)
        assert len(gate.workers[0].seen) == 1
        first.cancel()
        await gate.until(lambda: gate.router.gate.inside == 0)
        gate.idle()


async def test_a_client_with_many_requests_does_not_keep_away_one_with_few() -> None:
    gate, order, tasks = Gate(Settings(max_concurrent_requests=1)), list[str](), list[asyncio.Task[None]]()
    await gate.enter(0, "holder", [])

    async def one(client: str, name: str, priority: int = 0) -> None:
        await gate.enter(priority, client, [])
        order.append(name)
        await asyncio.sleep(0)
        gate.leave(client)

    for client, count in (("greedy", 6), ("modest", 2)):
        for at in range(count):
            tasks.append(asyncio.create_task(one(client, f"{client}{at}")))
            await asyncio.sleep(0)
    gate.leave("holder")
    await asyncio.gather(*tasks)
    assert order.index("modest1") < order.index("greedy3") and len(order) == 8
    assert not gate.inside and not gate.waiting and not gate._held


def test_keys_have_tokens_at_a_steady_rate() -> None:
    buckets = Buckets(100, 1000)
    buckets.take("a", 900, 0.0)
    with pytest.raises(TooMany, match="100 tokens a second") as refused:
        buckets.take("a", 300, 0.0)
    assert refused.value.after == 2
    buckets.take("b", 1000, 0.0)
    buckets.take("a", 300, 2.0)
    buckets.take("c", 5000, 0.0)  # more than a bucket holds: once, and then a long pause
    with pytest.raises(TooMany):
        buckets.take("c", 1, 39.0)
    buckets.take("c", 1, 41.0)
    Buckets(0, 0).take("a", 1e9, 0.0)


async def test_a_key_is_asked_for_and_another_one_is_shown_to_workers() -> None:
    settings: dict[str, Any] = {
        "api_key": ("one", "two"),
        "worker_api_key": "inner",
        "rate_limit_tokens_per_second": 100,
    }
    async with gateway(Worker(), **settings) as gate:
        assert (await gate.chat()).status_code == 401
        assert (await gate.chat(headers={"authorization": "Bearer three"})).status_code == 401
        assert (await gate.http.post("/add_worker?url=http://evil:1")).status_code == 401
        assert (await gate.http.get("/health")).status_code == 200
        for headers in ({"authorization": "Bearer one"}, {"x-api-key": "two"}):
            assert (await gate.chat(headers=headers)).status_code == 200
        seen = gate.workers[0].seen
        assert {request.headers["authorization"] for request in seen} == {"Bearer inner"}
        assert not any("x-api-key" in request.headers for request in seen)
        large = await gate.chat("x" * 8000, headers={"authorization": "Bearer one"})
        assert large.status_code == 429 and large.json()["error"]["code"] == "rate_limited"
        assert (await gate.chat(headers={"authorization": "Bearer two"})).status_code == 200


async def test_what_would_come_too_late_is_refused_at_once() -> None:
    async with gateway(Worker(), slo_ttft_ms=1000) as gate:
        worker = gate.router.fleet.workers[gate.workers[0].url]
        worker.rate = 1000
        assert (await gate.chat("x" * 2000)).status_code == 200
        late = await gate.chat("x" * 40_000)
        assert late.status_code == 429 and late.json()["error"]["code"] == "too_late"
        assert int(late.headers["retry-after"]) >= 9 and "is predicted in 10" in late.json()["error"]["message"]
        assert (await gate.chat("x" * 40_000, headers={"x-slo-ttft-ms": "60000"})).status_code == 200
        gate.idle()


async def test_metrics_count_what_happened() -> None:
    async def bad(request: Request) -> None:
        await say(request, 500, {})

    async with gateway(Worker(answer=bad), Worker()) as gate:
        for _ in range(3):
            await gate.by()
        text = (await gate.http.get("/metrics")).text
        found = {
            (sample.name, *sample.labels.values()): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert found["phloem_router:requests_total", "/v1/chat/completions", "200"] == 3
        assert found["phloem_router:worker_requests_total", gate.workers[1].url] == 3
        assert found["phloem_router:worker_errors_total", "status 500", gate.workers[0].url] >= 1
        assert found["phloem_router:retries_total",] >= 1 and found["phloem_router:workers_ready",] == 2
        assert found["phloem_router:request_duration_seconds_count",] == 3


async def test_loads_of_workers_are_asked_and_shown() -> None:
    loads = {"num_running_reqs": 3, "total_prefill_uncached_tokens": 0, "total_prefill_busy_us": 0}
    async with gateway(Worker(loads=loads)) as gate:
        told = (await gate.http.get("/get_loads")).json()["workers"]
        assert told[0]["num_running_reqs"] == 3 and told[0]["worker"] == gate.workers[0].url


async def test_conversations_stay_with_their_worker_over_http() -> None:
    async with gateway(Worker(), Worker(), Worker(), policy="cache_aware") as gate:
        rng = random.Random(1)
        places: dict[int, set[int]] = {}
        talks: dict[int, list[dict[str, str]]] = {at: [{"role": "user", "content": f"{at} " * 300}] for at in range(12)}
        for _ in range(4):
            for at in rng.sample(sorted(talks), len(talks)):
                response = await gate.http.post("/v1/chat/completions", json={"model": "tiny", "messages": talks[at]})
                places.setdefault(at, set()).add(response.json()["by"])
                talks[at] += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "and then? " * 9}]
        assert all(len(where) == 1 for where in places.values()), places
        assert len({next(iter(where)) for where in places.values()}) == 3
        assert gate.router.metrics.cached_tokens > 0.5 * gate.router.metrics.prompt_tokens


@pytest.mark.slow
async def test_it_ends_when_all_has_been_answered() -> None:
    async def slow(request: Request) -> None:
        await asyncio.sleep(0.3)
        await say(request, 200, {"by": 1})

    async with gateway(Worker(answer=slow)) as gate:
        task = asyncio.create_task(gate.by())
        await gate.until(lambda: gate.router.gate.inside == 1)
        gate.router.draining = True
        assert (await gate.http.get("/health")).json()["error"]["code"] == "draining"
        assert (await gate.chat()).status_code == 503
        assert await task == 1


async def test_a_new_gateway_sends_on_where_the_old_one_left() -> None:
    """Nothing of importance is lost with the process: sessions go where they went."""
    some = [Worker(), Worker(), Worker()]
    places: list[dict[str, int]] = []
    for _ in range(2):
        async with gateway(*some, policy="consistent_hashing") as gate:
            names = [f"s{at}" for at in range(10)]
            places.append({name: await gate.by(headers={"x-session-id": name}) for name in names})
    assert places[0] == places[1] and len(set(places[0].values())) > 1


async def test_what_concerns_all_workers_reaches_all() -> None:
    async def knows(request: Request) -> None:
        await say(request, 200 if request.path.startswith(("/flush_cache?", "/abort_request")) else 500, {})

    async with gateway(Worker(answer=knows), Worker(answer=knows)) as gate:
        told = await gate.http.post("/flush_cache?timeout=1")
        assert told.json() == {"success": True, "workers": {worker.url: 200 for worker in gate.workers}}
        await gate.http.post("/abort_request", json={"rid": "a"})
        assert [worker.seen[-1].json() for worker in gate.workers] == [{"rid": "a"}] * 2
        bad = await gate.http.post("/pause_generation", json={})
        assert bad.status_code == 502 and not bad.json()["success"]


async def test_traces_and_counts_are_of_all_workers_whose_answers_are_handed_on() -> None:
    async def traces(request: Request) -> None:
        await say(request, 200, {"path": request.path})

    async def refuses(request: Request) -> None:
        await say(request, 400, {"error": {"message": "no profile is being made"}})

    async with gateway(Worker(answer=traces), Worker(answer=traces)) as gate:
        urls = [worker.url for worker in gate.workers]
        begun = await gate.http.post("/start_profile", json={"num_steps": 5})
        assert begun.json()["answers"] == {url: {"path": "/start_profile"} for url in urls}
        assert [worker.seen[-1].json() for worker in gate.workers] == [{"num_steps": 5}] * 2
        for path in ("/stop_profile", "/dump_expert_distribution_record"):
            told = (await gate.http.get(path)).json()
            assert told["success"] and told["answers"] == {url: {"path": path} for url in urls}
        gate.workers[1].answer = refuses
        bad = await gate.http.post("/stop_profile")
        assert bad.status_code == 502 and bad.json()["workers"] == dict(zip(urls, (200, 400), strict=True))
        assert bad.json()["answers"][urls[1]]["error"]["message"] == "no profile is being made"


async def test_new_weights_reach_all_workers_and_who_refuses_them_is_told() -> None:
    async def takes(request: Request) -> None:
        await say(request, 200, {"success": True, "message": "v2"})

    async def refuses(request: Request) -> None:
        await say(request, 400, {"error": {"message": "no such directory"}})

    async with gateway(Worker(answer=takes), Worker(answer=takes)) as gate:
        urls = [worker.url for worker in gate.workers]
        told = await gate.http.post("/update_weights_from_disk", json={"model_path": "x"})
        assert told.status_code == 200 and told.json()["success"] and told.json()["message"] == "v2"
        assert [worker.seen[-1].json() for worker in gate.workers] == [{"model_path": "x"}] * 2
        gate.workers[1].answer = refuses
        bad = await gate.http.post("/release_memory_occupation", json={})
        assert bad.status_code == 502 and bad.json()["workers"] == dict(zip(urls, (200, 400), strict=True))
        assert bad.json()["answers"][urls[1]]["error"]["message"] == "no such directory"
        seen = [len(worker.seen) for worker in gate.workers]
        for path in ("/init_weights_update_group", "/disaggregation_mode"):
            own = await gate.http.post(path, json={"mode": "prefill"})
            assert own.status_code == 400 and all(url in own.text for url in urls)
        assert [len(worker.seen) for worker in gate.workers] == seen


async def test_what_all_workers_refuse_alike_is_refused_and_with_none_nothing_succeeds() -> None:
    async def refuses(request: Request) -> None:
        await say(request, 400, {"message": "no such directory"})

    async with gateway(Worker(answer=refuses), Worker(answer=refuses)) as gate:
        bad = await gate.http.post("/update_weights_from_disk", json={"model_path": "x"})
        assert bad.status_code == 400 and bad.json()["message"] == "no such directory"
        assert not bad.json()["success"] and set(bad.json()["workers"].values()) == {400}
        for worker in gate.workers:
            await gate.http.post("/remove_worker", params={"url": worker.url})
        nobody = await gate.http.post("/update_weights_from_disk", json={"model_path": "x"})
        assert nobody.status_code == 503 and nobody.json()["error"]["code"] == "no_worker"


async def test_a_slash_behind_a_path_does_not_lead_past_the_gateway() -> None:
    async with gateway(Worker(), Worker()) as gate:
        await gate.http.post("/flush_cache/")
        await gate.http.post("/v1/completions%2F/", json={"model": "tiny", "prompt": "x"})
        seen = [request.path for worker in gate.workers for request in worker.seen]
        assert seen.count("/flush_cache") == 2 and seen.count("/v1/completions") == 1
        assert not any(path.endswith("/") for path in seen)


@pytest.mark.parametrize("path", ["/update_weight_version", "/weights_checker", "/clear_hicache_storage_backend"])
async def test_calls_that_are_every_servers_business_reach_all_workers(path: str) -> None:
    async with gateway(Worker(), Worker()) as gate:
        assert (await gate.http.post(path, json={"action": "checksum"})).status_code == 200
        assert [(worker.seen[-1].path, worker.seen[-1].json()) for worker in gate.workers] == [
            (path, {"action": "checksum"})
        ] * 2


@pytest.mark.parametrize("path", ["/v1/set_lora", "/v1/merge_lora_weights", "/v1/unmerge_lora_weights"])
async def test_what_pictures_wear_is_set_at_all_workers(path: str) -> None:
    async def knows(request: Request) -> None:
        await say(request, 200 if request.path == path else 404, {})

    async with gateway(Worker(answer=knows), Worker(answer=knows)) as gate:
        told = await gate.http.post(path, json={"strength": 0.5})
        assert told.status_code == 200, told.text
        assert [worker.seen[-1].json() for worker in gate.workers] == [{"strength": 0.5}] * 2


async def test_what_one_worker_keeps_is_found_there() -> None:
    async def keeps(request: Request) -> None:
        await say(request, 200, {"id": "resp_1"})

    async def lacks(request: Request) -> None:
        await say(request, 404, {"error": {"message": "no such response"}})

    async with gateway(Worker(answer=lacks), Worker(answer=keeps), Worker(answer=lacks)) as gate:
        for _ in range(3):
            assert (await gate.http.get("/v1/responses/resp_1")).json() == {"id": "resp_1"}
            body = {"model": "tiny", "input": "and?", "previous_response_id": "resp_1"}
            assert (await gate.http.post("/v1/responses", json=body)).status_code == 200
        gate.workers[1].answer = lacks
        assert (await gate.http.get("/v1/responses/resp_1")).status_code == 404


async def test_an_unknown_policy_is_told_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'cache_aware'"):
        Router(Settings(policy="cache_awar"))


async def test_the_body_is_passed_on_byte_for_byte() -> None:
    raw = b'{ "model" :"tiny",  "messages":[ {"role":"user","content":"\\u00e9"} ] }'
    async with gateway(Worker()) as gate:
        await gate.http.post("/v1/chat/completions", content=raw)
        assert gate.workers[0].seen[0].body == raw and json.loads(raw)["model"] == "tiny"
