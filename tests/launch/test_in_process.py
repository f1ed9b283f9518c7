"""The engine in this process: how it fails, how it ends, and what it takes."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
import torch
from engine_door import http_door

from phloem import LLM, Engine
from phloem.checkpoint.describe import describe
from phloem.client.client import EngineClient
from phloem.client.info import ModelInfo
from phloem.client.request import GenerateRequest, Item
from phloem.core.errors import BadRequest, ConfigError, EngineDead, ModelLoadError
from phloem.core.messages import (
    Abort,
    Control,
    ControlReply,
    EngineLink,
    FromEngine,
    Submit,
    ToEngine,
    Tokens,
    decode_from_engine,
    encode,
    pack_ids,
    refusal,
)
from phloem.core.request import SamplingParams, recommended
from phloem.launch.__main__ import received
from phloem.launch.door import Begins
from phloem.testing.checkpoints import tiny_checkpoint

SMALL: dict[str, Any] = {"dtype": "float32", "ops": "reference", "max_total_tokens": 2048, "log_level": "warning"}
LONG = {"max_new_tokens": 450, "ignore_eos": True}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[Engine]:
    with Engine(model_path=str(path), **SMALL) as found:
        yield found


# How it fails


def test_a_checkpoint_that_lacks_tensors_is_a_model_load_error(path: Path, tmp_path: Path, capfd: Any) -> None:
    """Found in the engine's thread, and told by its class; no task is left behind."""
    from safetensors.torch import load_file, save_file

    for file in path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight"):
        Engine(model_path=str(tmp_path), **SMALL)
    with pytest.raises(ConfigError, match="attention backend flash"):
        Engine(model_path=str(path), **{**SMALL, "attention_backend": "flash"})
    assert "was destroyed" not in capfd.readouterr().err
    assert not [thread for thread in threading.enumerate() if thread.name == "phloem-door" and thread.is_alive()]


def test_after_shutdown_every_call_says_so(path: Path) -> None:
    engine = Engine(model_path=str(path), **SMALL)
    engine.shutdown()
    engine.shutdown()
    calls: list[Any] = [
        lambda: engine.generate("a"),
        lambda: engine.flush_cache(),
        lambda: engine.get_server_info(),
        lambda: engine.abort_request(abort_all=True),
        lambda: engine.pause_generation(),
        lambda: engine.continue_generation(),
        lambda: engine.open_session(),
        lambda: engine.close_session("x"),
        lambda: engine.score("a", "b", [1, 2]),
    ]
    for call in calls:
        with pytest.raises(EngineDead, match="shut down"):
            call()


def test_a_shutdown_under_load_is_no_error(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        engine = Engine(model_path=str(path), **SMALL)
        stream: Any = engine.generate("a", LONG, stream=True)
        next(stream)
        with caplog.at_level(logging.INFO):
            engine.shutdown()
        with pytest.raises(EngineDead):
            for _ in stream:
                pass
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_a_stream_that_outlives_its_engine_says_so(path: Path) -> None:
    engine = Engine(model_path=str(path), **SMALL)
    begun, late = (engine.generate("a", LONG, stream=True) for _ in range(2))
    next(begun)  # type: ignore[call-overload]
    engine.shutdown()
    for stream in (begun, late):
        with pytest.raises(EngineDead, match="shut down"):
            list(stream)


async def test_calls_of_an_event_loop_are_told_of_the_end(path: Path) -> None:
    engine = Engine(model_path=str(path), **SMALL)
    whole = [asyncio.ensure_future(engine.async_generate("a", LONG)) for _ in range(3)]
    stream: Any = await engine.async_generate("a", LONG, stream=True)
    await anext(stream)
    await asyncio.to_thread(engine.shutdown)
    ends = await asyncio.wait_for(asyncio.gather(*whole, return_exceptions=True), 20)
    assert {type(end) for end in ends} == {EngineDead}
    with pytest.raises(EngineDead, match="shut down"):
        async for _ in stream:
            pass


@pytest.mark.slow
def test_callers_that_race_with_the_end_are_all_told(path: Path) -> None:
    ends: list[BaseException] = []
    engine = Engine(model_path=str(path), **SMALL)

    def until_it_ends(call: Callable[[], Any]) -> None:
        try:
            while True:
                call()
        except BaseException as error:
            ends.append(error)

    calls: list[Callable[[], Any]] = [
        lambda: engine.generate("a", {"max_new_tokens": 1}),
        lambda: list(engine.generate("a", {"max_new_tokens": 2}, stream=True)),
        lambda: until_refused(engine),
        engine.get_server_info,
        engine.flush_cache,
        engine.open_session,
    ]
    threads = [threading.Thread(target=until_it_ends, args=(call,), daemon=True) for call in calls * 2]
    for thread in threads:
        thread.start()
    engine.generate("a", {"max_new_tokens": 20})
    engine.shutdown()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    assert {(type(error), str(error)) for error in ends} == {(EngineDead, "the engine was shut down")}


def until_refused(engine: Engine) -> None:
    """A prompt so long that it is tokenised in a thread of its own, and then refused."""
    with pytest.raises(BadRequest):
        engine.generate("long " * 5000, {"max_new_tokens": 1})


@pytest.mark.slow
def test_an_engine_that_nobody_holds_ends(path: Path) -> None:
    def running() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("phloem-")}

    before = running()
    engine = Engine(model_path=str(path), **SMALL)
    stream: Any = engine.generate("a", LONG, stream=True)
    next(stream)
    held = weakref.ref(engine)
    del engine, stream
    for _ in range(1000):  # what made the stream's events holds it until it is told
        gc.collect()
        if held() is None:
            break
        time.sleep(0.01)
    assert held() is None
    for thread in running() - before:
        thread.join(20)
    assert running() <= before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_is_told_that_it_has_no_engine(engine: Engine) -> None:
    stream: Any = engine.generate("a", LONG, stream=True)
    next(stream)

    async def ask() -> None:
        await engine.async_generate("a", LONG)

    calls: list[Callable[[], Any]] = [
        lambda: engine.generate("a", {"max_new_tokens": 1}),
        lambda: list(stream),
        lambda: engine.score("a", "b", [1, 2]),
        lambda: asyncio.run(ask()),
        engine.get_server_info,
        engine.shutdown,  # not its own: nothing happens
    ]
    told: list[str] = []
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(30)
        for call in calls:
            try:
                call()
                told.append("nothing")
            except EngineDead as error:
                told.append(str(error))
            except BaseException as error:
                told.append(repr(error))
        os.write(write, json.dumps(told).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        told = json.loads(pipe.read() or "[]")
    os.waitpid(child, 0)
    assert told[-1:] == ["nothing"]
    assert len(told) == len(calls) and all("forked child" in text for text in told[:-1]), told
    stream.close()
    assert isinstance(engine.generate("a", {"max_new_tokens": 1}), dict)


# How a script ends

ENDINGS: dict[str, tuple[int, str]] = {  # the exit status, and what the script does behind HEAD
    "a stream as the last line": (0, "g = engine.generate('a', P, stream=True); next(g)"),
    "sys.exit": (3, "g = engine.generate('a', P, stream=True); next(g); sys.exit(3)"),
    "an exception": (1, "g = engine.generate('a', P, stream=True); next(g); raise ValueError('mine')"),
    "Ctrl-C": (
        -signal.SIGINT,
        """
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        while True: engine.generate('a', P)
        """,
    ),
    "a thread": (
        0,
        """
        def ask():
            try:
                while True: engine.generate('a', P)
            except EngineDead: pass
        threading.Thread(target=ask, daemon=True).start(); time.sleep(0.1)
        """,
    ),
    "a thread that begins": (
        0,
        """
        def begin():
            try: Engine(model_path=PATH, **S)
            except EngineDead: pass
        threading.Thread(target=begin, daemon=True).start()
        """,
    ),
    "an event loop": (
        0,
        """
        async def main():
            asyncio.ensure_future(engine.async_generate('a', P))
            g = await engine.async_generate('a', P, stream=True)
            await anext(aiter(g))
        asyncio.run(main())
        """,
    ),
    "an engine that nobody holds": (0, "g = engine.generate('a', P, stream=True); next(g); del g, engine"),
    "an LLM": (0, "other = LLM(PATH, **S); g = other.engine.generate('a', P, stream=True); next(g)"),
    "a constraint that compiles": (
        0,
        """
        def ask():
            try:
                for at in range(10_000): engine.generate('a', {**P, "regex": "(%d|[a-z]{1,60} ){40}" % at})
            except EngineDead: pass
        threading.Thread(target=ask, daemon=True).start(); time.sleep(0.5)
        """,
    ),
    "a forked child": (
        0,
        """
        g = engine.generate('a', P, stream=True); next(g)
        child = os.fork()
        if child: sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
    ),
}
HEAD = """
import asyncio, os, signal, sys, threading, time
from phloem import LLM, Engine
from phloem.core.errors import EngineDead
P = {"max_new_tokens": 450, "ignore_eos": True}
engine = Engine(model_path=PATH, **S)
"""
# Each ending is a child of one process that has imported everything: that takes seconds.
DRIVER = """
import json, os, signal, sys
import phloem.launch.core, phloem.llm
signal.signal(signal.SIGINT, signal.default_int_handler)
folder, PATH, S, scripts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
for at, script in enumerate(scripts):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os.dup2(os.open(f"{folder}/{at}", os.O_CREAT | os.O_WRONLY), 2)
        break
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
else:
    script = ""
exec(script)
"""


@pytest.fixture(scope="module")
def ends(path: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    folder = tmp_path_factory.mktemp("ends")
    scripts = json.dumps([HEAD + textwrap.dedent(script) for _, script in ENDINGS.values()])
    command = [sys.executable, "-c", DRIVER, str(folder), str(path), json.dumps(SMALL), scripts]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    codes = [int(line) for line in done.stdout.split()]
    return {name: (codes[at], (folder / str(at)).read_text()) for at, name in enumerate(ENDINGS)}


@pytest.mark.some(4)
@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_script_that_ends_while_a_step_runs_ends_cleanly(ends: dict[str, tuple[int, str]], ending: str) -> None:
    code, said = ends[ending]
    assert code == ENDINGS[ending][0], said[-2000:]
    own = said.count("Traceback") - (ending in ("an exception", "Ctrl-C"))  # those are the script's own
    assert own == 0, said[-2000:]
    for word in ("terminate called", "ERROR", "was destroyed", "never awaited"):
        assert word not in said, said[-2000:]


def test_the_end_of_python_waits_for_an_engine_that_begins_and_lets_none_begin_after() -> None:
    begins, started, go, seen = Begins(), threading.Event(), threading.Event(), list[str]()

    def begin() -> None:
        with begins.one():
            started.set()
            go.wait(10)
            seen.append("the door stands")

    thread = threading.Thread(target=begin)
    thread.start()
    assert started.wait(10)
    assert not begins.end(timeout=0.01) and seen == []  # it does not wait for ever
    threading.Timer(0.05, go.set).start()
    assert begins.end(timeout=10) and seen == ["the door stands"]
    thread.join()
    with pytest.raises(EngineDead, match="Python is ending"), begins.one():
        pass


def test_an_engine_that_could_not_begin_is_not_waited_for() -> None:
    begins = Begins()
    with pytest.raises(ValueError, match="mine"), begins.one():
        raise ValueError("mine")
    assert begins.end(timeout=0)


def test_a_forked_child_waits_for_no_engine_that_its_parent_begins() -> None:
    begins = Begins()
    with begins.one():
        begins.forked()  # as in the child, which lacks the thread that began it
        assert begins.end(timeout=0)
    assert begins.end(timeout=0)  # nor is it off by one where the child came from within


# What it takes


def test_arrays_and_tensors_of_token_ids(engine: Engine) -> None:
    wanted: Any = engine.generate(input_ids=[5, 6, 7], sampling_params={"max_new_tokens": 4, "temperature": 0})
    forms: list[Any] = [np.array([5, 6, 7]), torch.tensor([5, 6, 7]), tuple([5, 6, 7]), [np.int64(5), np.int32(6), 7]]
    for ids in forms:
        found: Any = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 4, "temperature": 0})
        assert found["output_ids"] == wanted["output_ids"]
    several: list[Any] = [torch.tensor([[5, 6, 7]] * 2), [np.array([5, 6, 7])] * 2, [[np.int64(5), 6, 7]] * 2]
    for ids in several:
        both: Any = engine.generate(input_ids=ids, sampling_params={"max_new_tokens": 4, "temperature": 0})
        assert [one["output_ids"] for one in both] == [wanted["output_ids"]] * 2
    for wrong in (np.array([0.5, 1.5]), np.array([True, False]), np.int64(3), torch.zeros(1, 1, 1, dtype=torch.long)):
        with pytest.raises(BadRequest, match="input_ids"):
            engine.generate(input_ids=wrong)


def test_arrays_wherever_a_list_or_number_is_asked_for(engine: Engine) -> None:
    params: Any = {"max_new_tokens": np.int64(4), "temperature": np.float32(0), "stop_token_ids": np.array([3])}
    found: Any = engine.generate("a", params, return_logprob=True, token_ids_logprob=torch.tensor([3, 4]))
    assert [token for _, token, _ in found["meta_info"]["output_token_ids_logprobs"][0]] == [3, 4]
    lists: Any = engine.score([5, 6], [[7], [8]], [1, 2])
    arrays: Any = engine.score(torch.tensor([5, 6]), np.array([[7], [8]]), torch.tensor([1, 2]))  # type: ignore[arg-type]
    assert arrays == lists


def test_text_that_is_no_unicode_is_a_bad_request(engine: Engine) -> None:
    wrong: list[Any] = [{"regex": "\ud800"}, {"max_new_tokens": "\ud800"}, {"stop_token_ids": ["\ud800"]}]
    for params in wrong[1:]:
        with pytest.raises(BadRequest, match="Unicode"):
            engine.generate("a", params)
    with pytest.raises(BadRequest):
        engine.generate("a", wrong[0])


def test_several_texts_for_a_prompt_are_a_list_each(path: Path) -> None:
    with LLM(str(path), **SMALL) as model:
        assert all(isinstance(text, str) for text in model.generate(["a", "b"], {"max_new_tokens": 2}))
        found: Any = model.generate(["a", "b"], {"max_new_tokens": 2, "n": 3})
        assert [len(texts) for texts in found] == [3, 3]
        talk: Any = model.chat([{"role": "user", "content": "a"}], {"max_new_tokens": 2, "n": 2})
        assert [len(texts) for texts in talk] == [2]
        with pytest.raises(BadRequest, match="at least one"):
            model.chat([[]])
        with pytest.raises(BadRequest, match="at least one"):
            model.chat([[{"role": "user", "content": "a"}], []])
        for wrong in ("hello", ["hello"], [{"content": "a"}], [[{"role": "user", "content": "a"}], None]):
            with pytest.raises(BadRequest, match="a role each"):
                model.chat(wrong)  # type: ignore[arg-type]
        assert model.chat([]) == []


# Nobody waits for ever


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"top_k": 20.5}, "top_k must be a whole number"),
        ({"top_k": "20"}, "top_k must be a number"),
        ({"temperature": True}, "temperature must be a number"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"repetition_penalty": -1}, "repetition_penalty must be in"),
        ({"min_p": [0.1]}, "min_p must be a number"),
        ({"top_k": float("inf")}, "top_k is too large"),
        ({"top_k": float("nan")}, "top_k must be a whole number"),
        ({"top_k": 10**30}, "top_k is too large"),
        ({"temperature": 10**400}, "temperature is too large"),
        ({"temperature": float("nan")}, "temperature must be in"),
    ],
)
def test_a_recommended_value_is_checked_like_a_clients(values: Any, said: str, path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=f"generation_config.json: {said}"):
        recommended(values, 100)
    with_file(path, tmp_path, "generation_config.json", values)
    with pytest.raises(ModelLoadError, match=f"{tmp_path}/generation_config.json: {said}"):
        Engine(model_path=str(tmp_path), **SMALL)


def with_file(path: Path, folder: Path, name: str, values: dict[str, Any]) -> None:
    """The checkpoint in another folder, with values of its own in one of its files."""
    before = json.loads((path / name).read_text()) if (path / name).exists() else {}
    for file in path.iterdir():
        (folder / file.name).unlink(missing_ok=True)
        (folder / file.name).symlink_to(file)
    (folder / name).unlink(missing_ok=True)
    (folder / name).write_text(json.dumps({**before, **values}))


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["x", True, 2.5, [[1]], {"a": 1}, float("nan")])
def test_ends_that_are_no_token_ids_are_named(file: str, value: Any, path: Path, tmp_path: Path) -> None:
    with_file(path, tmp_path, file, {"eos_token_id": value})
    with pytest.raises(ModelLoadError, match=f"{tmp_path}/{file}: eos_token_id must be a token id or a list"):
        describe(str(tmp_path))


def test_ends_in_another_spelling_are_taken_and_those_of_no_token_left_out(path: Path, tmp_path: Path) -> None:
    without = describe(str(path)).eos_ids
    with_file(path, tmp_path, "generation_config.json", {"eos_token_id": [5.0, -1, 10**9, 6, None, 5]})
    found = describe(str(tmp_path)).eos_ids
    assert found == tuple(dict.fromkeys([5, 6, *without]))
    assert all(type(token) is int for token in found)


def test_a_chat_with_whole_numbers_in_another_spelling_is_answered(path: Path, tmp_path: Path) -> None:
    with_file(path, tmp_path, "generation_config.json", {"top_k": 20.0, "temperature": 1})
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    with Engine(model_path=str(tmp_path), **SMALL) as engine, http_door(engine) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    assert answer.status_code == 200, answer.text


def test_whole_numbers_in_another_spelling_are_taken() -> None:
    assert recommended({"top_k": 20.0, "temperature": 1}, 100) == {"top_k": 20, "temperature": 1.0}
    assert recommended({"top_k": 0, "max_length": "x"}, 100) == {"top_k": -1}
    assert isinstance(recommended({"top_k": 20.0}, 100)["top_k"], int)


def test_a_message_that_is_not_understood_is_answered() -> None:
    submit = Submit(id="r1", input_ids=pack_ids([1]), sampling=SamplingParams())
    submit.sampling.top_k = 2.5  # type: ignore[assignment]
    answer = refusal(encode(submit), "Expected `int`, got `float`")
    assert isinstance(answer, Tokens)
    finish = answer.chunks[0].finish
    assert answer.chunks[0].id == "r1"
    assert finish is not None
    assert (finish.type, finish.status_code) == ("abort", 400)
    assert "Expected `int`" in (finish.message or "")
    reply = refusal(encode(Control(id="c1", name="state")), "why")
    assert isinstance(reply, ControlReply)
    assert (reply.id, reply.ok) == ("c1", False)
    assert refusal(encode(Abort(id="r1")), "why") is None
    assert refusal(msgspec.msgpack.encode([1, 2]), "why") is None
    assert refusal(b"\xc1", "why") is None


class _Border(EngineLink):
    """An engine that reads messages as it does in a process of its own, and knows nothing else."""

    def __init__(self) -> None:
        self._replies: asyncio.Queue[FromEngine] = asyncio.Queue()

    def send(self, message: ToEngine) -> None:
        received([encode(message)], lambda reply: self._replies.put_nowait(decode_from_engine(encode(reply))))

    async def receive(self) -> FromEngine:
        return await self._replies.get()

    @property
    def alive(self) -> bool:
        return True

    def close(self) -> None:
        pass


async def test_whoever_sent_what_is_not_understood_gets_an_error() -> None:
    client = EngineClient(None, None, ModelInfo("m", "m", vocab_size=100, context_length=100))
    client.attach(_Border())
    client.start()
    item = Item(id="r1", ids=[1, 2], sampling=SamplingParams(top_k=2.5))  # type: ignore[arg-type]
    call = await client.submit(GenerateRequest(items=[item]))

    async def read() -> None:
        async for _ in call:
            pass

    with pytest.raises(BadRequest, match="does not understand"):
        await asyncio.wait_for(read(), 5)
    assert client.in_flight == 0
    reply = await client.control(7, deadline=5.0)  # type: ignore[arg-type]
    assert not reply.ok
    wrong = Item(id="r2", ids=[1, 2], sampling=SamplingParams(regex="\ud800"))
    with pytest.raises(BadRequest, match="Unicode"):
        await client.submit(GenerateRequest(items=[wrong]))
    assert client.in_flight == 0
    await client.close()
