"""The log probabilities of a rollout are those that a later pass over its tokens gives, whatever it ran beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phloem import Engine
from phloem.testing.checkpoints import tiny_checkpoint

PROMPTS = [[5, 6, 7, 8], list(range(10, 60)), [9] * 17]
DRAWN: dict[str, Any] = {"temperature": 1.0, "max_new_tokens": 30, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))


FORMS = [
    pytest.param(({"dtype": "float32"}, 1e-5, 1e-5), id="float32"),
    pytest.param(({"dtype": "float32", "enable_deterministic_inference": True}, 0.0, 0.0), id="deterministic"),
    pytest.param(
        ({"dtype": "bfloat16", "enable_deterministic_inference": True, "kv_cache_dtype": "bfloat16"}, 0.0, 0.0),
        id="bfloat16",
    ),
]


# The engine; how far a rollout may be from itself beside others; and from a pass that reads its tokens as a prompt.
Served = tuple[Engine, float, float]


@pytest.fixture(scope="module", params=FORMS)
def served(request: pytest.FixtureRequest, model: Path) -> Iterator[Served]:
    settings, beside, later = request.param
    with Engine(model_path=str(model), max_total_tokens=8192, chunked_prefill_size=64, **settings) as engine:
        yield engine, beside, later


def roll_out(engine: Engine, prompts: Any, **params: Any) -> list[dict[str, Any]]:
    asked = {**DRAWN, **params}
    found: Any = engine.generate(input_ids=prompts, sampling_params=asked, return_logprob=True)
    return found if isinstance(found, list) else [found]


def values(answer: dict[str, Any]) -> list[float]:
    return [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]


def scored(engine: Engine, prompt: list[int], output: list[int]) -> list[float]:
    answer: Any = engine.generate(
        input_ids=prompt + output, sampling_params={"max_new_tokens": 0}, return_logprob=True, logprob_start_len=0
    )
    return [value for value, *_ in answer["meta_info"]["input_token_logprobs"]][len(prompt) :]


def near(found: list[float], want: list[float], bound: float) -> None:
    assert len(found) == len(want)
    assert max(abs(a - b) for a, b in zip(found, want, strict=True)) <= bound


@pytest.mark.slow
def test_a_later_pass_gives_the_same_log_probabilities(served: Served) -> None:
    engine, _, bound = served
    for number, answer in enumerate(roll_out(engine, PROMPTS, sampling_seed=3)):
        ids = answer["output_ids"]
        near(values(answer), scored(engine, PROMPTS[number], ids), bound)
        engine.flush_cache(10)
        near(values(answer), scored(engine, PROMPTS[number], ids), bound)


@pytest.mark.slow
def test_neither_batch_nor_cache_nor_chunks_nor_preemption_change_a_rollout(served: Served) -> None:
    engine, bound, later = served
    engine.flush_cache(10)
    alone = [roll_out(engine, prompt, sampling_seed=5)[0] for prompt in PROMPTS]
    cached = [roll_out(engine, prompt, sampling_seed=5)[0] for prompt in PROMPTS]
    together = roll_out(engine, PROMPTS, sampling_seed=5)
    several = roll_out(engine, PROMPTS[0], sampling_seed=5, n=6)
    for one, two, three in zip(alone, cached, together, strict=True):
        assert one["output_ids"] == two["output_ids"] == three["output_ids"]
        near(values(one), values(two), later)  # a cached prefix is read where an own one was computed
        near(values(two), values(three), bound)
    assert several[0]["output_ids"] == alone[0]["output_ids"]
    assert len({tuple(answer["output_ids"]) for answer in several}) == 6
    assert several[1]["meta_info"]["cached_tokens"] >= 0
    for answer in several:
        near(values(answer), scored(engine, PROMPTS[0], answer["output_ids"]), later)
    stream: Any = engine.generate(
        input_ids=PROMPTS[1], sampling_params={**DRAWN, "sampling_seed": 5}, return_logprob=True, stream=True
    )
    for number, event in enumerate(stream):
        last = event
        if number == 4:
            engine.pause_generation("retract")
            engine.continue_generation()
    if later > 1e-5:
        return  # what was computed again, as a prompt, may lead to another draw
    assert last["output_ids"] == alone[1]["output_ids"]
    near(values(last), values(alone[1]), later)


def test_log_probabilities_after_temperature_are_those_of_the_divided_logits(model: Path) -> None:
    """A vocabulary's whole row, raw, gives them: log-softmax of logits / T is log-softmax of (raw / T)."""
    params: dict[str, Any] = {"temperature": 0.6, "max_new_tokens": 4, "ignore_eos": True, "sampling_seed": 2}
    settings: dict[str, Any] = {"model_path": str(model), "dtype": "float32", "max_total_tokens": 1024}
    with Engine(**settings) as engine, Engine(**settings, logprobs_mode="temperature") as heated:
        size = engine.info.vocab_size
        raw, hot = (
            one.generate(
                input_ids=PROMPTS, sampling_params=params, return_logprob=True, top_logprobs_num=min(size, 1024)
            )
            for one in (engine, heated)
        )
        few: Any = heated.generate(input_ids=PROMPTS[0], sampling_params={**params, "top_k": 5}, return_logprob=True)
        greedy = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        plain, cold = (
            one.generate(input_ids=PROMPTS[0], sampling_params=greedy, return_logprob=True) for one in (engine, heated)
        )
    assert values(plain) == values(cold)  # pyright: ignore[reportArgumentType]
    assert few["output_ids"] and all(value < 0 for value in values(few))
    one: Any
    two: Any
    for one, two in zip(raw, hot, strict=True):
        assert one["output_ids"] == two["output_ids"]
        rows = one["meta_info"]["output_top_logprobs"]
        for row, token, (value, *_) in zip(
            rows, one["output_ids"], two["meta_info"]["output_token_logprobs"], strict=True
        ):
            assert len(row) == size
            scaled = torch.tensor([p / 0.6 for p, *_ in row]).log_softmax(0)
            place = [identity for _, identity, *_ in row].index(token)
            assert abs(float(scaled[place]) - value) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bits_of_decoding_are_those_of_scoring_whatever_varies_at_once(model: Path, dtype: str) -> None:
    """Batches, prefixes, chunks, drafts and preemptions together; then each text alone, whole, and nothing cached."""
    head = [5 + at % 60 for at in range(40)]
    prompts = [head[: 8 * number] + [7, 8, 9, 7 + number] * (1 + number % 3) for number in range(8)]
    same: dict[str, Any] = {"model_path": str(model), "dtype": dtype, "ops": "invariant", "kv_cache_dtype": dtype}
    busy = {"max_total_tokens": 320, "page_size": 16, "chunked_prefill_size": 24, "speculative_algorithm": "ngram"}
    # Greedy ones repeat themselves, so that drafts are accepted; the others are drawn.
    params = [{**DRAWN, "sampling_seed": at, "max_new_tokens": 40, "temperature": at % 2} for at in range(8)]

    def answered(engine: Engine, prompts: Any, params: Any) -> Any:
        return engine.generate(input_ids=prompts, sampling_params=params, return_logprob=True)

    with Engine(**same, **busy, disable_speculative_adaptive=True, context_length=256) as engine:
        roll_out(engine, head)  # a prefix that some find
        answers = answered(engine, prompts, params)
        state = engine.get_server_info()["internal_states"][0]
        assert state["preemptions"] and any(answer["meta_info"]["cached_tokens"] for answer in answers)
        assert sum(answer["meta_info"].get("spec_num_correct_drafts", 0) for answer in answers)
    with Engine(**same, max_total_tokens=2048, disable_radix_cache=True, chunked_prefill_size=512) as engine:
        for prompt, one, answer in zip(prompts, params, answers, strict=True):
            alone = answered(engine, prompt, one)
            assert alone["output_ids"] == answer["output_ids"] and values(alone) == values(answer)
            assert scored(engine, prompt, answer["output_ids"]) == values(answer)


def test_processed_log_probabilities_are_those_of_what_is_drawn_from(model: Path) -> None:
    settings: dict[str, Any] = {"model_path": str(model), "dtype": "float32", "max_total_tokens": 1024}
    drawn: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, "sampling_seed": 2, "temperature": 0.7}
    cases: list[dict[str, Any]] = [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.3}, {"regex": "[ab]{9}"}, {}]
    with Engine(**settings) as engine, Engine(**settings, logprobs_mode="processed") as other:
        size = min(engine.info.vocab_size, 1024)
        for case in cases:
            fields: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": size, "input_ids": PROMPTS[1]}
            raw, found = (one.generate(sampling_params={**drawn, **case}, **fields) for one in (engine, other))
            assert raw["output_ids"] == found["output_ids"]
            for before, after in zip(*(one["meta_info"]["output_top_logprobs"] for one in (raw, found)), strict=True):
                kept = {token: value for value, token, *_ in after if value > -1e3}
                assert abs(sum(torch.tensor(list(kept.values())).exp()) - 1) < 1e-4
                warm = {token: value / 0.7 for value, token, *_ in before}
                scaled = torch.tensor([warm[token] for token in kept]).log_softmax(0)
                assert torch.allclose(scaled, torch.tensor(list(kept.values())), atol=1e-4)
                assert case.get("top_k", size) >= len(kept) and (len(kept) == size) is (not case)
            assert all(value > -1e3 for value in values(found))
        greedy = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
        plain, same = (
            one.generate(input_ids=PROMPTS[0], sampling_params=greedy, return_logprob=True) for one in (engine, other)
        )
        assert torch.allclose(torch.tensor(values(plain)), torch.tensor(values(same)), atol=1e-5)
