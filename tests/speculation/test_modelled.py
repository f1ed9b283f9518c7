"""Through the public door: with a model that drafts, answers are those of plain decoding, token for token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from draft_support import eagle, eagle3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_support import built

import phloem
from phloem.core.errors import ConfigError
from phloem.speculation import modelled
from phloem.speculation.marks import Marks
from phloem.testing.checkpoints import tiny_checkpoint, tiny_gguf

pytestmark = pytest.mark.skipif(not built(), reason="the native library is not built (no C++ compiler?)")
TIGHT: dict[str, Any] = {
    "max_total_tokens": 320,
    "max_running_requests": 4,
    "chunked_prefill_size": 24,
    "random_seed": 5,
    "debug_invariants": True,
}
ALWAYS: dict[str, Any] = {"disable_speculative_adaptive": True, "speculative_num_steps": 4}
SCHEMA = '{"type": "object", "properties": {"a": {"enum": ["xx", "yy"]}, "b": {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "maxItems": 4}}, "required": ["a", "b"], "additionalProperties": false}'  # noqa: E501
KINDS = ("itself", "another", "eagle3", "eagle", "by measured times")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    tiny_checkpoint("llama", path / "target", num_hidden_layers=6)
    tiny_checkpoint("llama", path / "small", num_hidden_layers=1, hidden_size=16, seed=3)
    eagle3(path / "eagle3")
    eagle(path / "eagle")
    return path


def asked(folder: Path, kind: str) -> dict[str, Any]:
    algorithm = kind.upper() if kind.startswith("eagle") else "STANDALONE"
    name = {"itself": "target", "another": "small", "by measured times": "target"}.get(kind, kind)
    always = {} if kind == "by measured times" else ALWAYS
    return {"speculative_algorithm": algorithm, "speculative_draft_model_path": str(folder / name), **always}


@pytest.fixture(scope="module")
def plain(folder: Path) -> Iterator[phloem.Engine]:
    with phloem.Engine(model_path=str(folder / "target"), speculative_algorithm="none", **TIGHT) as engine:
        yield engine


@pytest.fixture(scope="module", params=KINDS)
def drafting(folder: Path, request: pytest.FixtureRequest) -> Iterator[phloem.Engine]:
    with phloem.Engine(model_path=str(folder / "target"), **TIGHT, **asked(folder, request.param)) as engine:
        yield engine


PARAMS = st.fixed_dictionaries(
    {
        "max_new_tokens": st.integers(8, 40),
        "temperature": st.sampled_from([0.0, 0.8]),
        "sampling_seed": st.integers(0, 3),
        "ignore_eos": st.booleans(),
    },
    optional={
        "top_p": st.just(0.9),
        "frequency_penalty": st.just(1.5),
        "repetition_penalty": st.just(1.2),
        "json_schema": st.just(SCHEMA),
    },
)
WORDS = ("the dog ", "a page table ", "Paris is ", "x y z ", "sugar, ", "1 2 3 4 5 6 7 8 9 ")
PROMPT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=12).map("".join)


@pytest.mark.some(2)
@pytest.mark.slow
@settings(max_examples=4, deadline=None, suppress_health_check=list(HealthCheck))
@given(requests=st.lists(st.tuples(PROMPT, PARAMS), min_size=1, max_size=7))
def test_answers_are_those_of_plain_decoding(
    plain: phloem.Engine, drafting: phloem.Engine, requests: list[tuple[str, dict[str, Any]]]
) -> None:
    """Seven requests of long texts do not fit: some are preempted; their prompts share beginnings."""
    prompts, params = [prompt for prompt, _ in requests], [dict(params) for _, params in requests]
    want: Any = plain.generate(prompts, params, return_logprob=True)
    got: Any = drafting.generate(prompts, params, return_logprob=True)
    for a, b in zip(got, want, strict=True):
        assert a["output_ids"] == b["output_ids"] and a["text"] == b["text"]
        ours, theirs = (one["meta_info"]["output_token_logprobs"] for one in (a, b))
        assert [one[0] for one in ours] == pytest.approx([one[0] for one in theirs], abs=1e-5)


def histogram(engine: phloem.Engine, prompt: str, **params: Any) -> list[int]:
    settings = {"max_new_tokens": 31, "sampling_seed": 4, "ignore_eos": True, **params}
    answer: Any = engine.generate(prompt, settings)
    return answer["meta_info"]["spec_correct_drafts_histogram"]


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_that_drafts_for_itself_is_always_right(folder: Path, temperature: float) -> None:
    """One token of the prompt's step, then five of each of six steps; also behind a prefix that is in the cache, and
    where short steps have cut the prompt."""
    with phloem.Engine(model_path=str(folder / "target"), **TIGHT, **asked(folder, "itself")) as engine:
        for prompt in ("Paris is sugar, ", "the dog a page table " * 6, "the dog a page table " * 6):
            assert histogram(engine, prompt, temperature=temperature) == [0, 0, 0, 0, 6]
        both = ["x y z ", "1 2 3 4"]
        params = {"max_new_tokens": 31, "temperature": temperature, "ignore_eos": True}
        answers: Any = engine.generate(both, params)
        assert all(one["meta_info"]["spec_accept_length"] > 4 for one in answers)
        told = engine.get_server_info()["internal_states"][0]["prepared"]["speculation"]
        assert told["accept_length"] == 5.0 and told["pass_ms"] > 0


@pytest.mark.slow
def test_a_model_drafts_by_measured_times_and_stops_where_it_does_not_pay(folder: Path) -> None:
    """The target as its own draft: each pass takes a plain step's time, so nothing is gained by it."""
    with phloem.Engine(model_path=str(folder / "target"), **TIGHT, **asked(folder, "by measured times")) as engine:
        params = {"max_new_tokens": 200, "temperature": 0.0, "ignore_eos": True}
        engine.generate("the dog", params)
        told = engine.get_server_info()["internal_states"][0]["prepared"]["speculation"]
    assert "greedy plain" in told["step_ms"] and told["on"] in (True, False)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["itself", "eagle3"])
def test_a_long_text_is_read_in_parts_before_anything_is_drafted(
    folder: Path, plain: phloem.Engine, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(modelled, "CATCH_UP", 12)
    params = {"max_new_tokens": 40, "temperature": 0.8, "sampling_seed": 4, "ignore_eos": True}
    prompts = ["the dog a page table " * 7, "Paris is sugar, " * 5]
    with phloem.Engine(model_path=str(folder / "target"), **TIGHT, **asked(folder, kind)) as engine:
        got: Any = engine.generate(prompts, params)
    want: Any = plain.generate(prompts, params)
    assert [one["output_ids"] for one in got] == [one["output_ids"] for one in want]
    if kind == "itself":  # once it has caught up it is right again
        assert all(one["meta_info"]["spec_correct_drafts_histogram"][-1] >= 4 for one in got)


@pytest.mark.slow
def test_a_head_beside_quantised_weights_is_kept_in_eight_bits(folder: Path, tmp_path: Path) -> None:
    gguf = str(tiny_gguf(folder / "target", tmp_path / "target.gguf", "Q8_0"))
    prompts = ["the dog a page table ", "Paris is "]
    params = {"max_new_tokens": 20, "temperature": 0.8, "sampling_seed": 2, "ignore_eos": True}
    with phloem.Engine(model_path=gguf, speculative_algorithm="none", **TIGHT) as engine:
        want: Any = engine.generate(prompts, params)
        before = engine.ready["weight_bytes"]
    with phloem.Engine(model_path=gguf, **TIGHT, **asked(folder, "eagle3")) as engine:
        got: Any = engine.generate(prompts, params)
        assert engine.ready["weight_bytes"] == before
    assert [one["output_ids"] for one in got] == [one["output_ids"] for one in want]
    assert all(one["meta_info"]["spec_num_proposed_drafts"] > 40 for one in got)


@pytest.mark.slow
def test_a_head_that_is_never_right_is_told_of_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[str]()
    monkeypatch.setattr(modelled._log, "warning", lambda text, *values: told.append(text % values))
    with phloem.Engine(model_path=str(folder / "target"), **TIGHT, **asked(folder, "eagle3")) as engine:
        params = {"max_new_tokens": 230, "temperature": 1.0, "sampling_seed": 1, "ignore_eos": True}
        engine.generate("Paris is sugar, ", params)
    assert len(told) == 1 and told[0].startswith("eagle3: 1.0")
    assert "200 steps" in told[0] and "speculative_draft" in told[0]


@pytest.mark.slow
def test_the_choice_and_what_drafts_are_printed(drafting: phloem.Engine) -> None:
    found = {name: (value, reason) for name, value, reason in drafting.ready["decisions"]}
    value, reason = found["speculative_algorithm"]
    assert value in ("draft_model", "eagle", "eagle3") and "up to" in reason
    value, reason = found["speculative_draft"]
    expected = {"draft_model": "token by token", "eagle": "reads what the model's head reads", "eagle3": "2, 3, 3"}
    assert expected[value] in reason


@pytest.mark.slow
def test_other_vocabularies_are_refused_with_the_first_difference(folder: Path, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        values = {"speculative_algorithm": "draft_model", "speculative_draft_model_path": str(path)}
        with pytest.raises(ConfigError) as caught:
            phloem.Engine(model_path=str(folder / "target"), **values, **TIGHT)
        return caught.value.message

    small = tiny_checkpoint("llama", tmp_path / "fewer", vocab_size=360)
    assert "a vocabulary of 360 tokens, and the model's has 384" in refusal(small)
    other = tiny_checkpoint("llama", tmp_path / "other")
    text = (other / "tokenizer.json").read_text("utf-8")
    (other / "tokenizer.json").write_text(text.replace("<|im_start|>", "<|im_begin|>"), "utf-8")
    assert "token 2 is '<|im_begin|>', and '<|im_start|>' in the model's" in refusal(other)
    window = tiny_checkpoint("gemma3_text", tmp_path / "window")
    assert "no windows" in refusal(window)


def test_marks_tell_how_much_of_each_page_is_there() -> None:
    marks, row = Marks(9, 4), np.array([3, 5, 7, 0], np.int32)

    def wrote(start: int, count: int, table: Any = row) -> None:
        marks.written(table[None], np.array([start], np.int32), np.array([count], np.int32))

    assert marks.known(row, 10) == 0
    marks.computed(row, 0, 10)
    assert marks.known(row, 10) == 10 and marks.known(row, 6) == 6 and marks.known(row, 12) == 10
    wrote(9, 3)
    assert marks.known(row, 12) == 9
    marks.computed(row, 9, 11)
    assert marks.known(row, 12) == 11
    # Another text writes into a page that it was given: it is old from there on.
    wrote(2, 1, np.array([5, 1, 1, 1], np.int32))
    assert marks.known(row, 12) == 6
    other = np.array([3, 8, 0, 0], np.int32)
    assert marks.known(other, 8) == 4  # a page that two texts share counts for both
    wrote(4, 8, np.array([3, 8, 7, 0], np.int32))
    assert marks.known(np.array([3, 5, 7, 0], np.int32), 12) == 6
    marks.computed(row, 6, 12)
    assert marks.known(row, 12) == 12
    marks.forget()
    assert marks.known(row, 12) == 0
