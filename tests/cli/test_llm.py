"""The engine in this process: what comes back, what is refused, and that nothing of one call reaches another."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phloem import LLM, Engine
from phloem.core.errors import BadRequest, ConfigError, EngineDead, ModelLoadError
from phloem.testing.checkpoints import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model_path=str(model), dtype="float32", max_total_tokens=4096, debug_invariants=True) as found:
        yield found


GREEDY: dict[str, Any] = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}


def test_one_prompt_gives_a_dict_and_several_a_list(engine: Engine) -> None:
    one: Any = engine.generate("hello there", GREEDY)
    assert set(one) == {"text", "output_ids", "meta_info"}
    assert len(one["output_ids"]) == one["meta_info"]["completion_tokens"] == 8
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 8}
    several: Any = engine.generate(["hello there", "general"], GREEDY)
    assert several[0]["output_ids"] == one["output_ids"]


def test_ids_and_text_give_the_same(engine: Engine) -> None:
    ids = engine.tokenizer.encode("hello there")
    by_ids: Any = engine.generate(input_ids=ids, sampling_params=GREEDY)
    by_text: Any = engine.generate("hello there", GREEDY)
    assert by_ids["output_ids"] == by_text["output_ids"]


def test_a_stream_grows_to_the_whole_answer(engine: Engine) -> None:
    events: list[Any] = list(engine.generate("hello there", GREEDY, stream=True))
    lengths = [len(event["output_ids"]) for event in events]
    assert lengths == sorted(lengths) and lengths[-1] == 8 and len(events) > 1
    whole: Any = engine.generate("hello there", GREEDY)
    assert events[-1]["text"] == whole["text"]


def test_a_stream_that_is_left_early_is_aborted(engine: Engine) -> None:
    stream: Any = engine.generate("hello there", {**GREEDY, "max_new_tokens": 400}, stream=True)
    next(stream)
    stream.close()
    for _ in range(200):
        state = engine.get_server_info()["internal_states"][0]
        if state["running"] == 0:
            break
    assert state["running"] == 0 and state["used_tokens"] == 0


def test_logprobs_agree_between_prompt_and_output(engine: Engine) -> None:
    ids = engine.tokenizer.encode("hello there")
    first: Any = engine.generate(input_ids=ids, sampling_params=GREEDY, return_logprob=True, top_logprobs_num=3)
    meta = first["meta_info"]
    outputs = meta["output_token_logprobs"]
    assert [item[1] for item in outputs] == first["output_ids"]
    assert all(abs(top[0][0] - item[0]) < 1e-5 for top, item in zip(meta["output_top_logprobs"], outputs, strict=True))
    # The same tokens as a prompt: their logprobs must come out as they did when they were generated.
    again: Any = engine.generate(
        input_ids=ids + first["output_ids"],
        sampling_params={"max_new_tokens": 0},
        return_logprob=True,
        logprob_start_len=0,
    )
    inputs = again["meta_info"]["input_token_logprobs"]
    assert inputs[0][0] is None and len(inputs) == len(ids) + 8
    for wanted, got in zip(outputs, inputs[len(ids) :], strict=True):
        assert got[1] == wanted[1] and abs(got[0] - wanted[0]) < 1e-4


def test_a_seed_decides_whatever_else_runs(engine: Engine) -> None:
    params = {"temperature": 1.2, "sampling_seed": 5, "max_new_tokens": 12, "ignore_eos": True}
    alone: Any = engine.generate("hello there", params)
    crowd: Any = engine.generate(
        ["one", "hello there", "three four five"], [{**params, "sampling_seed": 1}, params, GREEDY]
    )
    assert crowd[1]["output_ids"] == alone["output_ids"]
    other: Any = engine.generate("hello there", {**params, "sampling_seed": 6})
    assert other["output_ids"] != alone["output_ids"]


def test_n_gives_different_continuations(engine: Engine) -> None:
    answers: Any = engine.generate("hello there", {"temperature": 1.5, "n": 3, "max_new_tokens": 12})
    assert len(answers) == 3
    assert len({tuple(answer["output_ids"]) for answer in answers}) > 1


def test_penalties_bias_and_minimum_length_work_through_the_engine(engine: Engine) -> None:
    plain: Any = engine.generate("hello there", GREEDY)
    token = plain["output_ids"][0]
    banned: Any = engine.generate("hello there", {**GREEDY, "logit_bias": {str(token): -100}})
    assert token not in banned["output_ids"]
    forced: Any = engine.generate("hello there", {**GREEDY, "logit_bias": {"7": 100}})
    assert forced["output_ids"] == [7] * 8
    spread: Any = engine.generate(
        "hello there", {**GREEDY, "logit_bias": {"7": 3, "9": 3}, "presence_penalty": 2, "frequency_penalty": 2}
    )
    assert len(set(spread["output_ids"])) > len(set(plain["output_ids"])) or len(set(spread["output_ids"])) > 2
    eos = engine.info.eos_ids[0]
    biased = {"temperature": 0, "max_new_tokens": 8, "logit_bias": {str(eos): 100}}
    short: Any = engine.generate("hello there", biased)
    assert short["output_ids"] == [eos] and short["meta_info"]["finish_reason"] == {"type": "stop", "matched": eos}
    longer: Any = engine.generate("hello there", {**biased, "min_new_tokens": 5})
    assert len(longer["output_ids"]) == 6 and eos not in longer["output_ids"][:5]


def test_a_second_turn_hits_what_the_first_generated(engine: Engine) -> None:
    engine.flush_cache(timeout=5)
    ids = engine.tokenizer.encode("a prompt that is long enough to fill more than two or three pages of the cache " * 3)
    first: Any = engine.generate(input_ids=ids, sampling_params={**GREEDY, "max_new_tokens": 40})
    second: Any = engine.generate(input_ids=ids + first["output_ids"] + [5, 6], sampling_params=GREEDY)
    page = engine.ready["page_size"]
    assert second["meta_info"]["cached_tokens"] >= (len(ids) + 39) // page * page
    salted: Any = engine.generate(input_ids=ids, sampling_params=GREEDY, cache_salt="other tenant")
    assert salted["meta_info"]["cached_tokens"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"sampling_params": {"max_new_token": 3}}, "did you mean 'max_new_tokens'"),
        ({"sampling_params": {"temperature": -1}}, "temperature"),
        ({"sampling_params": {"top_p": float("nan")}}, "top_p"),
        ({"prompt": None, "input_ids": [10**6]}, "token id"),
        ({"prompt": None, "input_ids": [-3]}, "token id"),
        ({"prompt": None, "input_ids": [5] * 5000}, "context"),
        ({"lora_path": "x"}, "lora_path: adapters are served with --enable-lora"),
    ],
)
def test_bad_input_names_the_field_and_harms_nobody(engine: Engine, fields: dict[str, Any], text: str) -> None:
    with pytest.raises(BadRequest, match=text):
        engine.generate(**{"prompt": "hello", **fields})
    assert engine.generate("hello there", GREEDY)


async def test_async_calls_run_together(engine: Engine) -> None:
    answers: list[Any] = await asyncio.gather(*(engine.async_generate(f"number {i}", GREEDY) for i in range(8)))
    alone: Any = await engine.async_generate("number 3", GREEDY)
    assert answers[3]["output_ids"] == alone["output_ids"]
    stream: Any = await engine.async_generate("number 3", GREEDY, stream=True)
    events = [event async for event in stream]
    assert events[-1]["output_ids"] == alone["output_ids"]


def test_pause_freezes_and_continue_resumes(engine: Engine) -> None:
    engine.pause_generation("in_place")
    stream: Any = engine.generate("hello there", GREEDY, stream=True)
    engine.continue_generation()
    assert len(list(stream)[-1]["output_ids"]) == 8


def test_llm_takes_prompts_and_conversations(model: Path) -> None:
    with LLM(str(model), dtype="float32", max_total_tokens=2048) as llm:
        texts = llm.generate(["one", "two"], GREEDY)
        assert len(texts) == 2 and all(isinstance(text, str) for text in texts)
        assert llm.generate([]) == []
        talk = [{"role": "user", "content": "hello"}]
        assert llm.chat(talk, GREEDY) == llm.chat([talk], GREEDY)


def test_settings_and_checkpoints_that_are_wrong_are_told_at_once(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'page_size'"):
        Engine(model_path=str(model), page_sise=16)
    with pytest.raises(ModelLoadError, match="nowhere"):
        Engine(model_path=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="context_length"):
        Engine(model_path=str(model), context_length=10**7)


def test_a_closed_engine_says_so(model: Path) -> None:
    engine = Engine(model_path=str(model), dtype="float32", max_total_tokens=2048)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineDead, match="shut down"):
        engine.generate("hello")
