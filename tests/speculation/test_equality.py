"""Through the public door: answers with speculation are those without it, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_support import built

import phloem
from phloem.core.errors import ConfigError
from phloem.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")
# Little memory and short steps: requests are preempted, prompts are cut, and drafts verified beside them.
TIGHT: dict[str, Any] = {
    "max_total_tokens": 320,
    "max_running_requests": 4,
    "chunked_prefill_size": 24,
    "random_seed": 5,
    "debug_invariants": True,
}
KINDS: dict[str, dict[str, Any]] = {
    "suffix": {"speculative_algorithm": "suffix", "disable_speculative_adaptive": True},
    "ngram": {"speculative_algorithm": "NGRAM", "disable_speculative_adaptive": True, "speculative_num_steps": 3},
    "by measured times": {"speculative_algorithm": "suffix"},
}
SCHEMA = '{"type": "object", "properties": {"a": {"enum": ["xx", "yy"]}, "b": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 4}}, "required": ["a", "b"], "additionalProperties": false}'  # noqa: E501


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint("llama", tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def plain(checkpoint: str) -> Iterator[phloem.Engine]:
    with phloem.Engine(model_path=checkpoint, speculative_algorithm="none", **TIGHT) as engine:
        yield engine


@pytest.fixture(scope="module", params=list(KINDS))
def speculating(checkpoint: str, request: pytest.FixtureRequest) -> Iterator[phloem.Engine]:
    with phloem.Engine(model_path=checkpoint, **TIGHT, **KINDS[request.param]) as engine:
        yield engine


PARAMS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(8, 40),
        "temperature": st.sampled_from([0.0, 0.0, 0.4, 1.0]),
        "sampling_seed": st.integers(0, 3),
        "ignore_eos": st.booleans(),
    },
    optional={
        "top_p": st.sampled_from([0.5, 0.9]),
        "top_k": st.sampled_from([1, 5]),
        "frequency_penalty": st.sampled_from([0.1, 1.5]),
        "presence_penalty": st.just(0.7),
        "repetition_penalty": st.just(1.2),
        "min_new_tokens": st.integers(0, 8),
        "logit_bias": st.sampled_from([{"9": 4.0}, {"70": -5.0, "71": 2.0}]),
        "stop_token_ids": st.lists(st.integers(4, 300), max_size=40),
        "json_schema": st.just(SCHEMA),
    },
)
WORDS = ("the dog ", "a page table ", "Paris is ", "x y z ", "sugar, ", "1 2 3 4 5 6 7 8 9 ")
PROMPT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join)


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(asked=st.lists(st.tuples(PROMPT, PARAMS), min_size=1, max_size=7), logprobs=st.booleans())
def test_answers_are_those_of_plain_decoding(
    plain: phloem.Engine, speculating: phloem.Engine, asked: list[tuple[str, dict[str, Any]]], logprobs: bool
) -> None:
    prompts, params = [prompt for prompt, _ in asked], [dict(params) for _, params in asked]
    fields: dict[str, Any] = {"return_logprob": True, "top_logprobs_num": 2} if logprobs else {}
    want: Any = plain.generate(prompts, params, **fields)
    got: Any = speculating.generate(prompts, params, **fields)
    for a, b in zip(got, want, strict=True):
        assert a["output_ids"] == b["output_ids"] and a["text"] == b["text"]
        assert a["meta_info"]["finish_reason"] == b["meta_info"]["finish_reason"]
        if logprobs:
            ours, theirs = (one["meta_info"]["output_token_logprobs"] for one in (a, b))
            assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], abs=1e-5)
            assert [one[1] for one in ours] == [one[1] for one in theirs]


@pytest.mark.slow
def test_the_drafts_of_that_were_verified_and_some_accepted(speculating: phloem.Engine) -> None:
    """The engines above do speculate; by measured times where it pays, which a tiny model's steps do not promise."""
    settings: Any = speculating.config.speculative
    answer: Any = speculating.generate("the dog a page table " * 6, {"max_new_tokens": 40, "temperature": 0.0})
    meta = answer["meta_info"]
    assert meta["spec_verify_ct"] >= 1 and meta["spec_accept_length"] >= 1
    if settings.disable_speculative_adaptive:
        assert meta["spec_num_correct_drafts"] > 0 and 0 < meta["spec_accept_rate"] <= 1
        assert sum(meta["spec_correct_drafts_histogram"]) >= 1
        assert meta["spec_verify_ct"] + meta["spec_num_correct_drafts"] == meta["completion_tokens"]
    state = speculating.get_server_info()["internal_states"][0]
    assert state["spec_accept_length"] >= 1


@pytest.mark.slow
def test_one_prompt_many_samples(plain: phloem.Engine, speculating: phloem.Engine) -> None:
    params = {"n": 4, "temperature": 0.8, "max_new_tokens": 30, "sampling_seed": 3, "ignore_eos": True}
    want: Any = plain.generate("What is the capital of France?", params)
    got: Any = speculating.generate("What is the capital of France?", params)
    assert [one["output_ids"] for one in got] == [one["output_ids"] for one in want]


def test_sixteen_requests_at_a_time_in_steps_of_any_length(checkpoint: str) -> None:
    """Prompts that enter beside decodes make steps of more than 24 rows, in which packed weights of few bits take
    another form: what enters with what is chance, and the table of `enable_deterministic_inference` has one form."""
    kept: dict[str, Any] = {
        "model_path": checkpoint,
        "quantization": "int4",
        "enable_deterministic_inference": True,
        "max_running_requests": 16,
        "max_total_tokens": 4096,
    }
    prompts = ["the dog a page table " * (1 + number % 5) for number in range(16)]
    params = [
        {"max_new_tokens": 6 + 3 * number, "temperature": 0.0, "ignore_eos": True}
        | ({"json_schema": SCHEMA} if number % 4 == 3 else {})
        for number in range(16)
    ]
    found: list[Any] = []
    for kind in ("none", "suffix"):
        more = {"speculative_algorithm": kind, "disable_speculative_adaptive": kind != "none"}
        with phloem.Engine(**kept, **more) as engine:
            found.append(engine.generate(prompts, [dict(one) for one in params]))
    assert [one["output_ids"] for one in found[1]] == [one["output_ids"] for one in found[0]]
    assert sum(one["meta_info"]["spec_num_correct_drafts"] for one in found[1]) > 20


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"speculative_algorithm": "medusa"}, "unknown speculative algorithm 'medusa'"),
        ({"speculative_algorithm": "eagle"}, "eagle needs speculative_draft_model_path"),
        ({"speculative_num_steps": 40}, "40 is not in 1 to 31"),
        ({"speculative_eagle_topk": 8}, "a tree of drafts comes from a model"),
    ],
)
def test_an_engine_that_cannot_speculate_as_asked_does_not_start(
    checkpoint: str, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        phloem.Engine(model_path=checkpoint, **values)
    assert reason in str(caught.value)


def test_the_choice_is_printed_with_its_reason(plain: phloem.Engine, speculating: phloem.Engine) -> None:
    def decision(engine: phloem.Engine) -> list[Any]:
        (found,) = [one for one in engine.ready["decisions"] if one[0] == "speculative_algorithm"]
        return found

    assert decision(plain)[1:] == ["none", "as asked"]
    _, value, reason = decision(speculating)
    assert value in ("suffix", "ngram") and "to the bit" in reason


def test_where_no_bit_changes_repeated_text_is_drafted_unasked(checkpoint: str, plain: phloem.Engine) -> None:
    prompt, params = "the dog a page table " * 6, {"max_new_tokens": 24, "temperature": 0.0}
    with phloem.Engine(model_path=checkpoint, **TIGHT) as engine:
        (found,) = [one for one in engine.ready["decisions"] if one[0] == "speculative_algorithm"]
        answer: Any = engine.generate(prompt, params)
    assert found[1] == "suffix" and "--speculative-algorithm none" in found[2] and "to the bit" in found[2]
    assert "spec_verify_ct" in answer["meta_info"]
    expected: Any = plain.generate(prompt, params)
    assert answer["output_ids"] == expected["output_ids"]


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"dtype": "float32", "ops": "reference"}, "last bits"),
        ({"disable_speculative_adaptive": True}, "by name"),
        ({"tp_size": 2}, "several ranks"),
    ],
)
def test_elsewhere_nothing_is_drafted_unasked(checkpoint: str, values: dict[str, Any], reason: str) -> None:
    with phloem.Engine(model_path=checkpoint, **{**TIGHT, **values}) as engine:
        (found,) = [one for one in engine.ready["decisions"] if one[0] == "speculative_algorithm"]
        answer: Any = engine.generate("the dog a page table " * 6, {"max_new_tokens": 4})
    assert found[1] == "none" and reason in found[2] and "asked for: suffix" in found[2]
    assert "spec_verify_ct" not in answer["meta_info"]
