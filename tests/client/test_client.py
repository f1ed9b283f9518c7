"""EngineClient over a fake engine: fan-out, stops, aborts, death, control calls; no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from door import CONTEXT, make_info, on_loop, until
from hypothesis import given, settings
from hypothesis import strategies as st

from phloem.client.client import EngineClient
from phloem.client.continuation import Continuation
from phloem.client.request import GenerateRequest, Item
from phloem.core.errors import BadRequest, ConfigError, EngineDead, ModelLoadError, PhloemError, QueueFull
from phloem.core.messages import ControlReply, Failed, Heartbeat, Ready, unpack_ids
from phloem.core.request import SamplingParams
from phloem.server.health import IDLE_SILENCE, Health
from phloem.testing.byte_tokenizer import EOS, ByteTemplate, ByteTokenizer
from phloem.testing.fake_engine import FakeEngine, logprob_of


def client_of(engine: FakeEngine | None, **info: Any) -> EngineClient:
    client = EngineClient(ByteTokenizer(), ByteTemplate(), make_info(**info))  # type: ignore[arg-type]
    if engine is not None:
        client.attach(engine)
    client.start()
    return client


def item(text: str = "hello", **params: Any) -> Item:
    fields = {name: params.pop(name) for name in list(params) if name in Item.__dataclass_fields__}
    return Item(sampling=SamplingParams(**{"max_new_tokens": 8, **params}), text=text, **fields)


async def generate(client: EngineClient, request: GenerateRequest) -> AsyncIterator[list[Continuation]]:
    """Submit and iterate; leaving early aborts what still runs."""
    call = await client.submit(request)
    try:
        async for outputs in call:
            yield outputs
    finally:
        call.cancel()


async def whole(client: EngineClient, *items: Item) -> list[Continuation]:
    found: list[Continuation] = []
    async for outputs in generate(client, GenerateRequest(list(items))):
        found = outputs
    return found


@on_loop
async def test_echo_gives_the_prompt_back_and_stops_at_eos() -> None:
    client = client_of(FakeEngine(mode="echo"))
    (output,) = await whole(client, item("héllo wörld", max_new_tokens=50))
    assert output.text == "héllo wörld"
    assert output.ids[-1] == EOS
    assert output.finish is not None and (output.finish.type, output.finish.matched) == ("stop", EOS)
    assert output.prompt_tokens == len("héllo wörld".encode()) + 1
    assert output.cached_tokens == output.prompt_tokens // 2
    assert output.queue_seconds > 0
    assert client.in_flight == 0
    await client.close()


@on_loop
async def test_stream_deltas_make_up_the_text() -> None:
    client = client_of(FakeEngine())
    deltas: list[str] = []
    ids: list[int] = []
    async for outputs in generate(client, GenerateRequest([item(max_new_tokens=20)], stream=True)):
        (output,) = outputs
        deltas.append(output.delta)
        ids += output.ids[output.new_from :]
    assert "".join(deltas) == output.text and len(output.text) == 20
    assert ids == output.ids
    assert len(deltas) > 10, "tokens arrive one by one"
    await client.close()


@on_loop
async def test_without_stream_the_reader_wakes_once() -> None:
    client = client_of(FakeEngine())
    times = 0
    async for outputs in generate(client, GenerateRequest([item(), item("other")])):
        times += 1
        assert all(output.finish is not None for output in outputs)
    assert times == 1
    await client.close()


@on_loop
async def test_what_came_in_one_call_is_told_to_the_engine_as_one() -> None:
    engine = FakeEngine()
    client = client_of(engine)
    await whole(client, item(n=2), item("other"))
    await whole(client, item())
    names = [submit.call for submit in engine.submits]
    assert names[0] and names == [names[0]] * 3 + [""]
    await client.close()


@on_loop
async def test_n_fans_out_with_seeds_of_their_own() -> None:
    engine = FakeEngine()
    client = client_of(engine)
    outputs = await whole(client, item(n=3, sampling_seed=7), item("b", n=2))
    assert [(output.index, output.choice) for output in outputs] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    seeds = [submit.sampling.sampling_seed for submit in engine.submits]
    assert seeds[0] == 7 and len(set(seeds[:3])) == 3 and seeds[3:] == [None, None]
    assert all(submit.sampling.n == 1 for submit in engine.submits)
    assert len({submit.id for submit in engine.submits}) == 5
    assert len({output.text for output in outputs}) == 5
    await client.close()


@on_loop
async def test_stop_string_ends_the_request_with_one_abort() -> None:
    engine = FakeEngine(mode="echo")
    client = client_of(engine)
    (output,) = await whole(client, item("one two three four", max_new_tokens=50, stop=["thr"]))
    assert output.text == "one two "
    assert output.finish is not None and output.finish.matched == "thr"
    await until(lambda: not engine.running)
    assert [abort.id for abort in engine.aborts] == [output.id]
    assert engine.submits[0].sampling.stop == [], "stop strings are the door's business"
    assert client.in_flight == 0 and client.counters.aborted == 0
    await client.close()


@on_loop
async def test_stop_string_cuts_ids_and_logprobs() -> None:
    client = client_of(FakeEngine(mode="echo", per_step=6))
    (output,) = await whole(client, item("abXcdef", stop=["Xc"], return_logprob=True, no_stop_trim=True))
    assert output.text == "abXc"
    assert bytes(output.ids[1:]) == b"abXc"
    assert len(output.logprobs.values) == len(output.ids)
    await client.close()


@on_loop
async def test_stop_regex() -> None:
    client = client_of(FakeEngine(mode="echo"))
    (output,) = await whole(client, item("year 1234 and on", max_new_tokens=50, stop_regex=["[0-9]{3}"]))
    assert output.text == "year "
    with pytest.raises(BadRequest, match="stop_regex"):
        await whole(client, item(stop_regex=["("]))
    await client.close()


@on_loop
async def test_stop_token_is_not_part_of_the_text_unless_asked() -> None:
    client = client_of(FakeEngine(mode="echo"))
    (trimmed,) = await whole(client, item("ab.cd", stop_token_ids=[ord(".")]))
    (kept,) = await whole(client, item("ab.cd", stop_token_ids=[ord(".")], no_stop_trim=True))
    assert (trimmed.text, kept.text) == ("ab", "ab.")
    assert trimmed.ids == kept.ids == [256, *b"ab."]
    assert trimmed.finish is not None and trimmed.finish.matched == ord(".")
    await client.close()


@on_loop
async def test_logprobs_arrive_for_output_and_prompt() -> None:
    client = client_of(FakeEngine())
    wanted = item("abc", return_logprob=True, logprob_start=0, top_logprobs=2, token_ids_logprob=[5])
    (output,) = await whole(client, wanted)
    assert output.logprobs.values == pytest.approx([logprob_of(token) for token in output.ids])
    assert output.logprobs.top[0] == [pytest.approx((logprob_of(0), 0)), pytest.approx((logprob_of(1), 1))]
    assert output.prompt_logprobs is not None
    assert output.prompt_logprobs.values == pytest.approx([logprob_of(byte) for byte in b"abc"])
    assert output.prompt_logprobs.chosen == [[pytest.approx((logprob_of(5), 5))]] * 3
    await client.close()


@on_loop
async def test_leaving_early_aborts_exactly_once() -> None:
    engine = FakeEngine(delay=0.002)
    client = client_of(engine)
    async for _ in generate(client, GenerateRequest([item(max_new_tokens=400)], stream=True)):
        break
    await until(lambda: not engine.running)
    task = asyncio.create_task(whole(client, item(max_new_tokens=400, n=2)))
    await until(lambda: client.in_flight == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not engine.running)
    assert sorted(abort.id for abort in engine.aborts) == sorted(submit.id for submit in engine.submits)
    assert client.in_flight == 0
    assert client.counters.aborted == 3
    await client.close()


@on_loop
async def test_a_call_can_be_cancelled_twice() -> None:
    engine = FakeEngine(delay=0.01)
    client = client_of(engine)
    call = await client.submit(GenerateRequest([item(max_new_tokens=100)]))
    call.cancel()
    call.cancel()
    with pytest.raises(PhloemError, match="disconnected"):
        await anext(call)
    await asyncio.sleep(0.03)
    assert len(engine.aborts) == 1
    await client.close()


@on_loop
async def test_abort_by_id_finishes_with_reason_abort() -> None:
    engine = FakeEngine(delay=0.002)
    client = client_of(engine)
    first = asyncio.create_task(whole(client, item(max_new_tokens=400, id="mine", n=2)))
    other = asyncio.create_task(whole(client, item(max_new_tokens=20)))
    await until(lambda: client.in_flight == 3)
    assert client.abort("mine") == 2
    assert client.abort("mine") == 0
    outputs = await first
    assert {output.finish.type for output in outputs if output.finish} == {"abort"}
    assert len((await other)[0].ids) == 20
    assert sorted(abort.id for abort in engine.aborts) == ["mine-0", "mine-1"]
    await client.close()


@on_loop
async def test_the_same_id_twice_is_refused() -> None:
    engine = FakeEngine(delay=0.002)
    client = client_of(engine)
    call = await client.submit(GenerateRequest([item(id="x", max_new_tokens=300)]))
    for items in ([item(id="x")], [item(id="y"), item(id="y")]):
        with pytest.raises(BadRequest, match="in use") as caught:
            await client.submit(GenerateRequest(items))
        assert caught.value.param == "rid"
    call.cancel()
    assert [submit.id for submit in engine.submits] == ["x"]
    await client.close()


@on_loop
async def test_one_bad_item_submits_nothing() -> None:
    engine = FakeEngine()
    client = client_of(engine)
    with pytest.raises(BadRequest, match="temperature"):
        await whole(client, item(), item(temperature=-1.0))
    with pytest.raises(BadRequest, match="stop_regex"):
        await whole(client, item(), item(stop_regex=["["]))
    assert engine.submits == [] and client.in_flight == 0
    await client.close()


@on_loop
async def test_lengths_are_checked_against_the_context() -> None:
    engine = FakeEngine()
    client = client_of(engine)
    with pytest.raises(BadRequest, match=f"{CONTEXT + 2} tokens.*{CONTEXT}"):
        await whole(client, item("x" * (CONTEXT + 1)))
    with pytest.raises(BadRequest, match=f"more than .*{CONTEXT}"):
        await whole(client, item("x" * 100 * CONTEXT))
    with pytest.raises(BadRequest, match="no room"):
        await whole(client, item("x" * (CONTEXT - 1)))
    (scored,) = await whole(client, item("x" * (CONTEXT - 1), max_new_tokens=0))
    assert scored.ids == [] and scored.finish is not None and scored.finish.type == "length"
    (clipped,) = await whole(client, item("x" * (CONTEXT - 10), max_new_tokens=1000, min_new_tokens=900))
    assert clipped.completion_tokens == 9
    (unset,) = await whole(client, item("x" * (CONTEXT - 10), max_new_tokens=None))
    assert unset.completion_tokens == 9
    await client.close()


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"ids": [0, 263], "text": None}, "input_ids"),
        ({"ids": [-1], "text": None}, "input_ids"),
        ({"ids": [], "text": None}, "prompt"),
        ({"logprob_start": -2}, "logprob_start_len"),
        ({"logprob_start": 6}, "logprob_start_len"),
        ({"top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 10_000}, "top_logprobs"),
        ({"token_ids_logprob": [9999]}, "token_ids_logprob"),
        ({"priority": 2**40}, "priority"),
        ({"stream_interval": 0}, "stream_interval"),
        ({"temperature": float("nan")}, "temperature"),
        ({"text": "\ud800"}, "text"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], param: str) -> None:
    async def main() -> None:
        client = client_of(FakeEngine())
        made = item(**{name: value for name, value in change.items() if name not in ("ids", "text")})
        for name in ("ids", "text"):
            if name in change:
                setattr(made, name, change[name])
        with pytest.raises(BadRequest) as caught:
            await whole(client, made)
        assert caught.value.param == param
        await client.close()

    asyncio.run(main())


@on_loop
async def test_an_empty_text_begins_with_bos() -> None:
    engine = FakeEngine()
    client = client_of(engine)
    made = item("", add_special_tokens=False)
    (output,) = await whole(client, made)
    assert output.prompt_ids == [256]
    await client.close()


@on_loop
async def test_without_a_tokenizer_ids_are_served_and_text_is_not() -> None:
    engine = FakeEngine(mode="echo")
    client = EngineClient(None, None, make_info())
    client.attach(engine)
    client.start()
    made = item()
    made.text, made.ids = None, [1, 2, 3]
    (output,) = await whole(client, made)
    assert (output.ids, output.text) == ([1, 2, 3, EOS], "")
    with pytest.raises(BadRequest, match="no tokenizer"):
        await whole(client, item())
    made = item(stop=["a"])
    made.text, made.ids = None, [1]
    with pytest.raises(BadRequest, match="stop needs a tokenizer"):
        await whole(client, made)
    await client.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raise", "failed", "silent"])
def test_engine_death_ends_every_call_and_attach_revives(how: str) -> None:
    async def main() -> None:
        engine = FakeEngine(delay=0.002)
        client = client_of(engine)
        reasons: list[str] = []
        client.on_death.append(reasons.append)
        tasks = [asyncio.create_task(whole(client, item(max_new_tokens=400))) for _ in range(5)]
        control = asyncio.create_task(client.control("state"))
        engine.silent_controls = True
        await until(lambda: engine.running == 5)
        engine.die("out of memory", how)
        results = await asyncio.gather(*tasks, control, return_exceptions=True)
        assert all(isinstance(result, EngineDead) for result in results)
        expected = "ended" if how == "silent" else "out of memory"
        assert all(expected in str(result) for result in results) and expected in (client.dead or "")
        with pytest.raises(EngineDead, match=expected):
            await whole(client, item())
        with pytest.raises(EngineDead):
            await client.control("state")
        assert len(reasons) == 1
        client.attach(FakeEngine())
        assert (await client.wait_ready())["page_size"] == 1
        assert len((await whole(client, item()))[0].ids) == 8
        await client.close()

    asyncio.run(asyncio.wait_for(main(), 20))


@on_loop
async def test_what_arrived_before_the_death_is_delivered() -> None:
    engine = FakeEngine(delay=0.002)
    client = client_of(engine)
    call = await client.submit(GenerateRequest([item(max_new_tokens=400)], stream=True))
    assert (await anext(call))[0].delta
    await asyncio.sleep(0.02)
    engine.die("gone")
    await until(lambda: client.dead is not None)
    assert (await anext(call))[0].delta
    with pytest.raises(EngineDead, match="gone"):
        await anext(call)
    call.cancel()
    assert engine.aborts == []
    await client.close()


@on_loop
async def test_waiting_for_an_engine_that_fails() -> None:
    engine = FakeEngine(ready=False)
    client = client_of(engine)
    waiting = asyncio.create_task(client.wait_ready())
    await asyncio.sleep(0)
    engine.die("no such file", "failed")
    with pytest.raises(EngineDead, match="RuntimeError: no such file"):
        await waiting
    await client.close()


@on_loop
async def test_refusal_and_failure_of_one_request_harm_no_other() -> None:
    engine = FakeEngine(refuse={"full": (503, "the queue is full"), "bad": (400, "no")}, failing={"broken"})
    client = client_of(engine)
    good = asyncio.create_task(whole(client, item(max_new_tokens=50)))
    with pytest.raises(QueueFull, match="the queue is full"):
        await whole(client, item(id="full"))
    with pytest.raises(BadRequest):
        await whole(client, item(id="bad"))
    with pytest.raises(PhloemError, match="the step failed") as caught:
        await whole(client, item(id="broken"))
    assert caught.value.status == 500
    assert len((await good)[0].ids) == 50
    await client.close()


@on_loop
async def test_a_failure_in_detokenising_fails_that_request_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(delay=0.001)
    client = client_of(engine)
    call = await client.submit(GenerateRequest([item(max_new_tokens=400, id="sick")], stream=True))
    good = asyncio.create_task(whole(client, item(max_new_tokens=30)))

    class Broken:
        def push(self, ids: list[int], last: bool = False) -> None:
            raise RuntimeError("bad merge table")

    call.outputs[0].decoder = Broken()  # type: ignore[assignment]
    with pytest.raises(PhloemError, match="sick failed"):
        await anext(call)
    assert "sick" in caplog.text and "bad merge table" in caplog.text
    assert [abort.id for abort in engine.aborts] == ["sick"]
    assert len((await good)[0].ids) == 30
    await client.close()


@on_loop
async def test_control_calls_carry_arguments_and_answers() -> None:
    engine = FakeEngine(control_reply=ControlReply(id="", ok=False, message="busy", data={"a": 1}))
    client = client_of(engine)
    reply = await client.control("flush_cache", timeout=3.5)
    assert (reply.ok, reply.message, reply.data) == (False, "busy", {"a": 1})
    assert (engine.controls[0].name, engine.controls[0].args) == ("flush_cache", {"timeout": 3.5})
    engine.silent_controls = True
    with pytest.raises(EngineDead, match="did not answer 'state'"):
        await client.control("state", deadline=0.02)
    await client.close()


@on_loop
async def test_draining_refuses_new_calls_and_waits_for_old_ones() -> None:
    engine = FakeEngine(delay=0.002)
    client = client_of(engine)
    old = asyncio.create_task(whole(client, item(max_new_tokens=20)))
    await until(lambda: client.in_flight == 1)
    draining = asyncio.create_task(client.drain(5))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull) as caught:
        await whole(client, item())
    assert caught.value.code == "draining"
    assert await draining
    assert len((await old)[0].ids) == 20
    await client.close()


@on_loop
async def test_stream_interval_groups_tokens_but_never_delays_the_first() -> None:
    client = client_of(FakeEngine())
    sizes: list[int] = []
    made = item(max_new_tokens=20, stream_interval=6)
    async for (output,) in generate(client, GenerateRequest([made], stream=True)):
        sizes.append(len(output.ids) - output.new_from)
    assert sizes == [1, 6, 6, 6, 1]
    await client.close()


@on_loop
async def test_health_tells_the_truth_about_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(ready=False, beats=False)
    client = client_of(engine)
    health = Health(client, watchdog=60.0)
    assert health.problem() == "the engine is starting" and health.hung() == 0
    engine.say(Ready())
    await client.wait_ready()
    assert health.problem() is None
    client.connection.heard_at -= IDLE_SILENCE + 1
    assert "silent" in (health.problem() or "") and health.hung() > IDLE_SILENCE
    engine.say(Heartbeat(step=3, busy_seconds=70.0))
    await until(lambda: client.connection.heartbeat.step == 3)
    assert "step has been running for 70" in (health.problem() or "") and 70 <= health.hung() < 75
    engine.say(Heartbeat(step=4))
    await until(lambda: client.connection.heartbeat.step == 4)
    assert health.problem() is None
    call = await client.submit(GenerateRequest([item(max_new_tokens=400)]))
    client.connection.heard_at -= IDLE_SILENCE + 1
    assert health.problem() is None, "a long step holds the heartbeat"
    client.connection.heard_at -= 60
    assert "silent" in (health.problem() or "")
    call.cancel()
    client.draining = True
    assert "silent" not in (health.problem() or "") and health.problem() is not None
    await client.close()
    assert "shutting down" in (health.problem() or "")


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=60), st.integers(1, 7), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_streaming_equals_the_whole_for_any_text_and_stops(text: str, per_step: int, stops: list[str]) -> None:
    async def main() -> None:
        results: list[tuple[str, str]] = []
        for stream in (False, True):
            client = client_of(FakeEngine(mode="echo", per_step=per_step if stream else 1))
            deltas = ""
            made = item(text, max_new_tokens=400, stop=stops, add_special_tokens=False)
            async for (output,) in generate(client, GenerateRequest([made], stream=stream)):
                deltas += output.delta
            assert not stream or deltas == output.text
            results.append((output.text, repr(output.finish)))
            await client.close()
        assert results[0] == results[1]
        if not any(stop in text for stop in stops) and "<" not in text:
            assert results[0][0] == text

    asyncio.run(main())


def test_ids_travel_packed() -> None:
    async def main() -> None:
        engine = FakeEngine()
        client = client_of(engine)
        made = item()
        made.ids = [5, 6, 7]
        await whole(client, made)
        assert unpack_ids(engine.submits[0].input_ids).tolist() == [5, 6, 7]
        await client.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("kind", "error"), [("ConfigError", ConfigError), ("ModelLoadError", ModelLoadError), ("RuntimeError", None)]
)
@on_loop
async def test_what_the_engine_was_asked_wrongly_is_raised_as_it_was_there(
    kind: str, error: type[PhloemError] | None
) -> None:
    engine = FakeEngine(ready=False)
    client = client_of(engine)
    engine.say(Failed(error="tp_size 2: 9 heads", kind=kind, param="tp_size"))
    with pytest.raises(EngineDead, match=f"{kind}: tp_size 2: 9 heads"):
        await client.wait_ready()
    failure = client.connection.failure
    assert failure is None if error is None else type(failure) is error
    assert failure is None or (failure.message, failure.param) == ("tp_size 2: 9 heads", "tp_size")
    client.attach(FakeEngine())
    assert client.connection.failure is None
    await client.close()
