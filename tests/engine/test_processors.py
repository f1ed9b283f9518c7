"""Custom logit processors: each alone, and through a real engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phloem.core.errors import BadRequest
from phloem.engine.processors import PROCESSORS, make
from phloem.llm import Engine
from phloem.testing.checkpoints import tiny_checkpoint

VOCAB = 12
PARAMS: dict[str, dict[str, Any]] = {
    "allowed_tokens": {"token_ids": [1, 5]},
    "disallowed_tokens": {"token_ids": [1, 5]},
    "no_repeat_ngram": {"ngram_size": 2},
    "speech": {"end": 5, "first_timestamp": 8},
    "thinking_budget": {"thinking_budget": 2, "start_ids": [3], "end_ids": [7, 8]},
}


def left(name: str, params: dict[str, Any], output: list[int]) -> list[int]:
    """The tokens that may still come."""
    logits = torch.zeros(VOCAB)
    make({name: params}, VOCAB)[0].apply_(output, logits)
    return torch.isfinite(logits).nonzero().flatten().tolist()


def test_every_file_is_tried_here() -> None:
    assert set(PARAMS) == set(PROCESSORS.names())


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_checked(name: str) -> None:
    for wrong in ({}, {"what": 1}, {**PARAMS[name], "more": 1}):
        with pytest.raises(BadRequest, match="custom_params"):
            make({name: wrong}, VOCAB)
    for key in PARAMS[name]:
        for value in (None, "1", [VOCAB], [-1], [True], -1, {}):
            with pytest.raises(BadRequest, match=f"custom_params.{key}"):
                make({name: {**PARAMS[name], key: value}}, VOCAB)


def test_an_unknown_name_lists_the_right_ones() -> None:
    with pytest.raises(BadRequest, match=r"did you mean 'allowed_tokens'.*no_repeat_ngram"):
        make({"alowed_tokens": {}}, VOCAB)
    with pytest.raises(BadRequest, match="unknown logit processor '_base'"):
        make({"_base": {}}, VOCAB)


def test_allowed_and_disallowed_tokens() -> None:
    assert left("allowed_tokens", {"token_ids": [5, 1, 5]}, []) == [1, 5]
    assert left("disallowed_tokens", {"token_ids": [1, 5]}, [1]) == [0, 2, 3, 4, 6, 7, 8, 9, 10, 11]


@pytest.mark.parametrize(
    ("params", "output", "banned"),
    [
        ({"ngram_size": 2}, [1, 2, 1], {2}),
        ({"ngram_size": 2}, [1, 2, 3], set[int]()),
        ({"ngram_size": 1}, [1, 2], {1, 2}),
        ({"ngram_size": 3}, [1, 2, 4, 1, 2], {4}),
        ({"ngram_size": 2, "window_size": 3}, [1, 2, 5, 6, 1], set[int]()),
        ({"ngram_size": 4}, [1], set[int]()),
    ],
)
def test_no_sequence_comes_twice(params: dict[str, Any], output: list[int], banned: set[int]) -> None:
    assert set(range(VOCAB)) - set(left("no_repeat_ngram", params, output)) == banned


@pytest.mark.parametrize(
    ("output", "forced"),
    [
        ([], None),
        ([4, 4, 4, 4], None),  # no block was opened
        ([3, 4], None),
        ([3, 4, 4], 7),
        ([3, 4, 4, 7], 8),
        ([3, 4, 7], 8),  # an end that began by itself is completed
        ([3, 4, 4, 7, 8], None),
        ([3, 4, 4, 7, 8, 4, 4, 4], None),
        ([3, 7, 8, 4], None),
    ],
)
def test_a_block_is_closed_when_its_budget_is_spent(output: list[int], forced: int | None) -> None:
    found = left("thinking_budget", PARAMS["thinking_budget"], output)
    assert found == (list(range(VOCAB)) if forced is None else [forced])


def test_a_block_that_the_prompt_opened() -> None:
    params = {"thinking_budget": 1, "end_ids": [7], "inside": True}
    assert left("thinking_budget", params, []) == list(range(VOCAB))
    assert left("thinking_budget", params, [4]) == [7]
    assert left("thinking_budget", {**params, "thinking_budget": 0}, []) == [7]


# --- through the engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    path: Path = tiny_checkpoint("llama", tmp_path_factory.mktemp("model"))
    with Engine(model_path=str(path), max_total_tokens=512, dtype="float32", skip_tokenizer_init=True) as made:
        yield made


def ids_of(engine: Engine, processor: str | None, custom: dict[str, Any], **params: Any) -> list[int]:
    answer: Any = engine.generate(
        input_ids=[1, 2, 3],
        sampling_params={"max_new_tokens": 12, "ignore_eos": True, "custom_params": custom, **params},
        custom_logit_processor=processor,
    )
    return answer["output_ids"]


def test_the_engine_applies_them(engine: Engine) -> None:
    assert set(ids_of(engine, "allowed_tokens", {"token_ids": [4, 9]}, temperature=2.0)) <= {4, 9}
    greedy = ids_of(engine, None, {}, temperature=0)
    banned = {"token_ids": sorted(set(greedy))}
    assert not set(greedy) & set(ids_of(engine, "disallowed_tokens", banned, temperature=0))
    once = ids_of(engine, "no_repeat_ngram", {"ngram_size": 1}, temperature=0)
    assert len(set(once)) == len(once) == 12


def test_a_budget_closes_the_block_in_the_engine(engine: Engine) -> None:
    custom = {"thinking_budget": 3, "end_ids": [7, 8], "inside": True}
    found = ids_of(engine, "thinking_budget", custom, logit_bias={"7": -100, "8": -100})
    assert found[3:5] == [7, 8]


def test_contradictions_fail_alone(engine: Engine) -> None:
    with pytest.raises(Exception, match="leave no token"):
        ids_of(engine, "disallowed_tokens", {"token_ids": list(range(engine.info.vocab_size))})
    assert len(ids_of(engine, None, {}, temperature=0)) == 12


@pytest.mark.parametrize(
    ("processor", "custom", "param"),
    [
        ("nonsense", {}, "custom_logit_processor"),
        ('{"callable": "80049512"}', {}, "custom_logit_processor"),
        ("allowed_tokens", {"token_ids": [10**9]}, "custom_params"),
        (None, {"token_ids": [1]}, "custom_params"),
    ],
)
def test_wrong_names_and_parameters_are_refused_at_the_door(
    engine: Engine, processor: str | None, custom: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as found:
        ids_of(engine, processor, custom)
    assert found.value.param == param


def test_sessions_and_scores_in_process(engine: Engine) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_new_tokens": 3, "ignore_eos": True}
    key = engine.open_session(1000)
    first: Any = engine.generate(input_ids=[1, 2, 3], sampling_params=greedy, session_params={"id": key})
    step = {"id": key, "rid": first["meta_info"]["id"]}
    second: Any = engine.generate(input_ids=[4], sampling_params=greedy, session_params=step)
    whole: Any = engine.generate(input_ids=[1, 2, 3, *first["output_ids"], 4], sampling_params=greedy)
    assert second["output_ids"] == whole["output_ids"] and second["meta_info"]["prompt_tokens"] == 7
    engine.close_session(key)
    with pytest.raises(BadRequest, match="no session"):
        engine.generate(input_ids=[4], sampling_params=greedy, session_params=step)
    plain = engine.score([1, 2], [[3], [4, 5]], [7, 8])
    among = engine.score([1, 2], [[3], [4, 5]], [7, 8], apply_softmax=True)
    for some, all_ in zip(plain, among, strict=True):
        assert all(0 < value < 1 for value in some)
        assert all_ == pytest.approx([value / sum(some) for value in some])
    turned = engine.score([3], [[1, 2]], [7, 8], item_first=True)
    assert turned[0] == pytest.approx(plain[0], rel=1e-4)
